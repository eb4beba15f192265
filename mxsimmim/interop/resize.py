"""Position tables for another resolution, as the reference carries them from pre-training to fine-tuning."""
from typing import List

import cv2
import numpy as np


def relative_table(table: np.ndarray, rows: int) -> np.ndarray:
    """A relative position bias table (R, H) resized to (rows, H), for a window of another side.

    Tables have (2 side - 1)^2 rows, and in ViT three more, for the cls token, which are kept. Bao et al. 2022
    (arXiv:2106.08254): the known offsets lie on an axis at distances that grow geometrically from the middle, so that
    near neighbours keep their values and far ones are stretched; a bicubic spline through them is read off at the new,
    equally spaced offsets.

    Raises:
        ValueError: the tables are not of squares, or of too small ones.
    """
    extra = next((n for n in (0, 3) if _side(len(table) - n) and _side(rows - n)), None)
    if extra is None:
        raise ValueError(f'{len(table)} rows cannot be resized to {rows}: neither with nor without a cls token are '
                         'both tables of square windows')
    old, new = _side(len(table) - extra), _side(rows - extra)
    if old == new:
        return table
    if old < 4:
        raise ValueError(f'{len(table)} rows cannot be resized to {rows}: a bicubic spline needs windows of three '
                         f'tokens a side or more, these are of {old // 2 + 1}')
    from scipy.interpolate import RectBivariateSpline  # here: 0.1 s, for other sizes alone
    steps = _distances(old // 2, new // 2)
    known = np.array([-x for x in reversed(steps)] + [0.0] + steps)
    wanted = np.arange(new) - new // 2
    planes = [RectBivariateSpline(known, known, plane.reshape(old, old))(wanted, wanted).ravel()
              for plane in table[:len(table) - extra].T.astype('float64')]
    return np.concatenate([np.stack(planes, 1).astype('float32'), table[len(table) - extra:]])


def absolute_table(table: np.ndarray, rows: int, prefix: int) -> np.ndarray:
    """Learned positions (1, prefix + side^2, C) resized to (1, rows, C), bicubically; those of the prefix are kept."""
    old, new = _side(table.shape[1] - prefix, odd=False), _side(rows - prefix, odd=False)
    if not old or not new:
        raise ValueError(f'{table.shape[1]} positions cannot be resized to {rows}: not squares of patches')
    if old == new:
        return table
    plane = table[0, prefix:].reshape(old, old, -1).astype('float32')
    layers = [cv2.resize(np.ascontiguousarray(plane[:, :, i]), (new, new), interpolation=cv2.INTER_CUBIC)
              for i in range(plane.shape[2])]
    return np.concatenate([table[0, :prefix], np.stack(layers, -1).reshape(new * new, -1)])[None]


def _side(count: int, odd: bool = True) -> int:
    """The root of a square number, 0 for others; of an odd root where asked."""
    root = round(max(count, 0) ** 0.5)
    return root if root * root == count and (root % 2 or not odd) else 0


def _distances(count: int, reach: int) -> List[float]:
    """`count` partial sums of 1, q, q^2, … with the q in [1.01, 1.5] that brings the last to `reach`, to 1e-6."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** count) / (1 - q) > reach else (q, high)
    return list(np.cumsum(q ** np.arange(count)))
