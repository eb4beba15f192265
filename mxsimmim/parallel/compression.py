"""What gradients become on the wire: halves, or two bits with error feedback."""
import math
from typing import Callable, Dict, List, Optional, Sequence

import mxnet as mx
import numba
import numpy as np

from .communicators import Copies, Communicator


LAST = 4  # of a network's parameters, in order of definition: their gradients are the last that a backward pass yields


class Plain:
    """Sums gradients as they are."""

    def __init__(self, store: Communicator, arrays: Sequence[Copies]):
        self._store, self._keys = store, store.keys(arrays)

    def sum(self, arrays: Sequence[Copies], computed: Optional[Callable[[], None]] = None) -> None:
        """Reduces in place, as `Communicator.sum`; waits only for `computed`, called when all gradients are there."""
        late = LAST if computed else 0
        self._store.sum(self._keys[late:], arrays[late:])
        if computed:
            for copies in arrays[:late]:
                for array in copies:
                    array.wait_to_read()
            computed()
            self._store.sum(self._keys[:late], arrays[:late])


class HalfPrecision:
    """Sums gradients over workers in float16. What float16 cannot hold becomes infinite, and the step is skipped."""

    def __init__(self, store: Communicator, arrays: Sequence[Copies]):
        self._local = _Devices(arrays)
        self._halves = [[first.astype('float16')] for first, *_ in arrays]
        self._plain = Plain(store, self._halves)

    def sum(self, arrays: Sequence[Copies], computed: Optional[Callable[[], None]] = None) -> None:
        """As `Plain.sum`."""
        self._local.sum(arrays)
        for (first, *_), (half,) in zip(arrays, self._halves):
            mx.nd.cast(first, dtype='float16', out=half)
        self._plain.sum(self._halves, computed)
        for (first, *_), (half,) in zip(arrays, self._halves):
            mx.nd.cast(half, dtype='float32', out=first)
        self._local.copy(arrays)


class TwoBit:
    """MXNet's 2-bit gradient compression (Strom 2015; arXiv:1802.06058 studies it), smaller on the wire both ways.

    Each worker adds its gradient to a residual r, sends t where r >= t, -t where r <= -t, else 0, and keeps the rest.
    MXNet compresses what is pushed only, so that a step never gets twice as fast. Here the codes 0, 1, 2 are digits of
    base 2 n + 1 for n workers, as many to a float32 as it counts exactly (2**24): a plain sum of such words is the sum
    of their digits, so pushes and pulls, of any store, shrink alike: to a tenth for 2 workers, to a fifth for 8.
    """

    def __init__(self, store: Communicator, arrays: Sequence[Copies], threshold: float):
        self._store, self._local, self._threshold = store, _Devices(arrays), np.float32(threshold)
        self._base = 2 * store.size + 1
        self.digits = int(24 / math.log2(self._base))
        sizes = [first.size for first, *_ in arrays]
        self._residuals = [np.zeros(size, 'float32') for size in sizes]
        self._words = [[mx.nd.zeros((-(-size // self.digits),))] for size in sizes] + [[mx.nd.zeros((1,))]]
        self._keys = store.keys(self._words)

    def sum(self, arrays: Sequence[Copies], computed: Optional[Callable[[], None]] = None) -> None:
        """As `Plain.sum`, but always waits. A gradient that is not finite in any worker makes the sum NaN."""
        self._local.sum(arrays)
        # The backward pass yields the last parameters' gradients first: each is packed while the next is computed.
        for i in reversed(range(len(arrays))):
            words = np.empty(self._words[i][0].shape, 'float32')
            bad = pack(arrays[i][0].asnumpy().ravel(), self._residuals[i], words, self.digits, self._base,
                       self._threshold)
            self._words[i][0][:] = words
            if computed and i == 0:
                computed()
            self._store.sum(self._keys[i:i + 1], self._words[i:i + 1])
            if bad:
                self._words[-1][0][:] = 1
        self._store.sum(self._keys[-1:], self._words[-1:])
        for (first, *_), (words,) in zip(arrays, self._words):
            total = np.empty(first.shape, 'float32')
            unpack(words.asnumpy(), total.reshape(-1), self.digits, self._base, self._threshold)
            first[:] = total
        if self._words[-1][0].asscalar():
            arrays[0][0][:] = float('nan')
        self._words[-1][0][:] = 0
        self._local.copy(arrays)


@numba.njit(nogil=True, error_model='numpy')
def pack(gradient: np.ndarray, residual: np.ndarray, words: np.ndarray, digits: int, base: int,
         threshold: float) -> bool:
    """Adds gradient (n,) to residual (n,), moves what exceeds the threshold into words (ceil(n / digits),).

    Element i is digit i // len(words) of word i % len(words). Returns whether a gradient was not finite; of such
    elements nothing is sent or kept.
    """
    n, stride, bad = len(gradient), len(words), False
    words[:] = 0
    weight = np.float32(1)
    for digit in range(digits):
        first = digit * stride
        for j in range(min(stride, n - first)):
            value = residual[first + j] + gradient[first + j]
            if not np.isfinite(value):
                bad = True
                value = residual[first + j]
            code = np.float32(1)
            if value >= threshold:
                code += np.float32(1)
                value -= threshold
            elif value <= -threshold:
                code -= np.float32(1)
                value += threshold
            residual[first + j] = value
            words[j] += weight * code
        weight *= np.float32(base)
    return bad


@numba.njit(nogil=True, error_model='numpy')
def unpack(words: np.ndarray, total: np.ndarray, digits: int, base: int, threshold: float) -> None:
    """The sum of all workers' codes times the threshold, into total (n,); takes `words` apart."""
    n, stride, workers = len(total), len(words), (base - 1) // 2
    for digit in range(digits):
        first = digit * stride
        for j in range(min(stride, n - first)):
            value = np.int32(words[j])
            rest = value // np.int32(base)
            total[first + j] = np.float32(value - rest * base - workers) * threshold
            words[j] = np.float32(rest)


class _Devices:
    """The sum over this worker's own devices, on the first one."""

    def __init__(self, arrays: Sequence[Copies]):
        self._store = Communicator('device')
        self._keys = self._store.keys(arrays)

    def sum(self, arrays: Sequence[Copies]) -> None:
        self._store.sum(self._keys, arrays)

    @staticmethod
    def copy(arrays: Sequence[Copies]) -> None:
        """From the first device to the others."""
        for first, *others in arrays:
            for other in others:
                first.copyto(other)


TRANSPORTS: Dict[str, Callable[[Communicator, List[Copies], float], object]] = {
    'none': lambda store, arrays, _: Plain(store, arrays),
    'fp16': lambda store, arrays, _: HalfPrecision(store, arrays),
    '2bit': TwoBit,
}
