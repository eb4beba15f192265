"""Updates that the workers of a data group divide among each other, with the optimiser's moments: ZeRO's first stage.

Rajbhandari et al. 2020 (arXiv:1910.02054). Gradients are reduced as ever. Then one worker of the group, the owner of a
parameter, updates it and alone keeps its moments, and all others get the new weights from it.
"""
import heapq
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np

from ..config import TrainConfig
from ..models import ParameterSpec, joined
from ..optim import Optimizer
from ..system.arrays import Gathered
from .clock import Clock
from .communicators import Communicator, Copies
from .updates import SynchronousUpdate


def deal(sizes: Sequence[int], workers: int) -> List[int]:
    """Return the owner of each parameter: the largest first, each goes to the worker that has the fewest numbers."""
    loads = [(0, worker) for worker in range(workers)]
    owners = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        load, owners[number] = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[number], owners[number]))
    return owners


def owners_of(specs: Sequence[ParameterSpec], workers: int) -> Dict[str, int]:
    """Return, by key, the owners of the parameters that a data group of so many workers divides.

    A parameter whose gradient is reduced over other workers, too, is small and is left out: each of them updates it.
    """
    divided = [spec for spec in specs if spec.trainable and spec.axes == ('data',)]
    sizes = [int(np.prod(spec.parameter.shape)) for spec in divided]
    return dict(zip([spec.key for spec in divided], deal(sizes, workers)))


def updated_by(worker: int, specs: Sequence[ParameterSpec], workers: int) -> List[ParameterSpec]:
    """Return those of `specs` that the optimiser of this worker of so many is for."""
    owners = owners_of(specs, workers)
    return [spec for spec in specs if owners.get(spec.key, worker) == worker]


class ShardedUpdate(SynchronousUpdate):
    """A synchronous update in which each worker updates the parameters that it owns.

    Weights and moments go from owners to the others in the arrays of the gradients, which are free after an update: no
    memory is added, and within a host nothing is sent. The owner puts its values there, the others -0.0, and the sum
    over the group has the owner's bits.
    """

    def __init__(self, specs: Sequence[ParameterSpec], optimizer: Optimizer, communicator: Communicator,
                 train: TrainConfig, clip: Optional[float]):
        """`optimizer` is for what this worker updates of `specs`, see `updated_by`."""
        super().__init__(specs, optimizer, communicator, train, clip)
        self._owners = owners_of(specs, communicator.size)
        self._updated = updated_by(communicator.rank, self._specs, communicator.size)
        exchange, = (each for each in self._exchanges if each.communicator is communicator)
        self._carriers = communicator.register(exchange.arrays)

    def step(self, update: int, lr: float, loss: mx.nd.NDArray, clock: Optional[Clock] = None,
             floor: float = 0.0) -> mx.nd.NDArray:
        stats = super().step(update, lr, loss, clock, floor)
        if clock:
            clock.start()  # what follows is communication, the update is not
        self._carry(lambda spec: spec.parameter.list_data()[0])
        for spec in self._specs:
            if self._owners.get(spec.key, self.workers.rank) != self.workers.rank:
                _copy(spec.parameter.list_grad(), spec.parameter.list_data())
        if clock:
            clock.communicated()
        return stats

    def moment_names(self) -> List[str]:
        return [f'{kind}.{name}' for kind in self.optimizer.MOMENTS for name in self._whole()]

    def state_dict(self) -> Gathered:
        """Return the moments of all parameters, in the first worker of the group; in the others none.

        They come kind by kind, and lie meanwhile in the gradients' arrays.
        """
        values = self._moments_of_all()
        if self.workers.rank:
            for _ in values:  # there are none, but this worker takes part
                pass
        shapes = [specs[0].whole_shape if len(specs) > 1 else specs[0].parameter.shape
                  for specs in self._whole().values()] * len(self.optimizer.MOMENTS)
        return Gathered({name: ('float32', shape) for name, shape in zip(self.moment_names(), shapes)}, values)

    def load_one_by_one(self, moments: Iterable[Tuple[str, np.ndarray]], update: int) -> None:
        self.load_state_dict(dict(moments), update)

    def load_state_dict(self, moments: Optional[Mapping[str, Any]], update: int) -> None:
        """As `SynchronousUpdate`; the first worker of the group has the moments, of all of its parameters."""
        for kind in self.optimizer.MOMENTS:
            for name, specs in self._whole().items():
                whole = moments[f'{kind}.{name}'] if moments else np.zeros(specs[0].whole_shape, 'float32')
                for spec in specs:
                    _put(spec, None if self.workers.rank else spec.part_of(whole))
            self.workers.all_reduce(self._carriers)
            for spec in self._updated:
                _copy(spec.parameter.list_grad(), self._moment(kind, spec))
        self.workers.broadcast(self.workers.register(
            [self._moment(kind, spec) for kind in self.optimizer.MOMENTS for spec in self._updated
             if spec.key not in self._owners]))
        super().load_state_dict(None, update)

    def _moments(self) -> List[List[Copies]]:
        return []  # there are none that all workers have

    def _moment(self, kind: str, spec: ParameterSpec) -> Copies:
        return self.optimizer.moments[f'{kind}.{spec.key}']

    def _whole(self) -> Dict[str, List[ParameterSpec]]:
        """Return the specs of all parts of each parameter, by name."""
        named: Dict[str, List[ParameterSpec]] = {}
        for spec in self._specs:
            named.setdefault(spec.name, []).append(spec)
        return named

    def _moments_of_all(self) -> Iterator[np.ndarray]:
        """Yield whole moments in the first worker of the group, as `moment_names` says; all of it run this."""
        for kind in self.optimizer.MOMENTS:
            self._carry(lambda spec: self._moment(kind, spec)[0])
            for name, specs in self._whole().items() if self.workers.rank == 0 else ():
                yield joined(specs, [spec.parameter.list_grad()[0].asnumpy() for spec in specs])[name]

    def _carry(self, found: Callable[[ParameterSpec], mx.nd.NDArray]) -> None:
        """Overwrite each gradient in all workers with what is `found` of its parameter in the one that updates it."""
        own = {spec.key for spec in self._updated}
        for spec in self._specs:
            _put(spec, found(spec) if spec.key in own else None)
        self.workers.all_reduce(self._carriers)


def _put(spec: ParameterSpec, value: Union[None, mx.nd.NDArray, np.ndarray]) -> None:
    """Write a value into the first copy of a parameter's gradient and -0.0 into the others; None: into all of them."""
    for number, carrier in enumerate(spec.parameter.list_grad()):
        if number == 0 and value is not None:
            carrier[:] = value
        else:
            clear(carrier)


def clear(array: mx.nd.NDArray) -> None:
    """Fill an array with -0.0: x + -0.0 has the bits of x for every x, and x + 0.0 not for -0.0."""
    array[:] = 0  # as would be stored for -0.0, too
    mx.nd.negative(array, out=array)


def _copy(values: Copies, targets: Copies) -> None:
    for value, target in zip(values, targets):
        value.copyto(target)
