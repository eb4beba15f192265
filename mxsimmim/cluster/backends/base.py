"""Say what the launcher needs to know of a kind of cluster."""
import argparse
from types import MappingProxyType
from typing import List, Mapping, Optional, Protocol, Sequence, Tuple

from mxsimmim.cluster.connections import AgentConnection
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec

REACHED_BY_SSH = ('--min-workers leaves out hosts that do not answer, which only --launcher ssh can: give the hosts '
                  'with -H FILE')


class Backend(Protocol):
    """Know where agents run, and start them. Holds nothing of a job: what it starts, the connections hold.

    A new kind of cluster is one file beside this one and a line in `BACKENDS`.
    """
    agent_per_process: bool = False  # one agent a process, on hosts that the backend chooses; else one agent a host
    fetches_logs: bool = True  # hosts write logs of their own, which are brought here at the end
    speaks_mpi: bool = False  # processes find themselves in MPI's world, which Horovod can use
    agent_address: str = ''  # where other hosts reach an agent's; empty: the agent knows from the way it was started
    patience: float = 30.0  # seconds in which an agent must come
    grace: float = 6.0  # seconds that workers may take for a checkpoint, when the launcher is told to stop
    needs_hostfile: bool = False
    needs_image: bool = False  # --image, and takes --namespace and --dry-run
    takes_address: bool = False  # --address, where the cluster is
    copies_by_ssh: bool = False  # the working directory to the hosts of the hostfile, which needs one
    refuses: Mapping[str, str] = MappingProxyType({})  # options that cannot be here: why, and the way out
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

    def instead(self, options: argparse.Namespace) -> Optional[int]:
        """Do what is to be done where the job does not run from here, and return the exit status; None: it does.

        Raises:
            ValueError: it cannot be done.
        """
        return None

    def restarts(self) -> Sequence[Tuple[float, str]]:
        """Say when and why this job, launcher and all, was started again by the cluster; empty the first time."""
        return []
