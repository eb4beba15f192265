"""What gradients become on the wire: halves, or two bits with error feedback."""
import math
from typing import Callable, Dict, List, Optional, Sequence, Union

import mxnet as mx
import numpy as np

from ..system.compiled import compiled
from .communicators import Communicator, Copies

LAST = 4  # of a network's parameters, in order of definition: their gradients are the last that a backward pass yields


class Plain:
    """Reduces gradients as they are."""

    residuals: Sequence[np.ndarray] = ()  # of each array (n,) what this worker has not sent yet

    def __init__(self, communicator: Communicator, arrays: Sequence[Copies]):
        self._communicator, self._handle = communicator, communicator.register(arrays)

    def all_reduce(self, computed: Optional[Callable[[], None]] = None) -> None:
        """Reduce the arrays in place; waits only for `computed`, which is called when all gradients are there."""
        late = LAST if computed else 0
        self._communicator.all_reduce(self._handle.part(late))
        if computed:
            last = self._handle.part(0, late)
            for copies in last.arrays:
                for array in copies:
                    array.wait_to_read()
            computed()
            self._communicator.all_reduce(last)


class HalfPrecision:
    """Reduces gradients over workers in float16. What it cannot hold becomes infinite, and the step is skipped."""

    residuals: Sequence[np.ndarray] = ()

    def __init__(self, communicator: Communicator, arrays: Sequence[Copies]):
        self._arrays, self._devices = arrays, _Devices(arrays)
        self._halves = [[first.astype('float16')] for first, *_ in arrays]
        self._plain = Plain(communicator, self._halves)

    def all_reduce(self, computed: Optional[Callable[[], None]] = None) -> None:
        """As `Plain.all_reduce`."""
        self._devices.reduce()
        for (first, *_), (half,) in zip(self._arrays, self._halves):
            mx.nd.cast(first, dtype='float16', out=half)
        self._plain.all_reduce(computed)
        for (first, *_), (half,) in zip(self._arrays, self._halves):
            mx.nd.cast(half, dtype='float32', out=first)
        self._devices.broadcast()


class TwoBit:
    """MXNet's 2-bit gradient compression (Strom 2015; arXiv:1802.06058 studies it), smaller on the wire both ways.

    Each worker adds its gradient to a residual r, sends t where r >= t, -t where r <= -t, else 0, and keeps the rest.
    MXNet compresses what is pushed only, so that a step never gets twice as fast. Here the codes 0, 1, 2 are digits of
    base 2 n + 1 for n workers, as many to a float32 as it counts exactly (2**24): a plain sum of such words is the sum
    of their digits, so pushes and pulls, of any communicator, shrink alike: to a tenth for 2 workers, to a fifth for 8.
    """

    def __init__(self, communicator: Communicator, arrays: Sequence[Copies], threshold: float):
        self._communicator, self._threshold = communicator, np.float32(threshold)
        self._arrays, self._devices = arrays, _Devices(arrays)
        self._base = 2 * communicator.size + 1
        self.digits = int(24 / math.log2(self._base))
        sizes = [first.size for first, *_ in arrays]
        self.residuals = [np.zeros(size, 'float32') for size in sizes]
        words = [[mx.nd.zeros((-(-size // self.digits),))] for size in sizes]
        self._handle = communicator.register(words + [[mx.nd.zeros((1,))]])  # the last counts what is not finite

    def all_reduce(self, computed: Optional[Callable[[], None]] = None) -> None:
        """As `Plain.all_reduce`, but always waits. A gradient that is not finite in any worker makes an element NaN."""
        self._devices.reduce()
        *sent, (bad,) = self._handle.arrays
        # The backward pass yields the last parameters' gradients first: each is packed while the next is computed.
        for i in reversed(range(len(sent))):
            words = np.empty(sent[i][0].shape, 'float32')
            if pack(self._arrays[i][0].asnumpy().ravel(), self.residuals[i], words, self.digits, self._base,
                    self._threshold):
                bad[:] = 1
            sent[i][0][:] = words
            if computed and i == 0:
                computed()
            self._communicator.all_reduce(self._handle.part(i, i + 1))
        self._communicator.all_reduce(self._handle.part(len(sent)))
        for (first, *_), (summed,) in zip(self._arrays, sent):
            total = np.empty(first.shape, 'float32')
            unpack(summed.asnumpy(), total.reshape(-1), self.digits, self._base, self._threshold)
            first[:] = total
        if bad.asscalar():
            # A gradient's element, which the next pass overwrites; what lies between small gradients nobody does.
            self._arrays[0][0].reshape((-1,))[:1] = float('nan')
        bad[:] = 0
        self._devices.broadcast()


@compiled
def pack(gradient: np.ndarray, residual: np.ndarray, words: np.ndarray, digits: int, base: int,
         threshold: float) -> bool:
    """Add gradient (n,) to residual (n,), move what exceeds the threshold into words (ceil(n / digits),).

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


@compiled
def unpack(words: np.ndarray, total: np.ndarray, digits: int, base: int, threshold: float) -> None:
    """Write the sum of all workers' codes times the threshold to total (n,); takes `words` apart."""
    n, stride, workers = len(total), len(words), (base - 1) // 2
    for digit in range(digits):
        first = digit * stride
        for j in range(min(stride, n - first)):
            value = np.int32(words[j])
            rest = value // np.int32(base)
            total[first + j] = np.float32(value - rest * base - workers) * threshold
            words[j] = np.float32(rest)


class _Devices:
    """The arrays of this worker's own devices, of which the first one's leave and come back."""

    def __init__(self, arrays: Sequence[Copies]):
        self._communicator = Communicator('device')
        self._handle = self._communicator.register(arrays)

    def reduce(self) -> None:
        self._communicator.all_reduce(self._handle)

    def broadcast(self) -> None:
        """Overwrite the other devices' with the first one's."""
        for first, *others in self._handle.arrays:
            for other in others:
                first.copyto(other)


TRANSPORTS: Dict[str, Callable[[Communicator, List[Copies], float], Union[Plain, HalfPrecision, TwoBit]]] = {
    'none': lambda communicator, arrays, _: Plain(communicator, arrays),
    'fp16': lambda communicator, arrays, _: HalfPrecision(communicator, arrays),
    '2bit': TwoBit,
}
