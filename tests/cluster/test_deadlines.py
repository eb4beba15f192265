"""Jobs in which something is waited for in vain: each ends in time, says who and what it was, and can begin again."""
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.hosts import three_hosts, wait_for, words_of
from support.jobs import HOROVOD, MESSAGES, PRETRAIN, PROGRAMS, SERVERS, steps
from support.launcher import Launcher
from support.running import ROOT, command
from support.tiny import NETWORK, TINY

SOAK = (pytest.mark.soak, pytest.mark.skipif('SOAK' not in os.environ, reason='half a minute, in `make soak`'))
DEADLINE = 3  # seconds
WHOLE = 2 * DEADLINE + 12  # seconds until a job has ended whose process waits in vain, on a machine with much to do
LONG = [*TINY, 'name=job', 'train.length=100000', 'validation.every=100000', 'checkpoint.every=100000',
        f'runtime.deadline={DEADLINE}']
ONCE = ['train.length=150', 'checkpoint.every=20']  # of a job that is started again, and ends
FAULT = [sys.executable, '-W', 'ignore', PROGRAMS / 'with_fault.py']


def slow(test):
    """Marks a test that is one of `make soak` alone."""
    return SOAK[0](SOAK[1](test))


def begun(launcher, *words, least=6):
    """The launcher of a job that has written a record of this many steps."""
    job, run = launcher.start(*words), launcher.folder / 'runs' / 'job'
    launcher.until(lambda: (run / 'metrics.jsonl').exists() and (steps(run) or [0])[-1] >= least, 60, 'training begins')
    return job


def stop(launcher, *parts):
    """Stops a process, as a debugger does, or a host that swaps; returns its number."""
    pid, = launcher.find(*parts)
    os.kill(pid, signal.SIGSTOP)
    return pid


def pause(launcher, seconds, *parts):
    """Stops a process for so many seconds."""
    pid = stop(launcher, *parts)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def goes_on(launcher, job):
    """Asserts that a job makes steps after those that it has made."""
    run = launcher.folder / 'runs' / 'job'
    done = steps(run)[-1]
    launcher.until(lambda: steps(run)[-1] > done + 6, 20, f'steps after {done}')
    assert job.poll() is None and ' ended itself' not in launcher.text('err')


def ended(launcher, job, status=1):
    """What the launcher said of a job that has ended in time, and left nothing."""
    assert job.wait(WHOLE) == status, launcher.text('err')
    launcher.gone(10)
    return launcher.text('err')


@pytest.mark.parametrize('rank, other, why', [
    (0, 1, 'rank 0 does not answer: it is stopped, or cut off'),  # which the others hear of each other through
    pytest.param(1, 0, 'nothing is heard of rank 1 on ', marks=SOAK)], ids=['rank 0', 'rank 1'])
def test_a_stopped_worker(launcher, rank, other, why):
    """The other one names it, and the job begins again."""
    job = begun(launcher, *HOROVOD, '--max-restarts', 1, '--', *PRETRAIN, *LONG, *ONCE, least=20)
    stop(launcher, f'HOROVOD_RANK={rank}')
    assert job.wait(60) == 0, launcher.text('err')
    launcher.gone(10)
    err = launcher.text('err')
    assert f'launch: worker {rank} on ' in err and ' was stopped, by a signal such as SIGSTOP' in err
    told, = [line for line in err.splitlines() if line.startswith(f'launch: worker {other} ended itself: rank {other}')]
    assert f' longer than runtime.deadline allows ({DEADLINE} s): {why}' in told
    assert 'launch: restart in ' in err
    log = launcher.log(f'worker-{other}')
    assert ' in fit\n' in log  # of Python
    assert re.search(r'^native thread \d+ .*\n/.*\n(/.*\n)*/.*/libmxnet\.so\(\w+\+0x', log, re.MULTILINE)


def test_what_else_hangs(tmp_path):
    """Four jobs at once, as they mostly wait."""
    checks, launchers = (stopped_server, hanging_image, hanging_disk, nobody_left), []
    for check in checks:
        (tmp_path / check.__name__).mkdir()
        launchers.append(Launcher(tmp_path / check.__name__))
    try:
        with ThreadPoolExecutor(len(checks)) as pool:
            list(pool.map(lambda check, one: check(one), checks, launchers))
    finally:
        for launcher in launchers:
            launcher.close()


def stopped_server(launcher):
    """One that answers slowly is waited for; which one does not answer no worker knows: the launcher does."""
    job = begun(launcher, *SERVERS, '--', *PRETRAIN, *LONG)
    for _ in range(2):
        pause(launcher, DEADLINE / 2, 'DMLC_ROLE=server')
        goes_on(launcher, job)
    stop(launcher, 'DMLC_ROLE=server')
    err = ended(launcher, job)
    assert f'longer than runtime.deadline allows ({DEADLINE} s)' in err
    # What is ended by the launcher says where it was.
    assert ' in run_server\n' in launcher.log('scheduler-0') and ' in run_server\n' not in launcher.log('server-0')
    assert 'launch: server 0 on ' in err and ' was stopped, by a signal such as SIGSTOP' in err
    assert ' ended itself: rank ' in err and ': all workers wait: for a server' in err


def hanging_image(launcher):
    """A file of a file system whose server is gone, here a FIFO, is named by the worker that reads it."""
    random, images = np.random.default_rng(0), launcher.folder / 'images'
    images.mkdir()
    for number in range(64):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype='uint8')).save(images / f'{number:02d}.png')
    job = begun(launcher, *HOROVOD, '--', *PRETRAIN, *LONG, f'data.path={images}', 'data.val_fraction=0')
    os.mkfifo(launcher.folder / 'fifo')
    os.replace(launcher.folder / 'fifo', images / '33.png')
    err = ended(launcher, job)
    told, = [line for line in err.splitlines() if ' ended itself: ' in line]
    assert f' s for data ({images}/33.png is being read for {DEADLINE}' in told


def hanging_disk(launcher):
    """It does not say that it has what was written of a checkpoint."""
    job = begun(launcher, '-n', 1, '--horovod', '--', *FAULT, 'hanging-disk', *PRETRAIN[5:], *LONG,
                'checkpoint.every=10')
    err = ended(launcher, job)
    assert 'launch: worker 0 ended itself: rank 0 on ' in err
    assert re.search(r' s for the checkpoint of step 10 after step \d+, longer than runtime.deadline allows '
                     fr'\({DEADLINE} s\)', err), err
    assert ' in hanging\n' in launcher.log('worker-0')


def nobody_left(launcher):
    """A server waits for ever, if its worker is stopped and its launcher killed: the agent ends it within 8 s."""
    program = ('import os, signal, sys; from mxsimmim.parallel.server import serve; '
               'os.environ["DMLC_ROLE"] == "worker" and os.kill(os.getpid(), signal.SIGSTOP); sys.exit(serve())')
    job = launcher.start('-n', 1, '-s', 1, '--', sys.executable, '-W', 'ignore', '-c', program)
    worker, = launcher.find('DMLC_ROLE=worker')
    server, = launcher.find('DMLC_ROLE=server')
    launcher.until(lambda: state(worker) == 'T' and loaded(server, 'libmxnet.so'), 30, 'one is stopped, one serves')
    job.kill()
    began = time.monotonic()
    launcher.gone(15)
    assert time.monotonic() - began > 4  # the worker, were it alive, could have saved
    assert ' in run_server\n' in launcher.log('server-0')


def state(pid):
    """That of a process, T if it is stopped."""
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]


def loaded(pid, name):
    """Whether a process has a library in memory."""
    return name in Path(f'/proc/{pid}/maps').read_text()


@slow
def test_a_hanging_import(launcher):
    """Of one worker, for which the other one waits as long; the next time it comes."""
    job = launcher.start(*HOROVOD, '--max-restarts', 1, '--', *FAULT, 'hanging-import', *PRETRAIN[5:], *LONG, *ONCE,
                         'runtime.deadline=2')
    assert job.wait(120) == 0, launcher.text('err')
    launcher.gone(10)
    err = launcher.text('err')
    assert re.search(r'launch: worker 1 ended itself: rank 1 on \S+ has waited 2\d(\.\d+)? s for the import of MXNet '
                     r'and of what needs it after step 0, longer than runtime.deadline allows \(20 s\); ', err), err
    assert 'launch: restart in 1 s' in err
    assert ' in find_spec\n' in launcher.log('worker-1')


@slow
def test_a_long_pause_within_the_deadline(launcher):
    """Longer than the 30 s that Gloo waits for a message if nobody tells it otherwise."""
    job = begun(launcher, *HOROVOD, *MESSAGES, '--', *PRETRAIN, *LONG, 'runtime.deadline=60')
    pause(launcher, 40, 'HOROVOD_RANK=1')
    goes_on(launcher, job)
    job.terminate()
    assert job.wait(30) == 143


@slow
@pytest.mark.parametrize('option, what', [('--eval', r'data \(\S+\.png is being read for \d'),
                                          ('--check', r'image \S+\.png after step 0')])
def test_a_hanging_image_of_no_training(launcher, option, what):
    """An evaluation by two workers, and a check."""
    images = launcher.folder / 'images'
    random = np.random.default_rng(0)
    for number in range(64):
        path = images / f'class-{number % 2}' / f'{number:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype='uint8')).save(path)
    words = [*command('finetune', ROOT / 'conf' / 'finetune_digits.yaml'), *NETWORK, f'data.path={images}',
             'data.val_fraction=0.5', 'data.labels_per_class=0', 'train.batch_size=8', 'train.length=1', 'name=job',
             'optim.warmup=0', 'runtime.threads=1']
    launcher.run('-n', 1, '--horovod', '--', *words)
    os.mkfifo(launcher.folder / 'fifo')
    for path in images.rglob('*.png'):
        path.unlink()
        os.link(launcher.folder / 'fifo', path)
    job = launcher.start(*HOROVOD, '--', *words, 'runtime.deadline=1', option)
    assert job.wait(60) == 1
    launcher.gone(10)
    assert re.search(r'launch: worker (\d) ended itself: rank \1 on \S+ has waited 1\d(\.\d+)? s for ' + what,
                     launcher.text('err')), launcher.text('err')
    assert ' in read\n' in launcher.log('worker-0') + launcher.log('worker-1')


@slow
@pytest.mark.parametrize('cut, mend', [
    (lambda hosts: hosts.plug(1, 1, 'down'), lambda hosts: hosts.plug(1, 1)),
    (lambda hosts: hosts.lose(1, 1.0, 1), lambda hosts: hosts.lose(1, 0, 1))], ids=['down', 'tc'])
def test_a_cable_between_two_workers(tmp_path, cut, mend):
    """Which the launcher does not use, so that no host is lost: the network of the job alone. It is mended."""
    with three_hosts(tmp_path / 'hosts') as hosts:
        (tmp_path / 'hostfile').write_text('host0\nhost1\n')
        with open(tmp_path / 'said', 'wb') as said:
            job = subprocess.Popen([sys.executable, ROOT / 'tools' / 'launch.py', *map(str, SERVERS), '-H', 'hostfile',
                                    '--interface', 'eth1', '--max-restarts', '1', '--', *PRETRAIN, *LONG, *ONCE],
                                   cwd=tmp_path, stderr=said, env=hosts.environ, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL)
        try:
            run = tmp_path / 'runs' / 'job'
            wait_for(lambda: (run / 'metrics.jsonl').exists() and (steps(run) or [0])[-1] >= 6, 'training begins', 60)
            cut(hosts)
            began = time.monotonic()
            wait_for(lambda: 'launch: restart in ' in (tmp_path / 'said').read_text(), 'it has ended', WHOLE)
            print(f'{time.monotonic() - began:.1f} s')
            mend(hosts)
            assert job.wait(60) == 0, (tmp_path / 'said').read_text()
            assert steps(run)[-1] == 150
            text = (tmp_path / 'said').read_text()
            assert ' ended itself: rank ' in text and 'was lost' not in text
            assert 'nothing is heard of rank 1 on host1 for ' in text or 'rank 0 does not answer: it is stopped' in text
            wait_for(lambda: not any(map(words_of, hosts.processes(0) + hosts.processes(1))), 'nothing is left', 10)
        finally:
            job.kill()
            job.wait()
