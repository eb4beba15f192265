"""However many processes share the work, and however they agree: the weights are those of one process."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hosts import three_hosts
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / 'programs'
COMMAND = [sys.executable, '-W', 'ignore', '-m', 'mxsimmim', 'pretrain', ROOT / 'conf' / 'digits.yaml']
TINY = ['model.img_size=16', 'model.patch_size=4', 'model.embed_dim=16', 'model.depth=2', 'model.num_heads=2',
        'model.drop_path=0.2', 'mask.patch_size=4', 'data.path=digits', 'data.val_fraction=0.1', 'train.batch_size=32',
        'train.length=10', 'optim.schedule=constant', 'optim.warmup=0', 'optim.base_lr=1e-2', 'optim.clip_grad=0.5',
        'validation.every=10', 'validation.images=51', 'validation.pictures=2', 'checkpoint.every=10', 'log.every=3',
        'train.check_replicas=2', 'runtime.threads=1', 'data.threads=1']
SGD = ['optim.type=sgd', 'optim.clip_grad=null', 'optim.base_lr=1']
WIDE = ['model.embed_dim=320', 'model.num_heads=4', 'optim.base_lr=1e-3']  # has arrays that are exchanged by themselves
SERVERS, HOROVOD = ['-n', 2, '-s', 1], ['-n', 2, '--horovod']
MESSAGES = ['--env', 'MXSIMMIM_FIRST_RANKS=']  # as if each of Horovod's ranks had a host for itself
TWO_DEVICES = 'devices=[cpu(0),cpu(1)]'


def weights(run):
    arrays = load_file(run / 'checkpoints' / 'step-00000010' / 'weights.safetensors')
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def recorded(run, name):
    with open(run / 'metrics.jsonl') as file:
        return [row[name] for row in map(json.loads, file) if name in row]


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """Runs of one process, made when asked for: the folder of the run with these further keys."""
    folder, made = tmp_path_factory.mktemp('alone'), {}

    def run(keys):
        if keys not in made:
            made[keys] = folder / 'runs' / f'run{len(made)}'
            subprocess.run(list(map(str, COMMAND)) + TINY + list(keys) + [f'name={made[keys].name}'], cwd=folder,
                           check=True, timeout=120)
        return made[keys]
    return run


@pytest.mark.parametrize('launch, keys, changes', [
    (SERVERS, [], []),
    (['-n', 2, '-s', 2], [], []),
    (['-n', 3, '-s', 1], [], []),
    (['-n', 3, '-s', 2], ['train.store=dist_device_sync'], []),
    (SERVERS, ['train.store=dist_device_sync'], []),
    (SERVERS, [TWO_DEVICES], []),
    (SERVERS, ['train.accumulate=2'], []),
    (SERVERS, ['data.shares=[3,1]'], []),
    (SERVERS + ['--p3'], [], []),
    (SERVERS, ['train.aggregation=local_sgd', 'train.local_steps=1'], SGD),
    (SERVERS, [], WIDE),
    (HOROVOD, [], []),
    (HOROVOD, [TWO_DEVICES], WIDE),
    (['-n', 3, '--horovod'], [], WIDE),
    (HOROVOD + MESSAGES, [], WIDE),
    (HOROVOD + MESSAGES, [TWO_DEVICES], []),
    (HOROVOD, ['data.shares=[3,1]', 'train.accumulate=2'], []),
    (HOROVOD, ['train.aggregation=local_sgd', 'train.local_steps=1', TWO_DEVICES], SGD),
], ids=lambda value: ' '.join(map(str, value)) or '-')
def test_weights_are_those_of_one_process(launcher, alone, launch, keys, changes):
    """10 steps: weights to 1e-5 in the L2 norm; the training loss, and that of 51 held-out images in uneven parts."""
    launcher.run(*launch, '--', *COMMAND, *TINY, *keys, *changes, 'name=many')
    many, one = launcher.folder / 'runs' / 'many', alone(tuple(changes))
    expected = weights(one)
    assert np.linalg.norm(weights(many) - expected) / np.linalg.norm(expected) < 1e-5
    for name in ('loss', 'val_loss', 'val_avg_dist'):
        np.testing.assert_allclose(recorded(many, name), recorded(one, name), rtol=1e-5)


def test_hosts_of_several_horovod_ranks(launcher, alone, tmp_path):
    """Two on one host, one on another: between hosts travels what two ranks would send each other, not three."""
    with three_hosts(tmp_path / 'hosts') as hosts:
        (tmp_path / 'hostfile').write_text('host0 slots=2\nhost1\n')
        before = hosts.traffic()[1][0]
        launcher.run('-n', 3, '-H', tmp_path / 'hostfile', '--horovod', '--', *COMMAND, *TINY, *WIDE, 'name=many',
                     env=hosts.environ)
        sent = hosts.traffic()[1][0] - before
    many, one = launcher.folder / 'runs' / 'many', alone(tuple(WIDE))
    expected = weights(one)
    assert np.linalg.norm(weights(many) - expected) / np.linalg.norm(expected) < 1e-5
    np.testing.assert_allclose(recorded(many, 'loss'), recorded(one, 'loss'), rtol=1e-5)
    print('megabytes', sent / 1e6, 'of gradients', 10 * expected.nbytes / 1e6)
    assert sent < 1.2 * 10 * expected.nbytes


@pytest.mark.parametrize('launch, store, devices', [
    (['-n', 2, '-s', 1], 'dist_sync', 2), (['-n', 3, '-s', 2], 'dist_sync', 1),
    (['-n', 2, '-s', 2], 'dist_device_sync', 2), (HOROVOD, 'horovod', 2), (HOROVOD + MESSAGES, 'horovod', 2)])
def test_twenty_starts(launcher, launch, store, devices):
    """Of the races among MXNet's first pushes and pulls, each shows within a few starts."""
    words = launcher.run(*launch, '--', sys.executable, '-W', 'ignore', PROGRAMS / 'repeat.py', store, 20, devices,
                         seconds=180)
    assert 'ok 20' in words[0] + words[1]


@pytest.mark.parametrize('launch, store', [(SERVERS, 'dist_sync'), (HOROVOD, 'horovod')])
def test_one_key_for_several_arrays(launcher, launch, store):
    """MXNet adds one worker's second array to another's first where both are under way under one key."""
    launcher.run(*launch, '--', sys.executable, '-W', 'ignore', PROGRAMS / 'one_key.py', store)


@pytest.mark.parametrize('launch, store', [(SERVERS, 'dist_sync'), (HOROVOD, 'horovod')])
def test_two_bits_on_the_wire(launcher, launch, store):
    """The closed form, computed in each worker for all of them."""
    launcher.run(*launch, '--', sys.executable, '-W', 'ignore', PROGRAMS / 'two_bits.py', store)


def test_half_precision_on_the_wire(launcher, alone):
    """float16 has 11 bits: gradients are off by 2**-12 at most, the weights after 10 steps by hardly more."""
    launcher.run(*HOROVOD, '--', *COMMAND, *TINY, 'train.compression=fp16', 'name=many')
    expected = weights(alone(()))
    difference = np.linalg.norm(weights(launcher.folder / 'runs' / 'many') - expected) / np.linalg.norm(expected)
    assert 1e-8 < difference < 1e-3
