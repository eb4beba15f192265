"""Tensor parallelism over processes: checkpoints that change the layout, a part that is killed, what is refused."""
import sys

import pytest
from support import machine
from support.jobs import HOROVOD, PRETRAIN, PROGRAMS, assert_rank_1_is_named, newest, same, steps
from support.running import rounds
from support.tiny import TEN_STEPS

pytestmark = [pytest.mark.unmeasured, machine.natively]

FOUR, TENSOR = ['-n', 4, '--horovod'], ['parallel.tensor=2']
HANDOVER = [sys.executable, '-W', 'ignore', PROGRAMS / 'handover.py']
DEVICES = 'devices=[cpu(0),cpu(1),cpu(2),cpu(3)]'


@pytest.mark.soak
def test_a_checkpoint_goes_from_layout_to_layout_unchanged(launcher):
    """Of two parts in workers to two stages of two: weights, moments, averages, bit for bit.

    In `make soak` to stages of two devices, and to 2 x 2 in one worker, as well.
    """
    runs = launcher.folder / 'runs'
    launcher.run(*HOROVOD, '--', *PRETRAIN, *TEN_STEPS, *TENSOR, 'train.ema=0.9', 'name=first')
    expected = newest(runs / 'first')
    assert set(expected[1]) == {'weights', 'optimizer', 'ema'} and steps(runs / 'first')[-1] == 10
    assert list((runs / 'first' / 'pictures').glob('*.png'))
    before = 'first'
    for name, launch, keys in (('workers', FOUR, ['devices=[cpu(0)]']),
                               ('devices', HOROVOD, ['devices=[cpu(0),cpu(1)]']),
                               ('contexts', ['-n', 1], [DEVICES]))[:rounds(1, 3)]:
        launcher.run(*launch, '--', *HANDOVER, runs / before, 'parallel.pipeline=2', *TENSOR, *keys, f'name={name}')
        step, arrays = newest(runs / name)
        assert step == 10
        same(arrays, expected[1])
        (runs / name / 'config.yaml').write_text((runs / 'first' / 'config.yaml').read_text())
        before = name


@pytest.mark.soak
@pytest.mark.skipif(not rounds(0, 1), reason='in `make soak`; test_together.py kills one that is known to wait')
def test_a_part_that_is_killed_ends_the_job(launcher):
    assert_rank_1_is_named(launcher, *HOROVOD, '--', *PRETRAIN, *TEN_STEPS, *TENSOR)


@pytest.mark.parametrize('words, keys, message', [
    (['-n', 3, '--horovod'], [], 'parallel.tensor=2 does not divide the 3 workers'),
    (['-n', 2, '-s', 1], [], 'parallel.tensor=2 with one device a worker puts the parts of a model into several'),
    (HOROVOD, ['train.aggregation=local_sgd'], 'train.aggregation=local_sgd cannot work with parallel.tensor=2'),
])
def test_what_cannot_work_is_refused_at_the_start(launcher, words, keys, message):
    """Before anything is started: devices that are named tell how many each worker has."""
    out, err = launcher.run(*words, '--', *PRETRAIN, *TEN_STEPS, *TENSOR, 'devices=[cpu(0)]', *keys, 'name=job',
                            status=2)
    assert message in out + err
