"""However many processes share the work, and however they agree: the weights are those of one process."""
import subprocess
import sys
from typing import List, NamedTuple, Tuple

import numpy as np
import pytest
from support.hosts import three_hosts
from support.jobs import HOROVOD, MESSAGES, PRETRAIN, PROGRAMS, SERVERS, recorded, vector
from support.running import BASE, command, rounds
from support.tiny import DETECTOR, SEGMENTER, TEN_STEPS

pytestmark = pytest.mark.unmeasured

SGD = ['optim.type=sgd', 'optim.clip_grad=null', 'optim.base_lr=1']
TENSOR = ['parallel.tensor=2']
WIDE = ['model.embed_dim=320', 'model.num_heads=4', 'optim.base_lr=1e-3']  # has arrays that are exchanged by themselves
TWO_DEVICES, FOUR_DEVICES = 'devices=[cpu(0),cpu(1)]', 'devices=[cpu(0),cpu(1),cpu(2),cpu(3)]'
FOUR, PIPELINE = ['-n', 4, '--horovod'], ['parallel.pipeline=2', 'parallel.micro_batches=4']
SWIN = ['model.type=swin', 'model.img_size=32', 'model.embed_dim=8', 'model.depths=[2,1]', 'model.num_heads=[1,2]',
        'model.window_size=4']


UNEVEN = (1, 3), 'rank 0 on host0 (part 1 of 2), rank 3 on host1 (part 2 of 2), rank 1 on host1 (part 1 of 2), rank 2'


class Task(NamedTuple):
    """What is trained, and what of its evaluation must be the same, to a tolerance."""
    words: List[str]
    steps: int
    values: Tuple[str, ...]
    tolerance: float


TASKS = {  # a detector is evaluated by the order of scores, where rounding sometimes decides
    'pretrain': Task(PRETRAIN + TEN_STEPS, 10, ('val_loss', 'val_avg_dist'), 1e-5),
    'segment': Task(command('finetune', BASE) + SEGMENTER, 8, ('val_miou', 'val_pixel_accuracy', 'val_loss'), 1e-3),
    'detect': Task(command('finetune', BASE) + DETECTOR, 4, ('val_box_ap', 'val_mask_ap50'), 1e-3),
}


def weights(run):
    return vector(run, 10)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """Runs of one process, made when asked for: the folder of the run with these further keys, of a task."""
    folder, made = tmp_path_factory.mktemp('alone'), {}

    def run(keys, task='pretrain'):
        if (task, keys) not in made:
            made[task, keys] = folder / 'runs' / f'run{len(made)}'
            subprocess.run(TASKS[task].words + list(keys) + [f'name={made[task, keys].name}'], cwd=folder,
                           check=True, timeout=120)
        return made[task, keys]
    return run


CASES = [
    (['-n', 3, '-s', 2], ['train.store=dist_device_sync'], []),
    (SERVERS, [TWO_DEVICES], []),
    (SERVERS + ['--p3'], [], []),
    (SERVERS, [], WIDE),
    (HOROVOD, [TWO_DEVICES], WIDE),
    (['-n', 3, '--horovod'], [], WIDE),
    (HOROVOD + MESSAGES, [], WIDE),
    (SERVERS, ['train.aggregation=local_sgd', 'train.local_steps=1', FOUR_DEVICES, *PIPELINE, *TENSOR], SGD),
    (HOROVOD, [TWO_DEVICES, *PIPELINE], WIDE),
    (FOUR, [*PIPELINE, 'train.accumulate=2', 'data.worker_weights=[3,1]'], []),
    (HOROVOD, [TWO_DEVICES, *TENSOR], WIDE),
    (HOROVOD + MESSAGES, TENSOR, []),
    (HOROVOD, ['data.worker_weights=[3,1]', 'train.accumulate=2'], []),
    (HOROVOD, ['train.aggregation=local_sgd', 'train.local_steps=1', TWO_DEVICES], SGD),
]
IN_SOAK = [  # there is more, or as much, among the others, in test_layout_jobs.py or in test_finetune_jobs.py
    (SERVERS, [], []),
    (['-n', 2, '-s', 2], [], []),
    (['-n', 3, '-s', 1], [], []),
    (SERVERS, ['train.store=dist_device_sync'], []),
    (SERVERS, [TWO_DEVICES, *TENSOR], []),
    (SERVERS, ['train.accumulate=2'], []),
    (SERVERS, ['data.worker_weights=[3,1]'], []),
    (SERVERS, ['train.aggregation=local_sgd', 'train.local_steps=1'], SGD),
    (SERVERS, [TWO_DEVICES, *PIPELINE], []),
    (SERVERS, ['train.aggregation=local_sgd', 'train.local_steps=1', TWO_DEVICES, *PIPELINE], SGD),
    (SERVERS, ['train.aggregation=local_sgd', 'train.local_steps=1', TWO_DEVICES, *TENSOR], SGD),
    (HOROVOD, [], []),
    (HOROVOD + MESSAGES, [TWO_DEVICES], []),
    (HOROVOD, PIPELINE, WIDE),
    (HOROVOD, [*TENSOR, 'train.accumulate=2'], WIDE),
    (FOUR, PIPELINE, SWIN),
    (FOUR, [*TENSOR, *PIPELINE], [*SWIN, 'model.num_heads=[2,2]', 'model.drop_path=0.2']),
]


LOCAL_SGD = ['train.aggregation=local_sgd', 'train.local_steps=1']
OTHER_TASKS = [
    ('segment', SERVERS + ['--p3'], [], []),
    ('segment', HOROVOD, ['data.worker_weights=[3,1]'], []),
    ('detect', SERVERS, [], []),
    ('detect', ['-n', 3, '--horovod'], ['data.worker_weights=[3,2,1]'], []),
]
OTHER_TASKS_IN_SOAK = [(task, *case) for task in ('segment', 'detect') for case in [
    (['-n', 3, '-s', 1], ['train.accumulate=2'], []),
    (SERVERS, ['train.store=dist_device_sync', TWO_DEVICES], []),
    (HOROVOD + MESSAGES, ['parallel.shard_optimizer=true'], []),
    (SERVERS, LOCAL_SGD, [*SGD, 'optim.base_lr=0.1']),
]]


@pytest.mark.soak
@pytest.mark.parametrize('task, launch, keys, changes', rounds(
    [('pretrain', *case) for case in CASES] + OTHER_TASKS,
    [('pretrain', *case) for case in CASES + IN_SOAK] + OTHER_TASKS + OTHER_TASKS_IN_SOAK),
                         ids=lambda value: value if isinstance(value, str) else ' '.join(map(str, value)) or '-')
def test_weights_are_those_of_one_process(launcher, alone, task, launch, keys, changes):
    """Weights to 1e-5 in the L2 norm; the training loss, and the evaluation of held-out images in uneven parts."""
    words, last, values, tolerance = TASKS[task]
    launcher.run(*launch, '--', *words, *keys, *changes, 'name=many')
    many, one = launcher.folder / 'runs' / 'many', alone(tuple(changes), task)
    expected = vector(one, last)
    assert np.linalg.norm(vector(many, last) - expected) / np.linalg.norm(expected) < 1e-5
    np.testing.assert_allclose(recorded(many, 'loss'), recorded(one, 'loss'), rtol=1e-5)
    for name in values:
        np.testing.assert_allclose(recorded(many, name), recorded(one, name), rtol=tolerance, atol=tolerance / 10)


def test_hosts_of_several_horovod_ranks(launcher, alone, tmp_path):
    """Two on one host, one on another: between hosts travels what two ranks would send each other, not three."""
    with three_hosts(tmp_path / 'hosts') as hosts:
        (tmp_path / 'hostfile').write_text('host0 slots=2\nhost1\n')
        before = hosts.traffic()[1][0]
        launcher.run('-n', 3, '-H', tmp_path / 'hostfile', '--horovod', '--', *PRETRAIN, *TEN_STEPS, *WIDE, 'name=many',
                     env=hosts.environ)
        sent = hosts.traffic()[1][0] - before
    many, one = launcher.folder / 'runs' / 'many', alone(tuple(WIDE))
    expected = weights(one)
    assert np.linalg.norm(weights(many) - expected) / np.linalg.norm(expected) < 1e-5
    np.testing.assert_allclose(recorded(many, 'loss'), recorded(one, 'loss'), rtol=1e-5)
    print('megabytes', sent / 1e6, 'of gradients', 10 * expected.nbytes / 1e6)
    assert sent < 1.2 * 10 * expected.nbytes


@pytest.mark.soak
@pytest.mark.parametrize('slots, table', rounds([UNEVEN], [UNEVEN, (
    (2, 2), 'rank 1 on host0 (part 2 of 2), rank 2 on host1 (part 1 of 2)')]))
def test_hosts_of_tensor_groups(launcher, alone, tmp_path, slots, table):
    """Two replicas in two parts: where hosts have room for a group, it is on one."""
    with three_hosts(tmp_path / 'hosts') as hosts:
        (tmp_path / 'hostfile').write_text(''.join(f'host{n} slots={count}\n' for n, count in enumerate(slots)))
        told = launcher.run(*FOUR, '-H', tmp_path / 'hostfile', '--', *PRETRAIN, *TEN_STEPS, *TENSOR, 'name=many',
                            'data.worker_weights=[3,1]', env=hosts.environ)
    assert table in told[0] + told[1]
    many, one = launcher.folder / 'runs' / 'many', alone(())
    expected = weights(one)
    assert np.linalg.norm(weights(many) - expected) / np.linalg.norm(expected) < 1e-5
    for name in ('loss', 'val_loss', 'val_avg_dist'):
        np.testing.assert_allclose(recorded(many, name), recorded(one, name), rtol=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize('launch, store, devices', [
    (['-n', 3, '-s', 2], 'dist_sync', 1), (['-n', 2, '-s', 2], 'dist_device_sync', 2),
    (HOROVOD + MESSAGES, 'horovod', 2), (HOROVOD, 'horovod', 2), (['-n', 2, '-s', 1], 'dist_sync', 2)][:rounds(3, 5)])
def test_starts(launcher, launch, store, devices):
    """Of the races among MXNet's first pushes and pulls, each shows within a few starts."""
    times = rounds(4, 20)
    words = launcher.run(*launch, '--', sys.executable, '-W', 'ignore', PROGRAMS / 'repeat.py', store, times, devices,
                         seconds=180)
    assert f'ok {times}' in words[0] + words[1]


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
    launcher.run(*HOROVOD, '--', *PRETRAIN, *TEN_STEPS, 'train.compression=fp16', 'name=many')
    expected = weights(alone(()))
    difference = np.linalg.norm(weights(launcher.folder / 'runs' / 'many') - expected) / np.linalg.norm(expected)
    assert 1e-8 < difference < 1e-3
