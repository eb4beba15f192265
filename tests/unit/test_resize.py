"""Position tables for another resolution: what must not change, what must come out, what cannot be."""
import numpy as np
import pytest

from mxsimmim.interop.resize import _distances, absolute_table, relative_table

SEED = 14


def random(*shape):
    return np.random.default_rng(SEED).standard_normal(shape).astype('float32')


def planes(table, side):
    """(H, side, side) without the rows of the cls token."""
    return table[:side * side].T.reshape(-1, side, side)


@pytest.mark.parametrize('extra', [0, 3])
@pytest.mark.parametrize('window', [4, 6, 7, 14])
def test_a_window_of_the_same_size_keeps_its_table(window, extra):
    table = random((2 * window - 1) ** 2 + extra, 3)
    assert relative_table(table, len(table)) is table


@pytest.mark.parametrize('extra', [0, 3])
@pytest.mark.parametrize('old, new', [(6, 7), (6, 12), (7, 14), (12, 6), (3, 5)])
def test_rows_of_the_cls_token_are_kept_and_the_middle_stays_the_middle(old, new, extra):
    print('seed', SEED)
    table, rows = random((2 * old - 1) ** 2 + extra, 3), (2 * new - 1) ** 2 + extra
    result = relative_table(table, rows)
    assert result.shape == (rows, 3) and result.dtype == np.float32
    np.testing.assert_array_equal(result[rows - extra:], table[len(table) - extra:])
    middle = [planes(t, 2 * w - 1)[:, w - 1, w - 1] for t, w in ((table, old), (result, new))]
    np.testing.assert_allclose(middle[1], middle[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('old, new', [(6, 7), (7, 14), (5, 8)])
def test_distances_are_a_geometric_series_to_the_new_edge(old, new):
    """1, q, q^2, … add up to what was asked for, and the old edge lands on the new one."""
    steps = np.array(_distances(old - 1, new - 1))
    assert steps[0] == 1 and steps[-1] == pytest.approx(new - 1, rel=1e-4)
    ratios = np.diff(steps[1:]) / np.diff(steps[:-1])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)
    table = random((2 * old - 1) ** 2, 2)
    corners = [planes(t, 2 * w - 1)[:, ::2 * w - 2, ::2 * w - 2] for t, w in (
        (table, old), (relative_table(table, (2 * new - 1) ** 2), new))]
    np.testing.assert_allclose(corners[1], corners[0], rtol=0.02, atol=0.02)


def test_a_surface_that_a_bicubic_spline_represents_comes_out_exactly():
    """A product of cubics of the distances: evaluated at the new offsets."""
    old, new = 7, 12
    steps = _distances(old - 1, new - 1)
    known = np.array([-x for x in reversed(steps)] + [0.0] + steps)
    wanted = np.arange(2 * new - 1) - (new - 1.0)

    def surface(x):
        x = x / (new - 1)
        return np.multiply.outer(1 + x - 0.5 * x ** 3, 2 - x + 0.3 * x ** 2)

    result = relative_table(surface(known).reshape(-1, 1).astype('float32'), len(wanted) ** 2)
    np.testing.assert_allclose(planes(result, len(wanted))[0], surface(wanted), atol=2e-6)


@pytest.mark.parametrize('rows, wanted', [(100, 121), (121, 100), (121, 124), (124, 121), (16, 25), (0, 9), (121, 3)])
def test_tables_that_are_not_of_square_windows_are_refused(rows, wanted):
    with pytest.raises(ValueError, match=f'{rows} rows cannot be resized to {wanted}: neither with nor without a cls'):
        relative_table(random(rows, 2), wanted)


@pytest.mark.parametrize('old, new', [(1, 5), (2, 5), (5, 1)])
def test_windows_of_one_or_two_tokens(old, new):
    """A bicubic spline needs four known offsets."""
    table, rows = random((2 * old - 1) ** 2, 2), (2 * new - 1) ** 2
    if 2 * old - 1 < 4:
        with pytest.raises(ValueError, match=f'{len(table)} rows cannot be resized to {rows}: '):
            relative_table(table, rows)
    else:
        assert relative_table(table, rows).shape == (rows, 2)


@pytest.mark.parametrize('prefix', [0, 1])
def test_positions(prefix):
    table = random(1, prefix + 16, 5)
    assert absolute_table(table, prefix + 16, prefix) is table
    result = absolute_table(table, prefix + 64, prefix)
    assert result.shape == (1, prefix + 64, 5) and result.dtype == np.float32
    np.testing.assert_array_equal(result[:, :prefix], table[:, :prefix])


def test_positions_are_resized_bicubically():
    """Keys's kernel with a = -3/4, as PyTorch's, on patches whose centres are half a patch from the edge, repeated."""
    print('seed', SEED)
    table, old, new = random(1, 1 + 16, 2), 4, 7

    def kernel(x):
        x, a = abs(x), -0.75
        return (((a + 2) * x - (a + 3)) * x ** 2 + 1) if x <= 1 else (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0

    matrix = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(-2, old + 2):
            matrix[i, min(max(j, 0), old - 1)] += kernel(at - j)
    expected = np.einsum('ij,kl,jlc->ikc', matrix, matrix, table[0, 1:].reshape(old, old, 2))
    np.testing.assert_allclose(absolute_table(table, 1 + 49, 1)[0, 1:].reshape(7, 7, 2), expected, atol=1e-5)


def test_many_channels():
    """More than OpenCV takes in one image."""
    table = random(1, 16, 769)
    np.testing.assert_array_equal(absolute_table(table, 36, 0)[..., 700:], absolute_table(table[..., 700:], 36, 0))


@pytest.mark.parametrize('rows, wanted, prefix', [(17, 16, 0), (16, 17, 0), (17, 50, 0), (16, 37, 1), (1, 17, 1)])
def test_positions_that_are_no_square_are_refused(rows, wanted, prefix):
    with pytest.raises(ValueError, match=f'{rows} positions cannot be resized to {wanted}: not squares of patches'):
        absolute_table(random(1, rows, 2), wanted, prefix)
