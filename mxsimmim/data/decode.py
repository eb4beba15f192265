"""From a file's bytes to pixels: uint8 (H, W, 3) RGB of whatever was encoded.

Of values of more than 8 bits the upper 8 become the pixels. How many bits count is what the file says: BitsPerSample,
or a MaxSampleValue or SMaxSampleValue of 2^b - 1 (TIFF); sBIT (PNG), where the values are not scaled up to 16 bits all
the same; the maximum (PGM); the precision (JPEG 2000). Where it says nothing, all 16 do, except where no value has more
than 12 or 8 bits and the image would be all but black: then these do, unless all values are multiples of 256 or 257, as
8 bits scaled up to 16 are. 32-bit integers count as 8, 12, 16 or, from 2^24 on, all bits; floats from 0 to 1 or to 255.
What none of this fits is broken, and its message says why. What was guessed is said, once a kind.
"""
import io
import logging
import math
import re
import threading
import warnings
from typing import Any, Callable, Iterator, NamedTuple, Sequence, Set, Tuple, Union, cast

import cv2
import numpy as np
import simplejpeg
from PIL import Image, TiffImagePlugin

from ..system.text import one_line

MAX_PIXELS = cast(int, Image.MAX_IMAGE_PIXELS)  # 89 million; Pillow takes an image beyond it for a decompression bomb
warnings.filterwarnings('ignore', module=r'PIL\.')  # of too many pixels, an error here, and of damaged EXIF

SCANS = 20  # of a JPEG of MAX_PIXELS, more of a smaller one: each takes the time of a whole image in a few bytes
STRIP = 1 << 22  # pixels that are converted or copied at a time
CONVERT = 'scale them to 0 to 255, or to 0 to 65535 in a 16-bit PNG'
ORIENTATION, BITS, PHOTOMETRIC, MAXIMUM, TILE, FORMAT, REAL_MAXIMUM = 274, 258, 262, 281, (322, 323), 339, 341

Image.init()
# What is read. Others that Pillow knows are no photographs, or start a program (EPS: Ghostscript).
FORMATS = tuple(name for name in ('JPEG', 'PNG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'DIB', 'TIFF', 'PPM', 'JPEG2000', 'TGA',
                                  'ICO', 'PCX', 'SGI', 'SUN', 'QOI') if name in Image.OPEN)

_MARKS = (b'Exif\0', b'EXIF', b'eXIf', b'Raw profile type exif', b'XML:com.adobe.xmp')  # where one may be found

_MARKER = re.compile(rb'\xff[^\x00\x01\xd0-\xd8\xff]', re.DOTALL)  # of a JPEG: what has a length, and the end

_said: Set[str] = set()
_lock = threading.Lock()


class BrokenImage(ValueError):
    """An image that cannot be decoded; its text, one line, names it."""

    def __init__(self, text: str):
        super().__init__(one_line(text))


class Stated(NamedTuple):
    """What a file says about its values; 0 where it does not."""
    bits: int = 0  # of integers, that count; of formats whose values Pillow scales up, 16
    white: float = 0  # of floats
    scaled: bool = False  # whether the values may be scaled up to 16 bits all the same


def decode(data: Union[bytes, np.ndarray], name: str, upright: bool = False,
           say: Callable[[str], None] = logging.getLogger(__name__).warning) -> np.ndarray:
    """Pixels of an encoded image, or of an array (H, W) or (H, W, 3), as uint8 (H, W, 3) RGB.

    Grey, palette, CMYK and deeper images are converted, transparency is dropped, the first frame of several is taken.

    Args:
        data: the file's content.
        name: what messages call it.
        upright: whether to turn the image as its EXIF orientation says, as `PIL.ImageOps.exif_transpose` does. The
            orientation of a TIFF is no EXIF: Pillow always applies it.
        say: told what was assumed about values of more than 8 bits, each kind once in the life of the process.

    Raises:
        BrokenImage: not an image, cut short, damaged, more than `MAX_PIXELS`, or values that could mean anything.
    """
    if isinstance(data, np.ndarray):
        return data if data.ndim == 3 else np.stack([data] * 3, axis=-1)
    if not data:
        raise BrokenImage(f'{name}: empty file')
    if data[:2] == b'\xff\xd8':
        try:  # the same library and numbers as Pillow, straight into an array
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if space in ('YCbCr', 'Gray') and _work(width * height, data) <= MAX_PIXELS:
                pixels = simplejpeg.decode_jpeg(data)
                return _turned(pixels, orientation(data)) if upright else pixels
        except ValueError:
            pass  # strict about blemishes that Pillow may tolerate
    try:
        with _open(data) as image:
            if _extent(image) > MAX_PIXELS:
                raise ValueError(f'{image.width} x {image.height} pixels are more than {MAX_PIXELS}')
            if data[:2] == b'\xff\xd8' and _work(image.width * image.height, data) > MAX_PIXELS:
                raise ValueError(f'{image.width} x {image.height} pixels in {_scans(data)} scans are too many')
            if image.format == 'PPM' and _tile(image)[0] == 'ppm':
                return _scaled(image, data)
            stated = _stated(image, data)
            image.load()  # which turns a TIFF
            pixels = _to_rgb(image, data, stated, lambda kind, text: _say_once(say, kind, f'{name}: {text}'))
            return _turned(pixels, _orientation(image)) if upright else pixels
    except Image.UnidentifiedImageError:
        raise BrokenImage(f'{name}: {_unknown(data)}') from None
    except Exception as error:  # Pillow's decoders raise about anything on damaged files
        raise BrokenImage(f'{name}: {error or type(error).__name__}') from error


def extent(data: bytes) -> int:
    """Pixels that decoding will hold at once, from an image's header; 0 if that tells nothing."""
    try:
        with _open(data) as image:
            return _extent(image)
    except Exception:  # `decode` will say what is wrong
        return 0


def orientation(data: bytes) -> int:
    """The EXIF orientation of an encoded image that decoding ignores, 1 (upright) to 8; 1 where there is none."""
    if not any(mark in data for mark in _MARKS):
        return 1
    try:
        with _open(data) as image:
            return 1 if image.format == 'TIFF' else _orientation(image)
    except Exception:  # garbage says nothing
        return 1


def _work(pixels: int, data: bytes) -> float:
    """Pixels of a JPEG, as many times as it takes their time."""
    if pixels * data.count(b'\xff\xda') <= SCANS * MAX_PIXELS:  # without a look at which of these are scans
        return pixels
    return max(pixels, pixels * _scans(data) / SCANS)


def _scans(data: bytes) -> int:
    """Scans of a JPEG: what begins one, outside of other segments, up to the end of the first image."""
    count, place = 0, 2
    while True:
        found = _MARKER.search(data, place)
        if not found or found[0] == b'\xff\xd9':
            return count
        count += found[0] == b'\xff\xda'
        place = found.end() + int.from_bytes(data[found.end():found.end() + 2], 'big')


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _extent(image: Image.Image) -> int:
    """Pixels, of a tile where it has more than the image: all of it is unpacked."""
    width, height = (_tags(image).get(tag, 0) for tag in TILE)
    return max(image.width * image.height, width * height)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION)
        return next((number for number in range(2, 9) if number == value), 1)
    except Exception:  # garbage says nothing
        return 1


def _turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """The upright image of one with this orientation."""
    if turn > 4:
        pixels = pixels.transpose(1, 0, 2)
    rows, columns = (-1 if turn in flipped else 1 for flipped in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(pixels[::rows, ::columns])


def _say_once(say: Callable[[str], None], kind: str, text: str) -> None:
    with _lock:
        if kind in _said:
            return
        _said.add(kind)
    say(f'{text}; so are others of this kind, which are not named')


def _unknown(data: bytes) -> str:
    """What is said about a file that Pillow cannot read."""
    if data[:4] in (b'II*\0', b'MM\0*'):
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
            file = io.BytesIO(data)
            file.seek(tags.next)
            tags.load(file)
            bits = tags.get(BITS, (1,))
            return (f'a TIFF of {len(bits)} x {bits[0]} bits (sample format {tags.get(FORMAT, (1,))[0]}, photometric '
                    f'interpretation {tags.get(PHOTOMETRIC)}), which cannot be read: convert it to 8 or 16 bits, grey '
                    'or RGB')
        except Exception:  # damaged
            pass
    return 'not an image, or of an unknown format'


def _strips(image: Image.Image) -> Iterator[Tuple[slice, Image.Image]]:
    """(rows, that part of the image), so that conversions need no memory for the whole."""
    step = max(1, STRIP // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        whole = bottom - top == image.height
        yield slice(top, bottom), image if whole else image.crop((0, top, image.width, bottom))


def _to_rgb(image: Image.Image, data: bytes, stated: Stated, say: Callable[[str, str], None]) -> np.ndarray:
    image.info.pop('transparency', None)  # else Pillow warns about what is meant here
    if image.mode == 'F' or image.mode.startswith('I'):
        return np.stack([_deep(image, stated, say)] * 3, axis=-1)
    if image.mode == 'L' and _tags(image).get(FORMAT) == (2,) and cast(float, image.getextrema()[1]) > 127:
        raise ValueError(f'values from -128 to 127: negative ones are no brightness: {CONVERT}')
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for rows, part in _strips(image):
        pixels[rows] = np.asarray(part if part.mode == 'RGB' else part.convert('RGB'))
    deep = data[24] == 16 if image.format == 'PNG' else set(_tags(image).get(BITS, ())) == {16}
    if deep and pixels.max() < 2 ** ((stated.bits or 12) - 8):
        return _deep_colours(pixels, data, stated, say)
    return pixels


def _scaled(image: Image.Image, data: bytes) -> np.ndarray:
    """A binary PGM or PPM with a maximum other than 255: the pixels that Pillow finds in a microsecond each."""
    _, _, start, (_, maximum) = _tile(image)
    white, shift = (65535, 8) if image.mode == 'I' else (255, 0)
    table = np.minimum(np.rint(np.arange(65536) / maximum * white), white).astype(np.uint16) >> shift
    shape = (image.height, image.width, 3 if image.mode == 'RGB' else 1)
    if len(data) - start < math.prod(shape) * (1 if maximum < 256 else 2):
        raise ValueError('image file is truncated')
    values = np.frombuffer(data, np.uint8 if maximum < 256 else '>u2', math.prod(shape), start).reshape(shape)
    pixels = np.empty((*shape[:2], 3), np.uint8)
    for rows, _ in _strips(image):
        pixels[rows] = table[values[rows]]
    return pixels


def _tags(image: Any) -> Any:
    return image.tag_v2 if image.format == 'TIFF' else {}


def _tile(image: Any) -> Any:
    """(coding, extent, where its bytes begin, arguments of its decoder) of an image that is not loaded yet."""
    return image.tile[0]


def _deep(image: Image.Image, stated: Stated, say: Callable[[str, str], None]) -> np.ndarray:
    """uint8 (H, W) of one channel of floats, or of integers of more than 8 bits."""
    tags = _tags(image)
    unsigned = image.mode == 'I' and tags.get(BITS) == (32,) and tags.get(FORMAT, (1,)) == (1,)
    parts = [(rows, np.asarray(part)) for rows, part in _strips(image)]
    parts = [(rows, values.view(np.uint32) if unsigned else values) for rows, values in parts]
    if image.mode == 'F':
        white: Any = _white([values for _, values in parts], stated.white, say)
    else:
        bits = _bits([values for _, values in parts], 32 if unsigned else 31, stated, say)
        white = 2 ** bits - 1
    pixels = np.empty((image.height, image.width), np.uint8)
    for rows, values in parts:
        if tags.get(PHOTOMETRIC) == 0:  # white is zero
            values = white - values
        if image.mode != 'F':
            values = values >> (bits - 8)
        elif white != 255:  # of which Pillow keeps the integer part
            values = np.rint(values * (255 / white))
        pixels[rows] = values.clip(0, 255)
    return pixels


def _deep_colours(pixels: np.ndarray, data: bytes, stated: Stated, say: Callable[[str, str], None]
                  ) -> np.ndarray:
    """uint8 (H, W, 3) of a dark image with 16 bits a channel; `pixels` are the upper 8, all that Pillow reads."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values[..., 2::-1].shape != pixels.shape:
        return pixels
    values = values[..., 2::-1]  # from BGR, or BGRA
    step = max(1, STRIP // values.shape[1])
    strips = [slice(top, top + step) for top in range(0, len(values), step)]
    if any((values[rows] >> 8 != pixels[rows]).any() for rows in strips):
        return pixels
    bits = _bits([values[rows] for rows in strips], 16, stated, say)
    for rows in strips if bits < 16 else ():
        pixels[rows] = values[rows] >> (bits - 8)
    return pixels


def _white(parts: Sequence[np.ndarray], stated: float, say: Callable[[str, str], None]) -> float:
    """The value of white in floats, which may go a tenth beyond black and white; `stated` is one, or 0."""
    low, high = (float(extreme([extreme(values) for values in parts])) for extreme in (np.min, np.max))
    if not np.isfinite([low, high]).all():
        raise ValueError(f'values that are not finite are no brightness: {CONVERT}')
    for white in ([stated] if stated else []) + [1, 255]:
        if -0.1 * white <= low and high <= 1.1 * white and (white in (1, stated) or high > 16):
            if white != stated:
                say(f'float {white}', f'float values from {low:g} to {high:g}, taken as 0 to {white}')
            return white
    raise ValueError(f'float values from {low:g} to {high:g} are neither 0 to 1 nor 0 to 255: {CONVERT}')


def _bits(parts: Sequence[np.ndarray], most: int, stated: Stated, say: Callable[[str, str], None]) -> int:
    """How many bits count in integers that have up to `most`; `stated` is what the file says."""
    low, high = (int(extreme([extreme(values) for values in parts])) for extreme in (np.min, np.max))
    if low == high == 0:
        return 16
    if low < 0:
        raise ValueError(f'values from {low} to {high}: negative ones are no brightness: {CONVERT}')
    if stated.bits and high < 2 ** stated.bits:
        widened = stated.scaled and not any((values & (2 ** (16 - stated.bits) - 1)).any() for values in parts)
        return 16 if widened else stated.bits
    if 2 ** 16 <= high < 2 ** 24:
        raise ValueError(f'values from {low} to {high} are neither of 16 nor of {most} bits: {CONVERT}')
    bits = next(bits for bits in (8, 12, 16, most) if high < 2 ** bits)
    if bits < 16 and any(all((values & 255 == (values >> 8) * factor).all() for values in parts) for factor in (0, 1)):
        return 16  # multiples of 256 or 257
    if bits != 16:
        say(f'{bits} bits', f'integer values up to {high}, taken as {bits} bits')
    return bits


def _stated(image: Image.Image, data: bytes) -> Stated:
    if image.format == 'PNG':
        start = data.find(b'sBIT', 0, data.find(b'IDAT') + 1)
        channels = data[start + 4:start + (7 if data[25] & 2 else 5)] if start > 0 else b''  # colour, or grey
        bits = max(channels, default=0)
        return Stated(bits if 8 <= bits <= 16 else 0, scaled=True)
    if image.format == 'PPM':
        coding, _, _, arguments = _tile(image)
        return Stated(0 if coding == 'raw' or arguments[1] == 65535 else 16)
    if image.format != 'TIFF':
        return Stated(16)
    tags = _tags(image)
    for tag in (MAXIMUM, REAL_MAXIMUM):
        white = tags.get(tag)
        white = white[0] if isinstance(white, tuple) and white else white
        for bits in range(8, 33):
            if white == 2 ** bits - 1:
                return Stated(bits, white)
        if white == 1:
            return Stated(0, 1)
    return Stated(12 if tags.get(BITS) == (12,) else 0)
