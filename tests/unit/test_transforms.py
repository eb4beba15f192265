"""Decoding of every kind of file, torchvision's crop arithmetic, Pillow's resize bit for bit."""
import io
import math
import time
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from support import machine

from mxsimmim.config import AugmentConfig, DataConfig, MaskConfig, ModelConfig
from mxsimmim.data import decode as decoding, resampling
from mxsimmim.data.augment import erase, rand_augment
from mxsimmim.data.sampling import generator
from mxsimmim.data.transforms import (
    BrokenImage,
    ClassifyEvalTransform,
    ClassifyTransform,
    EvalTransform,
    PretrainTransform,
    decode,
    normalise,
    random_crop,
    resize,
    resize_short_side,
)

VIT = ModelConfig(drop_path=0.1)


def picture(width, height, seed=0):
    """A smooth random picture with some noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.BICUBIC)).astype(int)
    return (smooth + rng.integers(-12, 13, (height, width, 3))).clip(0, 255).astype(np.uint8)


def encode(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


RGB = Image.fromarray(picture(61, 47))


@pytest.mark.parametrize('form', ['PNG', 'BMP', 'TIFF'])
def test_lossless_rgb(form):
    assert (decode(encode(RGB, form), 'x') == np.asarray(RGB)).all()


@pytest.mark.parametrize('image', [RGB, RGB.convert('L'), RGB.resize((1, 1)), RGB.resize((17, 3))],
                         ids=['rgb', 'grey', '1x1', '17x3'])
@pytest.mark.parametrize('options', [{}, {'quality': 30}, {'subsampling': 0}, {'subsampling': 1},
                                     {'progressive': True}, {'quality': 95, 'optimize': True}], ids=str)
def test_jpeg_is_decoded_as_pillow_does(image, options):
    data = encode(image, 'JPEG', **options)
    with mock.patch.object(decoding.Image, 'open', side_effect=AssertionError('the fast path was not taken')):
        fast = decode(data, 'x')
    assert fast.shape == (image.height, image.width, 3)
    assert (fast == np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))).all()


def test_cmyk_jpeg():
    data = encode(RGB.convert('CMYK'), 'JPEG', quality=100, subsampling=0)
    assert np.abs(decode(data, 'x').astype(int) - np.asarray(RGB)).max() <= 3


def test_grey_is_repeated():
    grey = RGB.convert('L')
    assert (decode(encode(grey, 'PNG'), 'x') == np.asarray(grey)[..., None]).all()
    assert (decode(np.asarray(grey), 'x') == np.asarray(grey)[..., None]).all()
    assert (decode(np.asarray(RGB), 'x') == np.asarray(RGB)).all()
    assert set(np.unique(decode(encode(grey.convert('1'), 'PNG'), 'x'))) == {0, 255}


def test_palette_and_transparency(recwarn):
    palette = RGB.quantize(16)
    want = np.asarray(palette.convert('RGB'))
    assert (decode(encode(palette, 'PNG'), 'x') == want).all()
    assert (decode(encode(palette, 'GIF'), 'x') == want).all()
    assert (decode(encode(palette, 'PNG', transparency=bytes(range(16))), 'x') == want).all()
    clear = RGB.copy()
    clear.putalpha(RGB.convert('L'))
    assert (decode(encode(clear, 'PNG'), 'x') == np.asarray(RGB)).all()
    assert (decode(encode(clear.convert('LA'), 'PNG'), 'x') == np.asarray(RGB.convert('L'))[..., None]).all()
    assert not recwarn.list


def test_the_first_frame_of_several():
    frames = [Image.new('L', (4, 4), value).convert('P') for value in (10, 200)]
    data = encode(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    assert (decode(data, 'x') == 10).all()


@pytest.mark.parametrize('form', ['PNG', 'TIFF'])
def test_sixteen_bits_become_eight(form):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0x0000, 0x0101, …, 0xffff
    data = encode(Image.fromarray(values), form)
    assert (decode(data, 'x') == np.arange(256).reshape(16, 16, 1)).all()


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode(encode(RGB, 'JPEG', exif=exif), 'x').shape == (47, 61, 3)


JPEG, PNG = encode(RGB, 'JPEG'), encode(RGB, 'PNG')


@pytest.mark.parametrize('data, reason', [
    (b'', 'empty file'), (b'hello', 'not an image'), (b'\xff\xd8', 'not an image'), (JPEG[:-400], 'truncated'),
    (JPEG[:100], ''), (PNG[:-400], ''), (PNG[:30], ''), (PNG[:60] + bytes(50) + PNG[110:], ''),
    (b'GIF89a' + bytes(20), ''), (b'BM' + bytes(50), '')], ids=str)
def test_broken_files_are_named(data, reason):
    with pytest.raises(BrokenImage, match=f'^folder/a.jpg: .*{reason}') as caught:
        decode(data, 'folder/a.jpg')
    assert '\n' not in str(caught.value) and 'BytesIO' not in str(caught.value)


@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_decompression_bomb(form, monkeypatch):
    monkeypatch.setattr(decoding, 'MAX_PIXELS', 1000)
    with pytest.raises(BrokenImage, match='x.png: 61 x 47 pixels are more than 1000'):
        decode(encode(RGB, form), 'x.png')


@pytest.fixture(params=['native', 'python'])
def passes(request, monkeypatch):
    """How passes are computed: by the library, or as where there is none."""
    if request.param == 'native':
        machine.need_native()
        assert resampling._one_pass() is not resampling.resize_rows
    else:
        monkeypatch.setattr(resampling, '_one_pass', lambda: resampling.resize_rows)


@pytest.mark.parametrize('width, height, size', [(500, 375, 224), (231, 224, 224), (40, 700, 32), (8, 8, 32),
                                                 (224, 224, 224), (1, 1, 7), (3, 500, 64), (1200, 900, 192), (5, 2, 1)])
@pytest.mark.parametrize('bicubic', [False, True])
def test_resize_equals_pillow(width, height, size, bicubic, passes):
    image = picture(width, height, seed=width)
    image[:, ::3] = np.where(image[:, ::3] < 128, 0, 255)  # edges that a cubic overshoots at
    want = np.asarray(Image.fromarray(image).resize((size, size), Image.BICUBIC if bicubic else Image.BILINEAR))
    assert (resize(image, size, bicubic=bicubic) == want).all()
    assert (resize(image, size, flip=True, bicubic=bicubic) == want[:, ::-1]).all()


def test_resize_of_a_crop_does_not_look_beyond_it():
    image = picture(500, 375)
    want = Image.fromarray(image).crop((30, 20, 430, 350)).resize((224, 224), Image.BILINEAR)
    assert (resize(image[20:350, 30:430], 224) == np.asarray(want)).all()


class Fixed:
    """A generator whose numbers are given: uniform(low, high) at a share of the way, integers(n) at a share of n."""

    def __init__(self, *shares):
        self.shares = iter(shares)

    def uniform(self, low, high):
        return low + (high - low) * next(self.shares)

    def integers(self, n):
        return int(n * next(self.shares))


@pytest.mark.parametrize('shares, box', [
    ((1, 0.5, 0, 0), (0, 0, 300, 300)),  # the whole area, square
    ((0, 0.5, 0, 0), (0, 0, 246, 246)),  # 0.67 of it: sqrt(60300) = 245.56
    ((0, 0.5, 0.5, 0.999), (27, 54, 246, 246)),  # 55 places a side
    ((0, 1, 0, 0), (0, 0, 213, 284)),  # 4 : 3; sqrt(60300 * 4 / 3) = 283.5
    ((0, 0, 0, 0), (0, 0, 284, 213)),
    ((1, 0) + (0, 0.5, 0, 0), (0, 0, 246, 246)),  # the first does not fit: 346 x 260
])
def test_random_crop_by_hand(shares, box):
    assert random_crop(Fixed(*shares), 300, 300, (0.67, 1), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize('height, width, box', [
    (100, 1000, (0, 433, 100, 133)),  # too wide: the central 4 : 3
    (1000, 100, (433, 0, 133, 100)),  # too tall: the central 3 : 4
    (100, 120, (0, 0, 100, 120))])
def test_random_crop_that_never_fits(height, width, box):
    assert random_crop(Fixed(*[1, 0] * 5, *[1, 1] * 5), height, width, (1, 1), (3 / 4, 4 / 3)) == box


def test_random_crop_statistics():
    """Area uniform in (0.67, 1), shape log-uniform, place uniform: on an image that nearly every box fits."""
    rng = generator(17)
    boxes = np.array([random_crop(rng, 4000, 4000, (0.05, 0.5), (3 / 4, 4 / 3)) for _ in range(20000)])
    top, left, height, width = boxes.T
    area, shape = height * width / 4000 ** 2, np.log(width / height)
    error = 5 / math.sqrt(12 * 20000)  # five standard errors of a uniform's mean
    assert abs(area.mean() - 0.275) < 0.45 * error and area.min() >= 0.0499 and area.max() <= 0.5001
    assert abs(shape.mean()) < 2 * math.log(4 / 3) * error and np.abs(shape).max() < math.log(4 / 3) + 1e-3
    assert abs((top / (4000 - height)).mean() - 0.5) < error
    assert abs((left / (4000 - width)).mean() - 0.5) < error


def test_pretrain_transform_draws_mask_first():
    transform = PretrainTransform(DataConfig(), MaskConfig(), VIT)
    small, large = (transform(picture(w, h), generator(1, 2)) for w, h in ((30, 200), (500, 375)))
    assert small['mask'].shape == (14, 14) and small['mask'].sum() == 30 * 4
    assert (small['mask'] == large['mask']).all() and (small['uniform'] == large['uniform']).all()
    assert small['uniform'].shape == (24,) and small['uniform'].dtype == np.float32
    assert 0 <= small['uniform'].min() and small['uniform'].max() < 1
    assert small['image'].shape == (224, 224, 3) and small['image'].dtype == np.uint8


def test_pretrain_transform_equals_the_pieces():
    transform, image = PretrainTransform(DataConfig(), MaskConfig(), ModelConfig()), picture(500, 375)
    flips = 0
    for number in range(20):
        rng = generator(number)
        rng.permutation(49)
        flip = rng.random() < 0.5
        top, left, height, width = random_crop(rng, 375, 500, (0.67, 1.0), (3 / 4, 4 / 3))
        box = (left, top, left + width, top + height)
        want = np.asarray(Image.fromarray(image).crop(box).resize((224, 224), Image.BILINEAR))
        sample = transform(image, generator(number))
        assert (sample['image'] == (want[:, ::-1] if flip else want)).all()
        assert sorted(sample) == ['image', 'mask']
        flips += flip
    assert 0 < flips < 20


def test_bicubic_crops():
    data = DataConfig(interpolation='bicubic', crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    image = picture(300, 300)
    want = np.asarray(Image.fromarray(image).resize((224, 224), Image.BICUBIC))
    assert (PretrainTransform(data, MaskConfig(), ModelConfig())(image, generator(0))['image'] == want).all()


def test_flip_can_be_switched_off():
    data = DataConfig(flip=0.0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    transform, image = PretrainTransform(data, MaskConfig(), ModelConfig()), picture(300, 300)
    want = np.asarray(Image.fromarray(image).resize((224, 224), Image.BILINEAR))
    assert all((transform(image, generator(i))['image'] == want).all() for i in range(10))


@pytest.mark.parametrize('width, height, box', [(500, 375, (62, 0, 437, 375)), (375, 500, (0, 62, 375, 437)),
                                                (219, 219, (0, 0, 219, 219)), (100, 1001, (0, 450, 100, 550))])
def test_eval_transform(width, height, box):
    image = picture(width, height)
    sample = EvalTransform(DataConfig(), MaskConfig(), ModelConfig(img_size=192, drop_path=0.1))(image, generator(4))
    want = np.asarray(Image.fromarray(image).crop(box).resize((192, 192), Image.BILINEAR))
    assert (sample['image'] == want).all()
    assert sample['mask'].sum() == 22 * 4 and sorted(sample) == ['image', 'mask']


@pytest.mark.parametrize('size, resized', [((500, 375), (292, 219)), ((375, 500), (219, 292)),
                                           ((100, 1001), (219, 2192))])
def test_short_side(size, resized):
    assert resize_short_side(Image.new('RGB', size), 219).size == resized


@pytest.mark.parametrize('width, height', [(1, 300), (300, 1), (3, 400), (2, 255), (255, 256), (1, 1), (9, 400)])
@pytest.mark.parametrize('size, crop', [(224, 0.875), (32, 1.0)])
def test_thin_images_as_if_all_were_resized(width, height, size, crop):
    image, model = picture(width, height, seed=3), ModelConfig(img_size=size, patch_size=8)
    resized = resize_short_side(Image.fromarray(image), int(size / crop))
    left, top = (round((side - size) / 2) for side in resized.size)
    want = np.asarray(resized.crop((left, top, left + size, top + size)))
    assert (ClassifyEvalTransform(DataConfig(eval_crop=crop), model)(image, generator(0))['image'] == want).all()


@pytest.mark.parametrize('length', [60000, 80_000_000])
def test_very_thin_images(length):
    """Each pixel becomes 256: what is cut from the middle depends on the few in the middle, in time and memory, too."""
    image = np.random.default_rng(1).integers(0, 256, (20, 1, 3), np.uint8)
    whole = np.zeros((length, 1, 3), np.uint8)
    whole[length // 2 - 10:length // 2 + 10] = image
    evaluate = ClassifyEvalTransform(DataConfig(), ModelConfig())
    want = evaluate(image, generator(0))['image']
    assert want.std() > 20
    began = time.perf_counter()
    assert (evaluate(whole, generator(0))['image'] == want).all()
    assert (evaluate(whole.transpose(1, 0, 2), generator(0))['image'] == want.transpose(1, 0, 2)).all()
    assert time.perf_counter() - began < 5
    for transform in (PretrainTransform, EvalTransform):
        sample = transform(DataConfig(), MaskConfig(), ModelConfig())(whole, generator(0))
        assert (sample['image'] == sample['image'][0, 0]).all()  # one pixel of it


@pytest.mark.parametrize('size', [(3000, 1500), (1500, 3000)])
@pytest.mark.parametrize('bicubic', [False, True])
def test_resize_in_strips(size, bicubic, passes):
    image = picture(*size)
    want = Image.fromarray(image).resize((64, 64), Image.BICUBIC if bicubic else Image.BILINEAR)
    for strip in (resampling.STRIP, 100_000):
        with mock.patch.object(resampling, 'STRIP', strip):
            assert (resize(image, 64, bicubic=bicubic) == np.asarray(want)).all()


@pytest.mark.parametrize('height, width, ratio, box', [
    (1, 900, (0.2, 0.3), (0, 449, 1, 1)), (900, 1, (3.0, 4.0), (449, 0, 1, 1)), (1, 1, (0.1, 0.2), (0, 0, 1, 1))])
def test_no_crop_is_empty(height, width, ratio, box):
    assert random_crop(generator(0), height, width, (0.9, 1.0), ratio) == box


def test_digits_take_the_same_way():
    model = ModelConfig(img_size=32, patch_size=4)
    digit = decode(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4, 'digits#0')
    for transform in (PretrainTransform, EvalTransform):
        sample = transform(DataConfig(), MaskConfig(patch_size=8), model)(digit, generator(0))
        assert sample['image'].shape == (32, 32, 3) and (sample['image'][..., :1] == sample['image']).all()


def laid_out(arrays):
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def test_allocate():
    fields = {'image': ((5, 224, 224, 3), np.uint8), 'mask': ((5, 14, 14), np.uint8)}
    assert laid_out(EvalTransform(DataConfig(), MaskConfig(), VIT).allocate(5)) == fields
    assert laid_out(PretrainTransform(DataConfig(), MaskConfig(), VIT).allocate(5)) == {
        **fields, 'uniform': ((5, 24), np.float32)}


def test_normalise():
    image = np.arange(256 * 3).reshape(16, 16, 3).astype(np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    result = normalise(image, mean, std)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_allclose(result, ((image / 255 - mean) / std).transpose(2, 0, 1), atol=1e-6)


LABELS = np.array([2, 0, 3])
FINE = DataConfig(crop_scale=(0.08, 1.0), interpolation='bicubic')


def test_classify_transform_equals_the_pieces():
    transform, image = ClassifyTransform(FINE, AugmentConfig(), VIT, LABELS, 4), picture(500, 375)
    how = {'resample': Image.BICUBIC, 'fillcolor': (124, 116, 104)}  # 255 x the mean
    erased = 0
    for number in range(20):
        rng = generator(number)
        uniform = rng.random(24, np.float32)
        flip = rng.random() < 0.5
        top, left, height, width = random_crop(rng, 375, 500, (0.08, 1.0), (3 / 4, 4 / 3))
        crop = Image.fromarray(image).crop((left, top, left + width, top + height)).resize((224, 224), Image.BICUBIC)
        crop = crop.transpose(Image.FLIP_LEFT_RIGHT) if flip else crop
        before = normalise(np.asarray(rand_augment(crop, rng, AugmentConfig(), how)), FINE.mean, FINE.std)
        want = before.copy()
        erase(want, rng, 0.25)
        sample = transform(image, generator(number), number % 3)
        assert (sample['image'] == want).all() and (sample['uniform'] == uniform).all()
        assert sorted(sample) == ['image', 'label', 'uniform']
        np.testing.assert_allclose(sample['label'], np.eye(4)[LABELS[number % 3]] * 0.9 + 0.025, atol=1e-7)
        erased += (want != before).any()
    assert 0 < erased < 20


def test_classify_transform_without_augmentations():
    off = AugmentConfig(rand_ops=0, erasing=0, mixup=0, cutmix=0, smoothing=0)
    data = DataConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0)
    transform, image = ClassifyTransform(data, off, ModelConfig(), LABELS, 4), picture(300, 300)
    want = normalise(np.asarray(Image.fromarray(image).resize((224, 224), Image.BILINEAR)), data.mean, data.std)
    sample = transform(image, generator(1), 1)
    assert (sample['image'] == want).all() and sample['label'].tolist() == [1, 0, 0, 0] and 'uniform' not in sample
    assert transform.group == 1 and ClassifyTransform(data, AugmentConfig(), VIT, LABELS, 4).group == 2


@pytest.mark.parametrize('width, height, size, crop, short, left, top', [
    (500, 375, 192, 0.875, (292, 219), 50, 14),  # 13.5 is rounded to the even 14
    (375, 500, 192, 0.875, (219, 292), 14, 50), (500, 375, 224, 0.875, (341, 256), 58, 16),  # and 58.5 to 58
    (256, 256, 224, 0.875, (256, 256), 16, 16), (1000, 80, 224, 0.875, (3200, 256), 1488, 16),
    (8, 8, 32, 0.875, (36, 36), 2, 2), (8, 8, 32, 1.0, (32, 32), 0, 0), (640, 427, 224, 1.0, (335, 224), 56, 0)])
def test_classify_eval_transform(width, height, size, crop, short, left, top):
    """The boxes of torchvision's Resize and CenterCrop, whose pixels these were found to equal."""
    image, data = picture(width, height), DataConfig(eval_crop=crop)
    resized = Image.fromarray(image).resize(short, Image.BICUBIC)
    sample = ClassifyEvalTransform(data, ModelConfig(img_size=size, patch_size=8))(image, generator(0))
    assert (sample['image'] == np.asarray(resized.crop((left, top, left + size, top + size)))).all()
    assert sorted(sample) == ['image']
    labelled = ClassifyEvalTransform(data, ModelConfig(img_size=size, patch_size=8), LABELS, 4)
    assert labelled(image, generator(0), 2)['label'].tolist() == [0, 0, 0, 1]


def test_classify_allocate():
    assert laid_out(ClassifyTransform(FINE, AugmentConfig(), VIT, LABELS, 4).allocate(5)) == {
        'image': ((5, 3, 224, 224), np.float32), 'label': ((5, 4), np.float32), 'uniform': ((5, 24), np.float32)}
    fields = {'image': ((5, 224, 224, 3), np.uint8)}
    assert laid_out(ClassifyEvalTransform(FINE, VIT).allocate(5)) == fields
    assert laid_out(ClassifyEvalTransform(FINE, VIT, LABELS, 4).allocate(5)) == {
        **fields, 'label': ((5, 4), np.float32)}
