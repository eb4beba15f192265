"""One job under one fault, on three hosts: how the fault is made to happen, and what must hold afterwards."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from .faults import MODES, SAVED
from .hosts import Hosts, wait_for, words_of
from .jobs import newest
from .running import BASE, ROOT, command, last_step, rounds
from .tiny import NETWORK

STEPS = rounds(60, 80)  # of a job
DEADLINE = 120  # seconds for a whole job, and for a fault to happen
WAITS = 6  # seconds that a worker waits for others, and a quarter more
AFTER = 40  # seconds until nothing of a job is left on a host that had lost the launcher
KEYS = [*NETWORK, 'model.depth=3', 'mask.patch_size=4', 'data.max_broken=0', 'data.threads=1',
        'train.batch_size=12', f'train.length={STEPS}', 'train.check_replicas=20', 'optim.schedule=constant',
        'optim.warmup=0', 'optim.base_lr=1e-2', 'optim.clip_grad=0.5',
        f'checkpoint.every={SAVED}', 'log.every=1', 'runtime.threads=1', f'runtime.deadline={WAITS}']


class Job:
    """A job in the folder `folder`, whose run is on the small disk `disk`; the launcher runs on this machine."""

    def __init__(self, hosts: Hosts, folder: Path, disk: Path, images: Path, mode: str):
        self.hosts, self.folder, self.disk, self.images, self.mode = hosts, folder, disk, images, MODES[mode]
        self.run, self.points = disk / folder.name, folder / 'points'
        self.history = [(time.time(), 0)]  # see `faults.course`
        for name in ('tmp', 'points'):
            (folder / name).mkdir(parents=True)
        (folder / 'hosts').write_text('\n'.join(hosts.names))
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._follow, daemon=True)
        self._watch.start()

    def _follow(self):
        while not self._done.wait(0.01):
            step = last_step(self.run)
            if step != self.history[-1][1]:
                self.history.append((time.time(), step))

    def start(self):
        words = [*self.mode.launch, '-H', self.folder / 'hosts', '--max-restarts', 6, '--env',
                 f'MXSIMMIM_FAULTS={self.points}', '--', *command('pretrain', BASE), *KEYS,
                 f'data.path={self.images}', f'output={self.disk}', f'name={self.run.name}', *self.mode.keys]
        with open(self.folder / 'said', 'ab') as said:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / 'tools' / 'launch.py'), *map(str, words)], cwd=self.folder, stderr=said,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                env=dict(self.hosts.environ, TMPDIR=str(self.folder / 'tmp')))

    def close(self):
        self.process.kill()
        self.process.wait()
        self._done.set()
        self._watch.join()
        for n in range(self.hosts.count):
            for pid in self.hosts.processes(n):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.hosts.run(n, f'rm -rf {self.hosts.folder / self.hosts.names[n]}/tmp/* /dev/shm/*')
        shutil.rmtree(self.run, ignore_errors=True)

    # --- seen

    def said(self):
        return (self.folder / 'said').read_text()

    def told(self):
        """What the launcher and each process said last."""
        logs = [f'{path.name}:\n{path.read_text(errors="replace")[-3000:]}'
                for path in sorted((self.folder / 'logs').glob('*.log'))]
        return '\n'.join([self.said(), *logs, *self.left()])

    def until(self, condition, what):
        """Waits for it as long as the job runs."""
        end = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None or condition(), f'the job ended before {what}\n{self.told()}'
            assert time.monotonic() < end, f'not within {DEADLINE} s: {what}\n{self.told()}'
            time.sleep(0.01)

    def reach(self, step):
        self.until(lambda: self.history[-1][1] >= step, f'step {step}')

    def restarts(self):
        return self.said().count('launch: restart in ')

    def checkpoints(self):
        return sorted(self.run.glob('checkpoints/step-*'))

    def find(self, target, n):
        """The process that is `target`, of a host where there is one on each."""
        kind, _, number = target.partition(' ')
        if kind == 'worker':
            return self._worker(int(number))
        if kind == 'agent':
            return parent(self._worker(n))
        if kind == 'guardian':
            return parent(self.find('agent', n))
        if kind == 'ssh':
            return next(pid for pid in self._local() if self.hosts.names[n] in words_of(pid).split())
        return next(pid for n in range(3) for pid in self._trained(n) if f'DMLC_ROLE={kind}' in environment(pid))

    def _worker(self, n):
        return next(pid for pid in self._trained(n) if not {'DMLC_ROLE=server', 'DMLC_ROLE=scheduler'}
                    & set(environment(pid)))

    def _trained(self, n):
        return [pid for pid in self.hosts.processes(n) if 'pretrain' in words_of(pid)
                and '--check-config' not in words_of(pid)]

    def _local(self):
        return [pid for pid in map(int, filter(str.isdigit, os.listdir('/proc')))
                if f'{self.hosts.folder}/ssh_config' in words_of(pid).split()]

    def left(self):
        """Command lines of what still runs of the job, on the hosts and here."""
        pids = [pid for n in range(3) for pid in self.hosts.processes(n)] + self._local()
        return [words for words in map(words_of, pids) if words]

    def files(self):
        """What lies in the folders for temporary files and shared memory, on the hosts and here."""
        found = [f'{host}:{name}' for n, host in enumerate(self.hosts.names)
                 for name in self.hosts.run(n, f'ls -A {self.hosts.folder / host}/tmp; ls -A /dev/shm').split()]
        return found + os.listdir(self.folder / 'tmp')


def environment(pid):
    with contextlib.suppress(OSError):
        return Path(f'/proc/{pid}/environ').read_bytes().decode(errors='replace').split('\0')
    return []


def parent(pid):
    return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])


# --- faults: each returns when it happened, by time.time()

def _signalled(number):
    def happen(job, fault):
        job.reach(1)
        pid = job.find(fault.target, fault.step % 3)  # now, as a step takes less time than that
        job.reach(fault.step)
        begin = time.time()
        os.kill(pid, number)
        assert job.process.poll() is None, 'the fault comes too late'
        return begin
    return happen


@contextlib.contextmanager
def _lasting(job, fault, end):
    """Waits for its step; what is done while entered lasts for its seconds, and then `end` is called."""
    job.reach(fault.step)
    try:
        yield
        time.sleep(fault.seconds)
    finally:
        end()


def host_lost(job, fault):
    n = job.hosts.names.index(fault.target)
    with _lasting(job, fault, lambda: job.hosts.switch_on(n)):
        begin = time.time()
        job.hosts.switch_off(n)
    return begin


def link_down(job, fault):
    n = job.hosts.names.index(fault.target)
    with _lasting(job, fault, lambda: job.hosts.plug(n)):
        begin = time.time()
        job.hosts.plug(n, state='down')
    return begin


def packets_lost(job, fault):
    n = job.hosts.names.index(fault.target)
    with _lasting(job, fault, lambda: job.hosts.lose(n, 0)):
        begin = time.time()
        job.hosts.lose(n, 0.3)
    return begin


def full_disk(job, fault):
    filler = job.disk / 'filler'
    with _lasting(job, fault, filler.unlink):
        begin = time.time()
        with open(filler, 'wb', buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        job.until(job.restarts, 'the disk is full')
    return begin


def deleted_image(job, fault):
    image = job.images / f'{fault.step:03d}.png'
    with _lasting(job, fault, lambda: image.with_name('gone').rename(image)):
        begin = time.time()
        image.rename(image.with_name('gone'))
        job.until(job.restarts, 'the image is missed')
    return begin


def damaged_checkpoint(job, fault):
    """Of two checkpoints the newer one, when a worker was killed and before the job begins again."""
    # On a busy machine steps are ahead of what is written meanwhile; a job whose only checkpoint is damaged is refused.
    job.until(lambda: len(job.checkpoints()) > 1, 'two checkpoints')
    begin = _signalled(signal.SIGKILL)(job, fault._replace(target='worker 0', step=max(fault.step, 2 * SAVED + 2)))
    job.until(job.restarts, 'a restart')
    file = job.checkpoints()[-1] / fault.target
    data = bytearray(file.read_bytes())
    if fault.kind == 'flipped bit':
        data[len(data) * fault.step // 100] ^= 1 << fault.step % 8
    file.write_bytes(data if fault.kind == 'flipped bit' else data[:len(data) // 2])
    return begin


def killed_launcher(job, fault):
    """The same command again, as soon as nothing is left of it."""
    job.reach(fault.step)
    begin = time.time()
    job.process.kill()
    wait_for(lambda: not job.left(), 'nothing is left of a job without its launcher', AFTER)
    job.process.wait()
    job.start()
    return begin


def killed_at_a_point(job, fault):
    taken = job.points / f'{fault.target}.taken'
    job.until(taken.exists, f'{fault.target} is reached')
    return taken.stat().st_ctime


def arm(job, fault):
    """Before the job starts: at the step of the fault, or at the save after so many steps, or at once."""
    arrival = {'update': fault.step, 'checkpoint': fault.step // SAVED, 'control': 1}[fault.target.partition('.')[0]]
    (job.points / fault.target).write_text(f'{int(signal.SIGKILL)} {arrival}')


HAPPEN = {
    'killed worker': _signalled(signal.SIGKILL), 'killed helper': _signalled(signal.SIGKILL),
    'stopped worker': _signalled(signal.SIGSTOP), 'stopped helper': _signalled(signal.SIGSTOP),
    'host lost': host_lost, 'link down': link_down, '30 % of packets lost': packets_lost, 'full disk': full_disk,
    'deleted image': deleted_image, 'truncated checkpoint': damaged_checkpoint, 'flipped bit': damaged_checkpoint,
    'killed launcher': killed_launcher, 'killed while saving': killed_at_a_point,
    'killed at a point': killed_at_a_point}


# --- what must hold

def weights_of(run):
    """The step and the weights, one after another, of a run's newest checkpoint."""
    step, arrays = newest(run)
    return step, np.concatenate([arrays['weights'][name].ravel() for name in sorted(arrays['weights'])])


def check(job, expected):
    """Waits for the job's end, and asserts that nothing tells it from an undisturbed one, as `Mode.tolerance` says."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        job.process.wait(DEADLINE)
    assert job.process.poll() == 0, f'exit status {job.process.poll()}\n{job.told()}'
    wait_for(lambda: not job.left(), 'no orphan is left', AFTER)
    assert job.files() == [], 'left behind'
    step, ours = weights_of(job.run)
    assert step == STEPS and np.isfinite(ours).all()
    difference = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    print(f'weights differ by {difference:.3g}, relative')
    if job.mode.tolerance:
        assert difference <= job.mode.tolerance
    else:
        np.testing.assert_array_equal(ours, expected)
