"""Masks of objects: polygons, run lengths as COCO writes them, bitmaps.

A pixel belongs to a polygon if its centre is inside by the even-odd rule, and to several if it belongs to any of them.
COCO's own tools trace the outline on a grid five times as fine; single pixels on slopes differ, some here, some there.
"""
import math
from typing import Any, List, NamedTuple, Tuple, Union

import numpy as np

from .geometry import Size, View

LARGEST = 2 ** 31  # of numbers in pixels


class Polygons(NamedTuple):
    """The outlines of an object, float (n, 2) each: x and y in pixels."""
    outlines: Tuple[np.ndarray, ...]


class RunLengths(NamedTuple):
    """Lengths, in turn, of what is outside and inside of the object, column after column."""
    lengths: np.ndarray  # int64


Region = Union[Polygons, RunLengths, np.ndarray]
"""What an object covers; an array is a bitmap, bool (h, w)."""


def region_of(segmentation: Any, size: Size) -> Region:
    """The region that COCO's 'segmentation' describes, of an image of this size.

    Raises:
        ValueError: it describes none, saying what is wrong.
    """
    if isinstance(segmentation, dict):
        counts = segmentation.get('counts')
        if isinstance(counts, str):
            counts = unpacked(counts)
        if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("its 'counts' are neither a list of lengths nor a string")
        if segmentation.get('size') != list(size):
            raise ValueError(f"its 'size' is {segmentation.get('size')}, and the image's {list(size)}: height, width")
        if sum(counts) != math.prod(size):
            raise ValueError(f"its 'counts' add up to {sum(counts)} pixels, and the image has {math.prod(size)}")
        return RunLengths(np.array(counts, np.int64))
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError('it is neither a list of polygons nor run lengths')
    return Polygons(tuple(map(_outline, segmentation)))


def _outline(numbers: Any) -> np.ndarray:
    if not isinstance(numbers, list) or len(numbers) < 6 or len(numbers) % 2:
        what = f'{len(numbers)} numbers' if isinstance(numbers, list) else str(numbers)[:40]
        raise ValueError(f'a polygon has an even number of numbers, six or more, but one is {what}')
    try:
        outline = np.array(numbers, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        raise ValueError('a polygon has something else than numbers') from None
    if not (np.abs(outline) < LARGEST).all():
        raise ValueError('a polygon has numbers that are no pixels')
    return outline


def unpacked(text: str) -> List[int]:
    """Lengths from COCO's compressed form.

    Each is written in groups of 5 bits, the lowest first, in the characters from '0' on, with 32 added to all groups
    but the last, whose bit 16 is the sign; from the fourth on, as the difference to the one before the last.

    Raises:
        ValueError: other characters, or the end within a number.
    """
    lengths: List[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"its 'counts' have the character {character!r}, which is none of COCO's")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            if shift > 60:  # an endless one would take the time of its square
                raise ValueError("its 'counts' have a number of more than 60 bits")
            continue
        if group & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its 'counts' end within a number")
    return lengths


def bitmap(region: Region, size: Size) -> np.ndarray:
    """The region in an image of this size, bool (h, w)."""
    if isinstance(region, Polygons):
        return _filled(region.outlines, size)
    if isinstance(region, RunLengths):
        inside = np.arange(len(region.lengths)) % 2 == 1
        return np.repeat(inside, region.lengths).reshape(size[::-1]).T
    return region


def in_box(region: Region, size: Size, view: View, box: np.ndarray, side: int) -> np.ndarray:
    """The region of an image of this `size`, as a view shows it, in the middles of side x side equal cells of a box.

    Args:
        box: float (4,), x0, y0, x1, y1 on the canvas, with an area.

    Returns:
        bool (side, side)
    """
    corner, extent = box[:2].astype(np.float64), box[2:].astype(np.float64) - box[:2]
    if isinstance(region, Polygons):
        scale = side / extent
        return _filled(tuple((view.points(outline, size) - corner) * scale for outline in region.outlines),
                       (side, side))
    centres = corner + (np.arange(side)[:, None] + 0.5) * (extent / side)  # x and y of the columns' and rows' middles
    x, y = view.origin(centres, size).astype(np.intp).clip(0, [size[1] - 1, size[0] - 1]).T
    return bitmap(region, size)[y[:, None], x]


def _filled(outlines: Tuple[np.ndarray, ...], size: Size) -> np.ndarray:
    result = np.zeros(size, bool)
    for outline in outlines:
        result |= _inside(outline, size)
    return result


def _inside(outline: np.ndarray, size: Size) -> np.ndarray:
    """The pixels whose centres are inside an outline (n, 2): every crossing to their left changes sides."""
    starts, ends = outline, np.roll(outline, -1, axis=0)
    down = starts[:, 1:] <= ends[:, 1:]
    upper, lower = np.where(down, starts, ends), np.where(down, ends, starts)
    first, last = (np.ceil(points[:, 1] - 0.5).clip(0, size[0]).astype(np.intp) for points in (upper, lower))
    counts = last - first  # rows whose centres an edge passes
    edge = np.repeat(np.arange(len(outline)), counts)
    row = np.arange(len(edge)) - np.repeat(counts.cumsum() - counts - first, counts)
    (dx, dy), (x, y) = (lower - upper)[edge].T, upper[edge].T
    column = np.ceil(x + (row + 0.5 - y) * (dx / dy) - 0.5).clip(0, size[1]).astype(np.intp)
    crossings = np.zeros((size[0], size[1] + 1), np.int32)
    np.add.at(crossings, (row, column), 1)
    return crossings.cumsum(axis=1)[:, :-1] % 2 == 1
