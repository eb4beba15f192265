"""A trained network that answers about encoded images."""
import contextlib
import threading
from typing import Any, Iterator, List, NamedTuple, Sequence, Tuple

import mxnet as mx
import numpy as np

from ..data.decode import MAX_PIXELS, decode, extent
from ..data.sampling import generator
from ..data.transforms import ClassifyEvalTransform, EvalTransform, normalise
from ..tasks.pictures import grid, to_uint8
from .trained import Trained, data_in_use

SEED = 0  # of the mask that images to reconstruct get
ROOM = MAX_PIXELS  # of all images decoded at the same time; 24 bytes each are needed at most (JPEG 2000 with alpha)


class Prepared(NamedTuple):
    """One image on its way into the network."""
    pixels: np.ndarray  # uint8 (S, S, 3)
    image: np.ndarray  # float32 (3, S, S), normalised
    mask: np.ndarray  # uint8 (h, w), 1 = masked; empty for a classifier


class Room:
    """A number that threads share: each takes what it needs, in the order in which they ask, and waits for it."""

    def __init__(self, free: int):
        self._free, self._turn, self._changed = free, threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """While entered, `amount` is taken; it must not be more than there is in all."""
        with self._turn, self._changed:  # one waits, so that what needs much is not put off for ever
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify()


class Predictor:
    """Classes of images, or after pre-training their reconstruction; on the device where the network is.

    `prepare` and `picture` may be called from any thread, `answer` from one at a time.
    """

    def __init__(self, trained: Trained):
        config = trained.config
        self.classes, self._data, self._net = trained.classes, data_in_use(config), trained.net
        self._context = trained.context
        self._transform: Any = EvalTransform(self._data, config.mask, config.model)
        if self.classes:
            self._transform = ClassifyEvalTransform(self._data, config.model)
        self._net.hybridize(static_alloc=True)
        self._room = Room(ROOM)

    def prepare(self, data: bytes, name: str) -> Prepared:
        """Decodes an image and brings it to the network's size.

        Raises:
            BrokenImage: not an image, damaged, or too many pixels; its text names it.
        """
        with self._room.taken(min(extent(data), ROOM)):
            image = decode(data, name, self._transform.upright)
            pixels, mask, *_ = self._transform(image, generator(SEED))
        return Prepared(pixels, normalise(pixels, self._data.mean, self._data.std), mask)

    def answer(self, batch: Sequence[Prepared]) -> np.ndarray:
        """Probabilities (B, classes) of a classifier; after pre-training reconstructions, uint8 (B, S, S, 3)."""
        image = mx.nd.array(np.stack([item.image for item in batch]), ctx=self._context)
        if self.classes:
            return mx.nd.softmax(self._net(image), axis=1).asnumpy()
        mask = mx.nd.array(np.stack([item.mask for item in batch]), ctx=self._context, dtype='uint8')
        return to_uint8(self._net.reconstruct(image, mask).asnumpy(), self._data.mean, self._data.std)

    def ranked(self, probabilities: np.ndarray) -> List[Tuple[str, float]]:
        """(class name, probability) of one image, the most probable first."""
        return [(self.classes[number], float(probabilities[number])) for number in np.argsort(-probabilities)]

    @staticmethod
    def picture(item: Prepared, reconstruction: np.ndarray) -> np.ndarray:
        """Original, masked, and reconstruction pasted into what was masked, side by side: uint8 (H, W, 3)."""
        return grid(item.pixels[None], item.mask[None], reconstruction[None])
