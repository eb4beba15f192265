"""Jobs of several processes: how they are started, and what their runs hold."""
import json
import os
import signal
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

from .hosts import wait_for
from .running import DIGITS, ROOT, command
from .tiny import TEN_STEPS

PROGRAMS = ROOT / 'tests' / 'cluster' / 'programs'
PRETRAIN = command('pretrain', DIGITS)
SERVERS, HOROVOD = ['-n', 2, '-s', 1], ['-n', 2, '--horovod']
MESSAGES = ['--env', 'MXSIMMIM_FIRST_RANKS=']  # as if each of Horovod's ranks had a host for itself

KEYS = [*TEN_STEPS, 'train.length=60', 'validation.every=1000', 'checkpoint.every=10', 'log.every=1', 'name=job']
SLOW = [sys.executable, '-W', 'ignore', PROGRAMS / 'with_fault.py', 'slow', 'pretrain', DIGITS, *KEYS]  # 50 ms a step


def undisturbed(folder):
    """The losses of SLOW as two ranks to which nothing happens."""
    subprocess.run([sys.executable, str(ROOT / 'tools' / 'launch.py'), '-n', '2', '--horovod', '--', *map(str, SLOW)],
                   cwd=folder, check=True, timeout=90, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return recorded(folder / 'runs' / 'job', 'loss')


def reach(folder, step, name='job'):
    """Waits until a run in `folder` has logged a step."""
    def reached():
        run = folder / 'runs' / name
        return (run / 'metrics.jsonl').exists() and max(steps(run), default=0) >= step
    wait_for(reached, f'step {step}', 90)


def vector(run, step, group='weights'):
    """All arrays of one kind in the checkpoint of a step, one after another."""
    arrays = load_file(run / 'checkpoints' / f'step-{step:08d}' / f'{group}.safetensors')
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def recorded(run, name):
    """The values of one metric."""
    with open(run / 'metrics.jsonl') as file:
        return [row[name] for row in map(json.loads, file) if name in row]


def steps(run):
    """The steps whose loss was logged."""
    with open(run / 'metrics.jsonl') as file:
        return [row['step'] for row in map(json.loads, file) if 'loss' in row]


def newest(run):
    """Step and arrays of the newest checkpoint."""
    path = sorted((run / 'checkpoints').glob('step-*'))[-1]
    return int(path.name[5:]), {file.stem: load_file(file) for file in path.glob('*.safetensors')}


def same(ours, expected):
    """Asserts that two checkpoints have the same arrays, bit for bit."""
    assert set(ours) == set(expected)
    for group, arrays in expected.items():
        assert set(ours[group]) == set(arrays), group
        for name, array in arrays.items():
            np.testing.assert_array_equal(ours[group][name], array, err_msg=f'{group} {name}')


def assert_close(ours, expected):
    """The arrays of two checkpoints."""
    for group, arrays in expected.items():
        for name, array in arrays.items():
            np.testing.assert_allclose(ours[group][name], array, rtol=1e-4, atol=1e-6, err_msg=f'{group} {name}')


def assert_rank_1_is_named(launcher, *words):
    """Asserts that a job of Horovod's ranks ends when rank 1, which holds a part of the model, is killed."""
    job = launcher.start(*words, 'train.length=5000', 'validation.every=5000', 'checkpoint.every=5000', 'name=job')
    run = launcher.folder / 'runs' / 'job'
    launcher.until(lambda: (run / 'metrics.jsonl').exists() and (steps(run) or [0])[-1] >= 9, 60, 'step 9')
    [pid] = launcher.find('HOROVOD_RANK=1')
    os.kill(pid, signal.SIGKILL)
    assert job.wait(30) != 0
    launcher.gone(10)
    told = [line for line in launcher.text('err').splitlines() if line.startswith('launch: worker')]
    assert len(told) == 1 and 'worker 1' in told[0] and 'was killed by SIGKILL' in told[0], launcher.text('err')
