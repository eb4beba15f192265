"""Networks with maps, trained on two devices: the weights are those of one, through the arrays that gradients share."""
import mxnet as mx
import numpy as np
import pytest
from support.tiny import DETECTOR

from mxsimmim.config import configfile
from mxsimmim.interop import official
from mxsimmim.training.build import build_trainer

VIT = ['model.type=vit', 'model.img_size=32', 'model.patch_size=8', 'model.embed_dim=16', 'model.depth=4',
       'model.num_heads=2', 'model.depths=[]', 'model.drop_path=0', 'model.head_channels=16']
CASES = {'detect-swin': [], 'detect-vit': VIT, 'segment-vit': ['task=segment', *VIT]}


def weights(case, tmp_path, *keys):
    """After one step."""
    config = configfile.load('conf/base.yaml', [*DETECTOR, *CASES[case], f'output={tmp_path}', 'name=run', *keys])
    trainer = build_trainer(config)
    before = official.extract(trainer.placement.net)
    trainer.train_step(next(iter(trainer._batches())))
    mx.nd.waitall()
    return before, official.extract(trainer.placement.net)


@pytest.mark.parametrize('case', CASES)
def test_a_step_is_that_of_one_device(case, tmp_path):
    before, one = weights(case, tmp_path)
    _, two = weights(case, tmp_path, 'devices=[cpu(0),cpu(1)]')
    for name, value in one.items():
        moved = np.linalg.norm(value - before[name])
        assert np.linalg.norm(two[name] - value) <= 2e-3 * moved + 1e-7, name
