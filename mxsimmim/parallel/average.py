"""An average of the weights over time."""
import contextlib
from typing import Dict, Iterator, List, Mapping, Optional, Sequence

import mxnet as mx
import numpy as np

from ..interop.official import official_shape
from ..models import ParameterSpec, joined
from .communicators import Communicator, Handle


class WeightAverage:
    """average <- d average + (1 - d) weights after each update (Polyak and Juditsky 1992), on their first devices.

    d grows as (1 + k) / (10 + k) after k updates, up to `decay`, so that initial weights are soon forgotten.
    """

    def __init__(self, specs: Sequence[ParameterSpec], decay: float):
        self._decay, self._specs = decay, list(specs)
        self._parameters = {spec.key: spec.parameter for spec in specs if spec.trainable}
        self._average = {key: p.list_data()[0].copy() for key, p in self._parameters.items()}
        self._handle: Optional[Handle] = None

    def names(self) -> List[str]:
        """Return the names of the whole parameters that are averaged."""
        return list(dict.fromkeys(spec.name for spec in self._specs if spec.trainable))

    def set(self, name: str, whole: np.ndarray) -> None:
        """Set the average of one of `names`."""
        for spec in self._specs:
            if spec.name == name:
                self._average[spec.key][:] = spec.part_of(whole.reshape(spec.whole_shape))

    def update(self, done: int) -> None:
        """Take in the weights after update number `done`, counted from 1."""
        decay = min(self._decay, (1 + done) / (10 + done))
        for key, p in self._parameters.items():
            average = self._average[key]
            mx.nd.elemwise_add(average * decay, p.list_data()[0] * (1 - decay), out=average)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Show the average: while entered, the parameters hold it on all devices."""
        own = {key: p.list_data()[0].copy() for key, p in self._parameters.items()}
        self._set(self._average)
        try:
            yield
        finally:
            self._set(own)

    def share(self, communicator: Communicator) -> None:
        """Give all workers rank 0's."""
        self._handle = self._handle or communicator.register([[value] for value in self._average.values()])
        communicator.broadcast(self._handle)

    def arrays(self) -> Dict[str, np.ndarray]:
        """Return the average, and buffers as they are, under the reference's names and in its layouts."""
        values = [self._average.get(spec.key, spec.parameter.list_data()[0]).asnumpy() for spec in self._specs]
        return {name: value.reshape(official_shape(name, value.shape))
                for name, value in joined(self._specs, values).items()}

    def _set(self, values: Mapping[str, mx.nd.NDArray]) -> None:
        for key, p in self._parameters.items():
            for copy in p.list_data():
                values[key].copyto(copy)
