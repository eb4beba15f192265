"""Fine-tuning shared among processes: the weights, their average and the evaluation are those of one process."""
import json
import subprocess

import numpy as np
import pytest
from support.jobs import HOROVOD, SERVERS, recorded, vector
from support.running import DIGITS, ROOT, command, rounds
from support.tiny import NETWORK

from mxsimmim.config import configfile
from mxsimmim.interop import official
from mxsimmim.models import build_simmim
from mxsimmim.training import checkpoint

pytestmark = pytest.mark.unmeasured

SEED = 31
COMMAND = command('finetune', ROOT / 'conf' / 'finetune_digits.yaml')
# All that is random is on: mixup and CutMix of pairs, RandAugment, erasing, stochastic depth.
TINY = [*NETWORK, 'model.patch_size=8', 'augment.rand_ops=2', 'augment.erasing=0.25', 'augment.mixup=0.8',
        'augment.cutmix=1', 'data.val_fraction=0.1', 'data.labels_per_class=0', 'train.length=10',
        'train.batch_size=32', 'optim.base_lr=1e-2', 'optim.warmup=0', 'optim.schedule=constant',
        'optim.clip_grad=0.5', 'validation.every=5', 'checkpoint.every=10', 'log.every=3', 'train.check_replicas=2',
        'runtime.threads=1', 'data.threads=1']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An encoder in `pre`, and in runs/alone what one process makes of it."""
    print('seed', SEED)
    made = tmp_path_factory.mktemp('alone')
    pretraining = configfile.load(DIGITS, [*NETWORK, 'model.patch_size=8'])
    checkpoint.save(made / 'pre' / 'checkpoints', 1, {'weights': official.export_weights(build_simmim(
        pretraining.model, SEED))}, {}, keep=1)
    subprocess.run(COMMAND + TINY + [f'model.pretrained={made}/pre', 'train.ema=0.5', 'name=alone'], cwd=made,
                   check=True, timeout=120)
    return made


@pytest.mark.soak
@pytest.mark.parametrize('launch, keys', [
    (['-n', 3, '-s', 1], ['train.ema=0.5', 'data.worker_weights=[4,1,2]']),
    (HOROVOD, ['train.ema=0.5', 'data.worker_weights=[3,1]']),
    (SERVERS, ['devices=[cpu(0),cpu(1)]']),
    (['-n', 4, '--horovod'], ['train.ema=0.5', 'parallel.pipeline=2', 'parallel.micro_batches=4', 'parallel.tensor=2']),
][:rounds(2, 4)], ids=lambda value: ' '.join(map(str, value)))
def test_weights_are_those_of_one_process(launcher, folder, launch, keys):
    """10 steps from one encoder: weights to 1e-5 in the L2 norm, losses, and the evaluation of 180 images."""
    launcher.run(*launch, '--', *COMMAND, *TINY, f'model.pretrained={folder}/pre', *keys, 'name=many')
    many, alone = launcher.folder / 'runs' / 'many', folder / 'runs' / 'alone'
    for group in ['weights'] + ['ema'] * ('train.ema=0.5' in keys):
        expected = vector(alone, 10, group)
        assert np.linalg.norm(vector(many, 10, group) - expected) / np.linalg.norm(expected) < 1e-5, group
    np.testing.assert_allclose(recorded(many, 'loss'), recorded(alone, 'loss'), rtol=1e-5)
    for name in ('val_loss', 'val_top1', 'val_top5') if 'train.ema=0.5' in keys else ():
        np.testing.assert_allclose(recorded(many, name), recorded(alone, name), rtol=1e-5)


APART = ['--env', 'MXSIMMIM_FIRST_RANKS=0,1']  # as if on two hosts: ranks 0 and 3 are a pipeline, 1 and 2 another


@pytest.mark.soak
def test_evaluation_by_several(launcher, folder):
    """By three workers: words and file of one, but for speed; parts are not equally large.

    In `make soak` by two pipelines and by two parts as well.
    """
    words = COMMAND + TINY + ['name=alone', f'output={folder}/runs', 'data.val_fraction=0.099', '--eval']

    def file():
        content = json.loads((folder / 'runs' / 'alone' / 'evaluation.json').read_text())
        assert content.pop('val_images_per_second') > 0 and content['images'] % 3
        return content

    one = subprocess.run(words, stdout=subprocess.PIPE, universal_newlines=True, check=True, timeout=60).stdout
    expected = file()
    head, first, *others = one.splitlines()
    assert first.startswith('top-1 ')
    jobs = [['-n', 3, '-s', 1, '--', *words], ['-n', 4, '--horovod', *APART, '--', *words, 'parallel.pipeline=2'],
            ['-n', 2, '--horovod', '--', *words, 'parallel.tensor=2']]
    for job in jobs[:rounds(1, 3)]:
        told = launcher.run(*job)
        assert file() == pytest.approx(expected, rel=1e-6)
        for line in [head, first.rpartition(', ')[0], *others]:
            assert line in told[0] + told[1]


@pytest.mark.soak
@pytest.mark.parametrize('keys', [
    ['train.store=dist_async', 'optim.clip_grad=null'],
    ['train.aggregation=local_sgd', 'train.local_steps=5', 'train.lr_on_plateau=0.5'],
][:rounds(1, 2)], ids=lambda value: value[0])
def test_other_aggregations_learn(launcher, folder, keys):
    launcher.run(*SERVERS, '--', *COMMAND, *TINY, f'model.pretrained={folder}/pre', *keys, 'name=many',
                 'train.length=100', 'validation.every=50', 'checkpoint.every=50', 'augment.mixup=0',
                 'augment.cutmix=0', 'augment.rand_ops=0', 'augment.erasing=0', 'optim.base_lr=1e-1', 'log.every=10')
    run = launcher.folder / 'runs' / 'many'
    losses, (first, last) = recorded(run, 'loss'), recorded(run, 'val_loss')
    print(losses, first, last, recorded(run, 'val_top1'))
    assert losses[-1] < losses[0] - 0.5 and last < first < 1.8
    assert [path.name for path in sorted((run / 'checkpoints').iterdir())] == ['step-00000050', 'step-00000100']
