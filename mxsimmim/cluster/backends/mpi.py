"""Run a job by Open MPI: one `mpirun` starts an agent for each process, and they call the launcher back.

``mpirun -x NAME`` takes the variable's value from the environment, so that the key is on no command line.
"""
import os
from types import MappingProxyType
from typing import List, Sequence

from mxsimmim.cluster.backends.base import REACHED_BY_SSH, Backend
from mxsimmim.cluster.backends.ssh import copy_command, explain
from mxsimmim.cluster.callback import AGENT, VARIABLE, own_addresses, start_all, why_none_came
from mxsimmim.cluster.connections import AgentConnection
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec, Process

ALLOCATIONS = 'SLURM_JOB_ID', 'PBS_NODEFILE', 'LSB_JOBID', 'PE_HOSTFILE'  # set where a resource manager gives the hosts


class MpiBackend(Backend):
    """Have mpirun start an agent for each process, on the hosts of the hostfile or wherever it chooses."""
    agent_per_process = True
    speaks_mpi = True
    copies_by_ssh = True
    other_python = 'start this launcher with'
    refuses = MappingProxyType({'min_workers': REACHED_BY_SSH})

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        return spec.hosts or [Host('')]

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        processes = [process for agent in agents for process in agent.processes]
        elsewhere = bool(spec.hosts) or any(os.environ.get(name) for name in ALLOCATIONS)
        start_all(mpirun(processes, spec.hosts, spec.interface), own_addresses(spec.interface, elsewhere),
                  'OMPI_COMM_WORLD_RANK', {str(rank): agent for rank, agent in enumerate(agents)})

    def why_none_came(self, agents: Sequence[AgentConnection]) -> List[str]:
        return [f'mpirun: {line}' for line in why_none_came(agents)]

    def explain(self, host: Host, said: str) -> str:
        return explain(host, said)

    def copy_command(self, host: Host, directory: str) -> List[str]:
        return copy_command(host, directory)


def mpirun(processes: Sequence[Process], hosts: Sequence[Host], interface: str) -> List[str]:
    """Build the mpirun command that starts one agent a process, rank by rank in the order of `processes`.

    Without hosts, mpirun chooses: those of a resource manager's allocation, or this machine.

    Raises:
        ValueError: a host that cannot be told to mpirun.
    """
    agent = ['-x', VARIABLE, *AGENT]
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
