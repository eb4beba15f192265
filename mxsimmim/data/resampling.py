"""Pillow's resize bit for bit, in a fraction of its time: each pass works on whole rows.

A pass is a loop of the native library; without the library it is the same loop in Python, compiled by numba, which
takes a second of every process.
"""
import ctypes
import functools
import math
from typing import Callable, Tuple

import cv2
import numpy as np

from ..ops import library
from ..ops.build import NotBuilt
from ..system.compiled import compiled
from .decode import STRIP


def resize(image: np.ndarray, size: int, flip: bool = False, bicubic: bool = False) -> np.ndarray:
    """Resize uint8 (H, W, 3) to (size, size, 3), optionally mirrored left to right.

    Bit for bit Pillow's `Image.resize((size, size), BILINEAR)`, or BICUBIC, which averages over a triangle as wide as
    two output pixels or a cubic as wide as four.
    """
    return resize_part(image, (size, size), (0, 0), (size, size), flip, bicubic)


def resize_part(image: np.ndarray, whole: Tuple[int, int], corner: Tuple[int, int], shape: Tuple[int, int],
                flip: bool, bicubic: bool) -> np.ndarray:
    """Return the part of `shape` (h, w) at `corner` (top, left) of the image resized to `whole` (H', W'), nothing else.

    What is computed and kept depends on `shape` and the image alone, however large `whole` is.
    """
    (height, width), (first, last) = image.shape[:2], _reach(image.shape[0], whole[0], corner[0], shape[0], bicubic)
    one_pass = _one_pass()
    left, right = _reach(width, whole[1], corner[1], shape[1], bicubic)
    rows = np.empty((last - first, shape[1] * 3), np.uint8)
    step = max(1, STRIP // (right - left))
    for start in range(first, last, step):
        part = cv2.transpose(image[start:min(start + step, last), left:right]).reshape(right - left, -1)
        columns = np.empty((shape[1], part.shape[1]), np.uint8)
        one_pass(part, columns, width, left, whole[1], corner[1], flip, bicubic)
        strip = cv2.transpose(columns.reshape(shape[1], -1, 3)).reshape(-1, shape[1] * 3)
        rows[start - first:][:len(strip)] = strip
    result = np.empty((*shape, 3), np.uint8)
    one_pass(rows, result.reshape(shape[0], -1), height, first, whole[0], corner[0], False, bicubic)
    return result


def _reach(length: int, whole: int, start: int, count: int, bicubic: bool) -> Tuple[int, int]:
    """From and up to which of `length` rows the output rows from `start` on are made of; see `resize_rows`."""
    scale = length / whole
    support = max(scale, 1.0) * (2 if bicubic else 1)
    return (max(int((start + 0.5) * scale - support + 0.5), 0),
            min(int((start + count - 0.5) * scale + support + 0.5), length))


@compiled
def resize_rows(rows: np.ndarray, out: np.ndarray, n: int, base: int, size: int, start: int, backwards: bool,
                bicubic: bool) -> None:
    """Weighted means of neighbouring rows, in fixed point with 22 bits as Pillow does it: uint8 (m, L) to (k, L).

    Of `n` rows `rows` are those from `base` on, of the `size` rows that they become `out` gets those from `start` on.
    """
    scale = n / size
    inverse = 1.0 / max(scale, 1.0)
    support = max(scale, 1.0) * (2 if bicubic else 1)
    weights = np.empty(2 * math.ceil(support) + 1)
    sums = np.empty(rows.shape[1], np.int32)
    for y in range(len(out)):
        centre = (start + y + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), n) - first
        for k in range(count):
            x = abs((k + first - centre + 0.5) * inverse)
            if not bicubic:
                weights[k] = max(0.0, 1.0 - x)
            elif x < 1:  # Keys (1981) with a = -0.5
                weights[k] = (1.5 * x - 2.5) * x * x + 1
            else:
                weights[k] = (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0
        total = weights[:count].sum()
        sums[:] = 1 << 21  # rounds to nearest
        for k in range(count):
            exact, row = weights[k] / total * (1 << 22), rows[first + k - base]
            weight = np.int32(exact + 0.5 if exact >= 0 else exact - 0.5)
            for i in range(len(sums)):
                sums[i] += np.int32(row[i]) * weight
        target = out[len(out) - 1 - y] if backwards else out[y]
        for i in range(len(sums)):
            target[i] = min(max(sums[i] >> 22, 0), 255)


@functools.lru_cache(maxsize=None)
def _one_pass() -> Callable[..., None]:
    """Choose how `resize_rows` is computed in this process."""
    try:
        library.open_library()
    except NotBuilt:
        return resize_rows
    loop = library.function('mxsimmim_resize_rows')
    loop.restype, pointer, number = None, ctypes.c_void_p, ctypes.c_int64
    loop.argtypes = [pointer] * 2 + [number] * 6 + [ctypes.c_int32] * 2 + [pointer] * 2

    def one_pass(rows: np.ndarray, out: np.ndarray, n: int, base: int, size: int, start: int, backwards: bool,
                 bicubic: bool) -> None:
        assert rows.flags.c_contiguous and out.flags.c_contiguous and rows.shape[1] == out.shape[1]
        weights = np.empty(2 * math.ceil(max(n / size, 1.0) * (2 if bicubic else 1)) + 1)
        sums = np.empty(rows.shape[1], np.int32)
        loop(rows.ctypes.data, out.ctypes.data, rows.shape[1], len(out), n, base, size, start, backwards, bicubic,
             weights.ctypes.data, sums.ctypes.data)
    return one_pass
