"""What values of more than 8 bits mean, what EXIF turns, what is too large; by files made here tag by tag."""
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from mxsimmim.data import decode as decoding
from mxsimmim.data.decode import FORMATS, BrokenImage, decode, extent, orientation

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=-1)


@pytest.fixture
def said():
    """What is said from here on, as if nothing had been before."""
    decoding._said.clear()
    yield []
    decoding._said.clear()


def encode(pixels, form, **options):
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(values, order='<', photometric=1, **tags):
    """An uncompressed TIFF of an array (H, W) or (H, W, C), as its type says, with more tags given by number."""
    height, width, channels = (*values.shape, 1)[:3]
    kind = {'u': 1, 'i': 2, 'f': 3}[values.dtype.kind]
    entries = {256: [width], 257: [height], 258: [8 * values.itemsize] * channels, 259: [1], 262: [photometric],
               273: [0], 277: [channels], 278: [height], 279: [values.nbytes], 339: [kind] * channels}
    entries.update({int(tag[1:]): value for tag, value in tags.items()})
    extra, start = b'', 8 + 2 + 12 * len(entries) + 4
    body = struct.pack(f'{order}H', len(entries))
    length = sum(len(entry) * 4 for entry in entries.values() if len(entry) > 1)
    for tag, numbers in sorted(entries.items()):
        real = any(isinstance(number, float) for number in numbers)
        numbers = [start + length] if tag == 273 else numbers
        packed = struct.pack(f'{order}{len(numbers)}{"f" if real else "I"}', *numbers)
        if len(numbers) > 1:
            packed, extra = struct.pack(f'{order}I', start + len(extra)), extra + packed
        body += struct.pack(f'{order}HHI', tag, 11 if real else 4, len(numbers)) + packed
    head = struct.pack(f'{order}2sHI', b'II' if order == '<' else b'MM', 42, 8)
    return head + body + bytes(4) + extra + values.astype(values.dtype.newbyteorder(order)).tobytes()


def png(values, **chunks):
    """A PNG of uint8 or uint16 (H, W) or (H, W, C), with more chunks before the pixels."""
    height, width, channels = (*values.shape, 1)[:3]
    rows = values.astype(values.dtype.newbyteorder('>')).reshape(height, -1)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts = {'IHDR': struct.pack('>IIBBBBB', width, height, 8 * values.itemsize, kind, 0, 0, 0), **chunks,
             'IDAT': zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows)), 'IEND': b''}
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name.encode() + data + struct.pack('>I', zlib.crc32(name.encode() + data))
        for name, data in parts.items())


def grey(data, said):
    pixels = decode(data, 'x', say=said.append)
    assert pixels.dtype == np.uint8 and (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


TWELVE = RAMP.astype(np.uint16) * 16 + 7  # 7 to 4087: 12 bits whose upper 8 are the ramp
FULL = RAMP.astype(np.uint16) * 256 + 99
DARK = (RAMP % 16).astype(np.uint16)  # 0 to 15, in what is stated to have more


@pytest.mark.parametrize('data, want, guessed', [
    (png(FULL), RAMP, ''), (tiff(FULL), RAMP, ''), (tiff(FULL, '>'), RAMP, ''), (encode(FULL, 'TIFF'), RAMP, ''),
    (png(TWELVE), RAMP, 'up to 4087, taken as 12 bits'), (tiff(TWELVE), RAMP, 'up to 4087, taken as 12 bits'),
    (tiff(TWELVE, '>'), RAMP, 'taken as 12 bits'), (png(RAMP.astype(np.uint16)), RAMP, 'up to 255, taken as 8 bits'),
    (png(TWELVE, sBIT=b'\x0c'), RAMP, ''), (tiff(TWELVE, t281=[4095]), RAMP, ''), (tiff(TWELVE, t341=[4095]), RAMP, ''),
    (png(DARK * 100, sBIT=b'\x0c'), DARK * 100 >> 4, ''), (tiff(DARK, t281=[4095]), DARK >> 4, ''),
    (png(TWELVE, sBIT=b'\x10'), TWELVE >> 8, ''), (tiff(TWELVE, t281=[65535]), TWELVE >> 8, ''),
    (png(TWELVE // 16 * 16, sBIT=b'\x0c'), TWELVE >> 8, ''),  # scaled up, as the standard demands: a dark image
    (png(FULL, sBIT=b'\x0c'), RAMP, ''), (tiff(FULL, t281=[4095]), RAMP, ''),  # brighter than what is stated
    (tiff(TWELVE, t281=[4087]), RAMP, 'taken as 12 bits'),  # measured: says nothing about the bits
    (png(RAMP.astype(np.uint16) * 64 + 1, sBIT=b'\x0e'), RAMP, ''),
    (png(DARK * 257), DARK, ''), (png(DARK * 256), DARK, ''), (png(DARK * 0), DARK * 0, ''),
    (b'P5 16 16 4095\n' + TWELVE.astype('>u2').tobytes(), RAMP, ''),
    (b'P5 16 16 4095\n' + DARK.astype('>u2').tobytes(), DARK >> 4, ''),
    (b'P5 16 16 65535\n' + FULL.astype('>u2').tobytes(), RAMP, ''),
    (b'P5 16 16 65535\n' + TWELVE.astype('>u2').tobytes(), RAMP, 'taken as 12 bits'),
    (b'P2 16 16 4095\n' + ' '.join(map(str, TWELVE.ravel())).encode(), RAMP, ''),
    (encode(FULL, 'JPEG2000', irreversible=False), RAMP, ''),
    (tiff(65535 - FULL, photometric=0), RAMP, ''), (tiff(4095 - TWELVE, photometric=0), RAMP, 'taken as 12 bits'),
    (tiff(255 - RAMP, photometric=0), RAMP, ''),
], ids=range(32))
def test_sixteen_bits(data, want, guessed, said):
    assert np.abs(grey(data, said).astype(int) - want).max() == 0
    assert len(said) == bool(guessed) and guessed in ''.join(said)


def test_twelve_bits_a_sample(said):
    flat = TWELVE.ravel()
    packed = np.stack([flat[::2] >> 4, (flat[::2] & 15) << 4 | flat[1::2] >> 8, flat[1::2] & 255], 1).astype(np.uint8)
    data = tiff(packed.reshape(16, 24), t256=[16], t258=[12], t279=[384])
    assert (grey(data, said) == RAMP).all() and not said


@pytest.mark.parametrize('kind', ['<i4', '>i4', '<u4', '<i2', '>i2'])
def test_other_integers(kind, said):
    order, kind = kind[0], np.dtype(kind[1:])
    for values, want in ((RAMP, RAMP), (TWELVE, RAMP), (FULL, RAMP), (FULL // 2, RAMP // 2)):
        if kind.itemsize == 2:
            values, want = values.clip(0, 32767), want if values.max() < 32768 else want.clip(0, 127)
        assert (grey(tiff(values.astype(kind), order), said) == want).all()
    assert sorted(text.split(', ')[1] for text in said) == ['taken as 12 bits; so are others of this kind',
                                                            'taken as 8 bits; so are others of this kind']
    bits = 32 if kind.kind == 'u' else 31
    if kind.itemsize == 4:
        most = RAMP.astype(np.int64) << (bits - 8) | 12345
        assert (grey(tiff(most.astype(kind), order), said) == RAMP).all() and f'taken as {bits} bits' in said[-1]
        with pytest.raises(BrokenImage, match=r'^x: values from 0 to 1044480 are neither of 16 nor of 3. bits: scale'):
            decode(tiff((RAMP.astype(kind) << 12), order), 'x')
    if kind.kind == 'i':
        with pytest.raises(BrokenImage, match='^x: values from -5 to 250: negative ones are no brightness: scale them'):
            decode(tiff(RAMP.astype(kind) - 5, order), 'x')
    with pytest.raises(BrokenImage, match='negative ones'):
        decode(tiff(RAMP.astype(np.int8)), 'x')


@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('low, high, want, guessed', [
    (0, 1, RAMP, 'from 0 to 1, taken as 0 to 1'), (0, 255, RAMP, 'from 0 to 255, taken as 0 to 255'),
    (-0.05, 1.05, None, 'taken as 0 to 1'), (-9, 260, None, 'taken as 0 to 255'), (0, 0, RAMP * 0, 'taken as 0 to 1'),
    (0, 0.5, None, 'from 0 to 0.5, taken as 0 to 1')])
def test_floats(order, low, high, want, guessed, said):
    values = (RAMP / 255 * (high - low) + low).astype(np.float32)
    found = grey(tiff(values, order), said)
    if want is None:
        want = np.rint(values * 255).clip(0, 255) if high < 2 else np.trunc(values.clip(0, 255))
    assert (found == want).all()
    assert len(said) == 1 and guessed in said[0]
    if high == 255 or high == 260:
        assert (found == np.asarray(Image.fromarray(values).convert('RGB'))[..., 0]).all()  # as ever


def test_floats_that_say_their_white(said):
    values = (RAMP / 255).astype(np.float32)
    assert (grey(tiff(values, t341=[1.0]), said) == RAMP).all()
    assert (grey(tiff(values * 4095, t341=[4095.0]), said) == RAMP).all()
    assert (grey(tiff(values * 10, t341=[255.0]), said) == np.trunc(values * 10)).all()  # dark, and meant so
    assert (grey(tiff(1 - values, photometric=0, t341=[1.0]), said) == RAMP).all()
    assert not said


@pytest.mark.parametrize('values, message', [
    (RAMP / 255 * 2 - 1, 'float values from -1 to 1 are neither 0 to 1 nor 0 to 255: scale them'),
    (RAMP / 255 * 3, 'from 0 to 3 are'), (RAMP * 257.0, 'from 0 to 65535 are'), (RAMP - 100.0, 'from -100 to 155 are'),
    (np.where(RAMP == 7, np.nan, 0.5), 'not finite'), (np.where(RAMP == 7, np.inf, 0.5), 'not finite')])
def test_floats_that_could_mean_anything(values, message):
    with pytest.raises(BrokenImage, match=f'^x: .*{message}'):
        decode(tiff(values.astype(np.float32)), 'x')


@pytest.mark.parametrize('make', [png, lambda v, **_: tiff(v, photometric=2), lambda v, **_: encode_cv(v, '.tiff')],
                         ids=['png', 'tiff', 'lzw'])
def test_sixteen_bits_a_channel(make, said):
    twelve, full = RGB.astype(np.uint16) * 16 + 7, RGB.astype(np.uint16) * 256 + 99
    assert (decode(make(full), 'x', say=said.append) == RGB).all() and not said
    assert (decode(make(twelve), 'x', say=said.append) == RGB).all()
    assert len(said) == 1 and 'up to 4087, taken as 12 bits' in said[0]
    assert (decode(make(RGB % 16 * np.uint16(257)), 'x') == RGB % 16).all()
    assert (decode(make(twelve * 0), 'x') == 0).all()
    if make is png:
        assert (decode(png(twelve, sBIT=b'\x10\x10\x10'), 'x') == twelve >> 8).all()
        assert (decode(png(RGB.astype(np.uint16) * 64 + 1, sBIT=b'\x0e\x0d\x0e'), 'x') == RGB).all()
        alpha = np.full((16, 16, 1), 65535, np.uint16)
        assert (decode(png(np.concatenate([twelve, alpha], 2)), 'x') == RGB).all()
        assert (decode(png(np.concatenate([TWELVE[..., None], alpha], 2)), 'x') == RAMP[..., None]).all()
    assert len(said) == 1


def encode_cv(values, ending):
    return cv2.imencode(ending, values[..., ::-1])[1].tobytes()


def test_each_guess_is_said_once(said):
    for name in 'abc':
        for data in (png(TWELVE), tiff((RAMP / 255).astype(np.float32))):
            decode(data, name, say=said.append)
    assert said == ['a: integer values up to 4087, taken as 12 bits; so are others of this kind, which are not named',
                    'a: float values from 0 to 1, taken as 0 to 1; so are others of this kind, which are not named']


@pytest.mark.parametrize('data, message', [
    (tiff(np.zeros((4, 4), np.float64)), 'a TIFF of 1 x 64 bits .sample format 3, photometric interpretation 1.,'),
    (tiff(np.zeros((4, 4, 5), np.uint16), photometric=2), 'a TIFF of 5 x 16 bits .sample format 1, .* 2., which'),
    (tiff(np.zeros((4, 4), np.float16)), 'a TIFF of 1 x 16 bits .sample format 3'),
    (tiff(np.zeros((4, 4), np.uint32), '>'), 'a TIFF of 1 x 32 bits'),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'of an unknown format$'),
    (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', 'unknown format'),
    (b'8BPS\0\x01' + bytes(6) + b'\0\x03\0\0\0\t\0\0\0\t\0\x08\0\x03' + bytes(999), 'unknown format')])
def test_what_cannot_be_read_is_named(data, message):
    with pytest.raises(BrokenImage, match=f'^x: .*{message}'):
        decode(data, 'x')


@pytest.mark.parametrize('form', FORMATS)
def test_every_format_is_read(form):
    options = {'WEBP': {'lossless': True}, 'JPEG': {'quality': 100, 'subsampling': 0}}.get(form, {})
    image = Image.fromarray(RGB)
    data = cv2_or_raw(form) or encode(image.quantize(256) if form == 'GIF' else image, form, **options)
    want = np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))
    assert (decode(data, 'x') == want).all() and np.abs(want.astype(int) - RGB).max() <= (60 if form == 'GIF' else 3)
    assert extent(data) == 256


def cv2_or_raw(form):
    """Of what Pillow cannot write: QOI, as literal pixels, and SUN."""
    if form == 'SUN':
        return struct.pack('>8I', 0x59a66a95, 16, 16, 24, 768, 1, 0, 0) + RGB[..., ::-1].tobytes()
    if form != 'QOI':
        return b''
    pixels = b''.join(b'\xfe' + bytes(pixel) for pixel in RGB.reshape(-1, 3))
    return b'qoif' + struct.pack('>IIBB', 16, 16, 3, 0) + pixels + bytes(7) + b'\1'


def turned(number, exif=None):
    exif = exif or Image.Exif()
    exif[0x0112] = number
    return exif


PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((23, 17))


@pytest.mark.parametrize('number', range(1, 9))
@pytest.mark.parametrize('form, mode, options', [
    ('JPEG', 'RGB', {}), ('JPEG', 'L', {}), ('JPEG', 'CMYK', {}), ('PNG', 'RGB', {}), ('PNG', 'LA', {}),
    ('PNG', 'I;16', {}), ('WEBP', 'RGB', {'lossless': True}), ('TIFF', 'RGB', {}),
    ('TIFF', 'L', {'compression': 'tiff_lzw'}), ('TIFF', 'I;16', {}), ('MPO', 'RGB', {'save_all': True})])
def test_exif_orientation(form, mode, options, number):
    image = Image.fromarray(np.asarray(PICTURE.convert('L')).astype(np.uint16) * 256) if mode == 'I;16' else (
        PICTURE.convert(mode))
    data = encode(image, form, exif=turned(number), **options)
    with Image.open(io.BytesIO(data)) as opened:
        want = ImageOps.exif_transpose(opened)
        plain = opened.convert('RGB')  # with a TIFF already turned
    if mode == 'I;16':
        want, plain = (Image.fromarray((np.asarray(part) >> 8).astype(np.uint8)) for part in (want, opened))
    upright, ignored = decode(data, 'x', upright=True), decode(data, 'x')
    assert upright.flags.c_contiguous and upright.shape[:2] == ((17, 23) if number < 5 else (23, 17))
    assert (upright == np.asarray(want.convert('RGB'))).all()
    assert (ignored == np.asarray(plain.convert('RGB'))).all()
    assert ignored.shape == (upright if form == 'TIFF' else np.empty((17, 23, 3))).shape
    assert orientation(data) == (1 if form == 'TIFF' else number)


def jpeg_with(payload):
    data = encode(PICTURE, 'JPEG')
    return data[:2] + b'\xff\xe1' + struct.pack('>H', len(payload) + 2) + payload + data[2:]


def exif(order, kind=3, value=6, tag=0x0112, head=b'Exif\0\0'):
    value = struct.pack(f'{order}H', value).ljust(4, b'\0')
    return (head + (b'II' if order == '<' else b'MM') + struct.pack(f'{order}HIH', 42, 8, 1)
            + struct.pack(f'{order}HHI', tag, kind, 1) + value + bytes(4))


@pytest.mark.parametrize('payload, turn', [
    (exif('<'), 6), (exif('>'), 6), (exif('<', value=0), 1), (exif('>', value=9), 1), (exif('<', value=60000), 1),
    (exif('<', tag=0x0111), 1), (exif('<', kind=2), 1), (exif('<', kind=99), 1), (exif('<')[:-9], 1),
    (exif('<')[:8], 1), (b'Exif\0\0', 1), (b'Exif\0\0' + bytes(50), 1), (b'Exif\0\0' + b'\xff' * 50, 1),
    (exif('<', head=b'http:'), 1)], ids=range(14))
def test_exif_of_any_order_and_garbage(payload, turn):
    data = jpeg_with(payload)
    want = decode(encode(PICTURE, 'JPEG'), 'x')
    assert orientation(data) == turn
    assert (decode(data, 'x') == want).all()
    assert (decode(data, 'x', upright=True) == (np.rot90(want, -1) if turn == 6 else want)).all()


@pytest.mark.parametrize('magic, maximum', [(b'P5', 254), (b'P5', 1000), (b'P5', 4095), (b'P6', 100), (b'P6', 1023),
                                            (b'P6', 65535)])
def test_any_maximum_of_pnm_as_pillow_reads_it(magic, maximum, said):
    channels = 3 if magic == b'P6' else 1
    values = np.random.default_rng(9).integers(0, maximum + 1, (40, 50, channels))
    values[0, :2] = [[0] * channels, [min(maximum + 1, 255 if maximum < 256 else 65535)] * channels]
    data = b'%s 50 40 %d\n' % (magic, maximum) + values.astype('u1' if maximum < 256 else '>u2').tobytes()
    with Image.open(io.BytesIO(data)) as image:
        want = np.asarray(image)
    want = want >> 8 if channels == 1 and maximum > 255 else want
    assert (decode(data, 'x', say=said.append) == want.reshape(40, 50, channels)).all() and not said
    with pytest.raises(BrokenImage, match='^x: image file is truncated'):
        decode(data[:-1], 'x')


def test_a_jpeg_of_too_many_scans(monkeypatch):
    """Each costs the time of a whole image, in some bytes. What looks like one in other segments or after the end is
    none.
    """
    data = encode(PICTURE, 'JPEG', progressive=True)
    last = data[data.rfind(b'\xff\xc4'):-2]
    many = data[:-2] + 50 * last + b'\xff\xd9'
    monkeypatch.setattr(decoding, 'MAX_PIXELS', 23 * 17 * 3)
    assert decode(many, 'x').shape == (17, 23, 3)  # small: 60 times its pixels are not many
    monkeypatch.setattr(decoding, 'MAX_PIXELS', 23 * 17)
    with pytest.raises(BrokenImage, match='^x: 23 x 17 pixels in 60 scans are too many'):
        decode(many, 'x')
    for other in (data + 99 * b'\xff\xda', jpeg_with(b'http:' + 99 * b'\xff\xda')):
        assert decode(other, 'x').shape == (17, 23, 3)


def test_a_tile_that_is_larger_than_its_image(monkeypatch):
    pixels = zlib.compress(bytes(128 * 64))
    data = tiff(np.zeros((16, 16), np.uint8), t259=[8], t322=[128], t323=[64], t324=[0], t325=[len(pixels)])
    assert extent(data) == 128 * 64
    monkeypatch.setattr(decoding, 'MAX_PIXELS', 128 * 64 - 1)
    with pytest.raises(BrokenImage, match='^x: 16 x 16 pixels are more than'):
        decode(data, 'x')


@pytest.mark.parametrize('mode, form', [('RGBA', 'PNG'), ('P', 'PNG'), ('LA', 'PNG'), ('CMYK', 'TIFF'), ('1', 'PNG'),
                                        ('L', 'TIFF'), ('F', 'TIFF'), ('I', 'TIFF'), ('I;16', 'TIFF')])
@pytest.mark.parametrize('strip', [1, 100, 23 * 16])
def test_strips_change_nothing(mode, form, strip, monkeypatch):
    if mode == 'I;16':
        image = Image.fromarray(np.asarray(PICTURE.convert('L')).astype(np.uint16) * 256)
    else:
        image = PICTURE.convert('L').convert(mode) if mode in 'IF' else PICTURE.convert(mode)
    data = encode(image, form)
    want = decode(data, 'x')
    monkeypatch.setattr(decoding, 'STRIP', strip)
    assert (decode(data, 'x') == want).all()


def test_extent():
    assert [extent(encode(PICTURE, form)) for form in ('JPEG', 'PNG', 'WEBP', 'TIFF')] == [23 * 17] * 4
    assert extent(b'nothing') == extent(b'') == 0
