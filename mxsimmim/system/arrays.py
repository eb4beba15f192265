"""Named arrays, in memory or on their way from other workers."""
from typing import Dict, Iterator, Mapping, NamedTuple, Tuple

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
