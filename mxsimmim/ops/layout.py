"""How the tokens of an image form the sequences that attend to each other."""
from typing import NamedTuple

import numpy as np

FORBIDDEN = -100.0  # added to the scores of pairs that only the shift brought into one window


class Windows(NamedTuple):
    """side x side tokens in windows of window x window, after a cyclic shift by `shift` towards the origin.

    Pairs that only the shift brought into one window do not attend to each other (Liu et al. 2021, arXiv:2103.14030).
    """
    side: int
    window: int
    shift: int = 0


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """(windows, 1, N, N): 0 for pairs that belong together before the shift, FORBIDDEN for the others."""
    band = np.digitize(np.arange(side), (side - window, side - shift))  # which of the three strips a row falls in
    region = (band[:, None] * 3 + band).reshape(side // window, window, side // window, window)
    region = region.transpose(0, 2, 1, 3).reshape(-1, window * window)  # (windows, N)
    apart = region[:, :, None] != region[:, None, :]
    return np.where(apart, FORBIDDEN, 0.0).astype('float32')[:, None]
