"""UperNet and its loss against numbers recorded from PyTorch with the same weights (float32).

upernet.npz has mmsegmentation's heads, 16 channels wide, with group normalisation, on four random maps of two images,
15 % of whose pixels are ignored: weights and maps as float16, in which they are exact, results as float32.
"""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from support import machine
from support.running import DATA

from mxsimmim.interop import official
from mxsimmim.models import named_parameters
from mxsimmim.models.segmenter import pixel_loss
from mxsimmim.models.upernet import FCNHead, GroupNorm, Resize, UperHead
from mxsimmim.ops import OpBackend

FILE = np.load(DATA / 'upernet.npz')
CLASSES, SIDE = 5, 64
forms = pytest.mark.parametrize('form', machine.FORMS)


class Heads(mx.gluon.HybridBlock):
    """Both heads on given maps."""

    def __init__(self, backend):
        super().__init__()
        self.decode_head = UperHead((8, 16, 24, 32), [(16, 16), (8, 8), (4, 4), (2, 2)], 16, CLASSES, backend)
        self.auxiliary_head = FCNHead(24, 8, CLASSES, backend)
        self.to_pixels, self.auxiliary_to_pixels = (Resize((side, side), (SIDE, SIDE)) for side in (16, 4))

    def hybrid_forward(self, F, label, *maps):
        logits, auxiliary = self.decode_head(*maps), self.auxiliary_head(maps[2])
        large = self.to_pixels(logits), self.auxiliary_to_pixels(auxiliary)
        return pixel_loss(F, *large, label, CLASSES, 0.4), logits, auxiliary


def group(prefix):
    names = [name for name in FILE.files if name.startswith(f'{prefix}:')]
    return {name[len(prefix) + 1:]: FILE[name].astype('float32') for name in names}


def close(ours, name, theirs):
    assert np.abs(ours.asnumpy() - theirs).max() < 1e-4 * max(1, np.abs(theirs).max()), name


@forms
@pytest.mark.parametrize('hybrid', [False, True])
def test_heads(hybrid, form):
    net = Heads(OpBackend(form))
    net.initialize()
    official.load_weights(net, group('weight'))
    if hybrid:
        net.hybridize(static_alloc=True)
    maps = [mx.nd.array(FILE[f'map:{number}'].astype('float32')) for number in range(4)]
    for array in maps:
        array.attach_grad()
    with autograd.record():
        loss, logits, auxiliary = net(mx.nd.array(FILE['label'], dtype='uint8'), *maps)
    loss.backward()
    assert abs(loss.asscalar() - float(FILE['loss'])) < 1e-5
    close(logits, 'logits', FILE['logits'])
    close(auxiliary, 'auxiliary', FILE['auxiliary'])
    for number, array in enumerate(maps):
        close(array.grad, f'map {number}', FILE[f'map_grad:{number}'])
    parameters, expected = named_parameters(net), group('grad')
    assert set(parameters) == set(expected)
    for name, theirs in expected.items():
        close(parameters[name].grad(), name, theirs)


@forms
def test_group_norm(form):
    """Of two groups of 16 channels."""
    net, given = GroupNorm(32, OpBackend(form)), group('norm')
    net.initialize()
    for name in ('weight', 'bias'):
        getattr(net, name).set_data(mx.nd.array(given[name]))
    x = mx.nd.array(given['x'])
    x.attach_grad()
    with autograd.record():
        y = net(x)
    y.backward(mx.nd.array(given['head']))
    found = {'y': y, 'x_grad': x.grad, 'weight_grad': net.weight.grad(), 'bias_grad': net.bias.grad()}
    for name, ours in found.items():
        close(ours, name, given[name])


@pytest.mark.parametrize('given, wanted', [((2, 3), (7, 5)), ((6, 6), (4, 4)), ((1, 4), (4, 4))])
def test_resize(given, wanted):
    """As MXNet's own operator, which is PyTorch's with align_corners=False: larger, smaller, and with the gradient."""
    rng = np.random.default_rng(5)
    found = []
    for resize in (Resize(given, wanted), lambda x: mx.nd.contrib.BilinearResize2D(
            x, height=wanted[0], width=wanted[1], align_corners=False)):
        if isinstance(resize, Resize):
            resize.initialize()
        x, head = mx.nd.array(rng.standard_normal((2, 3, *given))), mx.nd.array(rng.standard_normal((2, 3, *wanted)))
        x.attach_grad()
        with autograd.record():
            y = resize(x)
        y.backward(head)
        found.append((y, x.grad))
        rng = np.random.default_rng(5)
    for ours, theirs in zip(*found):
        assert np.abs((ours - theirs).asnumpy()).max() < 1e-6
