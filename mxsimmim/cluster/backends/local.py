"""Run a job on this machine."""
import sys
from typing import Sequence

from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.connections import BOOTSTRAP, AgentConnection
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec


class LocalBackend(Backend):
    """Start one agent, as a child of the launcher."""
    fetches_logs = False
    agent_address = '127.0.0.1'
    other_python = 'start this launcher with'

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        return [Host('')]

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        for agent in agents:
            agent.open([sys.executable, '-X', 'utf8', '-c', BOOTSTRAP])
