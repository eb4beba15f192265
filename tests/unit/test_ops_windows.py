"""Attention in windows of maps whose sides they need not divide, against NumPy, which knows no padding and no mask."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from support import machine, plain

from mxsimmim.ops import OpBackend, Windows, shift_mask

WIDTH, HEADS, EPS = 6, 2, 1e-6
MAPS = [Windows(4, 6, 2), Windows(5, 7, 3), Windows(5, 7, 3, 1), Windows(3, 8, 4, 2), Windows(2, 9, 4),
        Windows(7, 3, 3, 1), Windows(1, 5, 2, 1), Windows(3, 2, 3), Windows(4, 4, 4, 2)]


def within(windows):
    """For each token its number in its window."""
    y, x = np.divmod(np.arange(windows.height * windows.width), windows.width)
    sides = [-(-side // windows.window) for side in (windows.height, windows.width)]
    y, x = ((at - windows.shift * (n > 1)) % (n * windows.window) % windows.window for at, n in zip((y, x), sides))
    return y * windows.window + x


def expected(windows, x, norm, qkv, proj, bias):
    """The half block in NumPy, each token attending to those that `plain.together` says."""
    place = within(windows)
    return plain.attention(x, norm, qkv, proj, bias[:, :, place[:, None], place], plain.together(windows), HEADS, EPS)


def inputs(windows, seed):
    rng = np.random.default_rng(seed)
    length = windows.window ** 2
    return [rng.standard_normal((2, windows.height * windows.width, WIDTH)),
            (rng.standard_normal(WIDTH), 3 * rng.standard_normal(WIDTH)),
            (rng.standard_normal((3 * WIDTH, WIDTH)), 3 * rng.standard_normal(3 * WIDTH)),
            (rng.standard_normal((WIDTH, WIDTH)), rng.standard_normal(WIDTH)),
            rng.standard_normal((1, HEADS, length, length))]


def run(backend, windows, given, dtype='float32'):
    """(result, gradients of all inputs for a head of the result's own values) in float64."""
    def array(value):
        return tuple(map(array, value)) if isinstance(value, tuple) else mx.nd.array(value, dtype=dtype)
    made = [array(value) for value in given]
    flat = [part for value in made for part in (value if isinstance(value, tuple) else [value])]
    for part in flat:
        part.attach_grad()
    mask = mx.nd.array(shift_mask(*windows), dtype=dtype) if windows.needs_mask else None
    with autograd.record():
        y = backend.attention(mx.nd, *made, mask=mask, width=WIDTH, heads=HEADS, eps=EPS, windows=windows,
                              tokens=windows.height * windows.width)
    y.backward(y)
    return y.asnumpy().astype('float64'), [part.grad.asnumpy().astype('float64') for part in flat]


@pytest.mark.parametrize('windows', MAPS, ids=str)
def test_each_token_sees_its_window_and_no_padding(windows):
    given = inputs(windows, 3)
    y, _ = run(OpBackend(), windows, given, 'float64')
    np.testing.assert_allclose(y, expected(windows, *given), rtol=0, atol=1e-11)


@pytest.mark.parametrize('windows', MAPS, ids=str)
def test_gradients_are_finite_differences(windows):
    given, rng, step = inputs(windows, 4), np.random.default_rng(5), 1e-6
    _, gradients = run(OpBackend(), windows, given, 'float64')
    directions = [tuple(map(rng.standard_normal, map(np.shape, value))) if isinstance(value, tuple)
                  else rng.standard_normal(value.shape) for value in given]

    def energy(by):
        moved = [tuple(a + by * b for a, b in zip(value, way)) if isinstance(value, tuple) else value + by * way
                 for value, way in zip(given, directions)]
        return 0.5 * (expected(windows, *moved) ** 2).sum()
    slope = (energy(step) - energy(-step)) / (2 * step)
    flat = [part for way in directions for part in (way if isinstance(way, tuple) else [way])]
    found = sum((gradient * way).sum() for gradient, way in zip(gradients, flat))
    assert found == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('windows', MAPS, ids=str)
def test_the_native_form_is_the_same(windows, recompute):
    machine.need_native()
    given = inputs(windows, 6)
    y, gradients = run(OpBackend(), windows, given, 'float64')
    native = OpBackend('native')

    class Recomputing:
        def attention(self, *args, **keys):
            return native.attention(*args, **keys, recompute=recompute)
    found, others = run(Recomputing(), windows, given)
    for a, b in zip([found, *others], [y, *gradients]):
        assert np.linalg.norm(a - b) < 1e-5 * max(1, np.linalg.norm(b))


def test_the_mask_of_whole_windows_is_that_of_the_shift():
    assert not shift_mask(6, 9, 3).any() and not Windows(6, 9, 3).needs_mask
    mask = shift_mask(8, 4, 4, 2)  # shifted down only
    assert mask.shape == (2, 1, 16, 16) and not mask[0].any()
    upper = np.arange(16) < 8
    assert np.array_equal(mask[1, 0] == 0, upper[:, None] == upper)
