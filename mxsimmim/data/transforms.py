"""From pixels to a training sample: cropping, resizing, masking.

Images are uint8 (H, W, 3) RGB throughout; they become normalised floats on the device, which saves three quarters of
the transfer. A classifier's training images are the exception: the noise that erases parts of them is not in bytes.
"""
import math
from typing import Dict, Optional, Protocol, Tuple

import numpy as np
from PIL import Image

from ..config import AugmentConfig, DataConfig, MaskConfig, ModelConfig
from .augment import erase, mix_pair, mixes, rand_augment, smooth_label
from .decode import MAX_PIXELS, BrokenImage, decode  # noqa: F401, for those who import them from here
from .masks import random_mask
from .resampling import resize, resize_part

Fields = Dict[str, np.ndarray]
"""What a network gets, by name: of one image, or of a batch with one more dimension in front.

image: uint8 (S, S, 3), or float32 (3, S, S), normalised, where a classifier is trained.
mask: uint8 (h, w), 1 = masked.
label: float32 (K,), the target distribution over the classes.
label_map, extent: see `dense_transforms`.
boxes, classes, crowd, masks, priority: see `object_transforms`.
uniform: float32 (U,) in [0, 1), for stochastic depth: data, so that no device or worker matters.
"""
DRAWN = 'mask', 'priority', 'uniform'  # fields that do not depend on the image


class Transform(Protocol):
    """What is done to each image, and which fields of a batch are made of it."""
    group: int = 1  # images that are transformed together: 1, or 2 that `mix` gets
    upright: bool  # how the images it is given are decoded

    def allocate(self, count: int) -> Fields:
        """Returns uninitialised arrays for `count` images."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        """Returns the fields of image (H, W, 3), uint8, which is number `index` of its source.

        Raises:
            BrokenImage: what is known of the image cannot be read, or is of another image.
        """

    def draw(self, rng: np.random.Generator) -> Fields:
        """Returns those of the fields that are DRAWN, as `__call__` with a generator like this one."""

    def mix(self, pair: Fields, rng: np.random.Generator) -> None:
        """Changes the fields of two images, in place; only where `group` is 2. None that are DRAWN."""
        raise AssertionError('images of this transform stay alone')


def random_crop(rng: np.random.Generator, height: int, width: int, scale: Tuple[float, float],
                ratio: Tuple[float, float]) -> Tuple[int, int, int, int]:
    """The box of torchvision's RandomResizedCrop: (top, left, height, width) in pixels.

    Its share of the area is uniform in `scale`, its width over height log-uniform in `ratio`; after ten boxes that do
    not fit, the largest central one whose shape is within `ratio`.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


class PretrainTransform(Transform):
    """Random mask, flip and resized crop: fills image, mask and, where the network drops branches, uniform.

    What is `draw`n comes first, so that it depends on the generator alone and not on the image's size.
    """

    def __init__(self, data: DataConfig, mask: MaskConfig, model: ModelConfig):
        self._data, self._mask, self._model = data, mask, model
        self._bicubic = data.interpolation == 'bicubic'
        self.upright = bool(data.exif_orientation)

    def allocate(self, count: int) -> Fields:
        return {'image': _pixels(count, self._model.side), 'mask': _masks(count, self._model),
                **empty_uniform(count, self._model)}

    def draw(self, rng: np.random.Generator) -> Fields:
        return {'mask': draw_mask(rng, self._mask, self._model), **draw_uniform(rng, self._model)}

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        drawn = self.draw(rng)
        flip = rng.random() < self._data.flip
        top, left, height, width = random_crop(rng, image.shape[0], image.shape[1], self._data.crop_scale,
                                               self._data.crop_ratio)
        cropped = resize(image[top:top + height, left:left + width], self._model.side, flip, self._bicubic)
        return {'image': cropped, **drawn}


class EvalTransform(Transform):
    """The largest square in the middle, resized as in training, with a mask: fills image and mask."""

    def __init__(self, data: DataConfig, mask: MaskConfig, model: ModelConfig):
        self._mask, self._model = mask, model
        self.upright = bool(data.exif_orientation)

    def allocate(self, count: int) -> Fields:
        return {'image': _pixels(count, self._model.side), 'mask': _masks(count, self._model)}

    def draw(self, rng: np.random.Generator) -> Fields:
        return {'mask': draw_mask(rng, self._mask, self._model)}

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        return {'image': middle_square(image, self._model.side), **self.draw(rng)}


class ClassifyTransform(Transform):
    """Random flip and resized crop, RandAugment, normalisation and random erasing.

    Fills image, normalised; label, the smoothed target of the image's number; and uniform as in pre-training.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig, model: ModelConfig, labels: np.ndarray, classes: int):
        """Keep what is done, and the class of each image.

        Args:
            data, augment, model: what is done.
            labels: int64 (n,), the class number of each image.
            classes: how many there are.
        """
        self._data, self._augment, self._model = data, augment, model
        self._labels, self._classes, self._bicubic = labels, classes, data.interpolation == 'bicubic'
        self._how = {'resample': Image.Resampling.BICUBIC if self._bicubic else Image.Resampling.BILINEAR,
                     'fillcolor': tuple(round(255 * mean) for mean in data.mean)}
        self.group = 2 if mixes(augment) else 1
        self.upright = bool(data.exif_orientation)

    def allocate(self, count: int) -> Fields:
        size = self._model.side
        return {'image': np.empty((count, 3, size, size), np.float32),
                'label': np.empty((count, self._classes), np.float32), **empty_uniform(count, self._model)}

    def draw(self, rng: np.random.Generator) -> Fields:
        return draw_uniform(rng, self._model)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        data, augment = self._data, self._augment
        drawn = self.draw(rng)
        flip = rng.random() < data.flip
        top, left, height, width = random_crop(rng, image.shape[0], image.shape[1], data.crop_scale, data.crop_ratio)
        pixels = resize(image[top:top + height, left:left + width], self._model.side, flip, self._bicubic)
        if augment.rand_ops:
            pixels = np.asarray(rand_augment(Image.fromarray(pixels), rng, augment, self._how))
        result = normalise(pixels, data.mean, data.std)
        erase(result, rng, augment.erasing)
        label = smooth_label(self._labels[index], self._classes, augment.smoothing)
        return {'image': result, 'label': label, **drawn}

    def mix(self, pair: Fields, rng: np.random.Generator) -> None:
        """mixup or CutMix of two images and their labels, in place."""
        mix_pair(pair['image'], pair['label'], rng, self._augment)


class ClassifyEvalTransform(Transform):
    """The middle of the image resized bicubically: fills image and, where labels are given, label, one-hot.

    The short side becomes the integer part of img_size / data.eval_crop (192 at 0.875: 219), and the square is cut out
    where torchvision's CenterCrop cuts it.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, labels: Optional[np.ndarray] = None, classes: int = 0):
        self._size, self._short = model.side, int(model.side / data.eval_crop)
        self._labels, self._classes = labels, classes
        self.upright = bool(data.exif_orientation)

    def allocate(self, count: int) -> Fields:
        fields = {'image': _pixels(count, self._size)}
        if self._labels is not None:
            fields['label'] = np.empty((count, self._classes), np.float32)
        return fields

    def draw(self, rng: np.random.Generator) -> Fields:
        return {}

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        width, height = _short_side(image.shape[1], image.shape[0], self._short)
        corner = round((height - self._size) / 2), round((width - self._size) / 2)
        fields = {'image': resize_part(image, (height, width), corner, (self._size, self._size), False, True)}
        if self._labels is not None:
            fields['label'] = smooth_label(self._labels[index], self._classes, 0)
        return fields


def normalise(image: np.ndarray, mean: Tuple[float, ...], std: Tuple[float, ...]) -> np.ndarray:
    """uint8 (H, W, 3) to float32 (3, H, W): (x / 255 - mean) / std, by channel."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std)]
    return np.stack([image[..., c] * np.float32(scale[c]) + np.float32(shift[c]) for c in range(3)])


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Bicubic, keeping the shape, as torchvision's Resize: the long side is rounded down."""
    return image.resize(_short_side(*image.size, size), Image.Resampling.BICUBIC)


def _short_side(width: int, height: int, size: int) -> Tuple[int, int]:
    short = min(width, height)
    return size * width // short, size * height // short


def middle_square(image: np.ndarray, size: int) -> np.ndarray:
    """The largest square in the middle of uint8 (H, W, 3), resized bilinearly to (size, size, 3)."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[top:top + side, left:left + side], size)


def draw_mask(rng: np.random.Generator, mask: MaskConfig, model: ModelConfig) -> np.ndarray:
    """A random mask uint8 (h, w) on the grid of patches, 1 = masked."""
    return random_mask(rng, model.side, mask.patch_size, mask.ratio, model.patch_size)


def _pixels(count: int, size: int) -> np.ndarray:
    return np.empty((count, size, size, 3), np.uint8)


def _masks(count: int, model: ModelConfig) -> np.ndarray:
    return np.empty((count, model.grid, model.grid), np.uint8)


def empty_uniform(count: int, model: ModelConfig) -> Fields:
    """One number an image and residual branch, if these are dropped at random."""
    return {'uniform': np.empty((count, 2 * model.blocks), np.float32)} if model.drop_path > 0 else {}


def draw_uniform(rng: np.random.Generator, model: ModelConfig) -> Fields:
    """These numbers of one image."""
    return {'uniform': rng.random(2 * model.blocks, np.float32)} if model.drop_path > 0 else {}
