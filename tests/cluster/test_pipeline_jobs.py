"""A pipeline whose stages are processes: schedules, checkpoints that change the layout, a stage that is killed."""
import json
import subprocess
import sys

import numpy as np
import pytest
from support import machine
from support.hosts import three_hosts
from support.jobs import HOROVOD, PRETRAIN, PROGRAMS, assert_rank_1_is_named, newest, recorded, same, steps
from support.running import BASE, DEADLINE, command, rounds
from support.tiny import TEN_STEPS

pytestmark = pytest.mark.unmeasured

PIPELINE = ['parallel.pipeline=2', 'parallel.micro_batches=4']
DEEP = ['model.depth=4', 'train.ema=0.9']
# Nearly all of the memory is for its 38 million parameters.
WIDE = ['model.img_size=16', 'model.patch_size=4', 'model.embed_dim=512', 'model.depth=12', 'model.num_heads=8',
        'mask.patch_size=8', 'data.path=digits', 'data.val_fraction=0', 'data.threads=1', 'runtime.threads=1',
        'train.batch_size=8', f'train.length={rounds(5, 20)}', 'optim.schedule=constant', 'optim.warmup=0']
HANDOVER = [sys.executable, '-W', 'ignore', PROGRAMS / 'handover.py']


def test_schedules_compute_the_same_bits_and_so_do_two_hosts(launcher, tmp_path):
    """1F1B, and GPipe with the stages on two hosts."""
    words = ['--', *PRETRAIN, *TEN_STEPS, *PIPELINE]
    launcher.run(*HOROVOD, *words, 'name=1f1b')
    (tmp_path / 'hostfile').write_text('host0\nhost1\n')
    with three_hosts(tmp_path / 'hosts') as hosts:
        launcher.run(*HOROVOD, '-H', tmp_path / 'hostfile', *words, 'name=hosts', 'parallel.schedule=gpipe',
                     env=hosts.environ)
    runs = [launcher.folder / 'runs' / name for name in ('1f1b', 'hosts')]
    expected = newest(runs[0])
    assert expected[0] == 10
    for run in runs[1:]:
        same(newest(run)[1], expected[1])
        assert recorded(run, 'loss') == recorded(runs[0], 'loss')


@pytest.mark.soak
def test_a_checkpoint_goes_from_layout_to_layout_unchanged(launcher):
    """Of a job of 2 x 2 workers to 4 stages: weights, moments and averages, bit for bit.

    In `make soak` to one worker and back again.
    """
    runs = launcher.folder / 'runs'
    launcher.run('-n', 4, '--horovod', '--', *PRETRAIN, *TEN_STEPS, *DEEP, *PIPELINE, 'name=first')
    expected = newest(runs / 'first')
    assert set(expected[1]) == {'weights', 'optimizer', 'ema'} and steps(runs / 'first')[-1] == 10
    before = 'first'
    for name, workers, stages in (('four', 4, 4), ('one', 1, 1), ('last', 4, 2))[:rounds(1, 3)]:
        words = ['-n', workers, '--horovod'] if workers > 1 else ['-n', 1]
        launcher.run(*words, '--', *HANDOVER, runs / before, f'parallel.pipeline={stages}', f'name={name}')
        step, arrays = newest(runs / name)
        assert step == 10
        same(arrays, expected[1])
        (runs / name / 'config.yaml').write_text((runs / 'first' / 'config.yaml').read_text())
        before = name


def test_a_stage_that_is_killed_ends_the_job(launcher):
    assert_rank_1_is_named(launcher, '-n', 3, '--horovod', '--', *PRETRAIN, *TEN_STEPS, 'model.depth=3',
                           'parallel.pipeline=3', 'parallel.micro_batches=4')


@machine.natively
@pytest.mark.slow
@pytest.mark.soak
def test_a_model_that_does_not_fit_one_process_trains_over_2_and_over_4(launcher):
    """Under 0.85 of what one process of it has, with the losses of that one; over 4 in `make soak` alone."""
    program = [sys.executable, '-W', 'ignore', PROGRAMS / 'limited.py', *WIDE]

    def trained(*words):
        out, _ = launcher.run(*words, seconds=DEADLINE)
        return json.loads(out.splitlines()[-1])
    alone = trained('-n', 1, '--', *program)
    limit = int(0.85 * alone['data'])
    limited = ['sh', '-c', f'ulimit -d {limit // 1024}; exec "$@"', 'sh']
    done = subprocess.run([*limited, *command('pretrain', BASE, *WIDE, 'name=alone')], cwd=launcher.folder,
                          timeout=DEADLINE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('mxsimmim: error: out of memory while ')
    assert f'this process may have {limit / 1e9:.1f} GB (of data: `ulimit -d`): ' in done.stderr
    previous = alone['resident']
    for stages in rounds([2], [2, 4]):
        found = trained('-n', stages, '--horovod', '--', *limited, *program, f'parallel.pipeline={stages}',
                        'parallel.micro_batches=4')
        np.testing.assert_allclose(found['losses'], alone['losses'], rtol=1e-5)
        assert found['data'] < limit and found['resident'] < 0.8 * previous
        previous = found['resident']


@pytest.mark.parametrize('words, keys, message', [
    (['-n', 3, '--horovod'], [], 'parallel.pipeline=2 does not divide the 3 workers'),
    (['-n', 2, '-s', 1], [], 'a parameter server waits for the same gradients of all'),
    (HOROVOD, ['train.aggregation=local_sgd'], 'train.aggregation=local_sgd cannot work with parallel.pipeline=2'),
    (HOROVOD, ['data.worker_weights=auto'], 'data.worker_weights=auto cannot work with parallel.pipeline=2'),
    (HOROVOD, ['data.worker_weights=[1,2]'], 'has 2 weights for 1 replicas of the model'),
])
def test_what_cannot_work_is_refused_at_the_start(launcher, words, keys, message):
    """Before anything is started: devices that are named tell how many each worker has."""
    out, err = launcher.run(*words, '--', *PRETRAIN, *TEN_STEPS, *PIPELINE, 'devices=[cpu(0)]', *keys, 'name=job',
                            status=2)
    assert message in out + err
