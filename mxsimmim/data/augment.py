"""What fine-tuning does to images and labels: RandAugment, random erasing, mixup, CutMix, label smoothing.

The variants and figures are those of timm 0.4 under the reference's recipe (rand-m9-mstd0.5-inc1, pixel erasing).
"""
import math
from typing import Any, Callable, Dict, NamedTuple, Tuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..config import AugmentConfig

STRONGEST = 10.0  # the levels of RandAugment go from 0 to this
PROBABILITY = 0.5  # that a chosen operation of RandAugment is applied


class Operation(NamedTuple):
    """One of RandAugment's: all grow stronger with the level."""
    argument: Callable[[float], float]  # of the level
    signed: bool  # whether the argument's sign is drawn
    apply: Callable[[Image.Image, float, Dict[str, Any]], Image.Image]  # (image, argument, resample and fill colour)


def _times(most: float) -> Callable[[float], float]:
    return lambda level: level / STRONGEST * most


def _affine(matrix: Callable[[float, Image.Image], Tuple[float, ...]]) -> Callable[..., Image.Image]:
    """With (a, b, c, d, e, f) of `matrix`, (x, y) shows what was at (ax + by + c, dx + ey + f)."""
    return lambda image, value, how: image.transform(image.size, Image.Transform.AFFINE, matrix(value, image), **how)


def _enhanced(kind: Callable[[Image.Image], Any]) -> Operation:
    return Operation(_times(0.9), True, lambda image, value, _: kind(image).enhance(1 + value))


def _solarize_add(image: Image.Image, value: float, _: Dict[str, Any]) -> Image.Image:
    return image.point([min(255, i + int(value)) if i < 128 else i for i in range(256)] * 3)


OPERATIONS: Dict[str, Operation] = {
    'AutoContrast': Operation(_times(0), False, lambda image, *_: ImageOps.autocontrast(image)),
    'Equalize': Operation(_times(0), False, lambda image, *_: ImageOps.equalize(image)),
    'Invert': Operation(_times(0), False, lambda image, *_: ImageOps.invert(image)),
    'Rotate': Operation(_times(30), True, lambda image, degrees, how: image.rotate(degrees, **how)),
    'Posterize': Operation(lambda level: 4 - int(_times(4)(level)), False,
                           lambda image, bits, _: ImageOps.posterize(image, int(bits))),
    'Solarize': Operation(lambda level: 256 - int(_times(256)(level)), False,
                          lambda image, threshold, _: ImageOps.solarize(image, int(threshold))),
    'SolarizeAdd': Operation(lambda level: int(_times(110)(level)), False, _solarize_add),
    'Color': _enhanced(ImageEnhance.Color),
    'Contrast': _enhanced(ImageEnhance.Contrast),
    'Brightness': _enhanced(ImageEnhance.Brightness),
    'Sharpness': _enhanced(ImageEnhance.Sharpness),
    'ShearX': Operation(_times(0.3), True, _affine(lambda value, _: (1, value, 0, 0, 1, 0))),
    'ShearY': Operation(_times(0.3), True, _affine(lambda value, _: (1, 0, 0, value, 1, 0))),
    'TranslateX': Operation(_times(0.45), True, _affine(lambda value, image: (1, 0, value * image.width, 0, 1, 0))),
    'TranslateY': Operation(_times(0.45), True, _affine(lambda value, image: (1, 0, 0, 0, 1, value * image.height))),
}


def rand_augment(image: Image.Image, rng: np.random.Generator, config: AugmentConfig,
                 how: Dict[str, Any]) -> Image.Image:
    """An RGB image after `config.rand_ops` random operations, each skipped half the time.

    RandAugment (Cubuk et al. 2020) with normally distributed strength. `how`: `resample` and `fillcolor`, for the
    operations that move pixels.
    """
    operations = list(OPERATIONS.values())
    for number in rng.integers(len(operations), size=config.rand_ops):
        if rng.random() < PROBABILITY:
            operation = operations[number]
            level = min(max(rng.normal(config.rand_magnitude, config.rand_std), 0.0), STRONGEST)
            value = operation.argument(level)
            if operation.signed and rng.random() < 0.5:
                value = -value
            image = operation.apply(image, value, how)
    return image


def erase(image: np.ndarray, rng: np.random.Generator, probability: float) -> None:
    """Writes noise over a random rectangle of `image`, in place, with this probability (Zhong et al. 2020).

    Its share of the area is uniform in (0.02, 1/3), its height over width log-uniform in (0.3, 1/0.3); after ten
    rectangles that do not fit, none.

    Args:
        image: float32 (3, H, W), normalised, as the noise is: N(0, 1) for each number.
        rng: source of everything random.
        probability: that anything happens.
    """
    if rng.random() >= probability:
        return
    _, height, width = image.shape
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        shape = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image[:, top:top + h, left:left + w] = rng.standard_normal((3, h, w), np.float32)
            return


def smooth_label(number: int, classes: int, smoothing: float) -> np.ndarray:
    """The target distribution of one class, float32 (classes,): a share `smoothing` of it is spread over all."""
    target = np.full(classes, smoothing / classes, np.float32)
    target[number] += 1 - smoothing
    return target


def mixes(config: AugmentConfig) -> bool:
    """Whether `mix_pair` does anything."""
    return config.mix_prob > 0 and (config.mixup > 0 or config.cutmix > 0)


def mix_pair(images: np.ndarray, targets: np.ndarray, rng: np.random.Generator, config: AugmentConfig) -> None:
    """Mixes two images and their targets, each with the other, in place.

    mixup (Zhang et al. 2018) blends them, CutMix (Yun et al. 2019) exchanges a rectangle; the targets are blended in
    the shares of the images that result.

    Args:
        images: float32 (2, 3, H, W), normalised.
        targets: float32 (2, K), distributions over the classes.
        rng: source of everything random.
        config: how strongly, and how often which.
    """
    if rng.random() >= config.mix_prob:
        return
    cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.mix_switch)
    alpha = config.cutmix if cut else config.mixup
    own = rng.beta(alpha, alpha)  # share of its own that each keeps
    if cut:
        height, width = images.shape[2:]
        top, bottom, left, right = cut_box(rng, height, width, 1 - own)
        images[:, :, top:bottom, left:right] = images[::-1, :, top:bottom, left:right].copy()
        own = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        _blend(images, own)
    _blend(targets, own)


def cut_box(rng: np.random.Generator, height: int, width: int, share: float) -> Tuple[int, int, int, int]:
    """CutMix's rectangle (top, bottom, left, right), of the image's shape and this share of its area.

    Its centre is anywhere, so that it may be cut short at the borders.
    """
    half_h, half_w = int(height * math.sqrt(share)) // 2, int(width * math.sqrt(share)) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    return max(y - half_h, 0), min(y + half_h, height), max(x - half_w, 0), min(x + half_w, width)


def _blend(pair: np.ndarray, own: float) -> None:
    pair[:] = pair * np.float32(own) + pair[::-1] * np.float32(1 - own)
