"""Scenes composed of scikit-learn's digits, whose boxes, masks and label maps are known; made when they are asked for.

A scene is a dark canvas of smooth colours with clutter (pieces of digits) and one to three bright digits of any colour,
the later ones over the edges of the earlier ones. Scene number i is the same at all times and on every machine.
"""
import functools
import math
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np
from PIL import Image

from ..system.paths import BUILT_IN
from .digits import Digits
from .sampling import generator

SEED = 0
TRAINING, HELD_OUT = 5000, 500  # scenes
DIGITS_HELD_OUT = 0.2  # share of the digits of which the held-out scenes are made, and no others
SIDE = 128  # of the canvas, pixels, where the path names no other
SMALLEST, LARGEST = 1 / 3, 1 / 2  # side of a digit over the canvas's short side
MOST_DIGITS, CLUTTER = 3, (2, 6)  # a scene
DARK, BRIGHT = 90, 170  # of 255: the background's colours are below, the digits' from there on
VISIBLE = 0.9  # share of a digit that others leave uncovered, at least
KEPT = 2 ** 27  # bytes of scenes that are not made again
TRIES = 10  # places that are tried for a digit that would cover too much
INK = 96  # of 255: from here on a pixel is the digit's
OBJECTS = tuple(map(str, range(10)))
CLASSES = ('background',) + OBJECTS


class Scene(NamedTuple):
    """An image and what is in it."""
    image: np.ndarray  # uint8 (h, w, 3)
    owner: np.ndarray  # int8 (h, w): the number of the digit that a pixel shows, -1: none
    digits: np.ndarray  # int64 (n,): what each is

    @property
    def label_map(self) -> np.ndarray:
        """The class of each pixel, uint8 (h, w), by `CLASSES`."""
        return np.append(self.digits + 1, 0).astype(np.uint8)[self.owner]  # the last is for -1


def is_scenes(path: str) -> bool:
    """Whether `path` names scenes of digits."""
    return BUILT_IN.fullmatch(path) is not None and path != 'digits'


def open_scenes(path: str) -> 'DigitScenes':
    """Makes the scenes of digit-scenes, or digit-scenes-val, those held out; with -HEIGHTxWIDTH, of another canvas.

    Raises:
        ValueError: a canvas on which digits cannot be told apart, or of more than a few megapixels.
    """
    found = BUILT_IN.fullmatch(path)
    assert found, path
    held_out, *sides = found.groups()
    height, width = (int(side or SIDE) for side in sides)
    if not 48 <= min(height, width) <= max(height, width) <= 2048:
        raise ValueError(f'{path}: a canvas of {height} x {width} pixels: its sides have 48 to 2048')
    return DigitScenes(bool(held_out), height, width)


class DigitScenes:
    """Scenes of training or held-out digits, a source of images."""
    notes: Sequence[str] = ()

    def __init__(self, held_out: bool = False, height: int = SIDE, width: int = SIDE):
        self._held_out, self._size = held_out, (height, width)
        digits = Digits()
        order, count = generator(SEED).permutation(len(digits)), round(len(digits) * DIGITS_HELD_OUT)
        self._own = order[:count] if held_out else order[count:]
        self._images, self._labels = np.stack([digits.read(i) for i in self._own]), digits.labels()[self._own]
        # Its image, then its labels are asked for; and those of small canvases, or of a small set, in each epoch.
        self.scene = functools.lru_cache(maxsize=max(32, KEPT // (4 * height * width)))(self._compose)

    def __len__(self) -> int:
        return HELD_OUT if self._held_out else TRAINING

    def name(self, index: int) -> str:
        return f'digit-scenes{"-val" * self._held_out}#{index}'

    def read(self, index: int) -> np.ndarray:
        return self.scene(index).image

    def _compose(self, index: int) -> Scene:
        rng, (height, width) = generator(SEED, int(self._held_out), index), self._size
        canvas = _background(rng, height, width)
        for _ in range(rng.integers(CLUTTER[0], CLUTTER[1] + 1)):
            _, ink = self._draw_digit(rng, piece=True)
            _paint(canvas, ink, _place(rng, self._size, ink), _colour(rng))
        owner = np.full(self._size, -1, np.int8)
        digits: List[int] = []
        areas: List[int] = []
        for _ in range(rng.integers(1, MOST_DIGITS + 1)):
            number, ink = self._draw_digit(rng)
            colour = _colour(rng)
            for _ in range(TRIES):
                corner = _place(rng, self._size, ink)
                if _leaves_visible(owner, ink, corner, areas):
                    _part(owner, ink, corner)[ink >= INK] = len(digits)
                    digits.append(self._labels[number])
                    areas.append(np.count_nonzero(ink >= INK))
                    _paint(canvas, ink, corner, colour)
                    break
        noise = rng.integers(-12, 13, canvas.shape, np.int16)
        image = np.clip(np.rint(canvas).astype(np.int16) + noise, 0, 255).astype(np.uint8)
        return Scene(image, owner, np.array(digits, np.int64))

    def _draw_digit(self, rng: np.random.Generator, piece: bool = False) -> Tuple[int, np.ndarray]:
        """Its number among those of this part, and its ink uint8 (h, w); of a `piece` a quarter of it or less."""
        number = int(rng.integers(len(self._own)))
        side = min(self._size) * math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST)))
        wide = side * math.exp(rng.uniform(-0.2, 0.2))
        image = self._images[number]
        if piece:
            h, w = rng.integers(2, 5, 2)
            top, left = rng.integers(8 - h + 1), rng.integers(8 - w + 1)
            image, side, wide = image[top:top + h, left:left + w], side * h / 8, wide * w / 8
        size = max(2, round(wide)), max(2, round(side))
        return number, np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth change between dark colours, float32 (height, width, 3)."""
    coarse = Image.fromarray(rng.integers(0, DARK, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(BRIGHT, 256, 3).astype(np.float32)


def _place(rng: np.random.Generator, size: Tuple[int, int], ink: np.ndarray) -> Tuple[int, int]:
    """A corner (top, left) at which all of the ink is on the canvas."""
    return int(rng.integers(size[0] - ink.shape[0] + 1)), int(rng.integers(size[1] - ink.shape[1] + 1))


def _part(array: np.ndarray, ink: np.ndarray, corner: Tuple[int, int]) -> np.ndarray:
    return array[corner[0]:corner[0] + ink.shape[0], corner[1]:corner[1] + ink.shape[1]]


def _paint(canvas: np.ndarray, ink: np.ndarray, corner: Tuple[int, int], colour: np.ndarray) -> None:
    part = _part(canvas, ink, corner)
    part += (np.minimum(ink[..., None] * np.float32(1 / INK / 1.5), 1)) * (colour - part)


def _leaves_visible(owner: np.ndarray, ink: np.ndarray, corner: Tuple[int, int], areas: Sequence[int]) -> bool:
    """Whether the digits that are there, of these areas when nothing covered them, keep enough under more ink."""
    below = np.bincount(_part(owner, ink, corner)[ink >= INK] + 1, minlength=len(areas) + 1)[1:]
    there = np.bincount(owner.ravel() + 1, minlength=len(areas) + 1)[1:]
    return bool((there - below >= VISIBLE * np.array(areas)).all())
