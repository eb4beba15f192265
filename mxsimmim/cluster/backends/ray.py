"""Run a job on the nodes of a Ray: an actor on each starts an agent, and the agents call the launcher back.

Ray has threads, which the launcher must not have where it forks: `ray_driver` is a program of its own, for Ray what
srun is for Slurm. It finds the key in its environment and hands it to the actors in a call, so that it is on no command
line and in none of Ray's tables.
"""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Dict, List, Sequence

from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.callback import own_addresses, start_all, why_none_came
from mxsimmim.cluster.connections import AgentConnection
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec

REFUSED = 2  # exit status of `ray_driver` that has said in a line what is wrong
DRIVER = sys.executable, '-X', 'utf8', '-m', 'mxsimmim.cluster.backends.ray_driver'
PLACE = 'MXSIMMIM_NODE'
ANSWER = 20.0  # seconds in which a Ray must tell its nodes


class RayBackend(Backend):
    """Have an actor start an agent on each node, in a placement group with a bundle a node."""
    takes_address = True
    patience = 60.0  # until Ray has given the placement group as well
    other_python = 'start Ray there by'
    refuses = MappingProxyType({
        'hostfile': '--launcher ray takes its hosts from Ray: leave out -H, and add machines with ray start --address',
        'min_workers': '--min-workers leaves out hosts that do not answer, and Ray knows which of its nodes are there: '
                       'leave it out; with --max-restarts all workers start again on those that are left, if they have '
                       'room for them',
        'sync_dst_dir': '--sync-dst-dir copies to hosts, which Ray does itself: leave it out, and submit the job with '
                        'ray job submit --working-dir, or use a folder that all nodes see'})

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        return choose(spec, nodes_of(spec.address))

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        shares = {agent.host.name: sum(process.role == 'worker' for process in agent.processes) for agent in agents}
        command = [*DRIVER, 'agents', spec.address, 'gpu' if spec.gpus else 'cpu', json.dumps(shares), PLACE]
        start_all(command, own_addresses(spec.interface, True), PLACE, {agent.host.name: agent for agent in agents},
                  driver_environ())

    def why_none_came(self, agents: Sequence[AgentConnection]) -> List[str]:
        return why_none_came(agents)


def choose(spec: JobSpec, nodes: Sequence[Dict]) -> List[Host]:
    """Choose the nodes of a job: for CPUs all, for GPUs those with most of them, as few as it needs.

    Args:
        nodes: of Ray, as `ray_driver` tells them: name, and free `cpus` and `gpus`; the launcher's own first.

    Returns:
        the hosts; their slots are what they have free, one for each worker.

    Raises:
        ValueError: there is no room for all workers.
    """
    kind = 'gpus' if spec.gpus else 'cpus'
    free = [node for node in nodes if node['cpus'] and node[kind]]
    if sum(node[kind] for node in free) < spec.workers:
        said = ', '.join(f"{node['name']} {node[kind]}{'' if node in free or not node[kind] else ' without a CPU'}"
                         for node in nodes)
        raise ValueError(f'{spec.workers} workers need a {kind[:-1].upper()} each, and of these Ray has free: {said}: '
                         'start fewer, add nodes with ray start --address, or wait for other jobs (ray status)')
    if spec.gpus:
        most = sorted(free, key=lambda node: -node[kind])
        while sum(node[kind] for node in most[:-1]) >= spec.workers:
            most.pop()
        free = [node for node in free if node in most]
    return [Host(node['name'], slots=node[kind]) for node in free]


def nodes_of(address: str) -> List[Dict]:
    """Ask a Ray for its nodes.

    Raises:
        ValueError: it cannot be reached.
    """
    try:
        done = subprocess.run([*DRIVER, 'nodes', address], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=ANSWER, env=driver_environ(), encoding='utf-8',
                              errors='replace', start_new_session=True)  # Ctrl-C is for the launcher
    except subprocess.TimeoutExpired:
        raise ValueError(f"what is at '{address}' does not tell the nodes of a Ray within {ANSWER:.0f} s: does ray "
                         'status show one?') from None
    if done.returncode == REFUSED:
        raise ValueError(done.stderr.strip())
    if done.returncode:  # as Ray ends a program that finds no node beside it
        raise ValueError(f"the Ray at '{address}' cannot be used from this machine, which must be one of its nodes: "
                         'join it with ray start --address=HOST:PORT, or start the launcher on another'
                         + ''.join(f' ({line.rpartition("] ")[2]})' for line in done.stderr.splitlines()[:1]))
    return json.loads(done.stdout)


def driver_environ() -> Dict[str, str]:
    """Build the environment in which `ray_driver` finds this package."""
    path = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get('PYTHONPATH')])]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(path)}
