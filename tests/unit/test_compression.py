"""Two-bit compression against the arithmetic it stands for, with the sums over workers done here."""
import mxnet as mx
import numpy as np
import pytest

from mxsimmim.parallel.communicators import Handle
from mxsimmim.parallel.compression import TwoBit, pack, unpack

SEED, THRESHOLD = 7, np.float32(0.5)


class Wire:
    """A communicator of this many workers, as far as it is looked at before anything is reduced."""
    rank = 0

    def __init__(self, workers):
        self.size = workers

    def register(self, arrays):
        return Handle(tuple(range(len(arrays))), tuple(arrays))


@pytest.mark.parametrize('workers, digits', [(2, 10), (3, 8), (4, 7), (8, 5), (100, 3)])
def test_digits_fill_what_a_float32_counts(workers, digits):
    base = 2 * workers + 1
    assert base ** digits <= 2 ** 24 < base ** (digits + 1)
    assert TwoBit(Wire(workers), [[mx.nd.zeros((3,))]], 0.5).digits == digits


@pytest.mark.parametrize('workers', [2, 3, 8])
@pytest.mark.parametrize('size', [1, 9, 1000])
def test_twenty_steps_agree_with_the_closed_form(workers, size):
    """r += g; q = t where r >= t, -t where r <= -t, else 0; r -= q; the sum is that of all q."""
    print('seed', SEED)
    rng = np.random.default_rng(SEED)
    base = 2 * workers + 1
    digits = next(d for d in range(24, 0, -1) if base ** d <= 2 ** 24)
    words = -(-size // digits)
    ours, theirs = np.zeros((2, workers, size), 'float32')
    for _ in range(20):
        gradients = rng.normal(0, 0.6, (workers, size)).astype('float32')
        theirs += gradients
        quantised = np.where(theirs >= THRESHOLD, THRESHOLD, np.where(theirs <= -THRESHOLD, -THRESHOLD, 0))
        theirs -= quantised.astype('float32')
        wire = np.zeros(words, 'float32')
        for worker in range(workers):
            packed = np.empty(words, 'float32')
            assert not pack(gradients[worker], ours[worker], packed, digits, base, THRESHOLD)
            wire += packed
        total = np.empty(size, 'float32')
        unpack(wire, total, digits, base, THRESHOLD)
        np.testing.assert_array_equal(total, quantised.sum(0))
        np.testing.assert_array_equal(ours, theirs)


def test_nothing_is_lost_over_time():
    """A constant gradient smaller than the threshold arrives, in time, as often as it must."""
    residual, words, total, arrived = np.zeros(1, 'float32'), np.empty(1, 'float32'), np.empty(1, 'float32'), 0.0
    for _ in range(100):
        pack(np.array([0.0625], 'float32'), residual, words, 10, 5, THRESHOLD)
        words += 1  # the other worker sends zero
        unpack(words, total, 10, 5, THRESHOLD)
        arrived += total[0]
    assert arrived + residual[0] == 6.25


def test_a_gradient_that_is_not_finite_is_reported_and_not_kept():
    residual, words = np.zeros(3, 'float32'), np.empty(1, 'float32')
    assert pack(np.array([0.25, np.nan, np.inf], 'float32'), residual, words, 10, 5, THRESHOLD)
    np.testing.assert_array_equal(residual, [0.25, 0, 0])
