"""Arithmetic on boxes: anchors, coding, which truth a box is of, which are sampled. F is mx.nd or mx.sym.

A box is (x0, y0, x1, y1) in pixels of the input; figures and coding are detectron2's. Shapes: B images, N boxes, M
objects of an image that are known, k boxes that are chosen.
"""
from typing import Any, Sequence, Tuple

import numpy as np

from ..ops.reference import AUTO

NOTHING = -1e30  # the score of a box that does not count
Size = Tuple[int, int]  # height and width


def anchors(sizes: Sequence[Size], strides: Sequence[float], scale: float, ratios: Sequence[float]) -> np.ndarray:
    """Return boxes of fixed shapes about all places of maps, float32 (N, 4): map, row, column, shape.

    Args:
        sizes: of the maps.
        strides: pixels a side for a place of each map.
        scale: side of the square one, in places.
        ratios: height over width; all have the same area.
    """
    found = []
    for (height, width), stride in zip(sizes, strides):
        wide = np.array([scale * stride / ratio ** 0.5 for ratio in ratios])
        high = wide * ratios
        shapes = np.stack([-wide, -high, wide, high], axis=1) / 2                            # (A, 4)
        y, x = np.meshgrid(np.arange(height) * stride, np.arange(width) * stride, indexing='ij')
        middles = np.stack([x, y, x, y], axis=2).reshape(-1, 1, 4)
        found.append((middles + shapes).reshape(-1, 4))
    return np.concatenate(found).astype('float32')


def rows(F: Any, array: Any, index: Any) -> Any:
    """Take rows (B, k, ...) of array (B, N, ...) by index (B, k)."""
    image = F.broadcast_like(F.reshape(F.contrib.arange_like(index, axis=0), shape=(AUTO, 1)), index, lhs_axes=(1,),
                             rhs_axes=(1,))
    return F.gather_nd(array, F.stack(image, index, axis=0))


def highest(F: Any, score: Any, count: int) -> Any:
    """Return the index (B, count) of the highest of score (B, N), the highest first."""
    return F.topk(score, axis=1, k=count, ret_typ='indices')


def sides(F: Any, boxes: Any) -> Tuple[Any, Any]:
    """Return the corner (..., 2) of boxes (..., 4) and their widths and heights (..., 2)."""
    low, high = (F.slice_axis(boxes, axis=-1, begin=begin, end=begin + 2) for begin in (0, 2))
    return low, high - low


def encode(F: Any, boxes: Any, truth: Any, weights: Sequence[float]) -> Any:
    """Return what `decode` makes truth (..., 4) of, from boxes (..., 4); finite for boxes of no area, too."""
    (low, size), (to, wanted) = (sides(F, given) for given in (boxes, truth))
    size, wanted = F.maximum(size, 1e-3), F.maximum(wanted, 1e-3)
    shift = (to + wanted / 2 - low - size / 2) / size
    return F.concat(shift * weights[0], F.log(wanted / size) * weights[2], dim=-1)


def clipped(F: Any, boxes: Any, size: Size) -> Any:
    """Return the part of boxes (B, N, 4) that is inside of an input of `size`."""
    x, y = (F.clip(F.slice(boxes, begin=(None, None, first), end=(None, None, None), step=(None, None, 2)), 0, most)
            for first, most in ((0, size[1]), (1, size[0])))
    return F.reshape(F.stack(x, y, axis=3), shape=(0, 0, 4))


def has_area(F: Any, boxes: Any) -> Any:
    """Tell which of boxes (..., 4) are wider and higher than nothing: (...), 1 or 0."""
    return F.min(sides(F, boxes)[1], axis=-1) > 0


def sampled(F: Any, positive: Any, negative: Any, priority: Any, count: int, most: int) -> Tuple[Any, Any, Any]:
    """Choose `count` boxes, of which up to `most` are positive; those of the highest priority.

    positive and negative (B, N) are 1 or 0, priority (B, N) is in [0, 1). Returns an index (B, count), positive ones
    first; which are positive; and which are at all, as there may be too few.
    """
    negative = negative * (1 - positive)
    chosen = positive * F.topk(positive * (1 + priority), axis=1, k=most, ret_typ='mask')
    index = highest(F, (chosen + negative) * (1 + priority / 2) + chosen, count)
    taken = rows(F, chosen, index)
    return index, taken, taken + rows(F, negative, index)
