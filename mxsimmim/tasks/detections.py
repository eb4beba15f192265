"""What a detector finds in images: from its answers to boxes and masks in pixels. No MXNet.

Masks are COCO's run lengths, which pycocotools makes, of the package's extra `detect`.
"""
import math
from typing import Any, Dict, NamedTuple, Sequence, Tuple

import numpy as np

from ..config.model import OBJECTS
from ..data.geometry import Size
from ..data.regions import Polygons, Region, RunLengths, bitmap
from ..data.views import Answer
from ..system.guards import unusable

NEAR = 1.0  # pixels of the input, from the border of a view
NMS = 0.5  # boxes of a class that share more (IoU) are one
CELLS = 28  # a side of a mask in its box
FAR = 4  # sides of an image, from which a polygon is far away from it
STRIP = 1 << 22  # probabilities of a mask's pixels at a time
BOXES = 6  # numbers of a row before its mask: x0, y0, x1, y1, score, class


class Found(NamedTuple):
    """What is found in an image, the most certain first."""
    boxes: np.ndarray  # float64 (n, 4): x0, y0, x1, y1 in pixels of the image
    scores: np.ndarray  # float32 (n,)
    classes: np.ndarray  # int64 (n,)
    masks: Tuple[Dict[str, Any], ...]  # COCO's compressed run lengths; empty where there are none


def needed() -> Any:
    """Return pycocotools' COCO and COCOeval, and its module of masks.

    Raises:
        ValueError: it is not installed, or does not load.
    """
    try:
        from pycocotools import coco, cocoeval, mask
    except Exception as error:  # a broken package raises anything
        raise unusable('task=detect', error, 'detect') from None
    for module in (coco, cocoeval):
        module.print = lambda *words: None  # progress, on standard output
    return coco.COCO, cocoeval.COCOeval, mask


def returned(answer: Answer, size: Size) -> np.ndarray:
    """Bring an answer, rows (n, 6), or with masks (n, 6 + 28 * 28), to the pixels of an image of this size: float64.

    Rows of no class are left out, and so are boxes that end where the view of a part of the image ends: there may be
    more of the objects beyond.
    """
    view, rows = answer
    rows = rows[(rows[:, 5] >= 0) & np.isfinite(rows).all(axis=1)].astype(float)
    ends = np.array([view.corner[1] > 0, view.corner[0] > 0, view.corner[1] + view.shape[1] < view.whole[1],
                     view.corner[0] + view.shape[0] < view.whole[0]])
    if view.flip:
        ends = ends[[2, 1, 0, 3]]
    near = np.abs(rows[:, :4] - [0, 0, view.shape[1], view.shape[0]]) < NEAR
    rows = rows[~(near & ends).any(axis=1)]
    first, second = view.origin(rows[:, :2], size), view.origin(rows[:, 2:4], size)
    masks = rows[:, BOXES:]
    if view.flip:
        masks = masks.reshape(len(rows), masks.shape[1] // CELLS, CELLS)[:, :, ::-1].reshape(masks.shape)
    return np.concatenate([np.minimum(first, second), np.maximum(first, second), rows[:, 4:BOXES], masks], axis=1)


def united(answers: Sequence[np.ndarray]) -> np.ndarray:
    """Return of several answers (n, 6 or more) about one image the best rows: one an object, `OBJECTS` in all.

    Of boxes of a class that share more than half of their area (IoU) the best stays, with its mask.
    """
    rows = np.concatenate(answers)
    rows = rows[np.argsort(-rows[:, 4], kind='stable')]
    if len(answers) > 1:
        same = (rows[:, None, 5] == rows[:, 5]) & (overlaps(rows[:, :4], rows[:, :4]) > NMS)
        kept = np.ones(len(rows), bool)
        for number in range(len(rows)):
            if kept[number]:
                kept[number + 1:] &= ~same[number, number + 1:]
        rows = rows[kept]
    return rows[:OBJECTS]


def overlaps(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) and (m, 4), float (n, m)."""
    sides = np.minimum(ours[:, None, 2:], theirs[:, 2:]) - np.maximum(ours[:, None, :2], theirs[:, :2])
    shared = sides.clip(0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (ours, theirs)]
    with np.errstate(invalid='ignore', divide='ignore'):
        return np.nan_to_num(shared / (areas[0][:, None] + areas[1] - shared))


def found_in(answers: Sequence[Answer], size: Size) -> Found:
    """Return what answers about views of an image of this size have found in it."""
    rows = united([returned(answer, size) for answer in answers])
    whole = rows[:, :4]
    boxes = whole.clip(0, np.tile(size[::-1], 2))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    rows, whole = rows[inside], whole[inside]
    masks: Tuple[Dict[str, Any], ...] = ()
    if rows.shape[1] > BOXES:
        grids = rows[:, BOXES:].reshape(-1, CELLS, CELLS)
        masks = tuple(encoded(pasted(grid, box, size)) for grid, box in zip(grids, whole))
    return Found(boxes[inside], rows[:, 4].astype(np.float32), rows[:, 5].astype(np.int64), masks)


def pasted(grid: np.ndarray, box: np.ndarray, size: Size) -> np.ndarray:
    """Lay a mask's probabilities (28, 28) into its box: where they are half or more, bool (H, W).

    Between the middles of cells they are interpolated, and 0 outside, as detectron2's paste_masks does.
    """
    result = np.zeros(size, bool, order='F')  # as `encoded` needs it
    axes = []
    for low, high, side in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        first, last = max(0, math.floor(low)), min(side, math.ceil(high))
        places = (np.arange(first, last) + 0.5 - low) / (high - low) * CELLS - 0.5
        axes.append((slice(first, max(first, last)), np.maximum(0, 1 - np.abs(places[:, None] - np.arange(CELLS)))))
    (rows, down), (columns, across) = axes
    down, step = down @ grid, max(1, STRIP // max(1, len(across)))
    for top in range(0, len(down), step):
        result[rows, columns][top:top + step] = down[top:top + step] @ across.T >= 0.5
    return result


def encoded(bitmap: np.ndarray) -> Dict[str, Any]:
    """Compress a mask, bool (H, W), to COCO's run lengths."""
    _, _, masks = needed()
    found = masks.encode(np.asfortranarray(bitmap).view(np.uint8))
    return {'size': [int(side) for side in found['size']], 'counts': found['counts'].decode('ascii')}


def decoded(mask: Dict[str, Any]) -> np.ndarray:
    """Return the bitmap, bool (H, W), of compressed run lengths."""
    return needed()[2].decode(mask).astype(bool)


def region_lengths(region: Region, size: Size) -> Dict[str, Any]:
    """Compress an object's region in an image of this size, polygons as COCO's own tools fill them.

    These need memory for each pixel along an outline, and end the process where that is not there: polygons that lead
    far away from the image are filled here.
    """
    _, _, masks = needed()
    if isinstance(region, Polygons) and max(np.abs(outline).max() for outline in region.outlines) > FAR * max(size):
        return encoded(bitmap(region, size))
    if isinstance(region, Polygons):
        found = masks.merge(masks.frPyObjects([outline.ravel().tolist() for outline in region.outlines], *size))
    elif isinstance(region, RunLengths):
        found = masks.frPyObjects({'size': list(size), 'counts': region.lengths.tolist()}, *size)
    else:
        return encoded(region)
    return {'size': list(size), 'counts': found['counts'].decode('ascii')}
