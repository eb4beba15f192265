"""Position tables for another resolution, as the reference carries them from pre-training to fine-tuning."""
from typing import List, Optional, Tuple

import cv2
import numpy as np


def relative_table(table: np.ndarray, rows: int, size: Optional[Tuple[int, int]] = None) -> np.ndarray:
    """A relative position bias table (R, H) resized to (rows, H), for a map or window of another size.

    Tables of h x w tokens have (2h - 1)(2w - 1) rows, and in ViT three more, for the cls token, which are kept. Bao et
    al. 2022 (arXiv:2106.08254): the known offsets lie on an axis at distances that grow geometrically from the middle,
    so that near neighbours keep their values and far ones are stretched; a bicubic spline through them is read off at
    the new, equally spaced offsets.

    Args:
        table: of a square.
        rows: wanted.
        size: h and w of the result, which may be without a cls token's rows; None: a square, with the same.

    Raises:
        ValueError: the tables are not of such sizes, or of too small ones.
    """
    kept = next((n for n in (0, 3) if _side(len(table) - n)), 0)
    old = _side(len(table) - kept)
    new = (2 * size[0] - 1, 2 * size[1] - 1) if size else (_side(rows - kept),) * 2
    extra = rows - new[0] * new[1]
    if not old or not all(new) or extra not in (0, kept):
        of = f'a map of {size[0]} x {size[1]}' if size else 'square windows'
        raise ValueError(f'{len(table)} rows cannot be resized to {rows}: neither with nor without a cls token are '
                         f'both tables of {of}')
    cls = table[len(table) - extra:]
    if new == (old, old):
        return table if extra == kept else table[:len(table) - kept]
    if old < 4:
        raise ValueError(f'{len(table)} rows cannot be resized to {rows}: a bicubic spline needs windows of three '
                         f'tokens a side or more, these are of {old // 2 + 1}')
    from scipy.interpolate import RectBivariateSpline  # here: 0.1 s, for other sizes alone
    known, wanted = [], []
    for side in new:
        steps = _distances(old // 2, side // 2)
        known.append(np.array([-x for x in reversed(steps)] + [0.0] + steps))
        wanted.append(np.arange(side) - side // 2)
    planes = [RectBivariateSpline(*known, plane.reshape(old, old))(*wanted).ravel()
              for plane in table[:len(table) - kept].T.astype('float64')]
    return np.concatenate([np.stack(planes, 1).astype('float32'), cls])


def absolute_table(table: np.ndarray, rows: int, prefix: int, size: Optional[Tuple[int, int]] = None) -> np.ndarray:
    """Learned positions (1, P + side^2, C) resized to (1, rows, C), bicubically; those of the prefix are kept.

    rows is `prefix` and the patches of `size`, height and width, or without it of a square. P is `prefix`, too, or with
    `size` also 1, that of a cls token, which is dropped then.

    Raises:
        ValueError: the tables are not of such sizes.
    """
    kept = prefix if _side(table.shape[1] - prefix, odd=False) or not size else 1
    old = _side(table.shape[1] - kept, odd=False)
    new = size or (_side(rows - prefix, odd=False),) * 2
    if not old or not all(new) or new[0] * new[1] != rows - prefix:
        raise ValueError(f'{table.shape[1]} positions cannot be resized to {rows}: not squares of patches')
    if new == (old, old):
        return table if kept == prefix else table[:, kept:]
    plane = table[0, kept:].reshape(old, old, -1).astype('float32')
    layers = [cv2.resize(np.ascontiguousarray(plane[:, :, i]), new[::-1], interpolation=cv2.INTER_CUBIC)
              for i in range(plane.shape[2])]
    return np.concatenate([table[0, :prefix], np.stack(layers, -1).reshape(new[0] * new[1], -1)])[None]


def _side(count: int, odd: bool = True) -> int:
    """The root of a square number, 0 for others; of an odd root where asked."""
    root = round(max(count, 0) ** 0.5)
    return root if root * root == count and (root % 2 or not odd) else 0


def _distances(count: int, reach: int) -> List[float]:
    """`count` partial sums of 1, q, q^2, … with the q in [1.01, 1.5] that brings the last to `reach`, to 1e-6.

    1, 2, 3, … where that is `count` itself: an axis that keeps its length.
    """
    if count == reach:
        return list(np.arange(1.0, count + 1))
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** count) / (1 - q) > reach else (q, high)
    return list(np.cumsum(q ** np.arange(count)))
