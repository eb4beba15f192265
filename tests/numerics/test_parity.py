"""Our networks and optimiser against recorded numbers (float32).

simmim_*.npz comes from the reference implementation; options_*.npz, for keys which those do not use, from the same
mathematics written independently in PyTorch 2.13.
"""
import json
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from support import machine
from support.trainer import build_tiny_trainer

from mxsimmim.config import ModelConfig
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.models import SimMIM, build_simmim, named_parameters
from mxsimmim.ops import OpBackend
from mxsimmim.optim import REFERENCE_BATCH, weight_decays

pytestmark = pytest.mark.unmeasured

DATA = Path(__file__).parent.parent / 'data'
KEYS = set(ModelConfig.model_fields) | {'ape'}


# A masked pixel that the network predicts to 2e-7, less than float32 rounds (1e-6): CPUs differ about the sign of the
# error, which is the gradient of |error|, and with it 0.6 % of the whole gradient changes, from which ten steps make
# 1.3e-4 of the loss. By step, image, channel and place: moved away from the prediction, on the side where it was when
# recorded. Elsewhere errors are 6e-6 and more. The network does not see masked pixels.
NEAR_TARGETS = {'simmim_swin': {(2, 0, 2, 57, 46): -1e-4}}


class Recorded:
    def __init__(self, name, backend):
        self.name, self.backend = name, backend
        self.file = np.load(DATA / f'{name}.npz')
        self.meta = json.loads(self.file['meta'].tobytes().decode())
        self.config = self.meta['config']
        self.model = ModelConfig(**{k: v for k, v in self.config.items() if k in KEYS})

    def group(self, prefix):
        return {k[len(prefix) + 1:]: self.file[k] for k in self.file.files if k.startswith(prefix + '/')}

    def net(self):
        net = build_simmim(self.model, None, self.backend)
        official.load_weights(net, self.group('param'))
        return net


@pytest.fixture(params=machine.FORMS, autouse=True)
def backend(request):
    """Everything here holds for both forms of the operators."""
    return OpBackend(request.param)


@pytest.fixture(params=['simmim_vit', 'simmim_swin'])
def recorded(request, backend):
    return Recorded(request.param, backend)


@pytest.fixture(params=['simmim_vit', 'simmim_swin', 'options_vit_positions', 'options_vit_tables',
                        'options_swin_stages'])
def passed(request, backend):
    """One forward and backward pass: absolute positions, tables in each block and no layer scale, 4 Swin stages with
    a window larger than the last ones, …"""
    return Recorded(request.param, backend)


def relative(ours, theirs, floor=0.0):
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), floor)


@pytest.mark.parametrize('hybridize', [False, True])
def test_loss_reconstruction_and_gradients(passed, hybridize):
    net = passed.net()
    if hybridize:
        net.hybridize(static_alloc=True, static_shape=True)
    image, mask = mx.nd.array(passed.file['image']), mx.nd.array(passed.file['mask'], dtype='uint8')
    with mx.autograd.record():
        loss = net(image, mask)
    loss.backward()
    assert loss.asscalar() == pytest.approx(float(passed.file['loss']), rel=1e-5)
    assert relative(net.reconstruct(image, mask).asnumpy(), passed.file['reconstruction']) < 1e-4
    theirs, ours = passed.group('grad'), official.export_weights(net, grad=True)
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(np.sum(g ** 2) for g in theirs.values()))
    worst = max((np.linalg.norm(ours[n] - theirs[n]) - 1e-6 * whole) / np.linalg.norm(theirs[n]) for n in theirs)
    assert worst < 1e-3
    assert np.sqrt(sum(np.sum((ours[n] - theirs[n]) ** 2) for n in theirs)) < 1e-4 * whole


def test_weights_go_round(recorded):
    given = recorded.group('param')
    back = official.export_weights(recorded.net())
    assert back.keys() == given.keys()
    assert all(np.array_equal(back[n], given[n]) for n in given)


def test_no_decay(recorded):
    decays = weight_decays(named_parameters(recorded.net()), 'reference', recorded.model.type, 0.05)
    assert {name for name, decay in decays.items() if decay == 0} == set(recorded.meta['no_decay'])
    assert set(decays.values()) == {0, 0.05}


def test_twelve_steps(recorded):
    c, steps, images = recorded.config, recorded.meta['steps'], recorded.file['train/images'].copy()
    for place, further in NEAR_TARGETS.get(recorded.name, {}).items():
        images[place] += further
    masks, count = recorded.file['train/masks'], images.shape[1]
    rates = {key: c[name] * REFERENCE_BATCH / count
             for key, name in (('base_lr', 'lr'), ('warmup_lr', 'warmup_lr'), ('min_lr', 'min_lr'))}
    trainer = build_tiny_trainer(
        backend=recorded.backend, model=recorded.model.model_dump(), mask=dict(patch_size=recorded.model.stride),
        optim=dict(rates, schedule=recorded.meta['sched'], warmup=c['warmup_steps'], clip_grad=c['clip_grad'],
                   milestones=c.get('multisteps', [1])),
        train=dict(batch_size=count, length=steps))
    official.load_weights(trainer.placement.net, recorded.group('param'))
    rows = [trainer.train_step(Batch({'image': image, 'mask': mask}, 0, np.arange(count))).asnumpy()
            for image, mask in zip(images, masks.astype('uint8'))]
    rate = [lr for _, lr, *_ in trainer.metrics.state()['rows']]
    loss, norm, applied = np.transpose(rows)
    np.testing.assert_allclose(rate, recorded.file['train/lr'], rtol=1e-4)
    np.testing.assert_allclose(loss, recorded.file['train/loss'], rtol=1e-4)
    np.testing.assert_allclose(norm, recorded.file['train/grad_norm'], rtol=1e-4)
    assert np.all(applied == 1)
    ours, theirs = official.export_weights(trainer.placement.net), recorded.group('final')
    assert max(relative(ours[n], theirs[n]) for n in theirs) < 1e-3


@pytest.mark.parametrize('keys, count', [
    (dict(type='swin', img_size=192, patch_size=4, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32],
          window_size=6), 89_874_104),
    (dict(type='swin', img_size=192, patch_size=4, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48],
          window_size=12), 199_881_204),
    (dict(type='vit'), 86_256_720)])
def test_parameter_counts(keys, count, backend):
    net = SimMIM(ModelConfig(**keys), backend)  # without values, which would be 1.6 GB
    assert sum(int(np.prod(p.shape)) for p in named_parameters(net).values()) == count
