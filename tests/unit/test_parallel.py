"""Transparency: however a batch is spread over devices and time, the update is the one of a single device."""
from unittest.mock import Mock

import mxnet as mx
import numpy as np
import pytest
from support import tiny

from mxsimmim.config import ModelConfig, OptimConfig, TrainConfig
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.models import build_simmim, named_parameters
from mxsimmim.optim import SGD, AdamW, weight_decays
from mxsimmim.parallel.updates import SynchronousUpdate
from mxsimmim.parallel.gradients import exchanged
from mxsimmim.parallel.placement import Replicated, contexts_of
from mxsimmim.parallel.communicators import make_communicator
from mxsimmim.runtime.process import ALONE

VIT = dict(tiny.VIT, drop_path=0.3)
SEED = 4


def batches(config, steps, images):
    rng = np.random.default_rng(SEED)
    for _ in range(steps):
        cells = (config.img_size // 8) ** 2
        hidden = np.argsort(rng.random((images, cells)), 1) < max(1, cells // 2)
        side = int(cells ** 0.5)
        mask = hidden.reshape(images, side, side).repeat(8 // config.patch_size, 1).repeat(8 // config.patch_size, 2)
        uniform = rng.random((images, 2 * config.blocks if config.drop_path else 0), 'float32')
        yield Batch(rng.integers(0, 256, (images, config.img_size, config.img_size, 3), 'uint8'),
                    mask.astype('uint8'), uniform, 0, np.arange(images))


def take(batch, part):
    return Batch(batch.image[part], batch.mask[part], batch.uniform[part], 0, batch.index[part])


def trained(keys, devices, accumulate=1, steps=10, images=7, recipe='fixed', clip=0.5, store='local'):
    print('seed', SEED)
    config = ModelConfig(**keys)
    optim = OptimConfig(recipe=recipe, clip_grad=clip)
    net = build_simmim(config, seed=SEED)
    placement = Replicated(net, [mx.cpu(i) for i in range(devices)], accumulate)
    parameters = named_parameters(net)
    adamw = AdamW(parameters, weight_decays(parameters, recipe, config.type, 0.05), optim)
    aggregation = SynchronousUpdate(parameters, adamw, make_communicator(store, ALONE), TrainConfig(batch_size=images),
                                    clip)
    on_micro_batch = aggregation.clip_partial if recipe == 'reference' else None
    rows = []
    for step, batch in enumerate(batches(config, steps, images)):
        loss = placement.forward_backward(batch, images, on_micro_batch)
        rows.append(aggregation.step(step, 1e-3, loss).asnumpy())
    copies = [{n: p.list_data()[d].asnumpy() for n, p in parameters.items()} for d in range(devices)]
    assert all(np.array_equal(copies[0][n], copy[n]) for copy in copies for n in copy)  # replicas are equal, bit by bit
    return official.export_weights(net), np.array(rows)


def difference(ours, theirs):
    """Relative, in the L2 norm of all parameters together."""
    ours, theirs = (np.concatenate([x[n].ravel() for n in sorted(x)]) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize('store', ['local', 'device'])
@pytest.mark.parametrize('devices', [2, 3, 4])
@pytest.mark.parametrize('keys', [VIT, tiny.SWIN], ids=['vit', 'swin'])
def test_devices(keys, devices, store):
    """7 images over 2, 3 and 4 contexts are uneven splits."""
    weights, rows = trained(keys, devices, store=store)
    expected, expected_rows = trained(keys, 1)
    assert difference(weights, expected) < 1e-5
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


def test_small_gradients_travel_together(monkeypatch):
    """Same gradients as apart, where the optimiser looks for them; what lies between is 0."""
    monkeypatch.setattr('mxsimmim.parallel.gradients.SMALL', 4 * 300)
    gradients = []
    for apart in (True, False):
        config = ModelConfig(**VIT)
        net = build_simmim(config, seed=SEED)
        placement = Replicated(net, [mx.cpu(0), mx.cpu(1)])
        parameters = list(named_parameters(net).values())
        store = make_communicator('local', ALONE)
        arrays = [p.list_grad() for p in parameters] if apart else exchanged(parameters, store, net.backend)
        for batch in batches(config, 2, 4):  # the second pass overwrites what the first has left
            placement.forward_backward(batch, 4)
        gradients.append([[g.asnumpy() for g in p.list_grad()] for p in parameters])
    for ours, theirs in zip(*gradients):
        for device in (0, 1):
            np.testing.assert_array_equal(ours[device], theirs[device])
    large = [p for p in parameters if p.data(mx.cpu(0)).size >= 300]
    assert 0 < len(large) == len(arrays) - 1
    for copies, p in zip(arrays[1:], large):
        for device, copy in enumerate(copies):
            copy[:] = device + 2
            assert np.all(p.list_grad()[device].asnumpy() == device + 2)
    small = sum((g[1] ** 2).sum() for g, p in zip(gradients[1], parameters) if p not in large)
    together = arrays[0][1].asnumpy()
    assert len(together) % 16 == 0 and (together ** 2).sum() == pytest.approx(small, rel=1e-6) and small > 0


@pytest.mark.parametrize('compression, asked', [('none', True), ('fp16', False), ('2bit', False)])
def test_who_compresses_asks_the_communicator_for_no_memory(monkeypatch, compression, asked):
    net, store = build_simmim(ModelConfig(**VIT), seed=SEED), make_communicator('local', ALONE)
    Replicated(net, [mx.cpu(0), mx.cpu(1)])
    allocate = Mock(side_effect=store.allocate)
    monkeypatch.setattr(store, 'allocate', allocate)
    parameters = named_parameters(net)
    SynchronousUpdate(parameters, SGD(parameters, {}, OptimConfig()), store, TrainConfig(compression=compression), None)
    assert allocate.called == asked


@pytest.mark.parametrize('devices', [1, 3])
@pytest.mark.parametrize('parts', [2, 3])
def test_accumulation(parts, devices):
    weights, rows = trained(VIT, devices, parts)
    expected, expected_rows = trained(VIT, 1)
    assert difference(weights, expected) < 1e-5
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


@pytest.mark.parametrize('devices', [1, 2])
def test_the_reference_clips_after_every_accumulated_part(devices):
    """Two parts, the first clipped to norm c: the sum handed to the optimiser is clip(clip(g1) + g2)."""
    config = ModelConfig(**VIT)
    batch = next(batches(config, 1, 6))

    def gradients(accumulate, clip, devices):
        net = build_simmim(config, seed=SEED)
        placement = Replicated(net, [mx.cpu(i) for i in range(devices)], accumulate)
        parameters = named_parameters(net)
        adamw = AdamW(parameters, weight_decays(parameters, 'reference', 'vit', 0.0), OptimConfig())
        aggregation = SynchronousUpdate(parameters, adamw, make_communicator('local', ALONE), TrainConfig(batch_size=6),
                                        clip)
        yield placement, aggregation, lambda: np.concatenate(
            [g.ravel() for g in official.export_weights(net, grad=True).values()])

    placement, _, read = next(gradients(1, None, 1))
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        placement.forward_backward(take(batch, part), 6)
        halves.append(read())
    clip = np.linalg.norm(halves[0]) / 4
    expected = halves[0] / 4 + halves[1]
    placement, aggregation, read = next(gradients(2, clip, devices))
    loss = placement.forward_backward(batch, 6, aggregation.clip_partial)
    _, norm, _ = aggregation.step(0, 0.0, loss).asnumpy()
    assert norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    # MXNet's AdamW operator leaves the gradient multiplied with its scale.
    np.testing.assert_allclose(read(), expected * clip / norm, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize('poison', [float('nan'), 1e38])
@pytest.mark.parametrize('devices', [1, 2])
def test_a_non_finite_step_changes_nothing(poison, devices):
    config = ModelConfig(**VIT)
    net = build_simmim(config, seed=SEED)
    placement = Replicated(net, [mx.cpu(i) for i in range(devices)])
    parameters = named_parameters(net)
    adamw = AdamW(parameters, weight_decays(parameters, 'fixed', 'vit', 0.05), OptimConfig())
    aggregation = SynchronousUpdate(parameters, adamw, make_communicator('local', ALONE), TrainConfig(batch_size=4),
                                    5.0)
    parameters['decoder.0.bias'].set_data(mx.nd.full((48,), poison))
    before, moments = official.export_weights(net), adamw.arrays()
    for step, batch in enumerate(batches(config, 2, 4)):
        loss, norm, applied = aggregation.step(step, 1e-3, placement.forward_backward(batch, 4)).asnumpy()
        assert applied == 0 and not np.isfinite(loss * norm)
    after = official.export_weights(net)
    assert all(np.array_equal(before[n], after[n], equal_nan=True) for n in before)
    assert all(np.array_equal(moments[n], value) for n, value in adamw.arrays().items())


def test_validation_loss_is_the_mean_over_images():
    config = ModelConfig(**dict(VIT, drop_path=0.0))
    batch = next(batches(config, 1, 7))
    net = build_simmim(config, seed=SEED)
    one = Replicated(net, [mx.cpu(0)])
    apart = [one.loss(take(batch, slice(i, i + 1))).asscalar() for i in range(7)]
    three = Replicated(build_simmim(config, seed=SEED), [mx.cpu(i) for i in range(3)])
    assert three.loss(batch).asscalar() == pytest.approx(sum(apart), rel=1e-5)
    fewer_than_devices = take(batch, slice(0, 2))
    assert three.loss(fewer_than_devices).asscalar() == pytest.approx(sum(apart[:2]), rel=1e-5)


def test_missing_gpus_are_named():
    with pytest.raises(ValueError, match=r'gpu\(97\) asked for, but MXNet sees \d+ GPUs'):
        contexts_of(['gpu(97)'])
    assert contexts_of(['cpu(0)', 'cpu(3)']) == [mx.cpu(0), mx.cpu(3)]


@pytest.mark.parametrize('devices', ['auto', ['gpu(0)']])
def test_gpus_without_code_are_refused_at_the_start(devices, monkeypatch):
    if mx.context.num_gpus():
        pytest.skip('needs an MXNet that cannot compute on gpu(0); this one may')
    monkeypatch.setattr(mx.context, 'num_gpus', lambda: 1)  # the CPU build fails as one without code for a card does
    with pytest.raises(ValueError, match=r'^gpu\(0\): MXNet cannot compute there: .*mxsimmim doctor'):
        contexts_of(devices)
