"""What each worker has of its own, besides the weights and moments of all, on its way to a checkpoint and back."""
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..models import ParameterSpec, joined
from ..system.arrays import Arrays, Gathered
from .communicators import Communicator, Copies, Handle


class Kind(NamedTuple):
    """One array a parameter of each worker's own, such as its residuals, that the parameters' gradients can hold."""
    put: Callable[[], None]  # this worker's into the first copies of the gradients
    take: Callable[[], None]  # out of them


def arrays_in(gradients: Sequence[Copies], arrays: Sequence[Copies]) -> Kind:
    """Return how gradients hold arrays of their shapes, on the same devices or on the first of them."""
    def put() -> None:
        for (gradient, *_), (first, *_) in zip(gradients, arrays):
            first.copyto(gradient)

    def take() -> None:
        for held, copies in zip(gradients, arrays):
            for gradient, copy in zip(held, copies):
                gradient.copyto(copy)
    return Kind(put, take)


def residuals_in(gradients: Sequence[Copies], residuals: Sequence[np.ndarray]) -> Kind:
    """Return how gradients hold NumPy's arrays (n,) of their sizes."""
    def put() -> None:
        for (first, *_), residual in zip(gradients, residuals):
            first[:] = residual.reshape(first.shape)

    def take() -> None:
        for (first, *_), residual in zip(gradients, residuals):
            residual[:] = first.asnumpy().ravel()
    return Kind(put, take)


class OwnState:
    """The arrays of all workers, by `NUMBER.KIND.NAME` with the number of the worker and the parameter's name.

    They travel in the arrays of the gradients, which are free after an update: no memory is added.
    """

    def __init__(self, communicator: Communicator, gradients: Handle, specs: Sequence[ParameterSpec],
                 kinds: Mapping[str, Kind]):
        """`gradients` has the arrays of the gradients of `specs`, under keys of `communicator`."""
        self._communicator, self._gradients, self._kinds = communicator, gradients, kinds
        self._specs = [spec for spec in specs if spec.trainable]

    def names(self) -> List[str]:
        """Return the names of all workers' arrays."""
        return [f'{worker}.{kind}.{name}' for worker in range(self._communicator.size) for kind in self._kinds
                for name in self._shapes()]

    def gathered(self) -> Gathered:
        """Return the arrays of all workers, in the first one; in the others none. All of them call this."""
        values = self._values()
        if self._communicator.rank:
            for _ in values:  # there are none, but this worker takes part
                pass
        shapes = list(self._shapes().values()) * len(self._kinds) * self._communicator.size
        return Gathered({name: ('float32', shape) for name, shape in zip(self.names(), shapes)}, values)

    def load(self, arrays: Optional[Arrays]) -> bool:
        """Give each worker its own of what `gathered` returned, which the first one has.

        Return False, in all workers, and change nothing if these arrays are not there, or are of other workers.
        """
        if not self._communicator.control.broadcast_object('whether each worker has a state of its own', lambda: (
                arrays is not None and set(arrays) == set(self.names()))):
            return False
        for worker in range(self._communicator.size):
            for kind, how in self._kinds.items():
                for spec in self._specs if self._communicator.rank == 0 else ():
                    assert arrays is not None
                    spec.parameter.list_grad()[0][:] = spec.part_of(arrays[f'{worker}.{kind}.{spec.name}'])
                self._communicator.broadcast(self._gradients)
                if self._communicator.rank == worker:
                    how.take()
        return True

    def _shapes(self) -> Dict[str, Tuple[int, ...]]:
        return {spec.name: spec.whole_shape for spec in self._specs}

    def _values(self) -> Iterator[np.ndarray]:
        """Yield the arrays in the order of their names in the first worker; all of them run this."""
        for worker in range(self._communicator.size):
            for how in self._kinds.values():
                if self._communicator.rank == worker:
                    how.put()
                self._communicator.broadcast(self._gradients, worker)
                if self._communicator.rank == 0:
                    values = [spec.parameter.list_grad()[0].asnumpy() for spec in self._specs]
                    yield from joined(self._specs, values).values()
