"""Say what a job is, and which process of it runs on which host. Pure functions of values that never change."""
from dataclasses import dataclass, field, replace
from typing import AbstractSet, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from mxsimmim.cluster.hostfile import Host


@dataclass(frozen=True)
class JobSpec:
    """Describe a job as the user asked for it. Every attempt at it reads this; nothing changes it."""
    command: Tuple[str, ...]  # of each process, word for word
    workers: int
    servers: int = 0
    hosts: Tuple[Host, ...] = ()  # of the hostfile; none: the backend knows them
    directory: str = '.'  # that the processes start in, on every host
    copy: bool = False  # whether the working directory is copied there first
    horovod: bool = False  # Horovod's ranks instead of parameter servers
    gpus: bool = False  # whether each host's GPUs are divided among its workers
    interface: str = ''  # network interface of every host; none: the one that it is reached by
    p3: bool = False  # parameter servers: send what is needed first, first
    max_restarts: int = 0  # without progress, before the job is given up
    address: str = ''  # of the cluster, where its kind has one
    min_workers: int = 0  # with which it goes on while hosts are away; 0: no host may be away
    worker_variables: Mapping[str, str] = field(default_factory=dict)  # the user's
    server_variables: Mapping[str, str] = field(default_factory=dict)  # the scheduler's as well


class Process(NamedTuple):
    """Name a process of a job; `host` counts in the list of hosts."""
    role: str
    index: int  # type: ignore[assignment]  # tuple has a method of that name
    host: int

    def __str__(self) -> str:
        return 'scheduler' if self.role == 'scheduler' else f'{self.role} {self.index}'


class HostInfo(NamedTuple):
    """Describe a host as its agent found it: address and interface in the job's network, cores and GPUs."""
    name: str
    address: str
    interface: str
    cores: int
    gpus: Sequence[str] = ()


def place_processes(spec: JobSpec, hosts: Sequence[Host]) -> List[Process]:
    """Decide which process runs on which host.

    Workers go round the hosts, each host taking part in as many rounds as it has slots; when all slots are taken, the
    rounds begin again. Servers go round the hosts whatever their slots, the scheduler to the first. Horovod's ranks are
    spread likewise, and then numbered host by host.

    Returns:
        the workers by index, then the servers, then the scheduler.

    Raises:
        ValueError: a host would get more workers than it takes.
    """
    rounds = [number for turn in range(max(host.slots for host in hosts))
              for number, host in enumerate(hosts) if host.slots > turn]
    places = [rounds[index % len(rounds)] for index in range(spec.workers)]
    for number, host in enumerate(hosts):
        if 0 < host.most < places.count(number):
            raise ValueError(f'{spec.workers} workers are {places.count(number)} for host {host.name}, which takes '
                             f'max_slots={host.most}: start fewer, add hosts, or raise it')
    if spec.horovod:
        return [Process('worker', index, host) for index, host in enumerate(sorted(places))]
    return ([Process('worker', index, host) for index, host in enumerate(places)]
            + [Process('server', index, index % len(hosts)) for index in range(spec.servers)]
            + [Process('scheduler', 0, 0)])


def without(spec: JobSpec, away: AbstractSet[Host], refused: AbstractSet[int] = frozenset()) -> Optional[JobSpec]:
    """Describe what is left of a job while some of its hosts are away.

    Each other host keeps the workers that it has in the whole job, and takes more up to its slots: in all, never more
    than asked for, and no number of them that the command has `refused`. No host gets more servers than the whole job
    would give it.

    Returns:
        the job on the other hosts, in their order, with as many workers as there is place for; None if these are less
        than `min_workers`.
    """
    if not away or not spec.min_workers:
        return None if away else spec
    whole = [process.host for process in place_processes(spec, spec.hosts) if process.role == 'worker']
    left = [number for number, host in enumerate(spec.hosts) if host not in away]
    workers = min(spec.workers, sum(max(spec.hosts[number].slots, whole.count(number)) for number in left))
    servers = min(spec.servers, len(left) * -(-spec.servers // len(spec.hosts)))
    taken = set(range(spec.min_workers, workers + 1)) - refused
    if not taken:
        return None
    return replace(spec, hosts=tuple(spec.hosts[number] for number in left), workers=max(taken), servers=servers)


def regroup(processes: Sequence[Process], names: Sequence[str]) -> List[Process]:
    """Number the hosts anew where others have placed the processes: `names` has the host of each process."""
    found = list(dict.fromkeys(names))
    return [process._replace(host=found.index(name)) for process, name in zip(processes, names)]


def root(processes: Sequence[Process]) -> Process:
    """Find the process whose host the others meet at: the scheduler, or rank 0."""
    return next((process for process in processes if process.role == 'scheduler'), processes[0])


def workers_beside(process: Process, processes: Sequence[Process]) -> List[Process]:
    """List the workers on the host of a process, itself too if it is one."""
    return [other for other in processes if (other.role, other.host) == ('worker', process.host)]


def part_of_cores(process: Process, processes: Sequence[Process]) -> Tuple[int, int]:
    """Divide a host's cores among its workers; all other processes may go where there is time.

    Left to the kernel, what two workers' exchanges cost often falls on the core of one, and the other waits for it.

    Returns:
        (number of the part, number of parts).
    """
    mates = workers_beside(process, processes)
    return (mates.index(process), len(mates)) if process in mates else (0, 1)


def describe_placement(infos: Sequence[HostInfo], processes: Sequence[Process]) -> List[str]:
    """Say, in lines for the user, over which network the job goes and what runs on each host."""
    networks = {info.interface: [other.address for other in infos if other.interface == info.interface]
                for info in infos}
    lines = ['network: ' + '; '.join(f'{name}, {" ".join(addresses)}' for name, addresses in networks.items())]
    for number, info in enumerate(infos):
        here = [process for process in processes if process.host == number]
        roles = {process.role: [str(other.index) for other in here if other.role == process.role] for process in here}
        lines.append(f'{info.name}: ' + ', '.join(
            role if role == 'scheduler' else ' '.join([role + 's' * (len(indices) > 1)] + indices)
            for role, indices in roles.items()))
    return lines
