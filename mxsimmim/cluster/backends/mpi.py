"""Run a job by Open MPI: one `mpirun` starts an agent for each process, and they call the launcher back.

``mpirun -x NAME`` takes the variable's value from the environment, so that the key is on no command line.
"""
import os
import sys
from typing import List, Sequence

from mxsimmim.cluster import inspection
from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.backends.ssh import copy_command, explain
from mxsimmim.cluster.callback import BOOTSTRAP, VARIABLE, Callbacks
from mxsimmim.cluster.connections import AgentConnection, Command
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec, Process

ALLOCATIONS = 'SLURM_JOB_ID', 'PBS_NODEFILE', 'LSB_JOBID', 'PE_HOSTFILE'  # set where a resource manager gives the hosts


class MpiBackend(Backend):
    """Have mpirun start an agent for each process, on the hosts of the hostfile or wherever it chooses."""
    agent_per_process = True
    speaks_mpi = True

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        return spec.hosts or [Host('')]

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        processes = [process for agent in agents for process in agent.processes]
        command = mpirun(processes, spec.hosts, sys.executable, spec.interface)
        callbacks = Callbacks(addresses(spec), agents)
        try:
            agents[0].command = Command(command, {**os.environ, VARIABLE: callbacks.variable})
        except ValueError:
            callbacks.close()
            raise
        agents[0].command.silent.add_done_callback(lambda _: callbacks.close())

    def why_none_came(self, agents: Sequence[AgentConnection]) -> List[str]:
        command = agents[0].command
        if not command or not command.silent.done():
            return []
        return [f'mpirun: {line}' for line in command.lines if line.strip(' -')]

    def explain(self, host: Host, said: str) -> str:
        return explain(host, said)

    def copy_command(self, host: Host, directory: str) -> List[str]:
        return copy_command(host, directory)


def addresses(spec: JobSpec) -> List[str]:
    """List the addresses of this machine at which agents may reach it, the likely ones first."""
    known = inspection.interfaces()
    if spec.interface in known:
        return [known[spec.interface]]
    if spec.hosts or any(os.environ.get(name) for name in ALLOCATIONS):
        return sorted(known.values(), key=lambda address: address.startswith('127.'))
    return ['127.0.0.1']


def mpirun(processes: Sequence[Process], hosts: Sequence[Host], python: str, interface: str) -> List[str]:
    """Build the mpirun command that starts one agent a process, rank by rank in the order of `processes`.

    Without hosts, mpirun chooses: those of a resource manager's allocation, or this machine.

    Raises:
        ValueError: a host that cannot be told to mpirun.
    """
    agent = ['-x', VARIABLE, python, '-X', 'utf8', '-c', BOOTSTRAP]
    start = ['mpirun', '--oversubscribe', '--bind-to', 'none']
    start += ['--mca', 'btl_tcp_if_include', interface] if interface else []
    for host in hosts[:1 + max(process.host for process in processes)]:
        if host.port or ':' in host.name:
            raise ValueError(f"host '{host.name}': mpirun takes neither ports nor IPv6 addresses: give it a name, "
                             'and its port, in ~/.ssh/config')
    if not hosts:
        return start + ['-np', str(len(processes))] + agent
    groups: List[List[int]] = []  # host and number of processes, of neighbours on one host
    for process in processes:
        if groups and groups[-1][0] == process.host:
            groups[-1][1] += 1
        else:
            groups.append([process.host, 1])
    words: List[str] = []
    for number, count in groups:
        words += [':'] * bool(words) + ['--host', f'{hosts[number].name}:{count}', '-np', str(count)] + agent
    return start + words
