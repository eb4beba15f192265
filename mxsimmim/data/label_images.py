"""Label images: a file whose pixels are class numbers, in 1 to 16 bits, grey or of a palette."""
import io
from typing import Any

import numpy as np
from PIL import Image

from .decode import MAX_PIXELS, BrokenImage

BITS, PHOTOMETRIC = 258, 262  # tags of a TIFF
NUMBERS = 'label images hold a class number a pixel: grey of 8 or 16 bits, or a palette'


def read_label_image(data: bytes, name: str) -> np.ndarray:
    """The numbers in an encoded label image, uint8 or uint16 (h, w), as they were written: of a palette the indices.

    Raises:
        BrokenImage: not an image, damaged, too large, or of values that are no class numbers (colours, floats, JPEG).
    """
    try:
        with Image.open(io.BytesIO(data), formats=('PNG', 'TIFF', 'BMP', 'GIF', 'PPM', 'TGA', 'JPEG')) as image:
            if image.format == 'JPEG':
                raise ValueError('a JPEG, which blurs class numbers: save label images as PNG where they are made')
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f'{image.width} x {image.height} pixels are more than {MAX_PIXELS}')
            if image.mode not in ('L', 'P', '1') and not image.mode.startswith('I'):
                raise ValueError(_of_mode(image.mode))
            bits = _grey_bits(image, data)
            values = np.array(image)
    except Image.UnidentifiedImageError:
        raise BrokenImage(f'{name}: not an image, or of an unknown format; {NUMBERS}, in a PNG') from None
    except Exception as error:  # Pillow's decoders raise about anything on damaged files
        raise BrokenImage(f'{name}: {error or type(error).__name__}') from error
    if bits < 8:
        return values // np.uint8(255 // (2 ** bits - 1))
    if values.dtype.itemsize == 1:
        return values.astype(np.uint8)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise BrokenImage(f'{name}: values from {low} to {high}; {NUMBERS}')
    return values.astype(np.uint16)


def _of_mode(mode: str) -> str:
    if mode in ('RGB', 'RGBA', 'RGBX', 'CMYK', 'YCbCr'):
        return (f'has colours ({mode}), but {NUMBERS}: write the number of each colour\'s class to a grey PNG, and the '
                "classes' names in that order to data.classes")
    return f'has pixels of mode {mode}, but {NUMBERS}'


def _grey_bits(image: Any, data: bytes) -> int:
    """Bits of a grey value that Pillow scales up to 8, else 8 (or more).

    Raises:
        ValueError: a TIFF whose numbers Pillow would turn round.
    """
    if image.format == 'PNG' and image.mode == 'L':
        return data[24]
    if image.format == 'TIFF' and image.mode != 'P':
        if image.tag_v2.get(PHOTOMETRIC) == 0:
            raise ValueError('a TIFF in which white is zero, so that its numbers are unclear: save it as PNG')
        bits = image.tag_v2.get(BITS, (1,))[0]
        return bits if image.mode == 'L' else 8
    return 8
