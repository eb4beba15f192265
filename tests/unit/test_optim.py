"""Schedules by table, AdamW against its formula in float64."""
import math

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import Parameter

from mxsimmim.config import OptimConfig, TrainConfig
from mxsimmim.optim import AdamW, learning_rates, weight_decays

TRAIN = TrainConfig(batch_size=512)


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


def test_adamw_is_the_published_formula():
    print('seed 8')
    rng = np.random.default_rng(8)
    parameter = Parameter('w', shape=(5, 4))
    parameter.initialize(mx.init.Zero(), ctx=mx.cpu())
    weight = rng.standard_normal((5, 4))
    parameter.set_data(mx.nd.array(weight))
    optim = OptimConfig(betas=(0.8, 0.9), eps=1e-2)
    adamw = AdamW({'w': parameter}, {'w': 0.3}, optim)
    mean = var = np.zeros_like(weight)
    for step in range(6):
        lr, scale, gradient = 0.1 / (step + 1), 0.5, rng.standard_normal((5, 4))
        parameter.list_grad()[0][:] = gradient
        adamw.update(step, lr, [mx.nd.array([scale])])
        gradient = gradient * scale
        mean, var = 0.8 * mean + 0.2 * gradient, 0.9 * var + 0.1 * gradient ** 2
        step_size = mean / (1 - 0.8 ** (step + 1)) / (np.sqrt(var / (1 - 0.9 ** (step + 1))) + 1e-2)
        weight = weight * (1 - lr * 0.3) - lr * step_size
    np.testing.assert_allclose(parameter.data().asnumpy(), weight, rtol=1e-5)
    again = AdamW({'w': parameter}, {'w': 0.3}, optim)
    again.load(adamw.arrays())
    assert all(np.array_equal(again.arrays()[n], value) for n, value in adamw.arrays().items())


def test_adamw_waits_for_copies_of_its_gradient():
    """It scales gradients in place: a copy to the next device that came later would be scaled twice."""
    contexts, count, size = [mx.cpu(0), mx.cpu(1)], 24, 16
    parameters = {f'p{i}': Parameter(f'p{i}', shape=(size,), init='zeros') for i in range(count)}
    for p in parameters.values():
        p.initialize(ctx=contexts)
    adamw = AdamW(parameters, dict.fromkeys(parameters, 0.0), OptimConfig())
    scale = mx.nd.array([0.5])
    scales = [scale.as_in_context(ctx) for ctx in contexts]
    big, ones, expected = mx.nd.ones((1000, 1000), ctx=contexts[1]), mx.nd.ones((size,)), 0.0
    for update in range(5):
        for p in parameters.values():
            first, other = p.list_grad()
            mx.nd.elemwise_mul(ones * update, ones, out=first)
            first.copyto(other)  # waits for the second device's last update, which waits for this product:
        mx.nd.dot(big, big)
        adamw.update(update, 1e-3, scales)
        expected = 0.9 * expected + 0.1 * 0.5 * update
    for name in parameters:
        for copy in adamw.moments[f'mean.{name}']:
            np.testing.assert_allclose(copy.asnumpy(), expected, rtol=1e-5)
