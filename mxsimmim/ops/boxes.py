"""The reference form of the operators on boxes: pooling from a pyramid of maps, matching. `reference` offers them.

F is mx.nd or mx.sym.
"""
from typing import Any, Sequence, Tuple

AWAY, BESIDE = -1e6, -1e6 + 64  # coordinates beyond any map; MXNet refuses boxes of no area
CANONICAL, LEVEL = 224, 2  # the side of a box in pixels, and the number of the map that it is pooled from
ROUNDING = 1e-6
OBJECT, CROWD = 1, 2  # kinds of boxes that are known; 0: none
SMALL = 1e-9  # square pixels


def pyramid_pool(F: Any, maps: Sequence[Any], boxes: Any, *, strides: Sequence[int], side: int, samples: int) -> Any:
    """Compute `OpBackend.pyramid_pool`: every box from every map, far away from all but the map that is its own.

    A box of another level gets a batch index of its own image all the same: for -1, which GluonCV gives it, MXNet's
    ROIAlign writes no zeros on CPUs, and what was in the memory counts.
    """
    boxes = F.BlockGrad(boxes)
    low, high = (F.slice_axis(boxes, axis=2, begin=begin, end=begin + 2) for begin in (0, 2))
    sizes = F.maximum(high - low, 0)                                                    # (B, N, 2)
    area = F.prod(sizes, axis=2, keepdims=True)                                         # (B, N, 1)
    level = F.clip(F.floor(F.log2(F.sqrt(area) / CANONICAL) + ROUNDING) + LEVEL, 0, len(maps) - 1)
    image = F.broadcast_like(F.reshape(F.contrib.arange_like(boxes, axis=0), shape=(-1, 1, 1)), level, lhs_axes=(1,),
                             rhs_axes=(1,))
    pooled = []
    for number, (array, stride) in enumerate(zip(maps, strides)):
        here = (level == number) * (area > 0)                                           # (B, N, 1)
        placed = (F.broadcast_add(F.broadcast_mul(corner, here), away * (1 - here))
                  for corner, away in ((low, AWAY), (high, BESIDE)))
        rows = F.reshape(F.concat(image, *placed, dim=2), shape=(-3, 0))                # (B*N, 5)
        pooled.append(F.contrib.ROIAlign(array, rows, pooled_size=(side, side), spatial_scale=1 / stride,
                                         sample_ratio=samples, aligned=True))
    # One of these is not zero. (B*N, C, side, side) to (B, N, ...): as many images as there are boxes' rows.
    return F.reshape_like(F.add_n(*pooled), boxes, lhs_begin=0, lhs_end=1, rhs_begin=0, rhs_end=2)


def match_boxes(F: Any, boxes: Any, truth: Any, kind: Any) -> Tuple[Any, Any, Any, Any]:
    """Compute `OpBackend.match_boxes`."""
    boxes, truth = F.expand_dims(boxes, axis=2), F.expand_dims(truth, axis=1)           # (B, N, 1, 4), (B, 1, M, 4)
    low, high = (each(F.slice_axis(boxes, axis=3, begin=begin, end=begin + 2),
                      F.slice_axis(truth, axis=3, begin=begin, end=begin + 2))
                 for each, begin in ((F.broadcast_maximum, 0), (F.broadcast_minimum, 2)))
    common = F.prod(F.maximum(high - low, 0), axis=3)                                   # (B, N, M)
    own, others = (F.prod(F.maximum(F.slice_axis(each, axis=3, begin=2, end=4) - F.slice_axis(each, axis=3, begin=0,
                                                                                              end=2), 0), axis=3)
                   for each in (boxes, truth))                                          # (B, N, 1), (B, 1, M)
    kind = F.expand_dims(kind, axis=1)                                                  # (B, 1, M)
    union = F.maximum(F.broadcast_add(own, others) - common, SMALL)
    overlap = F.broadcast_mul(common / union, kind == OBJECT)
    crowd = F.max(F.broadcast_mul(F.broadcast_div(common, F.maximum(own, SMALL)), kind == CROWD), axis=2)
    largest = F.max(overlap, axis=1, keepdims=True)                                     # (B, 1, M)
    is_best = F.max(F.broadcast_equal(overlap, largest) * (overlap > 0), axis=2)
    found = F.max(overlap, axis=2), F.argmax(overlap, axis=2), is_best, crowd
    return tuple(F.BlockGrad(each) for each in found)
