"""Images with boxes, and masks where there are any, of what is in them, in columns whatever the files were."""
import zlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

import numpy as np

from ..system.text import one_line
from .annotated import Annotated, Annotations
from .decode import BrokenImage
from .geometry import Size, size_of
from .regions import Region
from .scenes import OBJECTS, DigitScenes


class Objects(NamedTuple):
    """What is in an image."""
    boxes: np.ndarray  # float32 (n, 4): x0, y0, x1, y1 in pixels, each with an area
    classes: np.ndarray  # int64 (n,)
    crowd: np.ndarray  # bool (n,): COCO's iscrowd, Pascal VOC's difficult; neither to be found nor wrong if it is
    regions: Tuple[Optional[Region], ...]  # n masks, None where there is none
    size: Optional[Size]  # of the image, if it is known


def within(objects: Objects, size: Size) -> Objects:
    """Cut boxes at the borders of their image, which has this size; those without an area in it are left out."""
    boxes = objects.boxes.clip(0, np.array(size[::-1] * 2, np.float32))
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    return Objects(boxes[kept], objects.classes[kept], objects.crowd[kept],
                   tuple(objects.regions[number] for number in kept), size)


class ObjectLists(Annotations, Protocol):
    """The objects of some images, by number."""
    has_masks: bool

    def read(self, index: int, masks: bool) -> Objects:
        """What is in the image, without its masks if they are not asked for; BrokenImage if that cannot be read."""


class WithObjects(Annotated):
    """Some images of a source, each with its objects."""
    _annotations: ObjectLists

    @property
    def has_masks(self) -> bool:
        """Whether objects have masks."""
        return self._annotations.has_masks

    def objects(self, index: int, masks: bool = True) -> Objects:
        """What is in an image; without `masks` none are read.

        Raises:
            BrokenImage: some of it cannot be read.
        """
        return self._annotations.read(int(self.indices[index]), masks)


class SceneObjects:
    """The objects of the digit scenes: what can be seen of each digit, and the box around that."""
    classes, has_masks = OBJECTS, True

    def __init__(self, scenes: DigitScenes):
        self._scenes = scenes

    def read(self, index: int, masks: bool) -> Objects:
        scene = self._scenes.scene(index)
        found = [scene.owner == number for number in range(len(scene.digits))]
        boxes = np.array([box_of(mask) for mask in found], np.float32)
        return Objects(boxes, scene.digits, np.zeros(len(boxes), bool),
                       tuple(found) if masks else (None,) * len(boxes), size_of(scene.owner))

    def checksum(self) -> int:
        return 0


def box_of(mask: np.ndarray) -> Tuple[int, int, int, int]:
    """The smallest box around the pixels of a mask (h, w), which has some."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class Columns(NamedTuple):
    """Objects as they are read, one after another."""
    image: List[int]  # number of the image
    box: Any  # list or array (n, 4): x0, y0, x1, y1
    kind: List[int]  # number of the class
    crowd: Any  # list or array (n,), as in `Objects`


class ObjectTable:
    """Objects read from files."""

    def __init__(self, classes: Tuple[str, ...], sizes: np.ndarray, columns: Columns, broken: Dict[int, str],
                 where: Callable[[int], str], regions: Optional[Callable[[int, Size], Optional[Region]]] = None):
        """Sort objects by image, cut their boxes at its borders, and leave out those of no area.

        Args:
            classes: names.
            sizes: int32 (images, 2), height and width of each; 0: not known.
            columns: all objects.
            broken: what is wrong with an image's objects, by the number of the image; its boxes are not used.
            where: what messages call the object of this place in `columns`.
            regions: its mask; BrokenImage if it is none. None: there are no masks.
        """
        self.classes, self.has_masks, self._sizes, self.broken = classes, regions is not None, sizes, broken
        self._regions = regions
        image, boxes = np.array(columns.image, np.int64), np.array(columns.box, np.float32).reshape(-1, 4)
        limits = np.where(sizes > 0, sizes, np.inf).astype(np.float32)[image][:, [1, 0, 1, 0]]
        cut = boxes.clip(0, limits)
        empty = (cut[:, 2] <= cut[:, 0]) | (cut[:, 3] <= cut[:, 1])
        outside, none = int((cut != boxes)[~empty].any(axis=1).sum()), np.flatnonzero(empty)
        self.notes = [f'{len(none):,} boxes without an area in the image left out, the first: {where(int(none[0]))}'
                      ] if len(none) else []
        self.notes += [f'{outside:,} boxes cut at the borders of their images'] if outside else []
        order = np.argsort(image, kind='stable')
        self._order = order[~empty[order]]
        self._starts = np.searchsorted(image[self._order], np.arange(len(sizes) + 1))
        self._boxes, self._kinds = cut[self._order], np.array(columns.kind, np.int32)[self._order]
        self._crowd = np.array(columns.crowd, bool)[self._order]

    def __len__(self) -> int:
        return len(self._boxes)

    def read(self, index: int, masks: bool) -> Objects:
        if index in self.broken:
            raise BrokenImage(self.broken[index])
        own = slice(self._starts[index], self._starts[index + 1])
        size = (int(self._sizes[index, 0]), int(self._sizes[index, 1])) if self._sizes[index].all() else None
        regions = tuple(self._regions(int(place), size) if masks and self._regions and size else None
                        for place in self._order[own])  # readers with masks know all sizes
        return Objects(self._boxes[own], self._kinds[own].astype(np.int64), self._crowd[own], regions, size)

    def checksum(self) -> int:
        arrays = self._starts, self._boxes, self._kinds, self._crowd
        return zlib.crc32(b''.join(array.tobytes() for array in arrays))


def class_numbers(names: Sequence[str], classes: Sequence[str], where: Callable[[int], str], key: str
                  ) -> Tuple[List[int], Tuple[str, ...]]:
    """(the number of each name, class names in the order of their numbers); without `classes`, the names sorted.

    Args:
        where: says where name number i stands.
        key: what else to change in `classes`.

    Raises:
        ValueError: a name that is no class.
    """
    known = {name: number for number, name in enumerate(classes or sorted(set(names)))}
    for place, name in enumerate(names):
        if name not in known:
            raise ValueError(f"{where(place)}: class '{one_line(name)}' is not one of the {len(known)} classes: "
                             f'correct it, or complete {key}')
    return [known[name] for name in names], tuple(known)
