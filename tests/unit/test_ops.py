"""The native operators against their reference form in float64: odd sizes, one row, widths that no vector divides."""
import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from support import machine

from mxsimmim.ops import REFERENCE, OpBackend, Windows, shift_mask

pytestmark = machine.natively
BEST = machine.PRECISIONS[-1:]  # bf16, where this CPU multiplies it
TOLERANCE = {'float32': 1e-5, 'bf16': 1e-2}


@pytest.fixture(scope='module')
def native():
    return OpBackend('native')


@pytest.fixture(scope='module')
def best():
    return OpBackend('native', *BEST)


def draw(rng, *shape, scale=1.0):
    return rng.standard_normal(shape) * scale


def pair(rng, outputs, inputs):
    return draw(rng, outputs, inputs, scale=inputs ** -0.5), draw(rng, outputs, scale=0.1)


def norm(rng, width):
    return 1 + 0.3 * draw(rng, width), draw(rng, width, scale=0.1)


def keep(rng, images):
    return rng.choice([0.0, 1.0, 1.25], (images, 1))


def layer_norm_case(rng):
    width = int(rng.integers(1, 70))
    x = draw(rng, *rng.integers(1, 9, 2), width)
    return [x, *norm(rng, width), 1e-5], dict(width=width)


def linear_case(rng):
    inputs, units = int(rng.integers(1, 70)), int(rng.integers(1, 70))
    weight, bias = pair(rng, units, inputs)
    x = draw(rng, *rng.integers(1, 7, 2), inputs)
    return [x, weight, bias if rng.random() < 0.7 else None, bool(rng.random() < 0.5)], dict(units=units)


def mlp_case(rng):
    images, tokens, width, hidden = (int(n) for n in rng.integers((1, 1, 5, 5), 40))
    inputs = [draw(rng, images, tokens, width), norm(rng, width), pair(rng, hidden, width), pair(rng, width, hidden),
              draw(rng, width) if rng.random() < 0.5 else None, keep(rng, images) if rng.random() < 0.5 else None]
    return inputs, dict(width=width, hidden=hidden, eps=1e-6)


def attention_case(rng):
    heads, depth, images = int(rng.integers(1, 6)), int(rng.integers(1, 20)), int(rng.integers(1, 5))
    windows = mask = None
    if rng.random() < 0.5:
        window = int(rng.integers(1, 5))
        height, width = (int(n) for n in rng.integers(1, 3 * window + 1, 2))  # padded, where the window does not divide
        windows = Windows(height, width, window, window // 2 if rng.random() < 0.6 else 0)
        mask = shift_mask(*windows) if windows.needs_mask else None
    tokens = windows.height * windows.width if windows else int(rng.integers(1, 30))
    length, width = windows.window ** 2 if windows else tokens, heads * depth
    inputs = [draw(rng, images, tokens, width), norm(rng, width), pair(rng, 3 * width, width), pair(rng, width, width),
              draw(rng, 1, heads, length, length) if rng.random() < 0.7 else None,
              draw(rng, width) if rng.random() < 0.5 else None, keep(rng, images) if rng.random() < 0.5 else None, mask]
    return inputs, dict(width=width, heads=heads, tokens=tokens, eps=1e-6, windows=windows)


CASES = {'layer_norm': layer_norm_case, 'linear': linear_case, 'mlp': mlp_case, 'attention': attention_case}
NOT_LEARNT = {'mlp': [5, 6], 'attention': [6, 7]}  # keep, rows or mask: no gradient


def arrays(inputs, dtype, name=''):
    """The inputs as NDArrays, each with a gradient buffer, and a flat list of those that are learnt."""
    made, learnt = [], []
    for place, value in enumerate(inputs):
        if isinstance(value, tuple):
            value = tuple(mx.nd.array(part, dtype=dtype) for part in value)
        elif isinstance(value, np.ndarray):
            value = mx.nd.array(value, dtype=dtype)
        made.append(value)
        if place not in NOT_LEARNT.get(name, []):
            learnt += [a for a in (value if isinstance(value, tuple) else (value,)) if isinstance(a, mx.nd.NDArray)]
    for array in learnt:
        array.attach_grad()
    return made, learnt


def run(backend, name, inputs, keys, dtype='float32', seed=0):
    """[result, gradient of each learnt input] in float64."""
    made, learnt = arrays(inputs, dtype, name)
    with autograd.record():
        y = getattr(backend, name)(mx.nd, *made, **keys)
    head = mx.nd.array(np.random.default_rng(seed).standard_normal(y.shape), dtype=dtype)
    y.backward(head)
    return [y.asnumpy().astype('float64')] + [a.grad.asnumpy().astype('float64') for a in learnt]


def difference(a, b):
    """Relative in norm, over a floor for gradients that vanish: a bias added to all scores of a softmax, say."""
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-3 * b.size ** 0.5)


@pytest.mark.parametrize('precision', machine.PRECISIONS)
@pytest.mark.parametrize('seed', range(12))
@pytest.mark.parametrize('name', CASES)
def test_equal_to_float64(name, seed, precision):
    inputs, keys = CASES[name](np.random.default_rng(seed))
    print('seed', seed, 'shapes', [np.shape(i) for i in inputs if isinstance(i, np.ndarray)], keys)
    expected, native = run(REFERENCE, name, inputs, keys, 'float64'), OpBackend('native', precision)
    found = run(native, name, inputs, keys)
    if name in ('mlp', 'attention'):
        again = run(native, name, inputs, dict(keys, recompute=True))
        assert all(np.array_equal(a, b) for a, b in zip(found, again)), 'recomputing changed something'
    assert len(found) == len(expected)
    for place, (a, b) in enumerate(zip(found, expected)):
        few = 2 if precision == 'bf16' and a.size < 64 else 1  # roundings do not average out
        assert difference(a, b) < few * TOLERANCE[precision], (place, difference(a, b))


@pytest.mark.parametrize('precision', machine.PRECISIONS)
@pytest.mark.parametrize('windows', [None, Windows(12, 12, 6, 3), Windows(8, 18, 6, 3)])
def test_the_size_of_a_real_block(windows, precision):
    rng = np.random.default_rng(5)
    tokens, heads, width = 144 if windows else 197, 4, 256
    length = 36 if windows else tokens
    inputs = [draw(rng, 2, tokens, width), norm(rng, width), pair(rng, 3 * width, width), pair(rng, width, width),
              draw(rng, 1, heads, length, length), draw(rng, width), None,
              shift_mask(*windows) if windows else None]
    keys = dict(width=width, heads=heads, tokens=tokens, eps=1e-6, windows=windows)
    expected = run(REFERENCE, 'attention', inputs, keys, 'float64')
    for a, b in zip(run(OpBackend('native', precision), 'attention', inputs, keys), expected):
        assert difference(a, b) < TOLERANCE[precision]


@pytest.mark.parametrize('precision', machine.PRECISIONS)
def test_rows_that_nobody_uses(precision):
    rng = np.random.default_rng(1)
    images, tokens, width, hidden = 3, 11, 33, 70
    rows = (rng.random((images, tokens)) < 0.4).astype('float32')
    inputs = [draw(rng, images, tokens, width), norm(rng, width), pair(rng, hidden, width), pair(rng, width, hidden),
              draw(rng, width), keep(rng, images)]
    keys = dict(width=width, hidden=hidden, eps=1e-6)
    results = []
    for backend, dtype, more in ((REFERENCE, 'float64', None), (OpBackend('native', precision), 'float32', rows)):
        made, learnt = arrays(inputs, dtype, 'mlp')
        with autograd.record():
            y = backend.mlp(mx.nd, *made, None if more is None else mx.nd.array(more), **keys)
            used = y * mx.nd.array(rows[..., None], dtype=dtype)
        used.backward(mx.nd.array(np.random.default_rng(2).standard_normal(y.shape), dtype=dtype))
        results.append([used.asnumpy()] + [a.grad.asnumpy() for a in learnt])
    for a, b in zip(*results):
        assert difference(b, a) < TOLERANCE[precision]


def test_no_row_at_all(native):
    rng = np.random.default_rng(1)
    inputs = [draw(rng, 2, 3, 8), norm(rng, 8), pair(rng, 16, 8), pair(rng, 8, 16), draw(rng, 8), None,
              np.zeros((2, 3))]
    y, dx, *others = run(native, 'mlp', inputs, dict(width=8, hidden=16, eps=1e-6))
    assert np.array_equal(y, inputs[0].astype('float32')) and dx.any()
    assert not any(other.any() for other in others)


class Block(mx.gluon.HybridBlock):
    """x through two half blocks whose weights are inputs."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def hybrid_forward(self, F, x, a, b, w, v, u, t, bias):
        y = self.backend.attention(F, x, (a, b), (w, u), (v, a), bias, width=8, heads=2, tokens=5, eps=1e-6)
        return self.backend.mlp(F, y, (a, b), (t, a), (v, b), width=8, hidden=8, eps=1e-6)


def block_inputs():
    rng = np.random.default_rng(3)
    shapes = (2, 5, 8), (8,), (8,), (24, 8), (8, 8), (24,), (8, 8), (1, 2, 5, 5)
    return [mx.nd.array(draw(rng, *shape)) for shape in shapes]


def gradients(block, inputs, grad_req='write', times=1):
    for array in inputs:
        array.attach_grad(grad_req)
    for _ in range(times):
        with autograd.record():
            y = block(*inputs)
        y.backward()
    return [y.asnumpy()] + [array.grad.asnumpy() for array in inputs]


@pytest.mark.parametrize('hybrid', [None, {}, dict(static_alloc=True), dict(static_alloc=True, static_shape=True)])
def test_imperative_and_hybridized(native, hybrid):
    expected, block = gradients(Block(REFERENCE), block_inputs()), Block(native)
    if hybrid is not None:
        block.hybridize(**hybrid)
    for _ in range(3):
        for a, b in zip(gradients(block, block_inputs()), expected):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_grad_req_add_through_the_layers(native):
    """Custom operators overwrite what they should add to; the layers put an operator between that adds."""
    from mxsimmim import config as cfg
    from mxsimmim.models import build_simmim, named_parameters
    config = cfg.ModelConfig(img_size=32, patch_size=8, embed_dim=24, depth=10, num_heads=3)
    rng = np.random.default_rng(0)
    image = mx.nd.array(rng.standard_normal((2, 3, 32, 32)))
    mask = mx.nd.array(rng.integers(0, 2, (2, 4, 4)), dtype='uint8')

    def run_twice(backend, hybrid):
        net = build_simmim(config, 0, backend)
        for p in named_parameters(net).values():
            p.grad_req = 'add'
        if hybrid:
            net.hybridize(static_alloc=True)
        for _ in range(2):
            with autograd.record():
                loss = net(image, mask)
            loss.backward()
        return {name: p.grad().asnumpy() for name, p in named_parameters(net).items()}

    expected = run_twice(REFERENCE, True)
    for hybrid in (False, True):
        for name, found in run_twice(native, hybrid).items():
            assert difference(found, expected[name]) < 1e-5, (name, hybrid)


def test_several_contexts(best):
    expected, block = gradients(Block(best), block_inputs()), Block(best)
    block.hybridize(static_alloc=True)
    for _ in range(5):
        inputs = [[a.as_in_context(mx.cpu(i)) for a in block_inputs()] for i in range(3)]
        for device in inputs:
            for array in device:
                array.attach_grad()
        with autograd.record():
            outputs = [block(*device) for device in inputs]
        autograd.backward(outputs)
        for device, y in zip(inputs, outputs):
            for a, b in zip([y] + [array.grad for array in device], expected):
                np.testing.assert_array_equal(a.asnumpy(), b)


def test_exported_symbol(native):
    names = ['x', 'a', 'b', 'w', 'v', 'u', 't', 'bias']
    expected = Block(native)(*block_inputs()).asnumpy()
    text = Block(native)(*(mx.sym.var(name) for name in names)).tojson()
    assert any(node['op'] == 'mxsimmim_mlp' for node in json.loads(text)['nodes'])
    block = mx.gluon.SymbolBlock(mx.sym.load_json(text), [mx.sym.var(name) for name in names])
    np.testing.assert_allclose(block(*block_inputs()).asnumpy(), expected, rtol=1e-6)


def test_the_same_twice(best):
    first = gradients(Block(best), block_inputs())
    for _ in range(3):
        assert all(np.array_equal(a, b) for a, b in zip(gradients(Block(best), block_inputs()), first))


@pytest.mark.parametrize('name, place, shape', [('linear', 1, (4, 6)), ('linear', 2, (5,)), ('layer_norm', 1, (5,))])
def test_bad_shapes(native, name, place, shape):
    inputs = {'linear': [(2, 3, 7), (4, 7), (4,)], 'layer_norm': [(2, 3, 7), (7,), (7,)]}[name]
    expected = inputs[0] if place == 1 and name == 'linear' else inputs[place]
    inputs[place] = shape
    keys = {'linear': dict(units=4), 'layer_norm': dict(eps=1e-5, width=7)}[name]
    with pytest.raises(mx.MXNetError) as error:
        getattr(native, name)(mx.nd, *(mx.nd.ones(s) for s in inputs), **keys)
    assert str(shape) in str(error.value) and str(expected) in str(error.value)


@pytest.mark.parametrize('wrong, says', [
    (dict(heads=3), '3 heads'), (dict(windows=Windows(4, 4, 2)), '4 x 4'), (dict(windows=Windows(2, 3, 3)), '2 x 3')])
def test_bad_arrangements(native, wrong, says):
    x, a, b, w, v, u, _, bias = block_inputs()
    keys = dict(dict(width=8, heads=2, tokens=5, eps=1e-6), **wrong)
    with pytest.raises(mx.MXNetError) as error:
        native.attention(mx.nd, x, (a, b), (w, u), (v, a), bias, **keys)
    assert says in str(error.value) and '(2, 5, 8)' in str(error.value)


def test_other_types_are_refused(native):
    x, a, b, *_ = block_inputs()
    with pytest.raises(mx.MXNetError, match='float32'):
        native.layer_norm(mx.nd, x.astype('float64'), a, b, 1e-5, width=8)
