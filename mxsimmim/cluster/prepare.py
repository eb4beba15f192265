"""Begin an attempt: agents on all hosts, an inspection of each, and only then the processes."""
import asyncio
import json
import secrets
import time
from typing import Callable, List, Sequence, Tuple

from mxsimmim.cluster import preflight
from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.connections import AgentConnection, Command, Lost, Problem, for_each, raise_if_any
from mxsimmim.cluster.environment import environments
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.logs import FOLDER, remove_other_logs
from mxsimmim.cluster.spec import (
    HostInfo,
    JobSpec,
    Process,
    describe_placement,
    part_of_cores,
    place_processes,
    regroup,
    root,
)
from mxsimmim.runtime.process import RESTARTS, WRITTEN

INSPECT, START = 30.0, 15.0  # seconds for each step; agents take them, not the job's command


class ConfigurationError(ValueError):
    """Tell what the job's command said against its own configuration, in its words."""


def agents_of(spec: JobSpec, backend: Backend, on_event: Callable[[AgentConnection, dict], None]
              ) -> List[AgentConnection]:
    """Make the connections of an attempt, none of them open yet: one a host, or one a process.

    Raises:
        ValueError: a host would get more workers than it takes.
    """
    hosts = backend.hosts(spec)
    processes = place_processes(spec, hosts)
    if backend.agent_per_process:
        return [AgentConnection(hosts[process.host], [process], on_event) for process in processes]
    shares = [[process for process in processes if process.host == number] for number in range(len(hosts))]
    return [AgentConnection(host, share, on_event) for host, share in zip(hosts, shares) if share]


def processes_of(agents: Sequence[AgentConnection]) -> List[Process]:
    """List the processes of all agents: workers by index, then servers, then the scheduler."""
    order = ['worker', 'server', 'scheduler']
    return sorted((process for agent in agents for process in agent.processes),
                  key=lambda process: (order.index(process.role), process.index))


def agent_of(process: Process, agents: Sequence[AgentConnection]) -> AgentConnection:
    """Find the agent that starts a process."""
    return next(agent for agent in agents if process in agent.processes)


async def prepare(spec: JobSpec, backend: Backend, agents: Sequence[AgentConnection], say: Callable[..., None],
                  restarts: Sequence[Tuple[float, str]] = (), written: int = -1) -> None:
    """Start the agents, inspect all hosts, and have the agents start the processes.

    Args:
        say: shows lines to the user.
        restarts: when and why the job was started again; its processes go on with the logs of those before.
        written: step of the newest checkpoint that they told of.

    Raises:
        ConfigurationError: the command refuses its own configuration.
        HostError: something is wrong with the hosts; a line for each problem of each.
        ValueError: no agent can be started.
    """
    if spec.copy:
        targets = list(dict.fromkeys(agent.host for agent in agents))
        raise_if_any(await for_each(targets, lambda host: copy(host, backend, spec.directory)))
    backend.start_agents(spec, agents)
    found = await for_each(agents, lambda agent: inspect_host(agent, spec, backend, checks=agent is agents[0]))
    refusal = agents[0].facts.get('refusal')
    if refusal:
        raise ConfigurationError('\n'.join(refusal + [f'launch: error: {problem.line}' for problem in found]))
    why = backend.why_none_came(agents)
    if why:
        raise ValueError('\n'.join(why))
    if backend.agent_per_process:
        raise_if_any(found)
        take_places(agents)
    hosts = range(1 + max(agent.processes[0].host for agent in agents))
    firsts = [next(agent for agent in agents if agent.processes[0].host == number) for number in hosts]
    infos, wrong = compare(spec, backend, [agent for agent in firsts if agent.facts])
    raise_if_any(found + wrong)
    port, control = await reserve_ports(spec, agents, infos)
    processes = processes_of(agents)
    mpi = backend.speaks_mpi and all(agent.facts['mpi'] for agent in firsts)
    environs = dict(zip(processes, environments(spec, processes, infos, port, control, mpi)))
    say(*describe_placement(infos, processes))
    header = ''
    if restarts:
        header = f'launch: restart {len(restarts)}\n'
        for environ in environs.values():
            environ[RESTARTS] = json.dumps(restarts)
            if spec.min_workers:
                environ[WRITTEN] = str(written)
    else:
        remove_other_logs(processes)
    key = secrets.token_hex(32)

    async def start(agent: AgentConnection) -> None:
        starts = [dict(role=process.role, index=process.index, argv=spec.command, environ=environs[process],
                       part=part_of_cores(process, processes), live=process[:2] == ('worker', 0))
                  for process in agent.processes]
        await agent.request('started', START, do='start', logs=FOLDER, key=key, header=header,
                            processes=starts)
    raise_if_any(await for_each(agents, start))


async def copy(host: Host, backend: Backend, directory: str) -> None:
    """Copy the working directory to a host.

    Raises:
        ValueError: it cannot be copied.
    """
    argv = backend.copy_command(host, directory)
    if not argv:
        return
    command = Command(argv)
    try:
        while command.process.poll() is None:
            await asyncio.sleep(0.05)
        if command.process.returncode:
            await command.wait_for_last_words()
            raise ValueError(f'--sync-dst-dir: {backend.explain(host, command.first_line())}')
    finally:
        await command.end(0)
        command.close()


async def inspect_host(agent: AgentConnection, spec: JobSpec, backend: Backend, checks: bool) -> None:
    """Wait for an agent and have it find out what its host is like; `checks`: the job's configuration as well.

    Raises:
        Lost: there is no agent, or no answer.
        ValueError: the job cannot run there.
    """
    try:
        await agent.request('hello', backend.patience)
    except Lost as error:
        raise Lost(backend.explain(agent.host, str(error))) from None
    environ = {name: value for name, value in spec.worker_variables.items() if name == 'PATH'}
    answer = await agent.request('facts', INSPECT, do='inspect', directory=spec.directory, environ=environ,
                                 needs=preflight.needs(spec, backend.agent_address, checks))
    agent.facts = answer['facts']
    asked = time.time()
    answer = await agent.request('pong', INSPECT, do='ping')
    agent.offset = agent.facts['offset'] = answer['time'] - (asked + time.time()) / 2


def compare(spec: JobSpec, backend: Backend, agents: Sequence[AgentConnection]
            ) -> Tuple[List[HostInfo], List[Problem]]:
    """Describe the hosts of agents that have inspected them, an agent a host, and say what is wrong with them."""
    infos = [host_info(agent) for agent in agents]
    lines = preflight.problems(spec, infos, [agent.facts for agent in agents], backend.other_python)
    return infos, [Problem(agents[number].host, line) for number, line in lines]


async def probe(spec: JobSpec, backend: Backend, host: Host, beside: Sequence[AgentConnection]) -> None:
    """Find out whether a job could start on a host, as `prepare` would, and leave nothing there.

    Args:
        beside: the agents of other hosts, that have inspected them; the first is compared with.

    Raises:
        Lost: the host cannot be reached.
        ValueError: the job cannot run there.
    """
    agent = AgentConnection(host, [], lambda *_: None)
    try:
        if spec.copy:
            await copy(host, backend, spec.directory)
        backend.start_agents(spec, [agent])
        await inspect_host(agent, spec, backend, checks=False)
        _, wrong = compare(spec, backend, [*[other for other in beside if other.facts][:1], agent])
        raise_if_any([problem for problem in wrong if problem.host == host])
    finally:
        agent.send(do='finish', fetch=False)
        await agent.end(3 if agent.facts else 0.5)
        agent.release()


def take_places(agents: Sequence[AgentConnection]) -> None:
    """Note on which hosts the backend has put the processes, an agent each."""
    placed = regroup([agent.processes[0] for agent in agents], [agent.facts['host'] for agent in agents])
    for agent, process in zip(agents, placed):
        agent.processes = [process]


def host_info(agent: AgentConnection) -> HostInfo:
    """Describe the host of an agent that has inspected it."""
    facts = agent.facts
    return HostInfo(agent.name, facts['address'], facts['interface'], facts['cores'], facts['gpus'])


async def reserve_ports(spec: JobSpec, agents: Sequence[AgentConnection], infos: Sequence[HostInfo]
                        ) -> Tuple[int, str]:
    """Reserve the ports where the job's processes meet, and make sure that every host gets through to them.

    Returns:
        the port of the scheduler or of Horovod's rendezvous; address:port of the control plane.

    Raises:
        ValueError: a host cannot reach them.
    """
    async def reserve(process: Process, how: str) -> Tuple[str, int]:
        address, ports = infos[process.host].address, []

        async def ask(agent: AgentConnection) -> None:
            ports.append((await agent.request('reserved', START, do=how, address=address))['port'])
        raise_if_any(await for_each([agent_of(process, agents)], ask))
        raise_if_any(await for_each(agents, lambda agent: agent.request('reached', START, do='reach', address=address,
                                                                        port=ports[0])))
        return address, ports[0]
    processes = processes_of(agents)
    _, port = await reserve(root(processes), 'rendezvous' if spec.horovod else 'reserve')
    return port, '%s:%d' % await reserve(processes[0], 'reserve')
