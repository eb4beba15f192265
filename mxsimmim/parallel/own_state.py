"""What each worker has of its own, besides the weights and moments of all, on its way to a checkpoint and back."""
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..models import ParameterSpec, joined
from ..system.arrays import Arrays, Gathered
from .communicators import Communicator, Copies, Handle

PIECE = 1 << 20  # numbers that travel at once
Shapes = Dict[str, Tuple[int, ...]]  # of arrays, by name


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


class OwnStateOfParts:
    """As `OwnState`, where several workers hold a model together: each has arrays of its own parts' shapes.

    By `NUMBER.KIND.KEY`, with the key of the part; for a job of the same mesh. The number is that of the worker's place
    there, which has the same parts on whatever hosts workers are. Since gradients of different workers have different
    shapes, the arrays of a worker travel one after another, in pieces of `PIECE` numbers.
    """

    def __init__(self, communicator: Communicator, piece: Handle, specs: Sequence[ParameterSpec],
                 kinds: Mapping[str, Kind]):
        """`communicator` is that of all workers, `piece` (PIECE,) an array of it, `specs` are this worker's own.

        All workers make this at once.
        """
        self._communicator, self._control, self._handle = communicator, communicator.control, piece
        self._specs, self._kinds, self._place = [spec for spec in specs if spec.trainable], kinds, communicator.rank
        told = dict(self._control.all_gather('shapes of the parts', (
            self._place, {spec.key: spec.parameter.shape for spec in self._specs})))
        self._shapes: List[Shapes] = [  # of the arrays of each worker, by their names
            {f'{place}.{kind}.{key}': tuple(shape) for kind in kinds for key, shape in told[place].items()}
            for place in sorted(told)]

    def gathered(self) -> Gathered:
        """Return the arrays of all workers, in the first one; in the others none. All of them call this."""
        values = self._values()
        if self._place:
            for _ in values:  # there are none, but this worker takes part
                pass
        return Gathered({name: ('float32', shape) for named in self._shapes for name, shape in named.items()}, values)

    def load(self, arrays: Optional[Arrays]) -> bool:
        """As `OwnState.load`; also False where a worker held other parts."""
        if not self._control.broadcast_object('whether each worker has a state of its own', lambda: (
                arrays is not None and {name: value.shape for name, value in arrays.items()}
                == {name: shape for named in self._shapes for name, shape in named.items()})):
            return False
        for place, named in enumerate(self._shapes):
            flat = np.zeros(size_of(named), 'float32') if self._place in (0, place) else None
            if flat is not None and arrays is not None:
                np.concatenate([arrays[name].ravel() for name in named], out=flat)
            self._send(flat, size_of(named), 0)
            if flat is not None and self._place == place:
                found = split(flat, named)
                for kind, how in self._kinds.items():
                    for spec in self._specs:
                        spec.parameter.list_grad()[0][:] = found[f'{place}.{kind}.{spec.key}']
                    how.take()
        return True

    def _values(self) -> Iterator[np.ndarray]:
        """Yield the arrays in the order of their names in the first worker; all of them run this."""
        for place, named in enumerate(self._shapes):
            flat = np.zeros(size_of(named), 'float32') if self._place in (0, place) else None
            if flat is not None and self._place == place:
                for how, own in zip(self._kinds.values(), np.split(flat, len(self._kinds))):
                    how.put()
                    np.concatenate([spec.parameter.list_grad()[0].asnumpy().ravel() for spec in self._specs], out=own)
            self._send(flat, size_of(named), place)
            if flat is not None and self._place == 0:
                yield from split(flat, named).values()

    def _send(self, flat: Optional[np.ndarray], size: int, root: int) -> None:
        """Overwrite `flat` (size,) in all workers that have one with that of the worker at place `root`."""
        (piece, *_), = self._handle.arrays
        for first in range(0, size, PIECE):
            part = slice(first, min(first + PIECE, size))
            if flat is not None:
                piece[:part.stop - first] = flat[part]
            self._communicator.broadcast(self._handle, root)
            if flat is not None:
                flat[part] = piece[:part.stop - first].asnumpy()


def size_of(shapes: Shapes) -> int:
    """Return how many numbers arrays of these shapes have."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def split(flat: np.ndarray, shapes: Shapes) -> Dict[str, np.ndarray]:
    """Return the arrays of these shapes that lie one after another in `flat` (n,)."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), np.split(flat, ends[:-1]))}
