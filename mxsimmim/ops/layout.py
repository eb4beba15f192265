"""How the tokens of an image form the sequences that attend to each other."""
from typing import NamedTuple, Tuple

import numpy as np

FORBIDDEN = -100.0  # added to the scores of pairs that only the shift brought together, as published
NOTHING = -1e9  # added to those of tokens and padding: whatever the score, its exponential is 0


class Windows(NamedTuple):
    """height x width tokens in windows of window x window, after a cyclic shift by `shift` towards the origin.

    Sides that the window does not divide are padded at the bottom and on the right, and an axis of one window is not
    shifted. Pairs that only the shift brought into one window do not attend to each other (Liu et al. 2021,
    arXiv:2103.14030), neither do tokens and padding. mmdetection's code, which pads likewise, has padding, zeros after
    the norm, take part in attention as a key: in windows at the edge it computes something else.
    """
    height: int
    width: int
    window: int
    shift: int = 0

    @property
    def counts(self) -> Tuple[int, int]:
        """Windows down and across."""
        return -(-self.height // self.window), -(-self.width // self.window)

    @property
    def padded(self) -> Tuple[int, int]:
        """Height and width with the padding."""
        down, across = self.counts
        return down * self.window, across * self.window

    @property
    def shifts(self) -> Tuple[int, int]:
        """By how much rows and columns are shifted."""
        down, across = self.counts
        return (self.shift if down > 1 else 0), (self.shift if across > 1 else 0)

    @property
    def needs_mask(self) -> bool:
        """Tell whether some window holds what does not belong together, so that attention needs `shift_mask`."""
        return self.padded != (self.height, self.width) or self.shifts != (0, 0)


def shift_mask(height: int, width: int, window: int, shift: int = 0) -> np.ndarray:
    """(windows, 1, N, N), of `Windows` as given: 0 for pairs that belong together, FORBIDDEN or NOTHING for others."""
    windows = Windows(height, width, window, shift)
    bands, outside = [], []  # of each axis: which of three strips a place after the shift falls in; what is padding
    for side, padded, by in zip((height, width), windows.padded, windows.shifts):
        place = np.arange(padded)
        bands.append(np.digitize(place, (padded - window, padded - by)))
        outside.append((place + by) % padded >= side)
    region, padding = bands[0][:, None] * 3 + bands[1], outside[0][:, None] | outside[1]

    def differ(of: np.ndarray) -> np.ndarray:  # (height, width) with padding to (windows, N, N)
        down, across = windows.counts
        of = of.reshape(down, window, across, window).transpose(0, 2, 1, 3).reshape(-1, window * window)
        return of[:, :, None] != of[:, None, :]
    return np.where(differ(padding), NOTHING, np.where(differ(region), FORBIDDEN, 0.0)).astype('float32')[:, None]
