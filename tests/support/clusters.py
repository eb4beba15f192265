"""Jobs on three hosts that the tests make, by each kind of launcher: how they are started, and what is left of them."""
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest
import yaml

from mxsimmim.runtime.process import CONTROL

from . import rays, slurm, tiny
from .hosts import Hosts, three_hosts, wait_for, words_of
from .jobs import SLOW, reach, recorded
from .running import BASE, ROOT, command

LAUNCH = [sys.executable, str(ROOT / 'tools' / 'launch.py')]
PRETRAIN = command('pretrain', BASE)
TINY = [*tiny.TINY, 'name=tiny', 'model.drop_path=0', 'train.length=20', 'optim.milestones=[15]',
        'validation.pictures=0', 'checkpoint.every=20', 'log.every=5', 'data.threads=1']
ENDLESS = [*TINY, 'train.length=100000', 'validation.every=100000', 'checkpoint.every=100000']
GRADIENT = 4 * 8360  # bytes of that network's gradients
JOB = 90  # seconds that a whole job may take
KILLED = 15  # seconds until nothing of a job is left, once one of its processes is killed
NAMES = 'host0', 'host1', 'host2'


class Cluster:
    """Starts the launcher in the folder `job`, of which each host has its own; what it says goes to `said`."""
    allocates = False  # started below a command of its own, to which one that is killed has ended well
    slack = 0  # seconds that what is left may take longer to end by itself
    holders = ('ssh', 'agent')  # what holds a host, and may be killed

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder, self.job = hosts, folder, folder / 'job'
        self.environ: Dict[str, str] = hosts.environ
        self.started: List[subprocess.Popen] = []

    def words(self, names) -> List[str]:
        """The words before the launcher's options."""
        (self.folder / 'hostfile').write_text(''.join(name + '\n' for name in names))
        return [*LAUNCH, '-H', str(self.folder / 'hostfile')]

    def start(self, *words, names=NAMES, environ=None) -> subprocess.Popen:
        """The launcher in the background."""
        with open(self.folder / 'said', 'wb') as said:
            self.started.append(subprocess.Popen(
                [*self.words(names), *map(str, words)], cwd=self.job, stderr=said, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, env=dict(self.environ, **environ or {})))
        return self.started[-1]

    def launch(self, *words, **keys):
        """The launcher to its end; returns its exit status and what it said."""
        status = self.start(*words, **keys).wait(JOB)
        return status, self.said()

    def train(self, *words, **keys) -> subprocess.Popen:
        """Starts a job that trains for ever; returns its launcher when all workers train."""
        process = self.start('-n', 3, *words, '--', *PRETRAIN, *ENDLESS, **keys)

        def trains():
            assert process.poll() is None, self.said()
            return len(self.metrics()) > 1
        wait_for(trains, 'training begins', JOB)
        assert all(self.hosts.processes(n) for n in range(3)) and self.local()  # as `left` would see them
        return process

    def called(self, n: int) -> str:
        """What the launcher calls a host."""
        return NAMES[n]

    def said(self) -> str:
        return (self.folder / 'said').read_text()

    def logs(self) -> Dict[str, str]:
        """Where the launcher runs, by name: 'worker-0', …."""
        return {path.stem: path.read_text() for path in (self.job / 'logs').glob('*.log')}

    def metrics(self, name='tiny') -> List[str]:
        """Lines of a run's metrics.jsonl, on host0."""
        return self.hosts.run(0, f'cat {self.job}/runs/{name}/metrics.jsonl 2> /dev/null || true').splitlines()

    def checkpoints(self) -> List[str]:
        """Names of the run's checkpoints, on host0."""
        return self.hosts.run(0, f'ls {self.job}/runs/tiny/checkpoints 2> /dev/null || true').split()

    def local(self) -> List[int]:
        """Processes on this machine that lead to the hosts, or have asked for them."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir('/proc')))
                if f'{self.hosts.folder}/ssh_config' in words_of(pid).split()]

    def left(self) -> List[str]:
        """Command lines of what still runs of a job, on the hosts and here."""
        pids = [pid for n in range(3) for pid in self.hosts.processes(n)] + self.local()
        return [words for words in map(words_of, pids) if words]

    def worker(self, n: int) -> int:
        """The process of a host that is a worker (or a rank), and no server or launcher with the same words."""
        return next(pid for pid in self.hosts.processes(n)
                    if 'pretrain' in words_of(pid) and CONTROL in environment(pid))

    def launcher(self, process: subprocess.Popen) -> int:
        """The process of a launcher that `start` returned."""
        return process.pid

    def kill(self, holder: str, n: int) -> None:
        """Kills what holds a host."""
        agent = parent(self.worker(n))
        if holder == 'ssh':
            [agent] = [pid for pid in self.local() if NAMES[n] in words_of(pid).split()]
        os.kill(agent, signal.SIGKILL)

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


class SlurmCluster(Cluster):
    """Each job is in an allocation of its own, which ends with it."""
    allocates = True
    holders = ('task', 'agent')

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        super().__init__(hosts, folder)
        self.slurm = slurm.Slurm(hosts).start()
        self.environ = self.slurm.environ

    def words(self, names) -> List[str]:
        return ['salloc', '--quiet', f'--nodelist={",".join(names)}', *LAUNCH, '--launcher', 'slurm']

    def local(self) -> List[int]:
        return [pid for pid in map(int, filter(str.isdigit, os.listdir('/proc')))
                if words_of(pid).split(' ')[0].rpartition('/')[2] in ('srun', 'salloc')
                and environment(pid).get('SLURM_CONF') == self.environ['SLURM_CONF']]

    def launcher(self, process: subprocess.Popen) -> int:
        return next(pid for pid in map(int, filter(str.isdigit, os.listdir('/proc')))
                    if LAUNCH[1] in words_of(pid).split() and parent(pid) == process.pid)

    def kill(self, holder: str, n: int) -> None:
        agent = parent(self.worker(n))
        os.kill(parent(agent) if holder == 'task' else agent, signal.SIGKILL)  # srun's task is the guardian

    def close(self) -> None:
        super().close()
        self.slurm.stop()


class InsideCluster(Cluster):
    """The launcher runs on host0."""

    def inside(self, n: int) -> List[str]:
        """The words before a command that run it in the folder `job` of a host."""
        return [*self.hosts.inside(n), 'sh', '-c', 'cd "$1" && shift && exec "$@"', 'sh', str(self.job)]

    def logs(self) -> Dict[str, str]:
        names = self.hosts.run(0, f'ls {self.job}/logs').split()
        return {name[:-len('.log')]: self.hosts.run(0, f'cat {self.job}/logs/{name}') for name in names}

    def local(self) -> List[int]:
        return [process.pid for process in self.started if process.poll() is None]

    def launcher(self, process: subprocess.Popen) -> int:
        return next(pid for pid in self.hosts.processes(0) if parent(pid) == process.pid)


class KubernetesCluster(InsideCluster):
    """Each pod of the Job that --dry-run prints is on a host, with its command as it stands and its variables.

    Only then its name stands for its address.
    """
    slack = 15
    holders = ('guardian', 'agent')

    def start(self, *words, names=NAMES, environ=None) -> subprocess.Popen:
        printed = subprocess.run([*LAUNCH, '--launcher', 'kubernetes', '--image', 'image', '--dry-run',
                                  *map(str, words)], env={**self.environ, **(environ or {})}, check=True, timeout=JOB,
                                 stdout=subprocess.PIPE).stdout
        secret, service, job = yaml.safe_load_all(printed)
        self.name = job['metadata']['name']
        [container] = job['spec']['template']['spec']['containers']
        command = [word.replace('$$', '$') for word in container['command']]
        with open(self.folder / 'said', 'wb') as said:
            for place in reversed(range(job['spec']['completions'])):
                self.started.append(subprocess.Popen(
                    [*self.inside(place), *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL if place else said, env={
                        **secret['stringData'], 'JOB_COMPLETION_INDEX': str(place),
                        'PATH': f'{Path(sys.executable).parent}:{self.environ["PATH"]}'}))
        time.sleep(0.5)
        with open(self.hosts.folder / 'etc_hosts', 'a') as file:
            for place in range(job['spec']['completions']):
                file.write(f'{self.hosts.address(place)} {self.called(place)}.{service["metadata"]["name"]}\n')
        return self.started[-1]

    def called(self, n: int) -> str:
        return f'{self.name}-{n}'

    def kill(self, holder: str, n: int) -> None:
        agent = parent(self.worker(n))
        os.kill(parent(agent) if holder == 'guardian' else agent, signal.SIGKILL)


class RayCluster(InsideCluster):
    """The launcher runs beside the head of a Ray."""
    slack = 10
    holders = ('actor', 'agent')

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        super().__init__(hosts, folder)
        self.ray = rays.Ray(hosts).start()
        self.environ = self.ray.environ

    def words(self, names) -> List[str]:
        return [*self.inside(0), *LAUNCH, '--launcher', 'ray']

    def local(self) -> List[int]:
        return [pid for pid in self.hosts.processes(0) if 'mxsimmim.cluster.backends.ray_driver' in words_of(pid)]

    def left(self) -> List[str]:
        return [words for words in super().left() if not rays.OWN.match(words)]

    def kill(self, holder: str, n: int) -> None:
        agent = parent(self.worker(n))
        os.kill(parent(parent(agent)) if holder == 'actor' else agent, signal.SIGKILL)

    def close(self) -> None:
        super().close()
        self.ray.stop()


KINDS = {'ssh': Cluster, 'slurm': SlurmCluster, 'kubernetes': KubernetesCluster, 'ray': RayCluster}


@contextlib.contextmanager
def cluster(kind: str, folder: Path) -> Iterator[Cluster]:
    """A cluster of a kind. Skips the test where it cannot be made; fails there under continuous integration."""
    with three_hosts(folder / 'hosts') as hosts:
        with on_hosts(kind, hosts, folder) as made:
            yield made


@contextlib.contextmanager
def on_hosts(kind: str, hosts: Hosts, folder: Path) -> Iterator[Cluster]:
    """The same on hosts that are there, each with a new and empty folder `job`."""
    reason = {'slurm': slurm.why_not, 'ray': rays.why_not}.get(kind, str)()
    if reason:
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(f'{kind} cannot be started: {reason}')
    (folder / 'job').mkdir(parents=True)
    for n in range(3):
        hosts.hide(n, folder / 'job')
    made = KINDS[kind](hosts, folder)
    try:
        yield made
    finally:
        made.close()


def survives(made: Cluster, losses: List[float], kill: Callable[[], None], lose: Callable[[], None]) -> None:
    """Asserts that a job to which one happens and then the other is started again each time, and keeps its losses."""
    job = made.start('-n', 2, '--horovod', '--max-restarts', 9, '--', *SLOW)
    reach(made.job, 15)
    kill()
    wait_for(lambda: 'restart in' in made.said(), 'a restart', JOB)
    reach(made.job, 30)
    lose()
    assert job.wait(JOB) == 0, made.said()
    assert made.said().count('restart in') > 1
    assert 'launch: host host1 was lost: ' in made.said()
    assert recorded(made.job / 'runs' / 'job', 'loss') == losses


def environment(pid: int) -> Dict[str, str]:
    """Variables of a process; none if it has ended."""
    with contextlib.suppress(OSError):
        words = Path(f'/proc/{pid}/environ').read_bytes().decode(errors='replace').split('\0')
        return dict(word.partition('=')[::2] for word in words if word)
    return {}


def parent(pid: int) -> int:
    """The process that started this one; 0 if it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])
    return 0
