"""Networks that compute with native operators: bytes go in as they are, and the numbers are those of plain MXNet."""
import mxnet as mx
import numpy as np
import pytest
from support import machine
from support.tiny import SWIN, VIT

from mxsimmim.config import ModelConfig
from mxsimmim.data.loader import Batch
from mxsimmim.models import build_classifier, build_simmim, named_parameters
from mxsimmim.ops import OpBackend
from mxsimmim.parallel.placement import Replicated

NETWORKS = [VIT, dict(VIT, norm_targets=True, loss='mse'), SWIN, dict(SWIN, loss='mse')]
LIMITS = {'float32': (1e-5, 1e-4), 'bf16': (1e-2, 0.1)}  # of the loss and the gradient
OTHER = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)  # a mean and a deviation that are no default


def batch_of(config, classes=0, images=3):
    rng = np.random.default_rng(9)
    image = rng.integers(0, 256, (images, config.img_size, config.img_size, 3), 'uint8')
    mask = (rng.random((images, config.grid, config.grid)) < 0.5).astype('uint8')
    fields = {'label': rng.random((images, classes), 'float32')} if classes else {'mask': mask}
    return Batch({'image': image, **fields}, 0, np.arange(images))


def normalised(batch, mean, std):
    image = mx.nd.image.to_tensor(mx.nd.array(batch.fields['image'], dtype='uint8'))
    image = mx.nd.image.normalize(image, mean=mean, std=std)
    return batch._replace(fields={**batch.fields, 'image': image.asnumpy()})


def seen_by(net):
    """The types of the images that a network will get."""
    types = []
    net.register_forward_pre_hook(lambda _block, inputs: types.append(np.dtype(inputs[0].dtype).name))
    return types


@machine.natively
@pytest.mark.parametrize('keys', NETWORKS, ids=str)
def test_bytes_go_to_the_network_which_normalises_them(keys):
    config = ModelConfig(**keys)
    found = []
    for prepare in (lambda batch: batch, lambda batch: normalised(batch, *OTHER)):
        net = build_simmim(config, 3, OpBackend('native'), *OTHER)
        batch = prepare(batch_of(config))
        placement = Replicated(net, [mx.cpu(0), mx.cpu(1)])
        types = seen_by(net)
        results = [placement.forward_backward(batch, len(batch.index)).asscalar(), placement.loss(batch).asscalar(),
                   placement.reconstruct(batch)]
        assert set(types) == {batch.fields['image'].dtype.name}
        found.append(results + [p.grad(mx.cpu(1)).asnumpy() for p in named_parameters(net).values()])
    assert all(np.array_equal(bytes_, floats) for bytes_, floats in zip(*found))


@machine.natively
@pytest.mark.parametrize('keys', [VIT, SWIN], ids=['vit', 'swin'])
def test_a_classifier_takes_bytes(keys):
    config = ModelConfig(**keys)
    found = []
    for prepare in (lambda batch: batch, lambda batch: normalised(batch, *OTHER)):
        net, batch = build_classifier(config, 5, 3, OpBackend('native'), *OTHER), prepare(batch_of(config, 5))
        placement = Replicated(net, [mx.cpu(0)])
        types = seen_by(net)
        results = [placement.forward_backward(batch, len(batch.index)).asscalar(), placement.outputs(batch)]
        assert set(types) == {batch.fields['image'].dtype.name}
        found.append(results + [p.grad().asnumpy() for p in named_parameters(net).values()])
    assert all(np.array_equal(bytes_, floats) for bytes_, floats in zip(*found))


def test_without_native_operators_images_are_normalised_before_the_network():
    config = ModelConfig(**VIT)
    net, batch = build_simmim(config, 3, mean=OTHER[0], std=OTHER[1]), batch_of(config)
    placement = Replicated(net, [mx.cpu(0)])
    types = seen_by(net)
    losses = [placement.loss(x).asscalar() for x in (batch, normalised(batch, *OTHER))]
    assert types == ['float32', 'float32'] and losses[0] == losses[1]


@machine.natively
@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('keys', NETWORKS, ids=str)
def test_networks_of_both_forms_agree(keys, accumulate):
    config, found = ModelConfig(**keys), []
    for form, precision in machine.ABLE:
        net, batch = build_simmim(config, 3, OpBackend(form, precision)), batch_of(config)
        placement = Replicated(net, [mx.cpu(0)], accumulate)
        loss = placement.forward_backward(batch, len(batch.index)).asscalar()
        found.append((loss, np.concatenate([p.grad().asnumpy().ravel() for p in named_parameters(net).values()])))
    loss, gradient = found[0]
    for precision, (ours, changes) in zip(machine.PRECISIONS, found[1:]):
        near, close = LIMITS[precision]
        assert ours == pytest.approx(loss, rel=near)
        assert np.linalg.norm(changes - gradient) < close * np.linalg.norm(gradient)


@machine.natively
def test_networks_of_both_forms_side_by_side():
    """Each keeps what it was built with, hybridized or not, whatever is built after it."""
    config = ModelConfig(**VIT)
    rng = np.random.default_rng(4)
    image, mask = mx.nd.array(rng.standard_normal((2, 3, 16, 16))), mx.nd.ones((2, 4, 4))
    for hybrid in (False, True):
        nets = {form: build_simmim(config, 3, OpBackend(form)) for form in machine.FORMS}
        for net in nets.values():
            net.hybridize(hybrid)
        first, second = ([net(image, mask).asscalar() for net in nets.values()] for _ in range(2))
        assert first == second and first[0] == pytest.approx(first[1], rel=1e-5)
        for form, net in nets.items():
            traced = net(mx.sym.var('image'), mx.sym.var('mask')).tojson()
            assert ('mxsimmim_attention' in traced) == (form == 'native') == net.backend.is_native
