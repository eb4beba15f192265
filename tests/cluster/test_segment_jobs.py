"""Segmentation shared among processes, and gone on with: the weights and the evaluation are those of one process."""
import json
import shutil
import subprocess

import numpy as np
import pytest
from support.jobs import HOROVOD, SERVERS, newest, recorded, same, vector
from support.running import BASE, command, rounds

pytestmark = pytest.mark.unmeasured

COMMAND = command('finetune', BASE)
# All that is random is on: scale, crop, flip, colours, stochastic depth.
TINY = ['task=segment', 'model.type=swin', 'model.img_size=48', 'model.patch_size=4', 'model.embed_dim=8',
        'model.depths=[1,1,1]', 'model.num_heads=[1,1,2]', 'model.window_size=4', 'model.drop_path=0.2',
        'model.head_channels=16', 'data.path=digit-scenes-60x70', 'data.val_fraction=0.01',
        'data.train_images=40', 'train.length=8', 'train.batch_size=12', 'optim.recipe=fixed', 'optim.base_lr=2e-2',
        'optim.warmup=0', 'optim.schedule=constant', 'optim.clip_grad=0.5', 'validation.every=8',
        'validation.pictures=2', 'checkpoint.every=4', 'log.every=2', 'train.check_replicas=2', 'runtime.threads=1',
        'data.threads=1']


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The run of one process, whole."""
    made = tmp_path_factory.mktemp('alone')
    subprocess.run(COMMAND + TINY + ['name=alone'], cwd=made, check=True, timeout=120)
    return made / 'runs' / 'alone'


CASES = [(SERVERS, []), (HOROVOD, ['data.worker_weights=[3,1]']), (['-n', 3, '-s', 1], ['train.accumulate=2']),
         (SERVERS, ['devices=[cpu(0),cpu(1)]'])]


@pytest.mark.soak
@pytest.mark.parametrize('launch, keys', CASES[:rounds(2, len(CASES))])
def test_weights_are_those_of_one_process(launcher, alone, launch, keys):
    """8 steps: weights to 1e-5 in the L2 norm, losses, and the counts of 50 evaluated images."""
    launcher.run(*launch, '--', *COMMAND, *TINY, *keys, 'name=many')
    many, expected = launcher.folder / 'runs' / 'many', vector(alone, 8)
    assert np.linalg.norm(vector(many, 8) - expected) / np.linalg.norm(expected) < 1e-5
    np.testing.assert_allclose(recorded(many, 'loss'), recorded(alone, 'loss'), rtol=1e-5)
    for name in ('val_miou', 'val_pixel_accuracy', 'val_loss'):
        np.testing.assert_allclose(recorded(many, name), recorded(alone, name), rtol=1e-3)


def test_resuming_is_exact(alone, tmp_path):
    """From step 4 of 8: the same bits. A picture of each validation is there, and the evaluation of the last."""
    shutil.copytree(alone, tmp_path / 'alone')
    shutil.rmtree(tmp_path / 'alone' / 'checkpoints' / 'step-00000008')
    subprocess.run(COMMAND + TINY + ['name=alone', f'output={tmp_path}'], check=True, timeout=120)
    (step, ours), (last, expected) = newest(tmp_path / 'alone'), newest(alone)
    assert step == last == 8
    same(ours, expected)
    assert [path.name for path in sorted((alone / 'pictures').iterdir())] == ['prediction-00000008.png']
    values = json.loads((alone / 'evaluation.json').read_text())
    assert values['images'] == 50 and 0 < values['miou'] < values['pixel_accuracy'] < 1
