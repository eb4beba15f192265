"""Run a job on this machine."""
import sys
from types import MappingProxyType
from typing import Sequence

from mxsimmim.cluster.backends.base import REACHED_BY_SSH, Backend
from mxsimmim.cluster.connections import BOOTSTRAP, AgentConnection
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec


class LocalBackend(Backend):
    """Start one agent, as a child of the launcher."""
    fetches_logs = False
    agent_address = '127.0.0.1'
    other_python = 'start this launcher with'
    refuses = MappingProxyType({
        'hostfile': '--launcher local starts everything on this machine: leave out -H, or use --launcher ssh',
        'min_workers': REACHED_BY_SSH, 'sync_dst_dir': '--sync-dst-dir copies to other hosts: it needs -H'})

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        return [Host('')]

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        for agent in agents:
            agent.open([sys.executable, '-X', 'utf8', '-c', BOOTSTRAP])
