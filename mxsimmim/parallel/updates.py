"""Update rules: how replicas agree on an update.

All have the same methods: `step` turns gradients into an update, `loss_divisor` says which mean those gradients are,
`poll` lets all workers stop, or save, after the same step, `consolidated_weights` shows the one model that the job has
trained so far, `combine` and `observed` reduce per-worker statistics to job-wide values.
"""
import contextlib
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import mxnet as mx
import numpy as np
from mxnet.gluon import Parameter

from ..config import TrainConfig
from ..models import ParameterSpec
from ..ops import OpBackend, adamw
from ..optim import Optimizer
from ..system.arrays import Arrays, Gathered
from .clock import Clock
from .communicators import GROUPS, Communicator, Copies, Handle
from .compression import TRANSPORTS
from .control import Pending
from .gradients import exchanged
from .mesh import AXES
from .own_state import PIECE, OwnState, OwnStateOfParts, residuals_in


def sum_of_squares(arrays: Sequence[Copies], backend: OpBackend) -> mx.nd.NDArray:
    """Return the sum (1,) of the squares of all first copies' elements, on the context of the first of them."""
    there: Dict[mx.Context, List[mx.nd.NDArray]] = {}
    for first, *_ in arrays:
        there.setdefault(first.context, []).append(first)
    sums = [adamw.square_sum(firsts, backend).as_in_context(arrays[0][0].context) for firsts in there.values()]
    return mx.nd.add_n(*sums) if len(sums) > 1 else sums[0]


def global_norm(arrays: Sequence[Copies], backend: OpBackend) -> mx.nd.NDArray:
    """Return the L2 norm (1,) of all first copies, on the context of the first of them."""
    return mx.nd.sqrt(sum_of_squares(arrays, backend))


class Agreed(NamedTuple):
    """What all workers do."""
    stop_at: Optional[int]  # the step to stop after, once any of them has voted for it
    save: bool  # whether to save after this step


class _Exchange:
    """Gradients that are reduced over one group of workers."""

    def __init__(self, communicator: Communicator, parameters: Sequence[Parameter], counts: bool, optimizer: Optimizer,
                 train: TrainConfig):
        """`counts` says whether the norm takes them from this worker, not from another that has them, too."""
        self.communicator, self.counts = communicator, counts
        # What leaves compressed leaves from other arrays: the communicator's own memory would be of no use.
        home = communicator if train.compression == 'none' else Communicator('device')
        together = communicator.size > 1 or any(len(p.list_ctx()) > 1 for p in parameters)
        self.arrays: List[Copies] = exchanged(parameters, home, optimizer.backend) if together else \
            [p.list_grad() for p in parameters]
        self.transport = TRANSPORTS[train.compression](communicator, self.arrays, train.threshold)


class SynchronousUpdate:
    """Sums gradients over all devices and workers, clips their global norm, and updates every replica alike.

    Nothing here waits for the device: a non-finite step is recognised and skipped there, by all replicas.
    """

    def __init__(self, specs: Sequence[ParameterSpec], optimizer: Optimizer, communicator: Communicator,
                 train: TrainConfig, clip: Optional[float]):
        self._communicator = self.workers = communicator
        self.optimizer, self._clip, self._batch = optimizer, clip, train.batch_size
        self._parameters = [spec.parameter for spec in specs if spec.trainable]
        self._buffers = [spec.parameter for spec in specs if not spec.trainable]
        self._registered: Dict[str, Handle] = {}  # weights, buffers and gradients, once somebody needs them
        self._several = communicator.control.size > 1  # workers, in this group or another
        self._mesh = mesh = communicator.control.mesh
        self._specs = weights = [spec for spec in specs if spec.trainable]
        self._exchanges: List[_Exchange] = []
        for axes in GROUPS:
            group = [spec.parameter for spec in weights if spec.axes == axes]
            counts = not any(mesh.coordinate(axis) for axis in axes if axis != 'data')
            if group:
                self._exchanges.append(_Exchange(communicator.over(axes), group, counts, optimizer, train))
        # Of the workers that hold the parts of a model, those of the first replica send in the squares of its norm.
        self._squares = communicator.over(AXES).register([[mx.nd.zeros((1,))]]) if mesh.data < mesh.size else None
        self._in_norm = mesh.coordinate('data') == 0
        # What all workers of a tensor group compute alike is summed over them, too, so that no rounding ever tells
        # their copies apart. Only the first one's counts.
        self._idle = [spec.parameter for spec in weights if 'tensor' in spec.axes and not spec.is_term
                      ] if mesh.coordinate('tensor') else []
        self._smallest = min((p for p in self._parameters if p not in self._idle), key=lambda p: p.list_data()[0].size)
        self._piece: Optional[Handle] = None  # of what each worker has of its own, on its way to a checkpoint
        self._votes: Optional[Pending] = None  # of the last step
        self.by_worker: List[Sequence[float]] = []  # what each gave to `observed` last

    def loss_divisor(self, _images: int) -> int:
        """Return the number of images over which the gradient is a mean; a worker has `_images` of them."""
        return self._batch

    def gradients(self) -> List[Copies]:
        """Return the arrays that are reduced over devices and workers."""
        return [copies for exchange in self._exchanges for copies in exchange.arrays]

    def step(self, update: int, lr: float, loss: mx.nd.NDArray, clock: Optional[Clock] = None,
             floor: float = 0.0) -> mx.nd.NDArray:
        """Apply the gradients; return (3,) on the first device: loss, gradient norm before clipping, 1 if applied.

        The update is skipped where loss or norm is not finite. With `clock` this waits, and tells it when the gradients
        were computed and when everybody's had arrived.
        """
        if self._several:  # the others do not see this loss: let it spoil the gradient that they do see
            self._spoil(loss)
        self._all_reduce(clock.computed if clock else None)
        if clock:
            clock.communicated()
        norm = self._norm()
        loss = loss.as_in_context(norm.context)
        applied = mx.nd.contrib.isfinite(norm) * mx.nd.contrib.isfinite(loss)
        scale = mx.nd.where(applied, self._scale(norm), mx.nd.zeros_like(norm))
        self.optimizer.update(update, lr, scale, floor)
        return mx.nd.concat(loss, norm, applied, dim=0)

    def clip_partial(self) -> None:
        """Clip what has been accumulated so far, as the reference does after each part but the last.

        The clipped sum stays on rank 0's first device; all others start the next part from zero. A norm that is not
        finite spoils the sum, so that the step is skipped: clipping to nothing would hide what is too large to square.
        """
        self._all_reduce()
        norm = self._norm()
        scale = mx.nd.where(mx.nd.contrib.isfinite(norm), self._scale(norm), mx.nd.zeros_like(norm))
        for exchange in self._exchanges:
            for first, *others in exchange.arrays:
                flat = first.reshape((-1,))
                mx.nd.broadcast_mul(flat, scale.as_in_context(first.context), out=flat)
                for other in others + ([first] if exchange.communicator.rank else []):
                    other[:] = 0
        self._spoil(norm)

    def _spoil(self, value: mx.nd.NDArray) -> None:
        """Make the gradient not finite where `value` (1,) is not.

        A parameter's, which the next pass overwrites; what lies between the small ones nobody does.
        """
        smallest = self._smallest.list_grad()[0].reshape((-1,))
        mx.nd.broadcast_add(smallest, (value * 0).as_in_context(smallest.context), out=smallest)

    def poll(self, step: int, stopping: bool, saving: bool = False, _due: bool = False) -> Agreed:
        """Vote after `step` updates; return what all workers do, which is the same in all of them.

        Any of them can be `stopping`, or `saving` besides what the timetable says, for which one vote is enough. Reads
        the votes of the step before, for which nobody has to wait.
        """
        if not self._several:
            return Agreed(step if stopping else None, saving)
        votes, self._votes = self._votes, self._communicator.control.start_gather('votes to stop', [stopping, saving])
        stops, saves = zip(*votes.result()) if votes else ((), ())
        return Agreed(step if any(stops) else None, any(saves))

    def consolidated_weights(self) -> ContextManager[None]:
        """Show the model that the job has trained so far: while entered, the parameters hold it.

        Buffers then hold their means over all replicas, which go on from these.
        """
        self._average_buffers()
        return contextlib.nullcontext()

    def in_sync(self, _step: int) -> bool:
        """Tell whether all workers' parameters must be equal after `_step` updates."""
        return True

    def combine(self, rows: np.ndarray) -> np.ndarray:
        """Reduce this worker's rows (k, 3) to the job's: loss, norm, whether applied, of k steps."""
        if self._several:
            own = rows[:, 0] if self._mesh.reports else 0 * rows[:, 0]
            rows[:, 0] = np.sum(self._communicator.control.all_gather('losses', own), axis=0)
        return rows

    def observed(self, noted: Sequence[float]) -> Tuple[List[float], Dict[str, float]]:
        """Return the means of some numbers over the workers, kept in `by_worker`, and further values for the log."""
        self.by_worker = self.workers.control.all_gather('figures for the log', noted)
        return list(np.mean(self.by_worker, axis=0)), {}

    def moment_names(self) -> List[str]:
        """Return the names in a checkpoint of the moments that `load_state_dict` takes in this worker."""
        return self.optimizer.names()

    def state_dict(self) -> Union[Arrays, Gathered]:
        """Return the optimiser's state, for a checkpoint."""
        return self.optimizer.arrays()

    def own_state(self) -> Union[OwnState, OwnStateOfParts, None]:
        """Return what each worker has of its own, for a checkpoint, too: residuals of compression."""
        arrays = self.gradients()
        residuals = [residual for exchange in self._exchanges for residual in exchange.transport.residuals]
        if not residuals:
            return None
        kinds = {'residual': residuals_in(arrays, residuals)}
        if self._mesh.data == self._mesh.size:
            return OwnState(self.workers, self._register('gradients', arrays), self._specs, kinds)
        everybody = self.workers.over(AXES)
        if self._piece is None:
            self._piece = everybody.register([[mx.nd.zeros((PIECE,))]])
        return OwnStateOfParts(everybody, self._piece, self._specs, kinds)

    def load_one_by_one(self, moments: Iterable[Tuple[str, np.ndarray]], update: int) -> None:
        """As `load_state_dict`, of whole moments each of which is kept before the next is asked for."""
        for name, value in moments:
            self.optimizer.set(name, value)
        self.load_state_dict(None, update)

    def load_state_dict(self, moments: Optional[Mapping[str, Any]], _update: int) -> None:
        """Go on from rank 0's weights and buffers and, unless None, the moments of its checkpoint."""
        if moments:
            self.optimizer.load(moments)
        weights = self._weights()
        for arrays in [weights.arrays] + self._moments():
            self.workers.broadcast(weights.with_arrays(arrays))
        if self._buffers:
            self.workers.broadcast(self._buffer_handle())

    def _weights(self) -> Handle:
        """Return the parameters' handle, under whose keys their moments are broadcast, too."""
        return self._register('weights', [p.list_data() for p in self._parameters])

    def _average_buffers(self) -> None:
        """Replace each buffer by its mean over all replicas, whose parts of a batch are equal, or nearly."""
        if self._buffers:
            handle = self._buffer_handle()
            for copies in handle.arrays:
                for copy in copies:
                    copy /= len(copies) * self.workers.size
            self.workers.all_reduce(handle)

    def _buffer_handle(self) -> Handle:
        return self._register('buffers', [p.list_data() for p in self._buffers])

    def _register(self, name: str, arrays: Sequence[Copies]) -> Handle:
        """Return the handle of these arrays: servers keep an array for each key, so that each gets one only once."""
        if name not in self._registered:
            self._registered[name] = self.workers.register(arrays)
        return self._registered[name]

    def _moments(self) -> List[List[Copies]]:
        """Return the moments by kind, of each one array for each parameter."""
        copies, count = list(self.optimizer.moments.values()), len(self._parameters)
        return [copies[first:first + count] for first in range(0, len(copies), count)]

    def _all_reduce(self, computed: Optional[Callable[[], None]] = None) -> None:
        for parameter in self._idle:
            for gradient in parameter.list_grad():
                gradient[:] = 0
        own, *others = self._exchanges
        for other in others:
            other.transport.all_reduce()
        own.transport.all_reduce(computed)

    def _norm(self) -> mx.nd.NDArray:
        """The L2 norm (1,) of the whole model's gradient, on the first context; each part of it counts once."""
        squares = sum_of_squares([copies for exchange in self._exchanges if exchange.counts
                                  for copies in exchange.arrays], self.optimizer.backend)
        if self._squares:
            (total,), = self._squares.arrays
            total[:] = squares.as_in_context(total.context) if self._in_norm else 0
            self.workers.over(AXES).all_reduce(self._squares)
            squares = total.as_in_context(squares.context)
        return mx.nd.sqrt(squares)

    def _scale(self, norm: mx.nd.NDArray) -> mx.nd.NDArray:
        """What clipping multiplies gradients with, as PyTorch's clip_grad_norm_."""
        if self._clip is None:
            return mx.nd.ones_like(norm)
        return mx.nd.minimum(self._clip / (norm + 1e-6), 1)
