"""Schedules by table, AdamW against its formula in float64."""
import math

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import Parameter
from support import machine
from support.specs import specs_of

from mxsimmim.config import OptimConfig, TrainConfig
from mxsimmim.ops import OpBackend
from mxsimmim.optim import SGD, AdamW, learning_rates, weight_decays

TRAIN = TrainConfig(batch_size=512)


@pytest.fixture(params=machine.FORMS)
def backend(request):
    return OpBackend(request.param)


def rates(train=TRAIN, total=100, **keys):
    rate = learning_rates(OptimConfig(**dict(dict(base_lr=1.0, warmup_lr=0.1, min_lr=0.0, warmup='10 steps'), **keys)),
                          train, per_epoch=10, total=total)
    return [rate(k) for k in range(total)]


def test_warm_up_is_one_update_late():
    assert rates(schedule='constant')[:4] == pytest.approx([0.1, 0.1, 0.19, 0.28])
    assert rates(schedule='constant')[10:13] == pytest.approx([0.91, 1.0, 1.0])


def test_cosine():
    reference, fixed = rates(schedule='cosine'), rates(schedule='cosine', recipe='fixed')
    assert reference[51] == pytest.approx(0.5)                          # t = 50 of 100, not counted from the warm-up
    assert fixed[56] == pytest.approx(0.5)                              # t = 55: half of the 90 after the warm-up
    assert reference[11] == pytest.approx((1 + math.cos(math.pi * 0.1)) / 2)
    assert fixed[11] == pytest.approx(1.0)


def test_multistep():
    values = rates(schedule='multistep', milestones=['3 epochs', '50%'])
    assert values[30:32] == pytest.approx([1.0, 0.1]) and values[50:52] == pytest.approx([0.1, 0.01])


def test_rates_scale_with_the_batch():
    assert rates(TrainConfig(batch_size=2048), schedule='constant')[-1] == pytest.approx(4.0)


def test_accumulated_parts_move_the_reference_schedule():
    """Update k of A parts comes after k*A parts, the last of which set time k*A - 1."""
    parts = rates(total=20, warmup='20 steps', schedule='constant')
    updates = rates(TrainConfig(batch_size=512, accumulate=2), total=10, warmup='10 steps', schedule='constant')
    assert updates == pytest.approx([parts[2 * k] for k in range(10)])


def test_no_warm_up():
    assert rates(warmup='0 steps', schedule='constant') == [1.0] * 100


@pytest.mark.parametrize('kind, name, shape, reference, fixed', [
    ('vit', 'encoder.blocks.0.attn.qkv.weight', (3, 2), 0.05, 0.05),
    ('vit', 'encoder.blocks.0.attn.q_bias', (3,), 0, 0),
    ('vit', 'encoder.pos_embed', (1, 2, 3), 0, 0),
    ('vit', 'encoder.mask_token', (1, 1, 3), 0.05, 0),
    ('swin', 'encoder.mask_token', (1, 1, 3), 0, 0),
    ('swin', 'encoder.absolute_pos_embed', (1, 2, 3), 0, 0),
    ('swin', 'encoder.layers.0.blocks.0.attn.relative_position_bias_table', (9, 1), 0.05, 0),
])
def test_weight_decays(kind, name, shape, reference, fixed):
    parameters = {name: Parameter(name, shape=shape)}
    assert weight_decays(parameters, 'reference', kind, 0.05) == {name: reference}
    assert weight_decays(parameters, 'fixed', kind, 0.05) == {name: fixed}


def test_adamw_is_the_published_formula(backend):
    print('seed 8')
    rng = np.random.default_rng(8)
    parameter = Parameter('w', shape=(5, 4))
    parameter.initialize(mx.init.Zero(), ctx=mx.cpu())
    weight = rng.standard_normal((5, 4))
    parameter.set_data(mx.nd.array(weight))
    optim = OptimConfig(betas=(0.8, 0.9), eps=1e-2)
    adamw = AdamW(specs_of({'w': parameter}, {'w': 0.3}), optim, backend)
    mean = var = np.zeros_like(weight)
    for step in range(6):
        lr, scale, gradient = 0.1 / (step + 1), 0.5, rng.standard_normal((5, 4))
        parameter.list_grad()[0][:] = gradient
        adamw.update(step, lr, mx.nd.array([scale]))
        gradient = gradient * scale
        mean, var = 0.8 * mean + 0.2 * gradient, 0.9 * var + 0.1 * gradient ** 2
        step_size = mean / (1 - 0.8 ** (step + 1)) / (np.sqrt(var / (1 - 0.9 ** (step + 1))) + 1e-2)
        weight = weight * (1 - lr * 0.3) - lr * step_size
    np.testing.assert_allclose(parameter.data().asnumpy(), weight, rtol=1e-5)
    again = AdamW(specs_of({'w': parameter}, {'w': 0.3}), optim, backend)
    again.load(adamw.arrays())
    assert all(np.array_equal(again.arrays()[n], value) for n, value in adamw.arrays().items())


def test_adamw_waits_for_copies_of_its_gradient(backend):
    """MXNet's scales gradients in place: a copy to the next device that came later would be scaled twice."""
    contexts, count, size = [mx.cpu(0), mx.cpu(1)], 24, 16
    parameters = {f'p{i}': Parameter(f'p{i}', shape=(size,), init='zeros') for i in range(count)}
    for p in parameters.values():
        p.initialize(ctx=contexts)
    adamw = AdamW(specs_of(parameters), OptimConfig(), backend)
    scale = mx.nd.array([0.5])
    big, ones, expected = mx.nd.ones((1000, 1000), ctx=contexts[1]), mx.nd.ones((size,)), 0.0
    for update in range(5):
        for p in parameters.values():
            first, other = p.list_grad()
            mx.nd.elemwise_mul(ones * update, ones, out=first)
            first.copyto(other)  # waits for the second device's last update, which waits for this product:
        mx.nd.dot(big, big)
        adamw.update(update, 1e-3, scale)
        expected = 0.9 * expected + 0.1 * 0.5 * update
    for name in parameters:
        for copy in adamw.moments[f'mean.{name}']:
            np.testing.assert_allclose(copy.asnumpy(), expected, rtol=1e-5)


SCHEDULES = [dict(schedule='cosine'), dict(schedule='cosine', recipe='fixed'), dict(schedule='constant'),
             dict(schedule='multistep', milestones=['3 epochs', '50%'], gamma=0.3)]


@pytest.mark.parametrize('keys', SCHEDULES, ids=lambda keys: ' '.join(map(str, keys.values())))
def test_a_scale_is_of_the_base_rate_alone(keys):
    """Warm-up and cosine begin and end at rates that no scale touches: floor + scale (full - floor) at every update.

    With the reference's layer decay a group's schedule is that of its own base rate, with the run's other rates.
    """
    optim = dict(base_lr=1.0, warmup_lr=0.1, min_lr=0.02, warmup='10 steps', **keys)
    rate = learning_rates(OptimConfig(**optim), TRAIN, per_epoch=10, total=100)
    for scale in (0.0, 0.0563, 0.75, 1.0):
        own = learning_rates(OptimConfig(**{**optim, 'base_lr': scale}), TRAIN, per_epoch=10, total=100)
        for k in range(101):
            floor, full = rate(k, 0), rate(k)
            assert rate(k, scale) == pytest.approx(own(k), rel=1e-12, abs=1e-15)
            assert floor + scale * (full - floor) == pytest.approx(own(k), rel=1e-12, abs=1e-15)


def test_scaled_rates_by_table():
    rate = learning_rates(OptimConfig(base_lr=1.0, warmup_lr=0.1, min_lr=0.02, warmup='10 steps', schedule='cosine'),
                          TRAIN, per_epoch=10, total=100)
    assert [rate(k, 0.5) for k in (0, 1, 6, 51, 101)] == pytest.approx([0.1, 0.1, 0.3, 0.26, 0.02])
    assert [rate(k, 0) for k in (0, 6, 51, 101)] == pytest.approx([0.1, 0.05, 0.01, 0.02])


@pytest.mark.parametrize('kind', [AdamW, SGD])
@pytest.mark.parametrize('devices', [1, 2])
def test_groups_have_their_own_rate_and_decay(backend, kind, devices):
    """Two groups against the formulas in float64: the rate of each is floor + lr_scale (lr - floor)."""
    print('seed 9')
    rng = np.random.default_rng(9)
    contexts = [mx.cpu(i) for i in range(devices)]
    scales, decays, shapes = {'a': 0.3, 'b': 1.0, 'c': 0.3}, {'a': 0.2, 'b': 0.2, 'c': 0.0}, {
        'a': (4, 3), 'b': (7,), 'c': (2, 2)}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    made = {name: Parameter(name, shape=shape) for name, shape in shapes.items()}
    for name, p in made.items():
        p.initialize(ctx=contexts)
        p.set_data(mx.nd.array(weights[name]))
    optim = OptimConfig(betas=(0.8, 0.9), eps=1e-2)
    optimizer = kind(specs_of(made, decays, scales), optim, backend)
    moments = {name: [np.zeros(shape), np.zeros(shape)] for name, shape in shapes.items()}
    for step in range(6):
        lr, floor = 0.2 / (step + 1), 0.05
        for name, p in made.items():
            gradient = rng.standard_normal(shapes[name])
            for copy in p.list_grad():
                copy[:] = gradient
            own, (mean, var) = floor + scales[name] * (lr - floor), moments[name]
            mean += 0.2 * (gradient - mean)
            var += 0.1 * (gradient ** 2 - var)
            adam = mean / (1 - 0.8 ** (step + 1)) / (np.sqrt(var / (1 - 0.9 ** (step + 1))) + 1e-2)
            weights[name] = weights[name] * (1 - own * decays[name]) - own * (adam if kind is AdamW else gradient)
        optimizer.update(step, lr, mx.nd.ones((1,)), floor)
    for name, p in made.items():
        for copy in p.list_data():
            np.testing.assert_allclose(copy.asnumpy(), weights[name], rtol=1e-5, atol=1e-6)
