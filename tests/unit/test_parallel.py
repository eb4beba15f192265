"""Transparency: however a batch is spread over devices and time, the update is the one of a single device."""
from unittest.mock import Mock

import mxnet as mx
import numpy as np
import pytest
from support.trainer import build_tiny_trainer, random_batches, take

from mxsimmim.config import ModelConfig, OptimConfig, TrainConfig
from mxsimmim.interop import official
from mxsimmim.models import build_simmim, named_parameters, parameter_specs
from mxsimmim.optim import SGD
from mxsimmim.parallel.communicators import make_communicator
from mxsimmim.parallel.gradients import exchanged
from mxsimmim.parallel.placement import Replicated, contexts_of
from mxsimmim.parallel.updates import SynchronousUpdate

VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, drop_path=0.3)
SWIN = dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4)
SEED = 4


def build(keys, devices, accumulate=1, images=7, recipe='fixed', clip=0.5, store='local', decay=0.05):
    print('seed', SEED)
    return build_tiny_trainer(model=keys, devices=[f'cpu({i})' for i in range(devices)], seed=SEED,
                              optim=dict(recipe=recipe, clip_grad=clip, weight_decay=decay),
                              train=dict(batch_size=images, accumulate=accumulate, store=store))


def trained(keys, devices, accumulate=1, steps=10, images=7, recipe='fixed', clip=0.5, store='local'):
    trainer = build(keys, devices, accumulate, images, recipe, clip, store)
    rows = [trainer.train_step(batch).asnumpy()
            for batch in random_batches(trainer.config.model, steps, images, SEED)]
    parameters = named_parameters(trainer.placement.net)
    copies = [{n: p.list_data()[d].asnumpy() for n, p in parameters.items()} for d in range(devices)]
    assert all(np.array_equal(copies[0][n], copy[n]) for copy in copies for n in copy)  # replicas are equal, bit by bit
    return official.export_weights(trainer.placement.net), np.array(rows)


def difference(ours, theirs):
    """Relative, in the L2 norm of all parameters together."""
    ours, theirs = (np.concatenate([x[n].ravel() for n in sorted(x)]) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope='module')
def alone():
    """What one device makes of a network, computed once."""
    made = {}

    def run(keys, images):
        name = repr((keys, images))
        if name not in made:
            made[name] = trained(keys, 1, images=images)
        return made[name]
    return run


@pytest.mark.parametrize('store', ['local', 'device'])
@pytest.mark.parametrize('devices', [2, 3, 4])
@pytest.mark.parametrize('keys', [VIT, SWIN], ids=['vit', 'swin'])
def test_devices(alone, keys, devices, store):
    """7 images over 2, 3 and 4 contexts are uneven splits."""
    weights, rows = trained(keys, devices, store=store)
    expected, expected_rows = alone(keys, 7)
    assert difference(weights, expected) < 1e-5
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


def test_a_loss_that_is_not_finite_spoils_one_step():
    """As several workers do it: nothing of it stays between the small gradients, which no backward pass overwrites."""
    trainer = build(SWIN, 2)
    trainer.update_rule._several = True
    applied = []
    for number, batch in enumerate(random_batches(trainer.config.model, 4, 7, SEED)):
        image = batch.fields['image'].transpose(0, 3, 1, 2).astype('float32') / 255
        batch.fields['image'] = image * np.float32('nan') if number == 1 else image
        applied.append(trainer.train_step(batch).asnumpy()[2])
    assert applied == [1, 0, 1, 1]


def test_small_gradients_travel_together(monkeypatch):
    """Same gradients as apart, where the optimiser looks for them; what lies between is 0."""
    monkeypatch.setattr('mxsimmim.parallel.gradients.SMALL', 4 * 300)
    gradients = []
    for apart in (True, False):
        config = ModelConfig(**VIT)
        net = build_simmim(config, seed=SEED)
        placement = Replicated(net, [mx.cpu(0), mx.cpu(1)])
        parameters = list(named_parameters(net).values())
        store = make_communicator('local')
        arrays = [p.list_grad() for p in parameters] if apart else exchanged(parameters, store, net.backend)
        for batch in random_batches(config, 2, 4, SEED):  # the second pass overwrites what the first has left
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
def test_who_compresses_asks_the_store_for_no_memory(monkeypatch, compression, asked):
    net, store = build_simmim(ModelConfig(**VIT), seed=SEED), make_communicator('local')
    Replicated(net, [mx.cpu(0), mx.cpu(1)])
    allocate = Mock(side_effect=store.allocate)
    monkeypatch.setattr(store, 'allocate', allocate)
    specs = parameter_specs(net)
    SynchronousUpdate(specs, SGD(specs, OptimConfig()), store, TrainConfig(compression=compression), None)
    assert allocate.called == asked


@pytest.mark.parametrize('devices', [1, 3])
@pytest.mark.parametrize('parts', [2, 3])
def test_accumulation(alone, parts, devices):
    weights, rows = trained(VIT, devices, parts, images=11)
    expected, expected_rows = alone(VIT, 11)
    assert difference(weights, expected) < 1e-5
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


@pytest.mark.parametrize('devices', [1, 2])
def test_the_reference_clips_after_every_accumulated_part(devices):
    """Two parts, the first clipped to norm c: the sum handed to the optimiser is clip(clip(g1) + g2)."""
    batch = next(random_batches(ModelConfig(**VIT), 1, 6, SEED))

    def gradient(trainer):
        return np.concatenate([g.ravel() for g in official.export_weights(trainer.placement.net, grad=True).values()])

    halves, whole = [], build(VIT, 1, images=6, recipe='reference', clip=None)
    for part in (slice(0, 3), slice(3, 6)):
        whole.placement.forward_backward(take(batch, part), 6)
        halves.append(gradient(whole))
    clip = np.linalg.norm(halves[0]) / 4
    expected = halves[0] / 4 + halves[1]
    trainer = build(VIT, devices, 2, images=6, recipe='reference', clip=clip, decay=0)
    _, norm, _ = trainer.train_step(batch).asnumpy()
    assert norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    # MXNet's AdamW operator leaves the gradient multiplied with its scale.
    np.testing.assert_allclose(gradient(trainer), expected * clip / norm, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize('poison', [float('nan'), 1e38])
@pytest.mark.parametrize('devices', [1, 2])
def test_a_non_finite_step_changes_nothing(poison, devices):
    trainer = build(VIT, devices, images=4, clip=5.0)
    net, update_rule = trainer.placement.net, trainer.update_rule
    named_parameters(net)['decoder.0.bias'].set_data(mx.nd.full((48,), poison))
    before, moments = official.export_weights(net), update_rule.state_dict()
    for batch in random_batches(trainer.config.model, 2, 4, SEED):
        loss, norm, applied = trainer.train_step(batch).asnumpy()
        assert applied == 0 and not np.isfinite(loss * norm)
    after = official.export_weights(net)
    assert all(np.array_equal(before[n], after[n], equal_nan=True) for n in before)
    assert all(np.array_equal(moments[n], value) for n, value in update_rule.state_dict().items())


def test_validation_loss_is_the_mean_over_images():
    still = dict(VIT, drop_path=0.0)
    batch = next(random_batches(ModelConfig(**still), 1, 7, SEED))
    one, three = build(still, 1).placement, build(still, 3).placement
    apart = [one.loss(take(batch, slice(i, i + 1))).asscalar() for i in range(7)]
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
