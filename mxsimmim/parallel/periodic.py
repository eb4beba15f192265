"""Update rules of workers that go alone for some steps and then meet: local SGD and elastic averaging."""
import contextlib
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

import mxnet as mx
import numpy as np

from ..config import TrainConfig
from ..data.batch_split import BatchSplit
from ..models import ParameterSpec
from ..optim import Optimizer
from .clock import Clock
from .communicators import Communicator, Copies
from .own_state import OwnState, arrays_in
from .updates import Agreed, SynchronousUpdate


class PeriodicAveraging(SynchronousUpdate):
    """Workers that go alone for some steps and meet after every `train.local_steps`-th and after the last.

    Within a worker all is as ever: its devices' gradients are added up, and the norm that is clipped is the worker's.
    """

    def __init__(self, specs: Sequence[ParameterSpec], optimizer: Optimizer, communicator: Communicator,
                 train: TrainConfig, clip: Optional[float], split: BatchSplit, last: int):
        super().__init__(specs, optimizer, Communicator('device'), train, clip)
        self.workers = communicator
        self._split, self._every, self._last = split, train.local_steps, last
        self._handle = self._weights()
        self._saving = False  # somebody is, since the last meeting

    def loss_divisor(self, images: int) -> int:
        return images

    def in_sync(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last

    def step(self, update: int, lr: float, loss: mx.nd.NDArray, clock: Optional[Clock] = None,
             floor: float = 0.0) -> mx.nd.NDArray:
        stats = super().step(update, lr, loss, clock, floor)
        if self.in_sync(update + 1):
            if clock:
                mx.nd.waitall()
                clock.computed()
            self._meet()
            if clock:
                clock.communicated()
        return stats

    def poll(self, step: int, stopping: bool, saving: bool = False, _due: bool = False) -> Agreed:
        self._saving = self._saving or saving
        if not self.in_sync(step):
            return Agreed(None, False)
        stops, saves = zip(*self.workers.control.all_gather('votes to stop', [stopping, self._saving]))
        self._saving = False
        return Agreed(step if any(stops) else None, any(saves))

    def combine(self, rows: np.ndarray) -> np.ndarray:
        rows = np.array(self.workers.control.all_gather('losses', rows))  # (workers, k, 3)
        weights = np.array(self._split.images)[:, None] / sum(self._split.images)
        return np.stack([(rows[:, :, 0] * weights).sum(0), (rows[:, :, 1] * weights).sum(0), rows[:, :, 2].min(0)], 1)

    def state_dict(self) -> Dict[str, Any]:
        """Return the means of the moments over the workers, with which another number of them goes on."""
        means = []
        for moments in self._moments():
            mean = [[first.copy()] for first, *_ in moments]
            self._average(mean)
            means += [first.asnumpy() for first, in mean]
        return self.optimizer.whole(means)

    def own_state(self) -> Optional[OwnState]:
        """Return the moments of each worker."""
        return self._own_state()

    def _own_state(self, **more: Sequence[Copies]) -> Optional[OwnState]:
        """Return the state of each worker that is its moments and arrays of their shapes."""
        arrays = {**more, **dict(zip(self.optimizer.MOMENTS, self._moments()))}
        # One handle for all: servers keep an array for each key.
        gradients = self._handle.with_arrays([p.list_grad() for p in self._parameters])
        kinds = {name: arrays_in(gradients.arrays, copies) for name, copies in arrays.items()}
        return OwnState(self.workers, gradients, self._specs, kinds) if kinds else None

    def _average(self, arrays: Sequence[Copies]) -> None:
        """Replace arrays shaped like the parameters by their mean over the workers, weighted with their images."""
        for first, *others in arrays:
            first *= self._split.fraction
            for other in others:
                other[:] = 0
        self.workers.all_reduce(self._handle.with_arrays(arrays))

    def _meet(self) -> None:
        raise NotImplementedError


class LocalSGD(PeriodicAveraging):
    """Averages the parameters, and with `train.average_moments` the optimiser's moments, of all workers.

    McMahan et al. 2017 (arXiv:1602.05629), Stich 2019 (arXiv:1805.09767): w <- sum_i (n_i / n) w_i.
    """

    def __init__(self, specs: Sequence[ParameterSpec], optimizer: Optimizer, communicator: Communicator,
                 train: TrainConfig, clip: Optional[float], split: BatchSplit, last: int):
        super().__init__(specs, optimizer, communicator, train, clip, split, last)
        self._with_moments = train.average_moments

    def state_dict(self) -> Dict[str, Any]:
        return self.optimizer.arrays() if self._with_moments else super().state_dict()

    def own_state(self) -> Optional[OwnState]:
        return None if self._with_moments else super().own_state()

    def _meet(self) -> None:
        self._average([p.list_data() for p in self._parameters])
        for moments in self._moments() if self._with_moments else []:
            self._average(moments)


class ElasticAverage(PeriodicAveraging):
    """Ties each worker's parameters to a common centre by a spring (Zhang et al. 2015, arXiv:1412.6651, synchronous).

    With d_i = b w_i (theta_i - centre), where w_i is the worker's share of the images and b is train.elastic, each
    worker moves by -d_i and the centre by the sum of all d_i. That is one gradient step on (b / 2) sum_i w_i
    |theta_i - centre|^2 for all of them. Some texts write the worker's pull as + w_i (centre - theta_i) and the
    centre's as sum_i w_i (centre - theta_i); added as signed, the latter drives the centre away from its workers. It
    must be subtracted, as here.
    """

    def __init__(self, specs: Sequence[ParameterSpec], optimizer: Optimizer, communicator: Communicator,
                 train: TrainConfig, clip: Optional[float], split: BatchSplit, last: int):
        super().__init__(specs, optimizer, communicator, train, clip, split, last)
        self._strength = train.elastic
        self._centre = [p.list_data()[0].copy() for p in self._parameters]
        self._aside: List[Copies] = []  # this worker's weights, while the parameters hold the centre

    def load_state_dict(self, moments: Optional[Mapping[str, Any]], update: int) -> None:
        super().load_state_dict(moments, update)
        self._centre = [p.list_data()[0].copy() for p in self._parameters]

    def own_state(self) -> Optional[OwnState]:
        """Return the weights and moments of each worker, beside the centre that all of them have."""
        return self._own_state(weight=self._aside or [p.list_data() for p in self._parameters])

    def _meet(self) -> None:
        pulls = [[(p.list_data()[0] - centre) * (self._strength * self._split.fraction)]
                 for p, centre in zip(self._parameters, self._centre)]
        for p, (pull,) in zip(self._parameters, pulls):
            for copy in p.list_data():
                copy -= pull.as_in_context(copy.context)
        self.workers.all_reduce(self._handle.with_arrays(pulls))
        for centre, (pull,) in zip(self._centre, pulls):
            centre += pull

    @contextlib.contextmanager
    def consolidated_weights(self) -> Iterator[None]:
        self._average_buffers()
        self._aside = [[p.list_data()[0].copy()] for p in self._parameters]
        self._set(self._centre)
        yield
        self._set([first for first, in self._aside])
        self._aside = []

    def _set(self, values: Sequence[mx.nd.NDArray]) -> None:
        for p, value in zip(self._parameters, values):
            for copy in p.list_data():
                value.copyto(copy)
