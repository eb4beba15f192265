"""Views of an image for a network of one input size, at several scales and in the mirror; and the way back.

What a network finds in a view lies in the image where `View.origin` says, or, for maps of the whole canvas, `returned`.
"""
import itertools
from typing import List, Sequence, Tuple

import numpy as np

from .geometry import Size, View, linear_weights, resized

NUMBERS = 7  # that a view is written as
Answer = Tuple[View, np.ndarray]  # a view, and what a network says where its input shows that


def views_of(size: Size, canvas: Size, scales: Sequence[float] = (1,), flip: bool = False) -> List[View]:
    """Views of all of an image of `size` at each scale, of which 1 just fits on the canvas; with `flip` mirrored, too.

    An image that is larger than the canvas at a scale has as few views as cover it, evenly spread: they overlap.
    """
    found: List[View] = []
    for scale in scales:
        whole = resized(size, canvas, scale, covers=False)
        shape = min(whole[0], canvas[0]), min(whole[1], canvas[1])
        tops, lefts = map(_corners, whole, shape)
        found += [View(whole, corner, shape) for corner in itertools.product(tops, lefts)]
    return found + [view._replace(flip=True) for view in found if flip]


def most_views(canvas: Size, scales: Sequence[float], flip: bool) -> int:
    """How many views an image has at most: one of the canvas's shape."""
    return len(views_of(canvas, canvas, scales, flip))


def _corners(whole: int, part: int) -> List[int]:
    """Where parts begin that cover the whole."""
    count = -(-whole // part)
    return [number * (whole - part) // max(1, count - 1) for number in range(count)]


def as_numbers(view: View) -> List[int]:
    """A view as `NUMBERS` integers, which are never all 0."""
    return [*view.whole, *view.corner, *view.shape, int(view.flip)]


def as_view(numbers: Sequence[int]) -> View:
    """The inverse of `as_numbers`."""
    height, width, top, left, h, w, flip = (int(number) for number in numbers)
    return View((height, width), (top, left), (h, w), bool(flip))


def returned(answer: np.ndarray, view: View, size: Size, canvas: Size, strip: slice = slice(None)
             ) -> Tuple[Tuple[slice, slice], np.ndarray]:
    """Bring an answer float32 (K, h, w) for all of the canvas back to the image of `size` that the view shows.

    Returns:
        Which of the rows in `strip` and of the columns have the middles of their pixels in the view, and their values
        (K, rows, columns), interpolated bilinearly between the middles of what the places of the answer stand for.
    """
    parts, matrices = [], []
    for own, wanted, whole, corner, shape, mirrored, side, places in zip(
            size, (strip, slice(None)), view.whole, view.corner, view.shape, (False, view.flip), canvas,
            answer.shape[1:]):
        middles = (np.arange(own)[wanted] + 0.5) * (whole / own) - corner  # on the canvas
        first, last = np.searchsorted(middles, [0, shape])
        middles = middles[first:last]
        middles = (shape - middles if mirrored else middles) * (places / side) - 0.5
        parts.append(slice(int(first), int(last)))
        matrices.append(linear_weights(middles, places))
    with np.errstate(invalid='ignore'):  # an answer that is no number
        return (parts[0], parts[1]), np.matmul(np.matmul(matrices[0], answer), matrices[1].T)
