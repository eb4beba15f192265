"""Random changes of brightness, contrast, saturation and hue, for images whose geometry must stay as it is.

The figures and the order are those of SSD (Liu et al. 2016, arXiv 1512.02325) as segmentation recipes take them: the
contrast changes before or after the colours, each change with probability 1/2.
"""
from typing import Tuple

import cv2
import numpy as np

PROBABILITY = 0.5
BRIGHTNESS = 32  # at most, of 255
CONTRAST = SATURATION = (0.5, 1.5)  # factors
HUE = 18  # at most, of 180: OpenCV's hues are of 2 degrees


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change uint8 (H, W, 3) RGB at random; the generator advances by the same amount whatever is drawn."""
    chances, values = rng.random(5), rng.random(4)
    happens = chances < PROBABILITY
    brightness = (2 * values[0] - 1) * BRIGHTNESS if happens[0] else 0
    contrast = _between(CONTRAST, values[1]) if happens[1] else 1
    saturation = _between(SATURATION, values[2]) if happens[2] else 1
    hue = round((2 * values[3] - 1) * HUE) if happens[3] else 0
    early = happens[4]  # whether the contrast changes before the colours
    levels = np.arange(256)
    light = levels + brightness
    image = _mapped(image, _levels(light) * contrast if early else light)
    if saturation != 1 or hue:
        colours = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        table = np.stack([(levels + hue) % 180, levels * saturation, levels], axis=-1)
        image = cv2.cvtColor(_mapped(colours, table), cv2.COLOR_HSV2RGB)
    return image if early else _mapped(image, levels * contrast)


def _between(bounds: Tuple[float, float], share: float) -> float:
    return bounds[0] + share * (bounds[1] - bounds[0])


def _levels(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _mapped(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each byte's entry in a table (256,) or, by channel, (256, 3)."""
    table = _levels(table)
    if (table.T == np.arange(256)).all():
        return image
    return cv2.LUT(image, table if table.ndim == 1 else table[:, None, :])
