"""Group normalisation, native and in plain MXNet, against NumPy in float64."""
import mxnet as mx
import numpy as np
import pytest
from support import machine

from mxsimmim.ops import OpBackend

EPS = 1e-5
forms = pytest.mark.parametrize('form', machine.FORMS)


class Norm(mx.gluon.HybridBlock):
    """The operator alone, with weights."""

    def __init__(self, form, groups, channels):
        super().__init__()
        self.backend, self._options = OpBackend(form), dict(groups=groups, channels=channels)
        self.weight, self.bias = (self.params.get(name, shape=(channels,)) for name in ('weight', 'bias'))

    def hybrid_forward(self, F, x, weight, bias):
        return self.backend.group_norm(F, x, weight, bias, EPS, **self._options)


def expected(x, weight, bias, head, groups):
    """The result, and the gradients of x, weight and bias times `head`, in float64."""
    x, weight, bias, head = (each.astype('float64') for each in (x, weight, bias, head))
    rows = x.reshape(len(x), groups, -1)
    scale = 1 / np.sqrt(rows.var(2, keepdims=True) + EPS)
    z = ((rows - rows.mean(2, keepdims=True)) * scale).reshape(x.shape)
    each = weight[None, :, None, None]
    d, flat = (head * each).reshape(rows.shape), z.reshape(rows.shape)
    dx = scale * (d - d.mean(2, keepdims=True) - flat * (d * flat).mean(2, keepdims=True))
    return z * each + bias[None, :, None, None], dx.reshape(x.shape), (head * z).sum((0, 2, 3)), head.sum((0, 2, 3))


@forms
@pytest.mark.parametrize('images, channels, groups, height, width', [
    (2, 32, 2, 7, 9), (3, 5, 1, 1, 1), (1, 48, 3, 16, 16), (2, 6, 6, 3, 33)])
def test_result_and_gradients(form, images, channels, groups, height, width):
    print('seed', channels)
    rng = np.random.default_rng(channels)
    x = (rng.standard_normal((images, channels, height, width)) * 2 + 30).astype('float32')  # a mean far from 0
    weight, bias = rng.standard_normal((2, channels)).astype('float32')
    head = rng.standard_normal(x.shape).astype('float32')
    for hybridize in (False, True):
        net = Norm(form, groups, channels)
        net.initialize()
        net.weight.set_data(mx.nd.array(weight))
        net.bias.set_data(mx.nd.array(bias))
        if hybridize:
            net.hybridize(static_alloc=True)
        given = mx.nd.array(x)
        given.attach_grad()
        with mx.autograd.record():
            y = net(given)
        y.backward(mx.nd.array(head))
        found = y, given.grad, net.weight.grad(), net.bias.grad()
        for name, ours, theirs in zip(('y', 'x', 'weight', 'bias'), found, expected(x, weight, bias, head, groups)):
            assert np.abs(ours.asnumpy() - theirs).max() < 1e-4 * max(1, np.abs(theirs).max()), (name, hybridize)


def test_shapes_that_contradict_each_other():
    machine.need_native()
    for shape, groups, message in (((2, 6, 4), 2, 'is not (B, C, H, W)'), ((2, 6, 4, 4), 4, 'multiple of groups=4')):
        with pytest.raises(mx.base.MXNetError) as error:
            OpBackend('native').group_norm(mx.nd, mx.nd.ones(shape), mx.nd.ones(6), mx.nd.ones(6), EPS, groups=groups,
                                           channels=6).wait_to_read()
        assert message in str(error.value)
