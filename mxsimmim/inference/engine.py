"""Answers of a trained network about encoded images."""
import contextlib
import threading
from typing import Iterator, NamedTuple, Sequence, Tuple

import mxnet as mx
import numpy as np

from ..data.decode import MAX_PIXELS, decode, extent
from ..data.sampling import generator
from ..data.transforms import Fields, normalise
from .trained import Trained, data_in_use

SEED = 0  # of the mask that images to reconstruct get
ROOM = MAX_PIXELS  # of all images decoded at the same time; 24 bytes each are needed at most (JPEG 2000 with alpha)


class Prepared(NamedTuple):
    """One image on its way into the network."""
    fields: Fields  # as the predictor's transform makes them
    image: np.ndarray  # float32 (3, S, S), normalised


class Room:
    """A number that threads share: each takes what it needs, in the order in which they ask, and waits for it."""

    def __init__(self, free: int):
        self._free, self._turn, self._changed = free, threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """Takes `amount` while entered; it must not be more than there is in all."""
        with self._turn, self._changed:  # one waits, so that what needs much is not put off for ever
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify()


class Engine:
    """Computes the answers of a run's predictor about encoded images, on the device where its network is.

    `prepare` and `body` may be called from any thread, `answer` from one at a time.
    """

    def __init__(self, trained: Trained):
        config = trained.config
        self.predictor, self._data = trained.predictor, data_in_use(config)
        self._context = trained.context
        trained.net.hybridize(static_alloc=True)
        self._transform, self._room = self.predictor.transform(self._data), Room(ROOM)

    def prepare(self, data: bytes, name: str) -> Prepared:
        """Decodes an image and brings it to the network's size.

        Raises:
            BrokenImage: not an image, damaged, or too many pixels; its text names it.
        """
        with self._room.taken(min(extent(data), ROOM)):
            fields = self._transform(self.pixels(data, name), generator(SEED))
        return Prepared(fields, normalise(fields['image'], self._data.mean, self._data.std))

    def pixels(self, data: bytes, name: str) -> np.ndarray:
        """Decodes an image, uint8 (H, W, 3), turned as the network sees it; raises as `prepare`."""
        return decode(data, name, self._transform.upright)

    def answer(self, batch: Sequence[Prepared]) -> np.ndarray:
        """Returns a row an image, as `Predictor.answer`."""
        inputs = {name: np.stack([item.image if name == 'image' else item.fields[name] for item in batch])
                  for name in self.predictor.inputs}
        return self.predictor.answer(*(mx.nd.array(values, ctx=self._context, dtype=values.dtype)
                                       for values in inputs.values()))

    def body(self, item: Prepared, answer: np.ndarray, accepted: str) -> Tuple[str, bytes]:
        """Returns media type and content of the answer about one image, as it is sent over HTTP."""
        return self.predictor.body(item.fields, answer, accepted)
