"""Images of which more is known than their pixels, such as label maps or objects: their parts, and opening them."""
import zlib
from typing import Callable, Optional, Protocol, Sequence, Tuple, TypeVar

import numpy as np

from ..config import DataConfig
from .labels import listed_classes
from .sampling import generator
from .sources import SEED, Source, Subset, hold_out

A = TypeVar('A', bound='Annotated')


class Annotations(Protocol):
    """What is known of some images, by number."""
    classes: Tuple[str, ...]

    def checksum(self) -> int:
        """Tells these annotations from others."""


class Annotated(Subset):
    """Some images of a source, of each of which something is known."""

    def __init__(self, source: Source, annotations: Annotations, indices: Optional[np.ndarray] = None):
        super().__init__(source, np.arange(len(source)) if indices is None else indices)
        self._annotations, self.classes = annotations, annotations.classes

    def checksum(self) -> int:
        """Tells these annotations from those of other files."""
        return zlib.crc32(self.indices.tobytes(), self._annotations.checksum())

    def part(self: A, indices: np.ndarray) -> A:
        """Those of these images that `indices` lists."""
        return type(self)(self._source, self._annotations, self.indices[indices])


def open_parts(data: DataConfig, what: str, opened: Callable[[str, str, str, Sequence[str]], A], seed: int
               ) -> Tuple[A, Optional[A]]:
    """(training, held-out images or None), as `data` describes them.

    The same images are held out as in pre-training; `seed` draws those that data.train_images keeps, of which a larger
    number keeps those of a smaller one.

    Args:
        what: is known of the images, for messages.
        opened: opens images by their path, the path of what is known of them, the key that sets that, and the classes
            they must have; none: as `data` says.

    Raises:
        ValueError: classes that differ, too few images; or as `opened`.
    """
    if data.val_labels and not data.val_path:
        raise ValueError(f'data.val_labels={data.val_labels} has the {what} of data.val_path: set that, too')
    train, held_out = opened(data.path, data.labels, 'data.labels', ()), None
    if data.val_path:
        held_out = opened(data.val_path, data.val_labels, 'data.val_labels', train.classes)
        if held_out.classes != train.classes:
            raise ValueError(f'data.val_path={data.val_path} has the classes {listed_classes(held_out.classes)}, '
                             f'data.path={data.path} {listed_classes(train.classes)}: they need the same')
    elif data.val_fraction:
        kept, held = hold_out(train, data.val_fraction, SEED)
        train, held_out = train.part(kept.indices), train.part(held.indices)
    return train.part(keep_few(len(train), data.train_images, seed)) if data.train_images else train, held_out


def keep_few(count: int, kept: int, seed: int) -> np.ndarray:
    """Which `kept` of `count` images data.train_images keeps, ascending.

    Raises:
        ValueError: there are fewer.
    """
    if kept > count:
        raise ValueError(f'data.train_images={kept}, but there are {count}: lower it, or add images')
    return np.sort(generator(seed, 0, 0, 1).permutation(count)[:kept])
