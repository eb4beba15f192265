"""What to start where: pure functions from options and hosts to processes and their environments."""
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..runtime.process import CONTROL, FIRSTS

# What a process must not inherit from a shell that itself ran inside another job.
OTHER_WORLDS = {'ps': ('HOROVOD_RANK', 'HOROVOD_SIZE', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'),
                'horovod': ('DMLC_ROLE',)}


class Host(NamedTuple):
    """A line of the hostfile; `port` None leaves it to ssh, `most` 0 is as many workers as asked for."""
    name: str
    port: Optional[int] = None
    slots: int = 1
    most: int = 0


class Process(NamedTuple):
    """One process of the job; `host` counts in the list of hosts."""
    role: str
    index: int
    host: int

    def __str__(self) -> str:
        return 'scheduler' if self.role == 'scheduler' else f'{self.role} {self.index}'


class Site(NamedTuple):
    """What the launcher learnt about a host: its address and interface in the job's network, its cores and GPUs."""
    name: str
    address: str
    interface: str
    cores: int
    gpus: Sequence[str] = ()


def read_hostfile(text: str, name: str) -> List[Host]:
    """Hosts of a hostfile, one a line: ``host[:port] [slots=N] [max_slots=N]``, IPv6 as ``::1`` or ``[::1]:22``.

    What follows ``#`` is a comment.

    Raises:
        ValueError: a line that is not of this form, or no host at all; the text names file and line.
    """
    hosts: List[Host] = []
    lines: Dict[Any, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r'\s*=\s*', '=', line.partition('#')[0]).split()
        if not words:
            continue
        try:
            host = read_host(words)
            if host[:2] in lines:
                raise ValueError(f"'{words[0]}' stands in line {lines[host[:2]]} already: write it once, with slots=N")
        except ValueError as error:
            raise ValueError(f'{name}:{number}: {error}') from None
        lines[host[:2]] = number
        hosts.append(host)
    if not hosts:
        raise ValueError(f'{name}: no host in it: write one a line, as host[:port] [slots=N]')
    return hosts


def read_host(words: Sequence[str]) -> Host:
    """A host from the words of its line.

    Raises:
        ValueError: they do not make one.
    """
    found = re.fullmatch(r'((?:[\w.+-]+@)?)(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\](?::(\d+))?|([\w.-]+)(?::(\d+))?)', words[0])
    if found:
        user, inet6, port6, name, port = found.groups()
    elif words[0].count(':') > 1 and re.fullmatch(r'[0-9A-Fa-f:.]+(%\w+)?', words[0]):
        user, inet6, port6, name, port = '', words[0], None, None, None
    else:
        raise ValueError(f"'{words[0]}' is not a host: write host, host:port, an IPv6 address, or [IPv6]:port")
    if words[0].startswith('-'):
        raise ValueError(f"'{words[0]}' is not a host: a name does not begin with -")
    port = port or port6
    if port and not 1 <= int(port) <= 65535:
        raise ValueError(f'port {port} is not between 1 and 65535')
    given: Dict[str, int] = {}
    for word in words[1:]:
        found = re.fullmatch(r'(slots|max[_-]slots)=0*([1-9]\d{0,4})', word)
        if not found:
            raise ValueError(f"'{word}' after the host: only slots=N can stand there, N at least 1, and max_slots=N"
                             + (f': write slots={word}' if re.fullmatch(r'[1-9]\d*', word) else ''))
        given[found[1].replace('-', '_')] = int(found[2])
    slots, most = given.get('slots', 1), given.get('max_slots', 0)
    if 0 < most < slots:
        raise ValueError(f'slots={slots} is more than max_slots={most}')
    return Host(user + (name or inet6), int(port) if port else None, slots, most)


def place(workers: int, servers: int, hosts: Sequence[Host], horovod: bool = False) -> List[Process]:
    """Which process goes where.

    Workers go round the hosts, each host taking part in as many rounds as it has slots; when all slots are taken, it
    begins again. Servers go round the hosts whatever their slots, the scheduler to the first. Horovod's ranks are
    spread likewise, and then numbered host by host.

    Raises:
        ValueError: a host would get more workers than it takes.
    """
    rounds = [place for turn in range(max(host.slots for host in hosts))
              for place, host in enumerate(hosts) if host.slots > turn]
    seats = [rounds[index % len(rounds)] for index in range(workers)]
    for number, host in enumerate(hosts):
        if 0 < host.most < seats.count(number):
            raise ValueError(f'{workers} workers are {seats.count(number)} for host {host.name}, which takes '
                             f'max_slots={host.most}: start fewer, add hosts, or raise it')
    processes = [Process('worker', index, host) for index, host in enumerate(sorted(seats) if horovod else seats)]
    if not horovod:
        processes += [Process('server', index, index % len(hosts)) for index in range(servers)]
        processes.append(Process('scheduler', 0, 0))
    return processes


# ps-lite takes a new buffer for each message, and glibc gives large ones back to the kernel at once: page faults were a
# seventh of what an exchange costs the CPU.
KEPT = {'MALLOC_MMAP_THRESHOLD_': str(1 << 30), 'MALLOC_TRIM_THRESHOLD_': str(1 << 32)}


def environments(processes: Sequence[Process], sites: Sequence[Site], port: int, given: Dict[str, Dict[str, str]],
                 p3: bool = False, gpus: bool = False, horovod: str = '',
                 control: str = '') -> List[Dict[str, Optional[str]]]:
    """What each process finds in its environment beside what its host gives it; None removes a variable.

    Args:
        port: of the scheduler, or of Horovod's rendezvous, on the host of the scheduler or of rank 0.
        given: the user's variables by role ('worker', 'server'; a scheduler gets the servers').
        horovod: '' for parameter servers, else what Horovod's ranks speak: 'gloo' or 'mpi'.
        control: address:port of the control plane, on the host of worker 0.

    Raises:
        ValueError: a host has fewer GPUs than workers.
    """
    workers = [process for process in processes if process.role == 'worker']
    local = {process: [other for other in workers if other.host == process.host] for process in processes}
    root = next((process for process in processes if process.role == 'scheduler'), workers[0])
    result = []
    for process in processes:
        site, mates = sites[process.host], local[process]
        environ: Dict[str, Optional[str]] = dict.fromkeys(OTHER_WORLDS['horovod' if horovod else 'ps'])
        environ[CONTROL] = control if process.role == 'worker' and control else None
        environ['PYTHONUNBUFFERED'] = '1'  # or rank 0's lines would arrive in blocks
        environ['PYTHONFAULTHANDLER'] = '1'  # any Python then names the line of a crash in native code
        environ['OMP_NUM_THREADS'] = str(max(1, site.cores // max(1, len(mates))))
        if gpus:
            environ['CUDA_VISIBLE_DEVICES'] = ','.join(share(process, mates, site))
        if horovod:
            environ.update(rank(process, workers, sites))
            # For workers that compute on CPUs: they add up in memory what their host's have.
            environ[FIRSTS] = None if gpus else ','.join(str(worker.index) for worker in workers
                                                         if local[worker][0] == worker)
            if site.interface != 'lo':
                environ['NCCL_SOCKET_IFNAME'] = site.interface
            if horovod == 'gloo':
                environ.update(HOROVOD_CONTROLLER='gloo', HOROVOD_CPU_OPERATIONS='gloo',
                               HOROVOD_GLOO_IFACE=site.interface, HOROVOD_GLOO_RENDEZVOUS_PORT=str(port),
                               HOROVOD_GLOO_RENDEZVOUS_ADDR=sites[root.host].address)
        else:
            counts = {role: sum(other.role == role for other in processes) for role in ('worker', 'server')}
            environ.update(DMLC_ROLE=process.role, DMLC_PS_ROOT_URI=sites[root.host].address,
                           DMLC_PS_ROOT_PORT=str(port), DMLC_NUM_WORKER=str(counts['worker']),
                           DMLC_NUM_SERVER=str(counts['server']), DMLC_NODE_HOST=site.address)
            if process.role != 'scheduler':
                environ[f'DMLC_{process.role.upper()}_ID'] = str(process.index)
            if p3:
                environ['DMLC_PS_VAN_TYPE'] = 'p3'
            environ.update(KEPT)
        environ.update(given['worker' if process.role == 'worker' else 'server'])
        result.append(environ)
    return result


def trial_environment(processes: Sequence[Process], given: Dict[str, Dict[str, str]], p3: bool, horovod: bool
                      ) -> Dict[str, Optional[str]]:
    """What worker 0 will find in its environment, as far as a check of its configuration depends on it."""
    counts = {role: str(sum(process.role == role for process in processes)) for role in ('worker', 'server')}
    environ: Dict[str, Optional[str]] = dict.fromkeys(OTHER_WORLDS['horovod' if horovod else 'ps'])
    if horovod:
        environ.update(HOROVOD_RANK='0', HOROVOD_SIZE=counts['worker'], HOROVOD_LOCAL_RANK='0', HOROVOD_LOCAL_SIZE='1')
    else:
        environ.update(DMLC_ROLE='worker', DMLC_WORKER_ID='0', DMLC_NUM_WORKER=counts['worker'],
                       DMLC_NUM_SERVER=counts['server'], DMLC_PS_VAN_TYPE='p3' if p3 else None)
    return {**environ, **given['worker']}


def part(process: Process, processes: Sequence[Process]) -> Tuple[int, int]:
    """(place, parts) of a process's cores: the workers of a host divide it, all others may go where there is time.

    Left to the kernel, what two workers' exchanges cost often falls on the core of one, and the other waits for it.
    """
    mates = [other for other in processes if (other.role, other.host) == ('worker', process.host)]
    return (mates.index(process), len(mates)) if process in mates else (0, 1)


def share(process: Process, mates: Sequence[Process], site: Site) -> Sequence[str]:
    """The GPUs of its host that belong to a process: for workers an equal part each, for others none."""
    if process.role != 'worker':
        return []
    if len(site.gpus) < len(mates):
        raise ValueError(f'host {site.name} has {len(site.gpus)} GPUs for {len(mates)} workers: start fewer workers, '
                         'or leave out --devices gpu')
    each, place = len(site.gpus) // len(mates), mates.index(process)
    return site.gpus[place * each:(place + 1) * each]


def rank(process: Process, workers: Sequence[Process], sites: Sequence[Site]) -> Dict[str, str]:
    """A Horovod rank's place in the world: among all, on its host, and among those of the same place on all hosts."""
    local = {worker: sum(other.host == worker.host for other in workers[:place])
             for place, worker in enumerate(workers)}
    across = [worker for worker in workers if local[worker] == local[process]]
    return {'HOROVOD_RANK': str(process.index), 'HOROVOD_SIZE': str(len(workers)),
            'HOROVOD_LOCAL_RANK': str(local[process]),
            'HOROVOD_LOCAL_SIZE': str(sum(other.host == process.host for other in workers)),
            'HOROVOD_CROSS_RANK': str(across.index(process)), 'HOROVOD_CROSS_SIZE': str(len(across)),
            'HOROVOD_HOSTNAME': sites[process.host].name}
