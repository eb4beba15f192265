"""Parts of half blocks: those of some heads, or of some hidden channels, add up to the whole, forward and backward."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from support import machine

from mxsimmim.ops import OpBackend, Windows, shift_mask
from mxsimmim.ops.native import Added

SEED = 14
TOLERANCE = {'float32': 1e-6, 'bf16': 1e-2}
IMAGES, WIDTH, HEADS, SIZE, HIDDEN, EPS = 3, 20, 4, 5, 12, 1e-6


def attention_case(rng, windows):
    tokens, mask = (windows.height * windows.width, shift_mask(*windows)) if windows else (7, None)
    length = windows.window ** 2 if windows else tokens
    inputs = dict(x=(IMAGES, tokens, WIDTH), norm_weight=(WIDTH,), norm_bias=(WIDTH,), qkv=(3 * WIDTH, WIDTH),
                  qkv_bias=(3 * WIDTH,), proj=(WIDTH, WIDTH), proj_bias=(WIDTH,), bias=(1, HEADS, length, length),
                  gamma=(WIDTH,))
    keys = dict(width=WIDTH, tokens=tokens, eps=EPS, windows=windows)
    keep = mx.nd.array(rng.choice([0.0, 1.25], (IMAGES, 1)))

    def run(backend, a, index=0, count=1, **more):
        heads = HEADS // count
        own = slice(index * heads * SIZE, (index + 1) * heads * SIZE)
        rows = np.arange(3 * WIDTH).reshape(3, WIDTH)[:, own].ravel()
        qkv = (a['qkv'][rows], a['qkv_bias'][rows])
        return backend.attention(mx.nd, a['x'], (a['norm_weight'], a['norm_bias']), qkv,
                                 (a['proj'][:, own], None if index else a['proj_bias']),
                                 a['bias'][:, index * heads:(index + 1) * heads], a['gamma'], keep,
                                 None if mask is None else mx.nd.array(mask), heads=heads, size=SIZE,
                                 partial=index > 0, **keys, **more)
    return inputs, run


def mlp_case(rng, used):
    inputs = dict(x=(IMAGES, 7, WIDTH), norm_weight=(WIDTH,), norm_bias=(WIDTH,), fc1=(HIDDEN, WIDTH),
                  fc1_bias=(HIDDEN,), fc2=(WIDTH, HIDDEN), fc2_bias=(WIDTH,), gamma=(WIDTH,))
    keep = mx.nd.array(rng.choice([0.0, 1.25], (IMAGES, 1)))
    rows = None if used is None else mx.nd.array(rng.random((IMAGES, 7)) < used)

    def run(backend, a, index=0, count=1, **more):
        own = slice(index * HIDDEN // count, (index + 1) * HIDDEN // count)
        y = backend.mlp(mx.nd, a['x'], (a['norm_weight'], a['norm_bias']), (a['fc1'][own], a['fc1_bias'][own]),
                        (a['fc2'][:, own], None if index else a['fc2_bias']), a['gamma'], keep, rows, width=WIDTH,
                        hidden=HIDDEN // count, eps=EPS, partial=index > 0, **more)
        return y if rows is None else mx.nd.broadcast_mul(y, mx.nd.expand_dims(rows, 2))  # the others' nobody uses
    return inputs, run


CASES = {'attention': (attention_case, None), 'windows': (attention_case, Windows(4, 4, 2)),
         'shifted': (attention_case, Windows(4, 4, 2, 1)), 'padded': (attention_case, Windows(3, 5, 2, 1)),
         'mlp': (mlp_case, None), 'some rows': (mlp_case, 0.4), 'no row': (mlp_case, 0.0)}


@pytest.mark.parametrize('form, precision', machine.ABLE)
@pytest.mark.parametrize('count', [2, 4])
@pytest.mark.parametrize('name', CASES)
def test_parts_add_up(name, count, form, precision):
    """Each computes with slices of the weights; the sum of their gradients, too, is that of the whole."""
    print('seed', SEED)
    rng, backend = np.random.default_rng(SEED), OpBackend(form, precision)
    make, more = CASES[name]
    shapes, run = make(rng, more)
    arrays = {key: mx.nd.array(rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1))
              for key, shape in shapes.items()}
    head = mx.nd.array(rng.standard_normal(shapes['x']))

    def results(*parts, **keys):
        for array in arrays.values():
            array.attach_grad()
        with autograd.record():
            y = mx.nd.add_n(*(run(backend, arrays, *part, **keys) for part in parts))
        y.backward(head)
        return {'y': y.asnumpy(), **{key: array.grad.asnumpy() for key, array in arrays.items()}}
    whole, parts = results((0, 1)), results(*((index, count) for index in range(count)))
    for key, value in whole.items():
        error = np.linalg.norm(parts[key] - value) / max(np.linalg.norm(value), 1e-3)
        assert error < TOLERANCE[precision], (key, error)
    if form == 'native':
        again = results(*((index, count) for index in range(count)), recompute=True)
        assert all(np.array_equal(again[key], value) for key, value in parts.items())


def _linear(backend, a):
    return backend.linear(mx.nd, a['x'], a['weight'], a['bias'], gelu=True, units=HIDDEN)


def _layer_norm(backend, a):
    return backend.layer_norm(mx.nd, a['x'], a['weight'], a['bias'], EPS, width=WIDTH)


def _masked_loss(backend, a, masked=1):
    mask = mx.nd.array([[[0, masked], [masked, 0]]] * IMAGES)
    target = mx.nd.ones((IMAGES, 4, 3 * 4))
    return backend.masked_loss(mx.nd, a['x'], (a['weight'], a['bias']), target, mask, cell=2, patch=2, prefix=1,
                               kind='mse')


def _mlp(backend, a, used=1):
    rows = mx.nd.array(np.arange(IMAGES * 7).reshape(IMAGES, 7) % 3 < 2 * used)
    y = backend.mlp(mx.nd, a['x'], (a['norm_weight'], a['norm_bias']), (a['fc1'], a['fc1_bias']),
                    (a['fc2'], a['fc2_bias']), a.get('gamma'), None, rows, width=WIDTH, hidden=HIDDEN, eps=EPS)
    return mx.nd.broadcast_mul(y, mx.nd.expand_dims(rows, 2))  # the others' nobody uses


def _attention(backend, a):
    return backend.attention(mx.nd, a['x'], (a['norm_weight'], a['norm_bias']), (a['qkv'], a['qkv_bias']),
                             (a['proj'], a['proj_bias']), a['bias'], a['gamma'], width=WIDTH, heads=HEADS, tokens=7,
                             eps=EPS)


ONE = [['weight'], ['bias', 'weight']]
HALF = [['gamma', 'norm_weight'], ['norm_bias']]
OF_LOSS = dict(x=(IMAGES, 5, WIDTH), weight=(12, WIDTH), bias=(12,))
OF_MLP, OF_ATTENTION = [make(np.random.default_rng(SEED), None)[0] for make in (mlp_case, attention_case)]
ADDING = {  # the shapes of the inputs that have a gradient, the operator, to which gradients it adds
    'linear': (dict(x=(2, 5, WIDTH), weight=(HIDDEN, WIDTH), bias=(HIDDEN,)), _linear, ONE),
    'layer_norm': (dict(x=(2, 5, WIDTH), weight=(WIDTH,), bias=(WIDTH,)), _layer_norm, ONE),
    'masked_loss': (OF_LOSS, _masked_loss, ONE),
    'nothing masked': (OF_LOSS, lambda backend, a: _masked_loss(backend, a, 0), ONE),
    'mlp': (OF_MLP, _mlp, [*HALF, ['fc1', 'fc2_bias'], ['fc1', 'fc2']]),
    'mlp, no gamma': ({key: shape for key, shape in OF_MLP.items() if key != 'gamma'}, _mlp, [['fc1', 'fc2']]),
    'mlp, no row': (OF_MLP, lambda backend, a: _mlp(backend, a, 0), [['fc1', 'fc2']]),
    'attention': (OF_ATTENTION, _attention, [*HALF, ['qkv'], ['proj', 'proj_bias']]),
}


@machine.natively
@pytest.mark.parametrize('name', ADDING)
def test_an_operator_adds_to_gradients_where_told(name):
    """Of inputs in turn: the others' gradients replace what was there."""
    print('seed', SEED)
    shapes, run, cases = ADDING[name]
    rng, backend = np.random.default_rng(SEED), OpBackend('native')
    values = {key: mx.nd.array(rng.standard_normal(shape)) for key, shape in shapes.items()}

    def gradients(added=()):
        for value in values.values():
            value.attach_grad('add')  # or MXNet passes another array than this
            value.grad[:] = 3
        with autograd.record():
            y = run(backend, {key: Added(value) if key in added else value for key, value in values.items()})
        y.backward(mx.nd.ones(y.shape) / 4)
        return {key: value.grad.asnumpy() for key, value in values.items()}
    plain = gradients()
    for added in cases:
        for key, found in gradients(added).items():
            expected = plain[key] + 3 if key in added else plain[key]
            np.testing.assert_array_equal(found, expected, err_msg=key)


@machine.natively
def test_few_rows_take_a_weight_as_it_is_and_compute_the_same_bits():
    """Of many rows the weight is brought into another layout first."""
    print('seed', SEED)
    rng, backend = np.random.default_rng(SEED), OpBackend('native')
    rows, weight, head = (mx.nd.array(rng.standard_normal(shape)) for shape in ((700, 40), (72, 40), (700, 72)))

    def results(count):
        x = rows[:count].copy()
        x.attach_grad()
        with autograd.record():
            y = backend.linear(mx.nd, x, weight, units=72)
        y.backward(head[:count])
        return y.asnumpy(), x.grad.asnumpy()
    for many, few in zip(results(700), results(500)):
        # On AVX2 oneDNN's sums depend on the number of rows, however the weight lies.
        np.testing.assert_allclose(many[:500], few, rtol=0, atol=1e-4 if machine.ISA == 'avx2' else 0)


@machine.natively
def test_a_size_that_does_not_fit_the_weights():
    with pytest.raises(mx.MXNetError, match=r"qkv's weight.*\(24, 8\).*\(12, 8\)|qkv's weight.*\(12, 8\).*\(24, 8\)"):
        a = {n: mx.nd.ones(s) for n, s in dict(x=(1, 2, 8), w=(8,), q=(24, 8), b=(24,), p=(8, 8)).items()}
        OpBackend('native').attention(mx.nd, a['x'], (a['w'], a['w']), (a['q'], a['b']), (a['p'], None), width=8,
                                      heads=2, size=2, tokens=2, eps=EPS)
