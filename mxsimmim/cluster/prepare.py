"""The beginning of a job: agents on all hosts, a look at each, and only then the processes."""
import asyncio
import contextlib
import os
import re
import secrets
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple

from mxsimmim.cluster import job as plan, mpi, options as command_line, inspection, preflight, seats, ssh
from mxsimmim.cluster.job import Host, Site
from mxsimmim.cluster.seats import Lost, Seat

if TYPE_CHECKING:
    from mxsimmim.cluster.supervise import Job

CONNECT, PROBE, START = 30.0, 30.0, 15.0  # seconds for each step
LOGS = 'logs'


class Refused(ValueError):
    """What the command said against its own configuration, in its words."""


async def prepare(job: 'Job') -> None:
    """Connects, looks at all hosts, and starts the processes.

    Raises:
        ValueError: something is wrong with the hosts; a line for each problem of each.
    """
    options = job.options
    if options.sync_dst_dir:
        refuse(await each(job, job.hosts, lambda host: sync(job, host)))
    if options.launcher == 'mpi':
        call_for_agents(job)
    else:
        open_seats(job)
    problems = await each(job, job.seats, lambda seat: look(job, seat))
    if job.seats[0].facts.get('refusal'):
        raise Refused('\n'.join(job.seats[0].facts['refusal'] + [f'launch: error: {line}' for line in problems]))
    if options.launcher == 'mpi':
        if job.seats[0].silent.done():  # mpirun failed
            problems = [f'mpirun: {line}' for line in job.seats[0].said if line.strip(' -')]
        refuse(problems)
        sit_down(job)
    firsts = [next(seat for seat in job.seats if seat.host == place) for place in range(len(job.hosts))]
    facts = [seat.facts for seat in firsts if seat.facts]
    sites = [Site(job.name(seat), seat.facts['address'], seat.facts['interface'], seat.facts['cores'],
                  seat.facts['gpus']) for seat in firsts if seat.facts]
    refuse(problems + preflight.problems(sites, facts, options))
    port, control = await meet(job, sites)
    speaks = 'mpi' if options.launcher == 'mpi' and all(fact['mpi'] for fact in facts) else 'gloo'
    environs = plan.environments(job.processes, sites, port, options.given, options.p3, options.devices == 'gpu',
                                 speaks if options.horovod else '', control)
    introduce(job, sites)
    remove_logs(job)
    key = secrets.token_hex(32)
    start = {seat: [dict(role=p.role, index=p.index, argv=options.command, environ=environ, live=p[:2] == ('worker', 0),
                         part=plan.part(p, job.processes))
                    for p, environ in zip(job.processes, environs) if job.seat(p) is seat] for seat in job.seats}
    refuse(await each(job, job.seats, lambda seat: seat.ask('started', START, do='start', logs=LOGS, key=key,
                                                            processes=start[seat])))


def refuse(problems: Sequence[str]) -> None:
    """Raises ValueError with all problems, one a line, if there are any."""
    if problems:
        raise ValueError('\n'.join(problems))


async def each(job: 'Job', hosts: Sequence[Any], step: Callable[[Any], Any]) -> List[str]:
    """Does one step for all hosts at once; returns what went wrong, host by host."""
    results = await asyncio.gather(*map(step, hosts), return_exceptions=True)
    problems = []
    for host, result in zip(hosts, results):
        if isinstance(result, (Lost, ValueError)):
            problems.append(f'host {job.name(host)}: {result}')
        elif isinstance(result, BaseException):
            raise result
    return list(dict.fromkeys(problems))


async def sync(job: 'Job', host: Host) -> None:
    """Copies the working directory to a host."""
    rsync = Seat(job.loop, host.name, 0, job.notice)
    rsync.start(ssh.sync(host, job.options.sync_dst_dir))
    try:
        while rsync.process.poll() is None:
            await asyncio.sleep(0.05)
    finally:
        await rsync.end(0)
    if rsync.process.returncode:
        await asyncio.wait([rsync.silent], timeout=1)
        raise ValueError(f'--sync-dst-dir: {ssh.remedy(host, rsync.first())}')


def open_seats(job: 'Job') -> None:
    """Starts an agent on each host."""
    for place, host in enumerate(job.hosts):
        seat = Seat(job.loop, host.name, place, job.notice)
        job.seats.append(seat)
        if job.options.launcher == 'local':
            seat.open([sys.executable, '-X', 'utf8', '-c', seats.BOOTSTRAP])
        else:
            seat.open(ssh.agent(host, sys.executable, seats.BOOTSTRAP, job.options.given['worker'].get('PATH')))


def call_for_agents(job: 'Job') -> None:
    """Has mpirun start an agent for each process."""
    known = inspection.interfaces()
    if job.options.interface in known:
        addresses = [known[job.options.interface]]
    elif job.options.hostfile or any(os.environ.get(name) for name in mpi.ALLOCATIONS):
        addresses = sorted(known.values(), key=lambda address: address.startswith('127.'))
    else:
        addresses = ['127.0.0.1']
    listener = socket.socket()
    listener.bind((addresses[0] if len(addresses) == 1 else '', 0))
    listener.listen(len(job.processes))
    key = secrets.token_bytes(32)
    hosts = job.hosts if job.options.hostfile else []
    job.seats = [Seat(job.loop, hosts[p.host].name if hosts else '', p.host, job.notice) for p in job.processes]
    seats.answer_calls(job.loop, listener, key, job.seats)
    value = f"{','.join(addresses)} {listener.getsockname()[1]} {key.hex()}"
    starter = job.seats[0]
    command = mpi.command(job.processes, hosts, sys.executable, job.options.interface)
    starter.start(command, {**os.environ, mpi.VARIABLE: value})
    starter.silent.add_done_callback(lambda _: [seat.close() for seat in job.seats if not seat.channel])


def sit_down(job: 'Job') -> None:
    """Takes note of where mpirun has put each process."""
    names = [seat.facts['host'] for seat in job.seats]
    found = sorted(set(names), key=names.index)
    job.hosts = [Host(name) for name in found]
    job.processes = [p._replace(host=found.index(name)) for p, name in zip(job.processes, names)]
    for seat, process in zip(job.seats, job.processes):
        seat.host = process.host


async def look(job: 'Job', seat: Seat) -> None:
    """Learns what a host is like."""
    options = job.options
    try:
        await seat.ask('hello', CONNECT)
    except Lost as error:
        raise Lost(ssh.remedy(job.hosts[seat.host], str(error))) from None
    needs = dict(command=options.command[0], paths=command_line.data_paths(options.command),
                 interface=options.interface, near='127.0.0.1' if options.launcher == 'local' else '',
                 gpus=options.devices == 'gpu', horovod=options.horovod, trial=trial(job, seat))
    folder = ssh.directory(options.sync_dst_dir) if options.sync_dst_dir else os.getcwd()
    environ = {name: value for name, value in options.given['worker'].items() if name == 'PATH'}
    answer = await seat.ask('facts', PROBE, do='inspect', directory=folder, environ=environ, needs=needs)
    seat.facts = answer['facts']
    asked = time.time()
    answer = await seat.ask('pong', PROBE, do='ping')
    seat.offset = seat.facts['offset'] = answer['time'] - (asked + time.time()) / 2


def trial(job: 'Job', seat: Seat) -> Tuple[List[str], Dict[str, Optional[str]]]:
    """What the host of worker 0, where the job's files are, runs once to check the configuration: words, variables."""
    options = job.options
    words = command_line.trial(options.command) if seat is job.seats[0] else []
    return words, plan.trial_environment(job.processes, options.given, options.p3, options.horovod)


def remove_logs(job: 'Job') -> None:
    """Removes logs of an earlier job with more processes, which would look like this one's."""
    mine = {f'{process.role}-{process.index}.log' for process in job.processes}
    for name in os.listdir(LOGS) if os.path.isdir(LOGS) else ():
        if re.fullmatch(r'(worker|server|scheduler)-\d+\.log', name) and name not in mine:
            with contextlib.suppress(OSError):  # of somebody else
                os.remove(os.path.join(LOGS, name))


async def meet(job: 'Job', sites: Sequence[Site]) -> Tuple[int, str]:
    """Settles where the job meets, so that every host gets there: the port of the scheduler or of Horovod's rendezvous,
    and address:port of the control plane."""
    async def reserve(process: plan.Process, how: str) -> Tuple[str, int]:
        address, answers = sites[process.host].address, []

        async def ask(seat: Seat) -> None:
            answers.append(await seat.ask('reserved', START, do=how, address=address))
        refuse(await each(job, [job.seat(process)], ask))
        port = answers[0]['port']
        refuse(await each(job, job.seats,
                          lambda seat: seat.ask('reached', START, do='reach', address=address, port=port)))
        return address, port
    root = next((p for p in job.processes if p.role == 'scheduler'), job.processes[0])
    _, port = await reserve(root, 'rendezvous' if job.options.horovod else 'reserve')
    return port, '%s:%d' % await reserve(job.processes[0], 'reserve')


def introduce(job: 'Job', sites: Sequence[Site]) -> None:
    """Says what runs where, and over which network."""
    networks: Dict[str, List[str]] = {}
    for site in sites:
        networks.setdefault(site.interface, []).append(site.address)
    job.terminal.say('network: ' + '; '.join(f'{name}, {" ".join(found)}' for name, found in networks.items()))
    for place, site in enumerate(sites):
        here = [process for process in job.processes if process.host == place]
        roles = {process.role: [str(other.index) for other in here if other.role == process.role] for process in here}
        job.terminal.say(f'{site.name}: ' + ', '.join(
            role if role == 'scheduler' else ' '.join([role + 's' * (len(indices) > 1)] + indices)
            for role, indices in roles.items()))
