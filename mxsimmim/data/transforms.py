"""From a file's bytes to a training sample: decoding, cropping, resizing, masking.

Images are uint8 (H, W, 3) RGB throughout; they become normalised floats on the device, which saves three quarters of
the transfer.
"""
import io
import math
from typing import NamedTuple, Tuple, Union

import cv2
import numba
import numpy as np
import simplejpeg
from PIL import Image

from ..config import DataConfig, MaskConfig, ModelConfig
from .masks import random_mask

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million; Pillow takes an image beyond it for a decompression bomb


class BrokenImage(ValueError):
    """An image that cannot be decoded; its text names it."""


class Sample(NamedTuple):
    """What the network gets of one image."""
    image: np.ndarray  # uint8 (S, S, 3)
    mask: np.ndarray  # uint8 (h, w), 1 = masked
    uniform: np.ndarray  # float32 (U,) in [0, 1), for stochastic depth: data, so that no device or worker matters


def decode(data: Union[bytes, np.ndarray], name: str) -> np.ndarray:
    """Pixels of an encoded image, or of an array (H, W) or (H, W, 3), as uint8 (H, W, 3) RGB.

    Grey, palette, CMYK and 16-bit images are converted, transparency is dropped, the first frame of several is taken,
    EXIF orientation is ignored (as the reference's loader does).

    Raises:
        BrokenImage: not an image, cut short, damaged, or more than `MAX_PIXELS`.
    """
    if isinstance(data, np.ndarray):
        return data if data.ndim == 3 else np.stack([data] * 3, axis=-1)
    if not data:
        raise BrokenImage(f'{name}: empty file')
    if data[:2] == b'\xff\xd8':
        try:  # the same library and numbers as Pillow, straight into an array
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if space in ('YCbCr', 'Gray') and height * width <= MAX_PIXELS:
                return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass  # strict about blemishes that Pillow may tolerate
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f'{image.width} x {image.height} pixels are more than {MAX_PIXELS}')
            return _to_rgb(image)
    except Image.UnidentifiedImageError:
        raise BrokenImage(f'{name}: not an image, or of an unknown format') from None
    except Exception as error:  # Pillow's decoders raise about anything on damaged files
        raise BrokenImage(f'{name}: {error or type(error).__name__}') from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith('I'):  # 16 bits; Pillow's own conversion would clip all above 255 to white
        return decode((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8), '')
    image.load()
    image.info.pop('transparency', None)  # else Pillow warns about what is meant here
    return np.asarray(image.convert('RGB'))


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
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, size: int, flip: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) to (size, size, 3), optionally mirrored left to right.

    Bit for bit Pillow's `Image.resize((size, size), BILINEAR)`, which averages over a triangle as wide as two output
    pixels, in a fifth of its time: each pass works on whole rows, with columns transposed into rows by OpenCV.
    """
    height, width, _ = image.shape
    columns = np.empty((size, height * 3), np.uint8)
    _resize_rows(cv2.transpose(image).reshape(width, height * 3), columns, flip)
    rows = cv2.transpose(columns.reshape(size, height, 3)).reshape(height, size * 3)
    result = np.empty((size, size, 3), np.uint8)
    _resize_rows(rows, result.reshape(size, size * 3), False)
    return result


@numba.njit(nogil=True, error_model='numpy')
def _resize_rows(rows, out, backwards):
    """Weighted means of neighbouring rows: uint8 (n, L) to (size, L), in fixed point with 22 bits as Pillow does it."""
    n, size = len(rows), len(out)
    scale = n / size
    support = max(scale, 1.0)
    inverse = 1.0 / support
    weights = np.empty(2 * math.ceil(support) + 1)
    sums = np.empty(rows.shape[1], np.int32)
    for y in range(size):
        centre = (y + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), n) - first
        for k in range(count):
            weights[k] = max(0.0, 1.0 - abs((k + first - centre + 0.5) * inverse))
        total = weights[:count].sum()
        sums[:] = 1 << 21  # rounds to nearest
        for k in range(count):
            weight, row = np.int32(weights[k] / total * (1 << 22) + 0.5), rows[first + k]
            for i in range(len(sums)):
                sums[i] += np.int32(row[i]) * weight
        target = out[size - 1 - y] if backwards else out[y]
        for i in range(len(sums)):
            target[i] = sums[i] >> 22


class PretrainTransform:
    """Random mask, flip and resized crop; called with (image (H, W, 3), rng), returns a `Sample`.

    The mask is drawn first, so that it depends on the generator alone and not on the image's size.
    """

    def __init__(self, data: DataConfig, mask: MaskConfig, model: ModelConfig):
        self._data, self._mask, self._model = data, mask, model
        self._uniforms = 2 * model.blocks if model.drop_path > 0 else 0  # one for each residual branch

    def allocate(self, count: int) -> Sample:
        """Uninitialised arrays for `count` samples."""
        return _allocate(count, self._model, self._uniforms)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Sample:
        mask = _draw_mask(rng, self._mask, self._model)
        uniform = rng.random(self._uniforms, np.float32)
        flip = rng.random() < self._data.flip
        top, left, height, width = random_crop(rng, *image.shape[:2], self._data.crop_scale, self._data.crop_ratio)
        return Sample(resize(image[top:top + height, left:left + width], self._model.img_size, flip), mask, uniform)


class EvalTransform:
    """The largest square in the middle, resized as in training, with a mask from the generator; called like the above.

    `Sample.uniform` is empty: nothing else is random.
    """

    def __init__(self, data: DataConfig, mask: MaskConfig, model: ModelConfig):
        self._mask, self._model = mask, model

    def allocate(self, count: int) -> Sample:
        """Uninitialised arrays for `count` samples."""
        return _allocate(count, self._model, 0)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Sample:
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = resize(image[top:top + side, left:left + side], self._model.img_size)
        return Sample(square, _draw_mask(rng, self._mask, self._model), np.empty(0, np.float32))


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Bicubic, keeping the shape, as torchvision's Resize: the long side is rounded down."""
    width, height = image.size
    short = min(width, height)
    return image.resize((size * width // short, size * height // short), Image.BICUBIC)


def _draw_mask(rng: np.random.Generator, mask: MaskConfig, model: ModelConfig) -> np.ndarray:
    return random_mask(rng, model.img_size, mask.patch_size, mask.ratio, model.patch_size)


def _allocate(count: int, model: ModelConfig, uniforms: int) -> Sample:
    return Sample(np.empty((count, model.img_size, model.img_size, 3), np.uint8),
                  np.empty((count, model.grid, model.grid), np.uint8), np.empty((count, uniforms), np.float32))
