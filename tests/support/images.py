"""Folders of images."""
import numpy as np
from PIL import Image


def noise(folder, count, side=24):
    """Writes `count` PNG files of random pixels, always the same, named by their numbers; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), 'uint8')
        Image.fromarray(pixels).save(folder / f'{number:03d}.png')
    return folder
