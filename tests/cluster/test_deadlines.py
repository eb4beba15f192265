"""Jobs in which something is waited for in vain: each ends in time, says who and what it was, and can begin again."""
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from support.hosts import three_hosts, wait_for, words_of
from support.jobs import HOROVOD, PRETRAIN, PROGRAMS, SERVERS, steps
from support.launcher import Launcher
from support.running import ROOT
from support.tiny import TINY

DEADLINE = 3  # seconds
WHOLE = 2 * DEADLINE + 12  # seconds until a job has ended whose process waits in vain, on a machine with much to do
LONG = [*TINY, 'name=job', 'train.length=100000', 'validation.every=100000', 'checkpoint.every=100000',
        f'runtime.deadline={DEADLINE}']
FAULT = [sys.executable, '-W', 'ignore', PROGRAMS / 'with_fault.py']


def begun(launcher, *words, least=6):
    """The launcher of a job that has written a record of this many steps."""
    job, run = launcher.start(*words), launcher.folder / 'runs' / 'job'
    launcher.until(lambda: (run / 'metrics.jsonl').exists() and (steps(run) or [0])[-1] >= least, 60, 'training begins')
    return job


def stop(launcher, *parts):
    """Stops a process, as a debugger does, or a host that swaps."""
    pid, = launcher.find(*parts)
    os.kill(pid, signal.SIGSTOP)


def ended(launcher, job, status=1):
    """What the launcher said of a job that has ended in time, and left nothing."""
    assert job.wait(WHOLE) == status, launcher.text('err')
    launcher.gone(10)
    return launcher.text('err')


def test_a_stopped_worker(launcher):
    """The other one names it, and the job begins again."""
    job = begun(launcher, *HOROVOD, '--max-restarts', 1, '--', *PRETRAIN, *LONG, 'train.length=100',
                'checkpoint.every=20', least=20)
    stop(launcher, 'HOROVOD_RANK=1')
    assert job.wait(60) == 0, launcher.text('err')
    launcher.gone(10)
    err = launcher.text('err')
    assert 'launch: worker 1 on ' in err and ' was stopped, by a signal such as SIGSTOP' in err
    told, = [line for line in err.splitlines() if line.startswith('launch: worker 0 ended itself: rank 0 on ')]
    assert f' longer than runtime.deadline allows ({DEADLINE} s): nothing is heard of rank 1 on ' in told
    assert 'launch: restart in ' in err
    log = launcher.log('worker-0')
    assert ' in fit\n' in log  # of Python
    assert re.search(r'^native thread \d+ .*\n/.*\n(/.*\n)*/.*/libmxnet\.so\(\w+\+0x', log, re.MULTILINE)


def test_what_else_hangs(tmp_path):
    """Three jobs at once, as they mostly wait."""
    checks, launchers = (stopped_server, hanging_image, hanging_disk), []
    for check in checks:
        (tmp_path / check.__name__).mkdir()
        launchers.append(Launcher(tmp_path / check.__name__))
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda check, one: check(one), checks, launchers))
    finally:
        for launcher in launchers:
            launcher.close()


def stopped_server(launcher):
    """No worker knows which server does not answer: the launcher does."""
    job = begun(launcher, *SERVERS, '--', *PRETRAIN, *LONG)
    stop(launcher, 'DMLC_ROLE=server')
    err = ended(launcher, job)
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


@pytest.mark.soak
@pytest.mark.skipif('SOAK' not in os.environ, reason='15 seconds, in `make soak`')
def test_a_cable_between_two_workers(tmp_path):
    """Which the launcher does not use, so that no host is lost: the network of the job alone."""
    with three_hosts(tmp_path / 'hosts') as hosts:
        (tmp_path / 'hostfile').write_text('host0\nhost1\n')
        with open(tmp_path / 'said', 'wb') as said:
            job = subprocess.Popen([sys.executable, ROOT / 'tools' / 'launch.py', *map(str, SERVERS), '-H', 'hostfile',
                                    '--interface', 'eth1', '--', *PRETRAIN, *LONG], cwd=tmp_path, stderr=said,
                                   env=hosts.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            run = tmp_path / 'runs' / 'job'
            wait_for(lambda: (run / 'metrics.jsonl').exists() and (steps(run) or [0])[-1] >= 6, 'training begins', 60)
            hosts.plug(1, interface=1, state='down')
            began = time.monotonic()
            assert job.wait(WHOLE) == 1, (tmp_path / 'said').read_text()
            print(f'{time.monotonic() - began:.1f} s')
            text = (tmp_path / 'said').read_text()
            assert ' ended itself: rank ' in text and 'was lost' not in text
            assert 'nothing is heard of rank 1 on host1 for ' in text or 'rank 0 does not answer: it is stopped' in text
            wait_for(lambda: not any(map(words_of, hosts.processes(0) + hosts.processes(1))), 'nothing is left', 10)
        finally:
            job.kill()
            job.wait()
