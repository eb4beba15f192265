"""Say what the launcher needs to know of a kind of cluster."""
from typing import List, Protocol, Sequence

from mxsimmim.cluster.connections import AgentConnection
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec


class Backend(Protocol):
    """Know where agents run, and start them. Holds nothing of a job: what it starts, the connections hold.

    A new kind of cluster is one file beside this one and a line in `BACKENDS`.
    """
    agent_per_process: bool = False  # one agent a process, on hosts that the backend chooses; else one agent a host
    fetches_logs: bool = True  # hosts write logs of their own, which are brought here at the end
    speaks_mpi: bool = False  # processes find themselves in MPI's world, which Horovod can use
    agent_address: str = ''  # where other hosts reach an agent's; empty: the agent knows from the way it was started
    other_python: str = 'put first into --env PATH=... the folder of'  # how to name another Python

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        """List the hosts that the job may use, the first one for worker 0."""

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        """Start the agent of each connection, on its host. Does not wait for them.

        Raises:
            ValueError: they cannot be started.
        """

    def why_none_came(self, agents: Sequence[AgentConnection]) -> List[str]:
        """Say why no agent came, where one command starts all of them and has failed; empty otherwise."""
        return []

    def explain(self, host: Host, said: str) -> str:
        """Add the way out to what was said last when an agent, or a copy, did not come to a host."""
        return said

    def copy_command(self, host: Host, directory: str) -> List[str]:
        """Build the command that copies the working directory to a host; none where the host sees this one."""
        return []
