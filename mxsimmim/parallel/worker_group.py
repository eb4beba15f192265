"""Workers of a host that compute half blocks together: a group of tensor parallelism, one device of each worker.

The conjugate pair of Shoeybi et al. 2019 (arXiv:1909.08053): where tokens enter a half block, nothing is done forward,
and gradients are added up backward; where they leave it, it is the other way round. What comes before the blocks and
what follows them each worker computes for itself. No training mode uses it yet.
"""
import threading
from typing import List, Sequence

import mxnet as mx
from mxnet import autograd

from .control import ControlPlane
from .shared_memory import SharedMemoryGroup

DEADLINE = 1800.0  # seconds for the backward pass before


class HostSums:
    """Sums of arrays over the workers of a host, in shared memory."""

    def __init__(self, sizes: Sequence[int], ranks: Sequence[int], control: ControlPlane):
        """All workers of the job do this at once, each with the `ranks` of its group and the same sizes.

        sizes: elements of what will be summed. An array takes the first that it fits in, whose elements are all moved.

        Raises:
            OSError: see `SharedMemoryGroup`.
        """
        self._memory = SharedMemoryGroup(sizes, ranks, control.rank, control, True)

    def sum(self, array: mx.nd.NDArray) -> mx.nd.NDArray:
        """Return the sum of all workers' arrays, to be called by all in the same order; returns before it is there."""
        self._memory.check()
        number, shared = next((i, own) for i, own in enumerate(self._memory.arrays) if own.size >= array.size)
        own = shared[:array.size]
        array.reshape((-1,)).copyto(own)
        self._memory.all_reduce(number)
        return own.reshape(array.shape).copy()


class WorkerGroup:
    """One device of each of several workers; see `tensor.Group`. This worker has the part of its place among `ranks`.

    MXNet has no operator that adds up over processes, so the two that the group records call Python back: backward in
    a thread of MXNet's, when the main thread has long gone on. Sums must come in the same order in all workers, and
    those of one direction must not wait in the queue of the other. So each direction has its own, and a pass begins
    when the one before has gone all the way back: a worker cannot have two of them under way, as a pipeline has.
    """

    def __init__(self, context: mx.Context, sizes: Sequence[int], ranks: Sequence[int], control: ControlPlane):
        """See `HostSums`; sizes are those of the tokens (B, L, C) of the largest batch, ascending."""
        self.contexts = [context]
        self.forward, self.backward = (HostSums(sizes, ranks, control) for _ in range(2))
        self._done, self._pending = threading.Condition(), 0  # sums of the backward pass that has not ended

    def begin(self) -> None:
        """Wait for the last backward pass.

        Raises:
            TimeoutError: it has not come.
        """
        with self._done:
            if not self._done.wait_for(lambda: self._pending == 0, DEADLINE):
                raise TimeoutError(f'a backward pass has not ended within {DEADLINE:g} s')

    def copies(self, x: mx.nd.NDArray) -> List[mx.nd.NDArray]:
        """See `Group`."""
        if not autograd.is_recording():
            return [x]
        with self._done:
            self._pending += 1
        return [_Enter(self)(x)]

    def reduced(self, terms: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
        """See `Group`."""
        term, = terms
        return _Leave(self)(term)

    def summed_back(self) -> None:
        """Count a sum of the backward pass."""
        with self._done:
            self._pending -= 1
            self._done.notify_all()


class _Enter(autograd.Function):
    """x; backward the sum of all workers' gradients."""

    def __init__(self, group: WorkerGroup):
        super().__init__()
        self._group = group

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        return x.detach()

    def backward(self, gradient: mx.nd.NDArray) -> mx.nd.NDArray:
        try:
            return self._group.backward.sum(gradient)
        finally:
            self._group.summed_back()


class _Leave(autograd.Function):
    """The sum of all workers' terms; backward the gradient of that."""

    def __init__(self, group: WorkerGroup):
        super().__init__()
        self._group = group

    def forward(self, term: mx.nd.NDArray) -> mx.nd.NDArray:
        return self._group.forward.sum(term)

    def backward(self, gradient: mx.nd.NDArray) -> mx.nd.NDArray:
        return gradient
