"""AdamW over all parameters in one call, and sums of squares: plain MXNet and native against formulas in float64."""
import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import nn
from support import machine

from mxsimmim.ops import OpBackend, adamw

SHAPES = [(1,), (3,), (7, 5), (17,), (33, 31), (2, 3, 5, 7), (16384,), (16385,), (40001,), (1, 1)]
CONSTANTS = dict(beta1=float(np.float32(0.8)), beta2=float(np.float32(0.9)), epsilon=1e-2)
NAMES = ('weights', 'grads', 'means', 'variances')


@pytest.fixture(params=machine.FORMS)
def backend(request):
    return OpBackend(request.param)


@pytest.fixture
def native():
    machine.need_native()
    return OpBackend('native')


def arrays(rng, shapes=tuple(SHAPES)):
    """Weights, gradients, means, variances in float32."""
    made = [[rng.standard_normal(shape).astype('float32') for shape in shapes] for _ in NAMES]
    return made[:3] + [[np.abs(a) for a in made[3]]]


def placed(groups, context=None):
    return [[mx.nd.array(a, ctx=context or mx.cpu(), dtype=a.dtype) for a in group] for group in groups]


def values(groups):
    return [[a.asnumpy() for a in group] for group in groups]


def same(ours, theirs):
    return all(np.array_equal(a, b, equal_nan=True) for x, y in zip(ours, theirs) for a, b in zip(x, y))


def closed_form(groups, rates, scale):
    """float64 in, float64 out."""
    beta1, beta2, epsilon = CONSTANTS.values()
    for i, (weight, grad, mean, var) in enumerate(zip(*groups)):
        grad, (lr, factor) = grad * scale, rates[i]
        mean, var = beta1 * mean + (1 - beta1) * grad, beta2 * var + (1 - beta2) * grad ** 2
        groups[0][i] = weight * (1 - factor) - lr * mean / (np.sqrt(var) + epsilon)
        groups[2][i], groups[3][i] = mean, var


@pytest.mark.parametrize('devices', [1, 3])
def test_closed_form(backend, devices):
    print('seed 21')
    rng = np.random.default_rng(21)
    rates = [(0.1 / (i + 1), 0.01 * (i % 3)) for i in range(len(SHAPES))]
    start = arrays(rng)
    contexts = [mx.cpu(i) for i in range(devices)]
    replicas = [placed(start, context) for context in contexts]
    exact = [[a.astype('float64') for a in group] for group in start]
    for step in range(4):
        scale = 0.5 + step
        for i, shape in enumerate(SHAPES):
            grad = rng.standard_normal(shape).astype('float32')
            exact[1][i] = grad.astype('float64')
            for groups in replicas:
                groups[1][i][:] = grad
        for groups, context in zip(replicas, contexts):
            adamw.update(*groups, rates, mx.nd.array([scale], ctx=context), backend=backend, shared=devices > 1,
                         **CONSTANTS)
        closed_form(exact, rates, scale)
    for groups in map(values, replicas):
        for name, ours, theirs in zip(NAMES, groups, exact):
            if name != 'grads':
                for a, b in zip(ours, theirs):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=name)
    assert all(same(values(groups), values(replicas[0])) for groups in replicas if backend.is_native)


@machine.natively
def test_native_is_the_reference():
    print('seed 22')
    start = arrays(np.random.default_rng(22))
    rates, ends = [(1e-3, 1e-3 * 0.05 * (i % 2)) for i in range(len(SHAPES))], {}
    for name in ('reference', 'native'):
        backend = OpBackend(name)
        rng, groups = np.random.default_rng(23), placed(start)
        for _ in range(5):
            for grad in groups[1]:
                grad[:] = rng.standard_normal(grad.shape)
            adamw.update(*groups, rates, mx.nd.array([0.3]), backend=backend, **CONSTANTS)
        ends[name] = values(groups)
    for kind in (0, 2, 3):
        for ours, theirs in zip(ends['native'][kind], ends['reference'][kind]):
            assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


def test_decay_rounds_before_the_step(native):
    """As in PyTorch: as one fma a quarter of the weights would have another last bit."""
    print('seed 24')
    rng = np.random.default_rng(24)
    weight = rng.standard_normal(50_000).astype('float32')
    mean = rng.standard_normal(weight.shape).astype('float32')
    groups = placed([[weight], [np.zeros_like(weight)], [mean], [np.ones_like(weight)]])
    lr, factor = np.float32(1e-3), np.float32(1e-3)
    adamw.update(*groups, [(float(lr), float(factor))], mx.nd.ones((1,)), backend=native, **CONSTANTS)
    beta1, beta2, epsilon = (np.float32(value) for value in CONSTANTS.values())
    step = lr * (beta1 * mean) / (np.sqrt(beta2) + epsilon)
    ours, fused = groups[0][0].asnumpy(), weight.astype('float64') * (1 - factor) - step
    assert np.mean(ours == weight * (1 - factor) - step) > 0.99 > np.mean(ours == fused.astype('float32'))


def test_gradients_stay_and_writes_are_in_order(native):
    """A slow product makes the gradient; what is read afterwards is the new weight, and the gradient may change."""
    big = mx.nd.ones((1500, 1500))
    groups = placed([[np.zeros(9, 'float32')] for _ in NAMES])
    weights, grads, means, _ = groups
    for step in range(3):
        grads[0][:] = mx.nd.dot(big, big)[0, :9] / 1500 * (step + 1)
        adamw.update(*groups, [(1.0, 0.0)], mx.nd.array([0.5]), backend=native, beta1=0.0, beta2=0.0, epsilon=1.0)
        seen, kept = means[0] + 0, grads[0] + 0
        grads[0][:] = -1
        np.testing.assert_allclose(seen.asnumpy(), 0.5 * (step + 1))
        assert np.all(kept.asnumpy() == step + 1)
    np.testing.assert_allclose(weights[0].asnumpy(), -(0.5 / 1.5 + 1 / 2 + 1.5 / 2.5), rtol=1e-6)


@pytest.mark.parametrize('scale', [0.0, math.nan, math.inf])
def test_skipped(backend, scale):
    """With gradients of NaN, too. The reference decays for scales that no caller gives."""
    print('seed 25')
    start = arrays(np.random.default_rng(25), [(5, 4), (19,)])
    start[1][0][:] = math.nan
    groups, copies = placed(start), [mx.nd.ones(a.shape, dtype='float16') for a in start[0]]
    factor, copies = (0.1, copies) if backend.is_native else (0.1 if scale == 0 else 0, [])
    adamw.update(*groups, [(0.1, factor)] * 2, mx.nd.array([scale]), copies=copies, backend=backend, **CONSTANTS)
    assert same(values(groups), start)
    assert all(np.all(copy.asnumpy() == 1) for copy in copies)


def nearest_bf16(values):
    """By trying both neighbours in float64."""
    below = values.view('uint32') >> 16
    distance = [np.abs((bits << 16).astype('uint32').view('float32').astype('float64') - values)
                for bits in (below, below + 1)]
    up = (distance[1] < distance[0]) | (distance[1] == distance[0]) & (below % 2 == 1)
    return (below + up).astype('uint16')


def test_copies_are_the_nearest_bf16(backend):
    print('seed 26')
    rng = np.random.default_rng(26)
    ties = 1 + np.arange(1, 64, dtype='float32') * np.float32(2 ** -8)
    tiny = rng.integers(0, 1 << 23, 40, dtype='uint32').view('float32')
    weight = np.concatenate([ties, -ties, tiny, rng.standard_normal(1002).astype('float32'), np.zeros(1, 'float32')])
    assert len(weight) % 8
    special = np.array([math.inf, -math.inf, math.nan, -0.0, 3.4e38], 'float32')
    special_bits = [0x7f80, 0xff80, 0x7fc0, 0x8000, 0x7f80]
    assert adamw.round_to_bf16(special).tolist() == special_bits
    if not backend.is_native:
        special, special_bits = special[2:], special_bits[2:]  # MXNet's operator makes NaN of infinite weights
    groups = placed([[weight, special]] + [[np.zeros_like(weight), np.zeros_like(special)] for _ in range(3)])
    copies = [mx.nd.ones(a.shape, dtype='float16') for a in groups[0]]
    adamw.update(*groups, [(0.0, 0.0)] * 2, mx.nd.ones((1,)), copies=copies, backend=backend, **CONSTANTS)
    bits = [copy.asnumpy().view('uint16') for copy in copies]
    assert np.array_equal(groups[0][0].asnumpy(), weight)
    assert np.array_equal(bits[0], nearest_bf16(weight)) and bits[1].tolist() == special_bits
    adamw.update(*groups, [(0.1, 0.1), (0.0, 0.0)], mx.nd.ones((1,)), copies=copies, backend=backend, **CONSTANTS)
    assert np.array_equal(copies[0].asnumpy().view('uint16'), nearest_bf16(groups[0][0].asnumpy()))
    assert np.any(copies[0].asnumpy().view('uint16') != bits[0])


def test_weights_that_inference_has_reordered(native):
    """Convolutions leave their weights in oneDNN's layout, of which MXNet would give our operator a copy."""
    net = nn.Conv2D(64, 3, in_channels=32)
    net.initialize()
    image, weight = mx.nd.ones((2, 32, 8, 8)), net.weight.data()
    before, others = weight.asnumpy(), [mx.nd.ones_like(weight), mx.nd.zeros_like(weight), mx.nd.zeros_like(weight)]
    for step in range(2):
        net(image)
        mx.nd.waitall()  # for the reordering, too, which MXNet begins by itself
        adamw.update([weight], *([a] for a in others), [(0.25, 0.0)], mx.nd.ones((1,)), backend=native, beta1=0.0,
                     beta2=0.0, epsilon=0.0)
        np.testing.assert_allclose(weight.asnumpy(), before - 0.25 * (step + 1), atol=1e-6)


@pytest.mark.parametrize('change, named', [
    (lambda groups: groups[1].__setitem__(1, mx.nd.zeros((4, 5))), ['gradient 1', '(4, 5)', '(5, 4)']),
    (lambda groups: groups[2].__setitem__(0, mx.nd.zeros((4,))), ['mean 0', '(4,)', '(3,)']),
    (lambda groups: groups[3].__setitem__(0, mx.nd.zeros((3, 1))), ['variance 0', '(3, 1)', '(3,)']),
    (lambda groups: groups[3].pop(), ['10', '9']),
    (lambda groups: groups[0].__setitem__(0, mx.nd.zeros((3,), dtype='float64')), ['float32', 'number 1'])])
def test_contradictions(native, change, named):
    groups = [[mx.nd.zeros((3,)), mx.nd.zeros((5, 4))] for _ in NAMES]
    change(groups)
    with pytest.raises(mx.MXNetError) as raised:
        adamw.update(*groups, [(0.1, 0.0)] * 2, mx.nd.ones((1,)), backend=native, **CONSTANTS)
    assert all(part in str(raised.value) for part in named), raised.value


def test_contradictions_of_the_rest(native):
    groups = [[mx.nd.zeros((3,))] for _ in NAMES]
    for rates, scale, copies, named in [
            ([(0.1, 0.0)] * 2, (1,), (), ['rates', '(2, 2)', '(1, 2)']),
            ([(0.1, 0.0)], (2,), (), ['scale', '(2,)', '(1,)']),
            ([(0.1, 0.0)], (1,), [mx.nd.zeros((4,), dtype='float16')], ['copy 0', '(4,)', '(3,)']),
            ([(0.1, 0.0)], (1,), [mx.nd.zeros((3,))], ['float16', 'number 0'])]:
        with pytest.raises(mx.MXNetError) as raised:
            adamw.update(*groups, rates, mx.nd.ones(scale), copies=copies, backend=native, **CONSTANTS)
        assert all(part in str(raised.value) for part in named), raised.value
    with pytest.raises(mx.MXNetError, match='count=0 must be'):
        mx.nd.mxsimmim_square_sum(groups[0][0], count=0)


@pytest.mark.parametrize('shapes', [[(1,)], [(3, 5), (1,)], SHAPES])
def test_square_sum(backend, shapes):
    print('seed 27')
    rng = np.random.default_rng(27)
    made = [(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4)).astype('float32') for shape in shapes]
    exact = math.fsum(float(v) ** 2 for a in made for v in a.ravel())
    total = adamw.square_sum([mx.nd.array(a) for a in made], backend)
    assert total.shape == (1,) and total.asscalar() == pytest.approx(exact, rel=1e-7 if backend.is_native else 1e-5)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 2e19])
@pytest.mark.parametrize('place', [0, 20_000, 39_999])
def test_square_sum_shows_what_is_not_finite(backend, bad, place):
    values = np.ones(40_000, 'float32')
    values[place] = bad
    total = adamw.square_sum([mx.nd.ones((2, 2)), mx.nd.array(values)], backend).asscalar()
    assert math.isnan(total) if math.isnan(bad) else total == math.inf


@pytest.mark.alone
def test_updates_keep_no_memory(native):
    """MXNet does not free the list of arrays that an operator writes: 1.2 kB a call here, if the operator made it."""
    if os.environ.get('MXSIMMIM_LIBRARY'):
        pytest.skip('sanitizers keep memory that was freed')
    groups, sizes = placed(arrays(np.random.default_rng(29), [(1,)] * 100)), []
    for _ in range(4):
        for _ in range(1000):
            adamw.update(*groups, [(0.1, 0.01)] * 100, mx.nd.array([0.7]), backend=native, **CONSTANTS)
        mx.nd.waitall()
        sizes.append(int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1]))
    growth = [after - before for before, after in zip(sizes, sizes[1:])]
    assert min(growth) < 300, growth  # kB; a leak grows in every round by 1200, what else a process does does not


def results():
    """A digest of updates and sums, for one number of threads."""
    groups = placed(arrays(np.random.default_rng(28)))
    whole = hashlib.sha256()
    native = OpBackend('native')
    for _ in range(3):
        adamw.update(*groups, [(0.1, 0.01)] * len(SHAPES), mx.nd.array([0.7]), backend=native, **CONSTANTS)
        groups[1] = [a * 1.5 + weight for a, weight in zip(groups[1], groups[0])]
        whole.update(adamw.square_sum(groups[1], native).asnumpy().tobytes())
    for group in values(groups):
        for array in group:
            whole.update(array.tobytes())
    return whole.hexdigest()


def test_threads_do_not_matter(native):
    print('seed 28')
    code = 'import runpy, sys; print(runpy.run_path(sys.argv[1])["results"]())'
    command = [sys.executable, '-W', 'ignore', '-c', code, __file__]
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))  # where it finds `machine`
    jobs = [subprocess.Popen(command, env=dict(env, OMP_NUM_THREADS=threads), stdout=subprocess.PIPE)
            for threads in '12']
    first, second = (job.communicate()[0] for job in jobs)
    assert first == second and len(first) == 65
