"""Workers that compute half blocks together: a group of tensor parallelism, one device of each worker.

The conjugate pair of Shoeybi et al. 2019 (arXiv:1909.08053): where tokens enter a half block, nothing is done forward,
and gradients are added up backward; where they leave it, it is the other way round. What comes before the blocks and
what follows them each worker computes for itself.
"""
import threading
from typing import List, Optional, Sequence, Tuple

import mxnet as mx
from mxnet import autograd

from ..ops import OpBackend
from ..runtime import watchdog
from .communicators import Communicator, Handle
from .control import DEADLINE


class WorkerGroup:
    """One device of each of several workers; see `tensor.Group`. This worker has the part of its place among them.

    MXNet has no operator that adds up over processes, so the group records functions that call Python back: backward in
    threads of MXNet's, when the main thread has long gone on. Each direction has arrays of its own, in which one sum
    follows the other, in the same order in all workers. Forward it is that of the program. Backward the passes that are
    under way, such as the micro-batches of a pipeline, come to their functions in an order that differs from worker to
    worker. So they take turns: a function waits until all passes recorded before its own have gone back. MXNet calls
    each in another thread, as many as it takes, and none that computes. Passes that are recorded must go back, in the
    order in which they were; others take no turn.
    """

    def __init__(self, context: mx.Context, sizes: Sequence[int], communicator: Communicator, backend: OpBackend):
        """Allocate the arrays of both directions; all workers of the job do this at once.

        sizes: elements of the tokens (B, L, C), ascending, the last of them those of the largest batch. A sum takes the
        first array that it fits in, whose elements are all moved. communicator: that of the group's workers.
        """
        self.contexts = [context]
        self._communicator = communicator
        self._forward, self._backward = (
            communicator.register(communicator.allocate(sizes, [context], backend)) for _ in range(2))
        self._turn = threading.Condition()
        self._recorded = self._gone_back = 0  # passes
        self._begins = False  # this pass has entered no half block yet
        self._latest: Optional[Tuple[mx.nd.NDArray, _Sum]] = None  # of this pass

    def begin(self) -> None:
        """See `Group`."""
        self._recorded += autograd.is_recording()
        self._begins, self._latest = True, None

    def copies(self, x: mx.nd.NDArray) -> List[mx.nd.NDArray]:
        """See `Group`."""
        if not autograd.is_recording():
            return [x]
        if self._latest and x is self._latest[0]:
            function = self._latest[1]
        else:
            function = _Sum(self, self._recorded - 1, forward=False)
            x = function(x)
        function.add_up_back(last=self._begins)
        self._begins = False
        return [x]

    def reduced(self, terms: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
        """See `Group`."""
        term, = terms
        function = _Sum(self, self._recorded - 1)
        x = function(term)
        self._latest = x, function
        return x

    def sum(self, term: mx.nd.NDArray) -> mx.nd.NDArray:
        """Return the sum of all workers' terms, before it is computed.

        Raises:
            RuntimeError: a worker of this host has ended.
        """
        self._sum(self._forward, term).copyto(term)  # no operator looks at what it has computed
        return term.detach()

    def sum_back(self, gradient: mx.nd.NDArray, number: int, last: bool) -> mx.nd.NDArray:
        """As `sum`, of gradients, for pass `number` when it is its turn; `last`: after this sum it has gone back.

        Valid until the next sum. If a worker has ended, it is NaN: the main thread comes to that, too, and raises it.

        Raises:
            TimeoutError: the passes before do not go on, in a process that no watch looks after.
        """
        with self._turn:
            if self._gone_back != number:
                self._wait_for_turn(number)
            try:
                total = self._sum(self._backward, gradient)
                # MXNet copies what a function returns: before the next sum of the same pass, but not of another.
                return total.copy() if last else total
            except RuntimeError:
                return gradient * float('nan')
            finally:
                self._gone_back += last
                self._turn.notify_all()

    def _wait_for_turn(self, number: int) -> None:
        with watchdog.doing('the turn of a backward pass', together=True):
            if not self._turn.wait_for(lambda: self._gone_back == number, None if watchdog.is_on() else DEADLINE):
                raise TimeoutError(f'a backward pass has not gone on for {DEADLINE:g} s')

    def _sum(self, arrays: Handle, term: mx.nd.NDArray) -> mx.nd.NDArray:
        """Return the sum where it is made."""
        number, array = next((i, own) for i, (own,) in enumerate(arrays.arrays) if own.size >= term.size)
        part = array[:term.size]
        term.reshape((-1,)).copyto(part)
        self._communicator.all_reduce(arrays.part(number, number + 1))
        return part.reshape(term.shape)


class _Sum(autograd.Function):
    """The sum of all workers' terms, or x as it is; backward the gradient as it is, or the sum of all workers'.

    Where half blocks follow each other, one function is the end of the first and the beginning of the second.
    """

    def __init__(self, group: WorkerGroup, number: int, forward: bool = True):
        """`number` is that of the pass, `forward` whether terms are added up."""
        super().__init__()
        self._group, self._number, self._forward, self._back, self._last = group, number, forward, False, False

    def add_up_back(self, last: bool) -> None:
        """Add up gradients, too; `last`: none of the pass come after these."""
        self._back, self._last = True, last

    def forward(self, x: mx.nd.NDArray) -> mx.nd.NDArray:
        return self._group.sum(x) if self._forward else x.detach()

    def backward(self, gradient: mx.nd.NDArray) -> mx.nd.NDArray:
        return self._group.sum_back(gradient, self._number, self._last) if self._back else gradient
