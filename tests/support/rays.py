"""A real Ray on the hosts that the tests make: a node on each, the head on host0, all its files in /tmp/ray there."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import List

from mxsimmim.cluster.backends.ray import DRIVER

from .hosts import Hosts, run, wait_for, words_of
from .running import ROOT

CORES, GPUS = 4, 2  # that Ray believes each host to have
PORT = 6379
# Its own processes; those that hold an agent are ray::Place.run.
OWN = re.compile(r'.*/(site|dist)-packages/ray/|ray::(IDLE|\w+Agent)|.*/bin/ray start|\S*raylet|\S*gcs_server')
STORE = 80_000_000  # bytes, the least that Ray takes


def why_not() -> str:
    """Why this machine cannot have a Ray; empty where it can."""
    return '' if find_spec('ray') else "needs the package ray: pip install 'mxsimmim[ray]'"


class Ray:
    """Ray of `hosts`, from the call of `start` to that of `stop`."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.environ = {name: value for name, value in hosts.environ.items() if not name.startswith('RAY_')}
        self.environ.update(PATH=f'{Path(sys.executable).parent}:{hosts.environ["PATH"]}',
                            RAY_prestart_worker_first_driver='0')  # or each node starts a worker a core, at once
        self.address = f'{hosts.address(0)}:{PORT}'

    def start(self) -> 'Ray':
        os.makedirs('/tmp/ray', exist_ok=True)
        started = [self.boot(n) for n in range(self.hosts.count)]
        for process in started:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0, said
        return self

    def boot(self, n: int, *words: str) -> subprocess.Popen:
        """Starts the node of a host; the process that is returned ends when the node is there."""
        self.hosts.hide(n, '/tmp/ray')
        where = [f'--address={self.address}'] if n else ['--head', f'--port={PORT}', '--include-dashboard=false',
                                                         '--no-monitor']
        return subprocess.Popen(
            [*self.hosts.inside(n), 'ray', 'start', *where, f'--node-ip-address={self.hosts.address(n)}',
             f'--num-cpus={CORES}', f'--num-gpus={GPUS}', f'--object-store-memory={STORE}', '--disable-usage-stats',
             '--include-log-monitor=false', *words], env=self.environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)

    def processes(self, n: int) -> List[int]:
        """What Ray itself runs on a host."""
        return [pid for pid in self.hosts.processes(n, all=True) if OWN.match(words_of(pid))]

    def remove(self, n: int) -> None:
        """Ends the node of a host at once, and nothing else there."""
        for pid in self.processes(n):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.processes(n), f'the node of host{n} has ended')

    def stop(self) -> None:
        for n in reversed(range(self.hosts.count)):
            self.remove(n)

    def nodes(self) -> int:
        """How many nodes can take a job."""
        return len(json.loads(run('env', '-C', ROOT, *self.hosts.inside(0), *DRIVER, 'nodes', 'auto')))
