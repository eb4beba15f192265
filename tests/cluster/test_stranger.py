"""What a stranger, or one of the job who does not hold its key, can make of our parameter servers, and MXNet's.

And that the job's own commands arrive: an asynchronous job goes on with its moments where it was stopped.
"""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import stranger, tiny
from support.jobs import PRETRAIN
from support.running import rounds

from mxsimmim.parallel import protocol

pytestmark = pytest.mark.unmeasured

COMMANDS = [sys.executable, '-W', 'ignore', Path(__file__).parent / 'programs' / 'commands.py']
TINY = [*tiny.TINY, 'optim.schedule=cosine', 'optim.base_lr=1e-2', 'optim.clip_grad=null', 'validation.every=60',
        'validation.images=51', 'checkpoint.every=20', 'data.threads=1']
ASYNC = PRETRAIN + TINY + ['train.store=dist_async', 'name=many']
DROPPED = 'server: dropped a command (head 0, '


def process(launcher, role):
    return launcher.find(f'DMLC_ROLE={role}')[0]


def attack(launcher, bodies, dropped):
    """A stranger's commands; waits until the server's log has `dropped` lines that say so."""
    [address] = stranger.listening(process(launcher, 'server'))
    stranger.send(address, bodies)
    launcher.until(lambda: launcher.log('server-0').count(DROPPED) == dropped, 20, f'{dropped} dropped commands')


def difference(run, other, name):
    """Relative, in the L2 norm, of what both have: servers also keep the weights that workers compute with."""
    ours, theirs = (load_file(folder / 'checkpoints' / 'step-00000060' / f'{name}.safetensors')
                    for folder in (run, other))
    assert set(ours) >= set(theirs)
    ours, theirs = (np.concatenate([arrays[key].ravel() for key in sorted(theirs)]) for arrays in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The folder of a run of one process, which updates by itself."""
    folder = tmp_path_factory.mktemp('alone')
    subprocess.run(PRETRAIN + TINY + ['name=one'], cwd=folder, check=True, timeout=120)
    return folder / 'runs' / 'one'


@pytest.mark.parametrize('servers', ['stock', 'ours'])
@pytest.mark.parametrize('inside', [False, True], ids=['stranger', 'worker without the key'])
def test_a_poisoned_pickle(launcher, servers, inside):
    """The same bytes: MXNet's server opens them, which shows that they are well-formed, and ours does not."""
    poison = stranger.POISON.format(launcher.folder / 'poisoned')
    job = launcher.start('-n', 1, '-s', 1, '--', *COMMANDS, servers, poison if inside else '')
    launcher.until(lambda: 'ready' in launcher.text('out'), 30, 'ready')
    if not inside:
        [address] = stranger.listening(process(launcher, 'server'))
        stranger.send(address, [poison.encode()])
    done = (launcher.folder / 'poisoned').exists if servers == 'stock' else lambda: DROPPED in launcher.log('server-0')
    launcher.until(done, 20, 'the server has read the command')
    (launcher.folder / 'go').mkdir()
    assert job.wait(30) == 0, launcher.text('err')
    assert (launcher.folder / 'poisoned').exists() == (servers == 'stock')
    if servers == 'ours':
        assert launcher.log('server-0').count(f'{DROPPED}{len(poison)} bytes): not signed with the key') == 1


def test_strangers_change_nothing(launcher, alone):
    """Every kind of command that must be dropped, in the middle of an asynchronous job, which then ends as if alone."""
    job = launcher.start('-n', 1, '-s', 1, '--', *ASYNC)
    metrics = launcher.folder / 'runs' / 'many' / 'metrics.jsonl'
    launcher.until(lambda: metrics.exists() and metrics.read_text(), 60, 'the first loss')
    worker, server = process(launcher, 'worker'), process(launcher, 'server')
    os.kill(worker, signal.SIGSTOP)
    [path] = (word.partition('=')[2] for word in launcher.environment(server) if word.startswith(protocol.KEY_FILE))
    key = protocol.job_key({protocol.KEY_FILE: path})
    number, last = time.time_ns(), 2 ** 62
    old, new = (protocol.sign({}, n, key).encode() for n in (1, number))
    poisoned = {'config': {}, 'layout': [0, 0, 1], 'decays': [], 'workers': 1, 'per_epoch': 1, 'total': 1, 'updates': 0}
    attack(launcher, [
        stranger.POISON.format(launcher.folder / 'poisoned').encode(), b'',
        b'\xff\xfe' * 100, b'\xff' * 64 + b'[1, {}]',  # not UTF-8
        b'x' * (16 << 20),
        new[:40], new[:-1], new[:64], b'0' * 64 + new[64:],
        protocol.sign(poisoned, last, b'the key of another job').encode(),
        new[:64] + new[64:].replace(b'{}', b'{"updates": 0}'),
        old,  # of this key, but not younger than the job's own
    ], dropped=12)
    assert launcher.log('server-0').count('not signed with the key of this job') == 11
    assert 'command number 1 came again' in launcher.log('server-0')
    attack(launcher, [new, new], dropped=13)  # taken once: it was signed; what goes over the wire can be sent again
    assert f'command number {number} came again' in launcher.log('server-0')
    assert not (launcher.folder / 'runs' / 'many' / 'checkpoints' / 'step-00000060').exists()
    os.kill(worker, signal.SIGCONT)
    assert job.wait(60) == 0, launcher.text('err')
    assert not (launcher.folder / 'poisoned').exists()
    assert difference(launcher.folder / 'runs' / 'many', alone, 'weights') < 1e-5
    assert difference(launcher.folder / 'runs' / 'many', alone, 'optimizer') < 1e-5


def test_sockets_listen_on_the_interface_of_the_job(launcher):
    job = launcher.start('-n', 2, '-s', 2, '--', *COMMANDS, 'ours', '')
    launcher.until(lambda: launcher.text('out').count('ready') == 1, 30, 'ready')
    pids = [pid for role in ('scheduler', 'server', 'worker') for pid in launcher.find(f'DMLC_ROLE={role}')]
    found = [address for pid in pids for address, _ in stranger.listening(pid)]
    (launcher.folder / 'go').mkdir()
    assert job.wait(30) == 0, launcher.text('err')
    assert found == ['127.0.0.1'] * 5


@pytest.mark.parametrize('role', ['server', 'scheduler'])
@pytest.mark.parametrize('content, mode, message', [
    (None, None, 'MXSIMMIM_KEY_FILE is not set: .* start it with tools/launch.py'),
    ('00' * 32, 0o640, 'others than its owner may read it: chmod 600'),
    ('00' * 15, 0o600, 'a key has at least 16 bytes, as hexadecimal digits'),
    ('not a key', 0o600, 'a key has at least 16 bytes, as hexadecimal digits')])
def test_without_a_key_there_is_no_server(tmp_path, role, content, mode, message):
    environ = {**os.environ, 'DMLC_ROLE': role, 'DMLC_SERVER_ID': '0', 'DMLC_NUM_WORKER': '1', 'DMLC_NUM_SERVER': '1',
               'DMLC_PS_ROOT_URI': '127.0.0.1', 'DMLC_PS_ROOT_PORT': '9'}
    environ.pop(protocol.KEY_FILE, None)
    if content:
        path = tmp_path / 'key'
        path.write_text(content)
        path.chmod(mode)
        environ[protocol.KEY_FILE] = str(path)
    done = subprocess.run(list(map(str, ASYNC)), cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True,
                          timeout=60)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert re.match(f'mxsimmim: error: .*{message}', line), line


@pytest.mark.soak
@pytest.mark.parametrize('launch', [
    pytest.param(['-n', 1, '-s', 2, '--env', 'MXNET_KVSTORE_BIGARRAY_BOUND=100'], id='2 servers with parts of arrays'),
    pytest.param(['-n', 1, '-s', 1], id='1 server')][:rounds(1, 2)])
def test_moments_outlive_the_job(launcher, alone, launch):
    """One worker has no races: weights and moments are those of a process that updates by itself.

    Also when the job was killed on the way: new servers, with the moments of the checkpoint.
    """
    run = launcher.folder / 'runs' / 'many'
    job = launcher.start(*launch, '--', *ASYNC)
    launcher.until((run / 'checkpoints' / 'step-00000020').exists, 60, 'a checkpoint')
    os.kill(process(launcher, 'worker'), signal.SIGKILL)
    assert job.wait(30) != 0
    launcher.gone(10)
    assert not (run / 'checkpoints' / 'step-00000060').exists()
    [*_, last] = sorted((run / 'checkpoints').glob('step-*'))
    moments = load_file(last / 'optimizer.safetensors')
    assert moments and all(np.abs(moment).max() > 0 for moment in moments.values())
    launcher.run(*launch, '--', *ASYNC)
    assert f'going on from runs/many/checkpoints/{last.name}' in launcher.text('out') + launcher.text('err')
    for name in ('weights', 'optimizer'):
        assert difference(run, alone, name) < 1e-5
