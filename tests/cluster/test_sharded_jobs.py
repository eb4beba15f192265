"""Optimisers whose moments are divided among workers: the same weights, and checkpoints that go from job to job."""
import subprocess
import sys

import pytest
from support.jobs import HOROVOD, MESSAGES, PROGRAMS, newest
from support.running import rounds

pytestmark = pytest.mark.unmeasured

PYTHON = [sys.executable, '-W', 'ignore']


@pytest.mark.soak
def test_weights_and_checkpoints_are_those_of_whole_optimisers(launcher):
    """10 steps, bit for bit where gradients are summed in shared memory; moments of n workers are 1/n of all each.

    In `make soak` of Swin, of three workers, which divide them unevenly, and of two stages.
    """
    runs = launcher.folder / 'runs'

    def run(launch, *words):
        launcher.run(*launch, '--', *PYTHON, PROGRAMS / 'sharded.py', *words, seconds=120)

    def same(name):
        step, arrays = newest(runs / name)
        assert step == 10 and set(arrays) == set(expected)
        for group, found in arrays.items():
            assert set(found) == set(expected[group]), f'{name} {group}'
            for key, array in found.items():
                assert array.tobytes() == expected[group][key].tobytes(), f'{name} {group} {key}'
        (runs / name / 'config.yaml').write_text((runs / 'plain' / 'config.yaml').read_text())

    run(HOROVOD, rounds('vit', 'vit,swin'), 'exact', '-', 'two')
    expected = newest(runs / 'plain')[1]
    assert set(expected) == {'weights', 'optimizer', 'ema'}
    assert len(expected['optimizer']) == 2 * len(expected['weights'])
    same('two')
    subprocess.run([*PYTHON, PROGRAMS / 'handover.py', runs / 'two', 'name=one'], cwd=launcher.folder, check=True,
                   timeout=60)
    same('one')
    for name in rounds([], ['three']):
        run(['-n', 3, '--horovod'], 'swin', 'exact', runs / 'one', name, 'shard_optimizer=true')
        same(name)
    for name in rounds([], ['stages']):
        run(['-n', 4, '--horovod'], 'narrow', 'exact', runs / 'one', name, 'shard_optimizer=true', 'pipeline=2',
            'micro_batches=2')
        same(name)
    run(HOROVOD + MESSAGES, 'narrow', 'close', runs / rounds('one', 'stages'), 'last')
    same('last')
