"""Jobs that save by the clock: all workers after the same step, and training goes on meanwhile."""
import pytest
from support.jobs import HOROVOD, PRETRAIN, SERVERS, steps
from support.running import rounds
from support.tiny import TEN_STEPS

from mxsimmim.training.checkpoint import load, saved_steps

KEYS = [*TEN_STEPS, 'train.length=200', 'validation.every=75', 'checkpoint.every=0.01 minutes', 'checkpoint.keep=99',
        'train.check_replicas=100']


@pytest.mark.soak
@pytest.mark.parametrize('launch, keys', [
    pytest.param(HOROVOD, [], id='horovod'),
    pytest.param(SERVERS, ['train.store=dist_async', 'optim.clip_grad=null'], id='dist_async'),
][:rounds(1, 2)])
def test_a_job_saves_by_the_clock(launcher, launch, keys):
    launcher.run(*launch, '--', *PRETRAIN, *KEYS, *keys, 'name=job')
    run = launcher.folder / 'runs' / 'job'
    last = steps(run)[-1]
    saved = saved_steps(run / 'checkpoints')
    assert saved[-1] == last and len(saved) >= 2
    for step in saved:
        found = load(run / 'checkpoints' / f'step-{step:08d}')
        assert found.step == step and set(found.arrays) == {'weights', 'optimizer'}
