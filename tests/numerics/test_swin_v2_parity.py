"""SwinV2 against recorded numbers of the code that its authors published, in PyTorch 2.13 (float32).

swinv2_window*.npz has features, losses and gradients of pre-training; images, masks and weights are drawn here as they
were there, so it has no copy of them. swinv2.pth is a checkpoint of another network, and swinv2_finetune.npz what a
classifier with its encoder answers at another resolution and window. `meta` says shapes and seed.
"""
import json
import zlib
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from support import machine

from mxsimmim.config import ModelConfig
from mxsimmim.inference import exchange
from mxsimmim.inference.trained import load_run
from mxsimmim.interop import official, pth
from mxsimmim.models import build_classifier, build_simmim, named_parameters
from mxsimmim.ops import OpBackend
from mxsimmim.optim import parameter_groups, weight_decays

DATA = Path(__file__).parent.parent / 'data'


class Recorded:
    def __init__(self, name):
        self.file = np.load(DATA / f'{name}.npz')
        self.meta = json.loads(self.file['meta'].tobytes().decode())
        self.keys = self.meta.get('config')

    def group(self, prefix):
        return {k[len(prefix) + 1:]: self.file[k] for k in self.file.files if k.startswith(prefix + '/')}

    def weight(self, name, shape):
        """As they were drawn there; of some heads logit_scale is above what it is clamped at."""
        value = np.random.default_rng([self.meta['seed'], zlib.crc32(name.encode())]).standard_normal(
            shape, dtype='float32')
        if name.endswith('logit_scale'):
            return 3 + 2 * value
        if name.endswith('cpb_mlp.2.weight'):
            return 0.1 * value
        return (1 if name.endswith('weight') and value.ndim == 1 else 0) + 0.3 * value

    def fill(self, net):
        shapes = {name: value.shape for name, value in official.export_weights(net).items()}
        official.load_weights(net, {name: self.weight(name, shape) for name, shape in shapes.items()})
        return net

    def batch(self, model):
        rng = np.random.default_rng(self.meta['seed'])
        image = rng.standard_normal((2, 3, model.img_size, model.img_size), dtype='float32')
        cells = model.img_size // model.stride
        mask = rng.random((2, cells, cells)) < 0.6
        scale = model.grid // cells
        return image, mask.repeat(scale, 1).repeat(scale, 2).astype('uint8')


@pytest.fixture(params=machine.FORMS)
def backend(request):
    """What computes holds for both forms of the operators."""
    return OpBackend(request.param)


@pytest.fixture(params=['swinv2_window4', 'swinv2_window8'])
def recorded(request):
    return Recorded(request.param)


def apart(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize('hybridize', [False, True])
def test_features_loss_and_gradients(recorded, backend, hybridize):
    """Windows of 4 are shifted in three stages, the fourth is one; those of 8 were 6 and 3 in pre-training."""
    model = ModelConfig(**recorded.keys)
    net = recorded.fill(build_simmim(model, None, backend))
    if hybridize:
        net.hybridize(static_alloc=True, static_shape=True)
    image, mask = recorded.batch(model)
    image, mask = mx.nd.array(image), mx.nd.array(mask, dtype='uint8')
    features = net.encoder(image, mask)
    assert apart(features.asnumpy(), recorded.file['features']) < 1e-5
    with mx.autograd.record():
        loss = net(image, mask)
    loss.backward()
    assert loss.asscalar() == pytest.approx(float(recorded.file['loss']), rel=1e-5)
    theirs, ours = recorded.group('grad'), official.export_weights(net, grad=True)
    assert ours.keys() == theirs.keys()
    scales = np.concatenate([v.ravel() for n, v in official.export_weights(net).items() if n.endswith('logit_scale')])
    assert (scales > np.log(100)).any() and (scales < np.log(100)).any()
    whole = np.sqrt(sum(np.sum(g ** 2) for g in theirs.values()))
    assert np.sqrt(sum(np.sum((ours[n] - theirs[n]) ** 2) for n in theirs)) < 1e-4 * whole
    worst = max((np.linalg.norm(ours[n] - theirs[n]) - 1e-6 * whole) / np.linalg.norm(theirs[n]) for n in theirs)
    assert worst < 1e-3


def test_targets_normalised_by_the_square_around_each_pixel(recorded, backend):
    model = ModelConfig(**recorded.keys, norm_targets=True, norm_window=47)
    net = recorded.fill(build_simmim(model, None, backend))
    net.hybridize()
    image, mask = recorded.batch(model)
    with mx.autograd.record():
        loss = net(mx.nd.array(image), mx.nd.array(mask, dtype='uint8'))
    loss.backward()
    assert loss.asscalar() == pytest.approx(float(recorded.file['normed/loss']), rel=1e-5)
    gradients = official.export_weights(net, grad=True)
    for name, theirs in recorded.group('normed/grad').items():
        assert apart(gradients[name], theirs) < 1e-4, name


def test_no_decay(recorded):
    """Of logit_scale and cpb_mlp only vectors are exempt: the exceptions are compared with names behind `encoder.`."""
    net = build_simmim(ModelConfig(**recorded.keys), None)
    decays = weight_decays(named_parameters(net), 'reference', 'swinv2', 0.05)
    assert {name for name, decay in decays.items() if decay == 0} == set(recorded.meta['no_decay'])


@pytest.fixture
def finetune():
    return Recorded('swinv2_finetune')


def test_groups_of_fine_tuning(finetune):
    net = build_classifier(ModelConfig(**finetune.meta['finetune']), finetune.meta['classes'], None)
    groups = parameter_groups(net, finetune.meta['layer_decay'], 0.05)
    assert groups.keys() == finetune.meta['groups'].keys()
    for name, expected in finetune.meta['groups'].items():
        assert groups[name] == pytest.approx(expected), name


def test_an_official_checkpoint_comes_in_and_goes_out(finetune, tmp_path):
    """As a run, which knows windows and image size from the buffers, and out to the same file, with these."""
    run = tmp_path / 'run'
    exchange.import_weights(DATA / 'swinv2.pth', run, overrides=['mask.patch_size=4'])
    trained = load_run(run)
    expected = ModelConfig(**finetune.meta['pretrain'])
    for key in expected.model_fields_set:
        assert getattr(trained.config.model, key) == getattr(expected, key), key
    exchange.export_weights(run, tmp_path / 'out.pth', 'official')
    before, after = pth.read_pth(DATA / 'swinv2.pth'), pth.read_pth(tmp_path / 'out.pth')
    assert set(after) == set(before)  # with the buffers, without which PyTorch does not load strictly
    for name, value in before.items():
        assert (after[name].dtype, after[name].shape) == (value.dtype, value.shape), name
        rtol = 1e-6 if name.endswith('coords_table') else 0
        np.testing.assert_allclose(after[name], value, rtol=rtol, err_msg=name)


@pytest.mark.parametrize('old', [False, True])
def test_a_classifier_with_its_encoder(finetune, backend, old, tmp_path):
    """Whose windows are larger than in pre-training; also from a checkpoint with the first names of cpb_mlp."""
    file = DATA / 'swinv2.pth'
    if old:
        file = tmp_path / 'old.pth'
        pth.write_pth(file, {n.replace('cpb', 'rpe'): v for n, v in pth.read_pth(DATA / 'swinv2.pth').items()})
    model = ModelConfig(**finetune.meta['finetune'])
    net = finetune.fill(build_classifier(model, finetune.meta['classes'], None, backend))
    assert official.load_pretrained(net, file) == ['head.weight', 'head.bias']
    answers = net(mx.nd.array(finetune.batch(model)[0])).asnumpy()
    np.testing.assert_allclose(answers, finetune.file['logits'], rtol=1e-4, atol=1e-5)
