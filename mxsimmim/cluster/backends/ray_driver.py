"""Start agents on the nodes of a Ray and wait for their end. A program of its own, as its imports have threads.

    python -m mxsimmim.cluster.backends.ray_driver nodes ADDRESS
    python -m mxsimmim.cluster.backends.ray_driver agents ADDRESS cpu|gpu '{"NODE": WORKERS, …}' PLACE

The first prints what nodes there are. The second finds in its environment what agents need to call the launcher
(`callback`); it ends after them, or some seconds after the launcher, which holds its standard input.
"""
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Dict, List

from mxsimmim.cluster.callback import BOOTSTRAP, VARIABLE

CORES = 'MXSIMMIM_CORES'  # in which an agent finds how many of its host's cores are the job's
CONNECT, NEAR = 5.0, 2.0  # seconds in which a Ray must answer, and each of its nodes
ROOM = 45.0  # seconds until it has given the nodes
LEAVE = 10.0  # seconds that agents may take to end without a launcher
EXTRA = "pip install 'mxsimmim[ray]'"


class Place:
    """Be in a bundle of the placement group what stands for the agent there: an actor, sent by value."""

    def run(self, environ: Dict[str, str]) -> str:
        """Have a process of its own be the agent, which has no threads then; it is told to end when this one dies.

        Returns:
            what it said, if it has failed.
        """
        code = ends_with(os.getpid()) + BOOTSTRAP
        agent = subprocess.Popen([sys.executable, '-X', 'utf8', '-c', code], env={**os.environ, **environ},
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 start_new_session=True)
        said = agent.communicate()[1].decode(errors='replace').strip()
        alone = threading.Timer(LEAVE, os._exit, [0])  # Ray ends actors, but not on a host that is cut off
        alone.daemon = True
        alone.start()
        return (said or f'its agent ended with status {agent.returncode}') if agent.returncode else ''


def ends_with(parent: int) -> str:
    """Write the beginning of a Python program that gets SIGTERM when its parent dies, or has died already.

    It unblocks the signals that threads of its parent's keep from themselves.
    """
    return ('import ctypes, os, signal, sys\n'
            'signal.pthread_sigmask(signal.SIG_SETMASK, ())\n'
            'ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG\n'
            f'os.getppid() == {parent} or sys.exit(1)\n')


def connect(address: str) -> Any:
    """Become a driver of the Ray at this address, and return the package.

    Raises:
        ValueError: there is none, or no package.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError(f"--launcher ray needs the package ray, in the cluster's version: {EXTRA} ({error})"
                         ) from None
    known = os.environ.get('RAY_ADDRESS', '') if address == 'auto' else address
    found = re.fullmatch(r'(.+):(\d+)', known)
    if known not in ('', 'auto'):
        if not found or '/' in known:
            raise ValueError(f"'{known}' is no address of a Ray ({'RAY_ADDRESS' if address == 'auto' else '--address'}"
                             '): write HOST:PORT, as ray start --head has shown it, or auto on one of its machines')
        try:
            socket.create_connection((found[1], int(found[2])), CONNECT).close()
        except OSError as error:
            raise ValueError(f'no Ray answers at {known} ({error}): start it with ray start --head, or correct '
                             '--address') from None
    try:
        ray.init(known or 'auto', log_to_driver=False, logging_level='critical', namespace='mxsimmim')
    except Exception as error:
        if isinstance(error, ConnectionError) and known in ('', 'auto'):
            raise ValueError('no Ray runs on this machine, for --address auto: start it with ray start --head, or join '
                             'one with ray start --address=HOST:PORT') from None
        lines = ' '.join(str(error).split())
        raise ValueError(f"the Ray at '{known or 'auto'}' cannot be used: {lines}") from None
    return ray


def nodes_of(ray: Any) -> List[Dict]:
    """List the nodes that are alive, this one first: name, address, and the CPUs and GPUs that are free.

    A name that several have, as nodes on one machine do, is followed by the first letters of their ids. Ray takes up to
    half a minute to see that a node is dead, so each is called.
    """
    from ray._private import state
    free, own = state.available_resources_per_node(), ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node['Alive'] and answers(node)]
    names = [node['NodeManagerHostname'] for node in alive]
    found = [dict(name=name + (f'-{node["NodeID"][:6]}' if names.count(name) > 1 else ''), own=node['NodeID'] == own,
                  address=node['NodeManagerAddress'], cpus=int(free.get(node['NodeID'], {}).get('CPU', 0)),
                  gpus=int(free.get(node['NodeID'], {}).get('GPU', 0))) for name, node in zip(names, alive)]
    return sorted(found, key=lambda node: (not node['own'], node['name']))


def answers(node: Dict) -> bool:
    """Tell whether a node can be called."""
    try:
        socket.create_connection((node['NodeManagerAddress'], node['NodeManagerPort']), NEAR).close()
    except OSError:
        return False
    return True


def bundles_of(nodes: Dict[str, Dict], shares: Dict[str, int], gpus: bool) -> List[Dict[str, float]]:
    """Describe what the job takes of each node: all CPUs that are free, or a GPU a worker and as large a part of them.

    Where others have taken CPUs meanwhile, it asks for one a worker still, and so waits for them.

    Args:
        nodes: as `nodes_of` lists them, by name.
        shares: the number of workers of each node that is needed.

    Raises:
        ValueError: a node is gone.
    """
    bundles = []
    for name, workers in shares.items():
        if name not in nodes:
            raise ValueError(f'{name} has left Ray')
        node = nodes[name]
        part = min(1.0, workers / node['gpus']) if gpus and node['gpus'] else 1.0
        least = 1 if gpus else max(1, workers)
        bundles.append({'CPU': max(least, int(node['cpus'] * part)), **({'GPU': workers} if gpus and workers else {}),
                        f"node:{node['address']}": 0.001})
    return bundles


def start(ray: Any, shares: Dict[str, int], gpus: bool, place: str) -> int:
    """Start the agents and wait for their end, or for that of the launcher; say on standard error what went wrong.

    That is closed when the first agent is lost: those that have not called yet never will.
    """
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    bundles = bundles_of({node['name']: node for node in nodes_of(ray)}, shares, gpus)
    group = placement_group(bundles, strategy='STRICT_SPREAD')
    limit = time.monotonic() + ROOM
    while not group.wait(1):
        if time.monotonic() < limit and not launcher_is_gone():
            continue
        free = ray.available_resources()
        raise ValueError(f'Ray has not given {", ".join(shares)} within {ROOM:.0f} s: the job asks for '
                         f'{_sum(bundles)}, and free are {_sum([free])}: ray status shows who has them')
    addresses, rest = os.environ[VARIABLE].split(' ', 1)
    first = ray.util.get_node_ip_address()  # of Ray's network
    known = sorted(addresses.split(','), key=lambda address: address != first)
    calls = {}
    for number, (name, bundle) in enumerate(zip(shares, bundles)):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        actor = ray.remote(Place).options(num_cpus=bundle['CPU'], num_gpus=bundle.get('GPU', 0), max_restarts=0,
                                          scheduling_strategy=strategy).remote()
        environ = {VARIABLE: f'{",".join(known)} {rest}', place: name, CORES: str(int(bundle['CPU']))}
        calls[actor.run.remote(environ)] = name, actor
    wait(ray, calls)
    ray.util.remove_placement_group(group)
    return 0


def wait(ray: Any, calls: Dict[Any, Any]) -> None:
    """Wait for all calls to end, not longer than `LEAVE` once the launcher is gone; say what has failed."""
    limit = None
    while calls and (limit is None or time.monotonic() < limit):
        done, _ = ray.wait(list(calls), timeout=0.1)
        for call in done:
            name, _ = calls.pop(call)
            try:
                said = ray.get(call)
            except ray.exceptions.RayError as error:  # for want of memory or of its environment it is no RayActorError
                said = f'the actor on {name} has ended: {reason(str(error))}'
            if said and not sys.stderr.closed:
                print(said if name in said else f'{name}: {said}', file=sys.stderr, flush=True)
                os.close(2)
                sys.stderr.close()
        if limit is None and launcher_is_gone():
            limit = time.monotonic() + LEAVE


def launcher_is_gone() -> bool:
    """Tell whether standard input, which the launcher holds, has ended."""
    return bool(select.select([0], [], [], 0)[0]) and not os.read(0, 1)


def reason(text: str) -> str:
    """Shorten to a line what Ray says of an actor that has died."""
    said = ' '.join(text.split())
    for begin in ('Worker exit detail: ', 'dead because ', 'is unavailable: '):
        said = said.partition(begin)[2] or said
    return re.split(r'\.? (?:There are some|Some common|rpc_code|This may be)', said)[0][:300]


def _sum(bundles: List[Dict[str, float]]) -> str:
    """Say how many CPUs and GPUs these are together."""
    sums = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ('CPU', 'GPU')}
    return ' and '.join(f'{number:g} {kind}s' for kind, number in sums.items() if number or kind == 'CPU')


def main(words: List[str]) -> int:
    """Do what the words of a command line say, and return the exit status."""
    try:
        ray = connect(words[1])
        if words[0] == 'nodes':
            print(json.dumps(nodes_of(ray)))
            return 0
        return start(ray, json.loads(words[3]), words[2] == 'gpu', words[4])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == '__main__':
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # Ray clears up after a driver that is gone, sooner than it would leave by itself
