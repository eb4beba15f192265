"""Real jobs through tools/launch.py on this machine: sums over workers, mpirun, and training that loses a process."""
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.launcher import Launcher
from support.running import DIGITS, rounds
from support.tiny import TINY

pytestmark = pytest.mark.unmeasured

SLEEP = ['python', '-c', 'import time; print("ready", flush=True); time.sleep(600)']
SUM = """
import mxnet as mx
store = mx.kv.create('dist_sync')
store.init('x', mx.nd.zeros(3))
mx.nd.waitall()
store._barrier()
store.push('x', mx.nd.ones(3) * (store.rank + 1))
out = mx.nd.zeros(3)
store.pull('x', out)
print('sum', out.asnumpy().tolist(), 'of', store.num_workers)
"""
ALLREDUCE = """
import horovod.mxnet as hvd, mxnet as mx
for turn in range(2):
    hvd.init()
    total = hvd.allreduce(mx.nd.ones(3) * (hvd.rank() + 1), average=False)
    print('sum', total.asnumpy().tolist(), hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), flush=True)
    hvd.shutdown()
"""


def script(text):
    return ['python', '-W', 'ignore', '-c', text]


@pytest.mark.soak
def test_jobs_at_once_do_not_collide(tmp_path):
    jobs, launchers = rounds(2, 10), []
    for number in range(jobs):
        (tmp_path / str(number)).mkdir()
        launchers.append(Launcher(tmp_path / str(number)))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(lambda one: one.run('-n', 1, '-s', 1, *script(SUM), seconds=120), launchers))
    finally:
        for launcher in launchers:
            launcher.close()
    assert [out for out, _ in results] == ['sum [1.0, 1.0, 1.0] of 1\n'] * jobs


def offered(port):
    """A socket for which the kernel has this one port to give."""
    one = socket.socket()
    try:
        one.setsockopt(socket.IPPROTO_IP, 51, (port << 16 | port).to_bytes(4, sys.byteorder))  # IP_LOCAL_PORT_RANGE
    except OSError:
        pytest.skip('needs Linux 6.3, where a socket can choose the ports it is offered')
    return one


def test_the_schedulers_port_stays_ours_until_it_is_bound(launcher):
    """Nobody who asks the kernel for any port gets it, with or without SO_REUSEADDR, to listen or to connect."""
    process = launcher.start('-n', 1, '-s', 1, *SLEEP)
    launcher.until(lambda: 'ready' in launcher.text('out'), 20, 'ready')
    [pid] = launcher.find('DMLC_ROLE=scheduler')
    port = next(word for word in launcher.environment(pid) if word.startswith('DMLC_PS_ROOT_PORT=')).partition('=')[2]
    for reuse in (0, 1):
        with offered(int(port)) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            with pytest.raises(OSError, match='Address already in use'):
                one.bind(('127.0.0.1', 0))
    with socket.socket() as listener, offered(int(port)) as one:
        listener.bind(('127.0.0.1', 0))
        listener.listen()
        with pytest.raises(OSError, match='Cannot assign requested address'):
            one.connect(listener.getsockname())
    process.terminate()
    process.wait(10)


needs_mpi = pytest.mark.skipif(not shutil.which('mpirun') and os.environ.get('CI') != 'true',
                               reason='needs mpirun (Debian: openmpi-bin)')
here = pytest.mark.parametrize('kind', ['local', pytest.param('mpi', marks=needs_mpi)])  # of launchers, on this machine


@here
def test_parameter_servers_sum(launcher, kind):
    out, err = launcher.run('--launcher', kind, '-n', 2, '-s', 2, *script(SUM))
    assert out == launcher.log('worker-1') == 'sum [3.0, 3.0, 3.0] of 2\n' and 'network: lo' in err


@here
def test_horovod_sums(launcher, kind):
    pytest.importorskip('horovod')
    out, _ = launcher.run('--launcher', kind, '-n', 2, '--horovod', *script(ALLREDUCE))
    assert out == 'sum [3.0, 3.0, 3.0] 0 2 0 2\n' * 2
    assert launcher.log('worker-1') == 'sum [3.0, 3.0, 3.0] 1 2 1 2\n' * 2


@needs_mpi
def test_mpirun_and_failures(launcher):
    command = 'test "$DMLC_WORKER_ID" != 1 || { echo reason; exit 7; }; exec sleep 600'
    _, err = launcher.run('--launcher', 'mpi', '-n', 2, '-s', 1, 'sh', '-c', command, status=7)
    assert 'worker 1 on' in err and 'failed with exit code 7' in err and 'launch:   | reason' in err


@needs_mpi
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL])
def test_mpirun_leaves_nothing_and_shows_no_secret(launcher, number):
    process = launcher.start('--launcher', 'mpi', '-n', 2, '-s', 1, *SLEEP)
    launcher.until(lambda: 'ready' in launcher.text('out'), 30, 'ready')
    secret = next(word for pid in launcher.find('mpirun') for word in launcher.environment(pid)
                  if word.startswith('MXSIMMIM_LAUNCH=')).split()[-1]
    assert len(secret) == 64 and secret not in launcher.command_lines()
    assert not any(secret in ' '.join(launcher.environment(pid)) for pid in launcher.find('DMLC_NUM_SERVER=1'))
    process.send_signal(number)
    process.wait(15)
    launcher.gone(12)


# --- training that loses a process

TRAIN = [*TINY, 'name=tiny', 'model.drop_path=0', 'train.length=999999', 'validation.every=999999',
         'validation.pictures=0', 'checkpoint.every=999999', 'log.every=1', 'data.threads=1']


@pytest.mark.soak
# A server is killed in test_restarts.py as well, a rank in faults/test_faults.py.
@pytest.mark.parametrize('victim', ['worker', 'scheduler', 'launcher', 'server', 'rank'][:rounds(3, 5)])
def test_kill_9_at_a_random_step(tmp_path, victim):
    with ThreadPoolExecutor(3) as pool:  # a job waits more than it computes
        list(pool.map(lambda seed: kill_9(victim, seed, tmp_path / str(seed)), range(rounds(1, 5))))


def kill_9(victim, seed, folder):
    folder.mkdir()
    launcher = Launcher(folder)
    step = random.Random(f'{victim} {seed}').randrange(1, 40)
    print(f'seed {seed}: {victim} is killed at step {step}')
    kind = ['--horovod'] if victim == 'rank' else ['-s', 1]
    process = launcher.start('-n', 2, *kind, '--', 'python', '-W', 'ignore', '-m', 'mxsimmim', 'pretrain', DIGITS,
                             *TRAIN, f'seed={seed}')
    metrics = folder / 'runs' / 'tiny' / 'metrics.jsonl'

    def trains():
        assert process.poll() is None, launcher.text('err')
        return metrics.exists() and metrics.read_text().count('\n') >= step
    try:
        launcher.until(trains, 90, f'step {step}')
        own = {'worker': ['DMLC_ROLE=worker', f'DMLC_WORKER_ID={seed % 2}'], 'server': ['DMLC_ROLE=server'],
               'scheduler': ['DMLC_ROLE=scheduler'], 'rank': [f'HOROVOD_RANK={seed % 2}']}.get(victim)
        [pid] = launcher.find(*own) if own else [process.pid]
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        status = process.wait(15)
        launcher.gone(15 - (time.monotonic() - began))
        print(f'seed {seed}: all gone {time.monotonic() - began:.1f} s later')
        assert status == (-9 if victim == 'launcher' else 137)
        name = {'server': 'server 0', **dict.fromkeys(('worker', 'rank'), f'worker {seed % 2}')}.get(victim, victim)
        assert victim == 'launcher' or re.search(rf'launch: {name} on \S+ was killed by SIGKILL', launcher.text('err'))
    finally:
        launcher.close()
