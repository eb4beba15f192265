"""How an image comes to lie on a canvas, and what is known of it along with it: scale, crop, flip, padding.

A view shows a part of the image, resized, in the upper left corner of the canvas; the rest of the canvas is padding.
Pixel (row y, column x) of an image is the square from (x, y) to (x + 1, y + 1); boxes have the coordinates of such
corners.
"""
import math
from typing import NamedTuple, Tuple, Union

import numpy as np

from .resampling import resize_part

Size = Tuple[int, int]  # height, width


def size_of(image: np.ndarray) -> Size:
    """The size of an image or a map (H, W, …)."""
    return image.shape[0], image.shape[1]


class View(NamedTuple):
    """A part of a resized image."""
    whole: Size  # of all the image, resized
    corner: Size  # (top, left) of the part
    shape: Size  # of the part
    flip: bool = False  # mirrored left to right, after the rest

    def elsewhere(self, rng: np.random.Generator) -> 'View':
        """A part of the same shape at a random place; the generator advances by two numbers."""
        top, left = (int(place * (whole - shape + 1)) for place, whole, shape in
                     zip(rng.random(2), self.whole, self.shape))
        return self._replace(corner=(top, left))

    def pixels(self, image: np.ndarray, bicubic: bool = False) -> np.ndarray:
        """The part of uint8 (H, W, 3), as Pillow resizes."""
        return resize_part(image, self.whole, self.corner, self.shape, self.flip, bicubic)

    def nearest(self, labels: np.ndarray) -> np.ndarray:
        """The part of numbers (H, W): each is that at the place of its centre."""
        rows, columns = (((np.arange(shape) + corner + 0.5) * (length / whole)).astype(np.intp).clip(0, length - 1)
                         for shape, corner, length, whole in zip(self.shape, self.corner, labels.shape, self.whole))
        return labels[rows[:, None], columns[::-1] if self.flip else columns]

    def points(self, points: np.ndarray, size: Size) -> np.ndarray:
        """Where points float (n, 2), x and y, of an image of this size lie on the canvas, also outside of the part."""
        moved = points * [self.whole[1] / size[1], self.whole[0] / size[0]] - [self.corner[1], self.corner[0]]
        if self.flip:
            moved[:, 0] = self.shape[1] - moved[:, 0]
        return moved

    def origin(self, points: np.ndarray, size: Size) -> np.ndarray:
        """Where points (n, 2) of the canvas lie in the image of this size: the inverse of `points`."""
        moved = np.array(points, np.float64)
        if self.flip:
            moved[:, 0] = self.shape[1] - moved[:, 0]
        return (moved + [self.corner[1], self.corner[0]]) * [size[1] / self.whole[1], size[0] / self.whole[0]]

    def boxes(self, boxes: np.ndarray, size: Size) -> np.ndarray:
        """Boxes float (n, 4), x0, y0, x1, y1, of an image of this size on the canvas, cut at the part's borders."""
        first, second = self.points(boxes[:, :2], size), self.points(boxes[:, 2:], size)
        moved = np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)
        return moved.clip(0, [self.shape[1], self.shape[0]] * 2)


def random_view(rng: np.random.Generator, size: Size, canvas: Size, jitter: Tuple[float, float], flip: float,
                covers: bool) -> View:
    """A view of an image of `size` at a random scale and place.

    Args:
        rng: advances by four numbers, whatever the image.
        size: of the image.
        canvas: what it is to be shown on.
        jitter: range of the scale, which is uniform in it.
        flip: probability of a horizontal flip.
        covers: whether the image at scale 1 just covers the canvas, or just fits into it.
    """
    chance, share = rng.random(2)
    whole = resized(size, canvas, jitter[0] + share * (jitter[1] - jitter[0]), covers)
    shape = min(whole[0], canvas[0]), min(whole[1], canvas[1])
    return View(whole, (0, 0), shape, bool(chance < flip)).elsewhere(rng)


def whole_view(size: Size, canvas: Size) -> View:
    """A view of all of an image of `size`, as large as fits on the canvas."""
    whole = resized(size, canvas, 1, covers=False)
    return View(whole, (0, 0), whole)


def resized(size: Size, canvas: Size, scale: float, covers: bool) -> Size:
    """The size of an image at a scale, of which 1 covers the canvas or fits into it; its shape is kept."""
    ratios = [side / own for side, own in zip(canvas, size)]
    factor = scale * (max(ratios) if covers else min(ratios))
    height, width = (max(1, math.floor(own * factor + 0.5)) for own in size)
    return height, width


def padded(part: np.ndarray, canvas: Size, fill: Union[int, np.ndarray]) -> np.ndarray:
    """The part (h, w, …) in the upper left corner of a canvas filled with a value or a colour."""
    if size_of(part) == canvas:
        return part
    result = np.empty((*canvas, *part.shape[2:]), part.dtype)
    result[...] = fill
    result[:part.shape[0], :part.shape[1]] = part
    return result


def linear_weights(places: np.ndarray, count: int) -> np.ndarray:
    """The matrix float32 (n, count) that interpolates values at 0, 1, … count-1 linearly at these places (n,).

    Beyond the first and the last the value stays.
    """
    return np.maximum(0, 1 - np.abs(places.clip(0, count - 1)[:, None] - np.arange(count))).astype('float32')
