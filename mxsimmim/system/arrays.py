"""Named arrays, in memory or on their way from other workers."""
from typing import Callable, Dict, Iterator, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Gathered(NamedTuple):
    """Arrays of a whole model, of which no more than a few are in memory; to be taken once."""
    kinds: Dict[str, Tuple[str, Tuple[int, ...]]]  # name -> type and shape, in the order of `values`
    values: Iterator[np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of all of them."""
        return sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in self.kinds.values())


def on_the_way(arrays: Arrays) -> Gathered:
    """Return arrays in memory as if they came from elsewhere."""
    return Gathered({name: (value.dtype.name, value.shape) for name, value in arrays.items()}, iter(arrays.values()))


class WhenAsked(Mapping[str, np.ndarray]):
    """Arrays that are made when they are asked for, each time anew: not all of them need fit into memory."""

    def __init__(self, names: Sequence[str], make: Callable[[str], np.ndarray]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:  # a mapping's own would make the array
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
