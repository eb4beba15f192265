"""RandAugment's table, random erasing, mixup and CutMix: against pixels by hand and numbers recorded from timm 0.4."""
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mxsimmim.config import AugmentConfig
from mxsimmim.data import augment
from mxsimmim.data.augment import OPERATIONS, Operation, cut_box, erase, mix_pair, mixes, rand_augment, smooth_label
from mxsimmim.data.sampling import generator

HOW = {'resample': Image.BICUBIC, 'fillcolor': (124, 116, 104)}
SEED = 5  # of everything random here


@pytest.mark.parametrize('name, arguments', [
    ('Rotate', (0, 9, 15, 27, 30)), ('Posterize', (4, 3, 2, 1, 0)), ('Solarize', (256, 180, 128, 26, 0)),
    ('SolarizeAdd', (0, 33, 55, 99, 110)), ('Color', (0, 0.27, 0.45, 0.81, 0.9)),
    ('Contrast', (0, 0.27, 0.45, 0.81, 0.9)), ('Brightness', (0, 0.27, 0.45, 0.81, 0.9)),
    ('Sharpness', (0, 0.27, 0.45, 0.81, 0.9)), ('ShearX', (0, 0.09, 0.15, 0.27, 0.3)),
    ('ShearY', (0, 0.09, 0.15, 0.27, 0.3)), ('TranslateX', (0, 0.135, 0.225, 0.405, 0.45)),
    ('TranslateY', (0, 0.135, 0.225, 0.405, 0.45))])
def test_argument_of_each_level(name, arguments):
    """As timm's level functions give them; the enhancements' are the distance from 1, no change."""
    got = [OPERATIONS[name].argument(level) for level in (0, 3, 5, 9, 10)]
    np.testing.assert_allclose(got, arguments, atol=1e-12)


def test_which_operations_there_are_and_which_go_both_ways():
    assert len(OPERATIONS) == 15
    assert {name for name, operation in OPERATIONS.items() if not operation.signed} == {
        'AutoContrast', 'Equalize', 'Invert', 'Posterize', 'Solarize', 'SolarizeAdd'}


def apply(name, value, pixels):
    """One operation on a grey column or row, whose values come back; and the fill colour where it shows."""
    image = Image.fromarray(np.repeat(np.asarray(pixels, np.uint8)[..., None], 3, -1))
    result = np.asarray(OPERATIONS[name].apply(image, value, HOW))
    return np.where((result == HOW['fillcolor']).all(-1), -1, result[..., 0])


RAMP = np.tile(np.arange(100, 120), (20, 1))  # 20 x 20, brighter to the right


@pytest.mark.parametrize('name, value, want', [
    ('Invert', 0, 255 - RAMP), ('Posterize', 1, np.zeros_like(RAMP)), ('Posterize', 4, RAMP // 16 * 16),
    ('Solarize', 110, np.where(RAMP < 110, RAMP, 255 - RAMP)), ('SolarizeAdd', 33, RAMP + 33),
    ('SolarizeAdd', 99, RAMP + 99), ('Brightness', -0.5, RAMP // 2), ('Color', 0.9, RAMP),
    ('Contrast', -1.0, np.full_like(RAMP, 110)),  # of a grey image, all its mean
    ('AutoContrast', 0, np.round((RAMP - 100) * 255 / 19 - 0.5)),
    ('TranslateX', 0.45, np.hstack([RAMP[:, 9:], np.full((20, 9), -1)])),  # 9 of 20 pixels
    ('TranslateX', -0.45, np.hstack([np.full((20, 9), -1), RAMP[:, :11]])),
    ('TranslateY', 0.45, np.vstack([RAMP[:11], np.full((9, 20), -1)])),
    ('Rotate', 0, RAMP)], ids=str)
def test_pixels(name, value, want):
    got = apply(name, value, RAMP)
    assert np.abs(got - want).max() <= (1 if name == 'AutoContrast' else 0), got


def test_shear_moves_rows_in_proportion():
    """Row y shows what was value * (y + 1/2) to its right; on a ramp that is added to its brightness."""
    got = apply('ShearX', 0.3, RAMP)
    for y in (0, 5, 13):
        rounded_down = RAMP[y, 1:10] + 0.3 * (y + 0.5) - got[y, 1:10]
        assert (rounded_down > -0.1).all() and (rounded_down < 1).all()
        assert (got[y, -1] == -1) == (0.3 * (y + 0.5) >= 0.5)
    assert (apply('ShearY', 0.3, RAMP.T) == got.T).all()


def test_solarize_add_leaves_bright_pixels():
    assert apply('SolarizeAdd', 110, [[0, 127, 128, 255]]).tolist() == [[110, 237, 128, 255]]


def test_rand_augment_draws(monkeypatch):
    """Uniformly with replacement, half applied, strength N(9, 0.5) cut at 10, either sign."""
    drawn, images = [], 20000

    def recording(name, signed):
        return Operation(float, signed, lambda image, value, how: drawn.append((name, value)) or image)

    monkeypatch.setattr(augment, 'OPERATIONS', {n: recording(n, op.signed) for n, op in OPERATIONS.items()})
    rng, config = generator(SEED), AugmentConfig()
    lengths = Counter()
    for _ in range(images):
        before = len(drawn)
        rand_augment(None, rng, config, HOW)
        lengths[len(drawn) - before] += 1
    for length, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert abs(lengths[length] / images - share) < 0.015
    counts = Counter(name for name, _ in drawn)
    assert len(counts) == 15 and all(abs(count - images / 15) < 5 * math.sqrt(images / 15) for count in counts.values())
    levels = np.abs([value for _, value in drawn])
    assert levels.max() == 10 and abs((levels == 10).mean() - 0.02275) < 0.005  # beyond two deviations
    assert abs(levels.mean() - 8.99575) < 0.02
    assert abs(levels[levels < 9].mean() - (9 - 0.5 * math.sqrt(2 / math.pi))) < 0.02
    signed = np.array([value for name, value in drawn if OPERATIONS[name].signed])
    assert abs((signed < 0).mean() - 0.5) < 0.02
    assert all(value > 0 for name, value in drawn if not OPERATIONS[name].signed)


def test_rand_augment_is_a_function_of_the_generator():
    image = Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (32, 32, 3), np.uint8))
    results = [np.asarray(rand_augment(image, generator(SEED, n), AugmentConfig(), HOW)) for n in (1, 1, 2, 3, 4)]
    assert (results[0] == results[1]).all()
    assert len({result.tobytes() for result in results}) > 2
    off = AugmentConfig(rand_ops=0)
    assert rand_augment(image, generator(SEED), off, HOW) is image


def rectangles(probability, draws):
    """Height and width of what was erased, of each image that something was erased from; noise of the last ones."""
    rng, found, noise = generator(SEED, 1), [], []
    for _ in range(draws):
        image = np.full((3, 64, 64), 100, np.float32)
        erase(image, rng, probability)
        rows, columns = (image[0] != 100).any(1), (image[0] != 100).any(0)
        if rows.any():
            h, w = rows.sum(), columns.sum()
            assert (image != 100).sum() == 3 * h * w  # one rectangle, in all channels
            found.append((h, w, rows.argmax(), columns.argmax()))
            noise.append(image[image != 100])
    return np.array(found), np.concatenate(noise)


def test_erased_rectangles():
    """Share of the area and shape: moments of 400,000 draws of timm's RandomErasing at 224."""
    found, noise = rectangles(0.25, 12000)
    assert abs(len(found) / 12000 - 0.25) < 0.02
    height, width, top, left = found.T
    area, shape = height * width / 64 ** 2, np.log(height / width)
    assert abs(area.mean() - 0.17571) < 0.006 and abs(area.std() - 0.09005) < 0.004
    np.testing.assert_allclose(np.quantile(area, (0.1, 0.5, 0.9)), (0.05102, 0.17578, 0.30026), atol=0.012)
    assert abs(shape.mean()) < 0.06 and abs(shape.std() - 0.6917) < 0.03
    assert abs((top / (64 - height)).mean() - 0.5) < 0.03 and abs((left / (64 - width)).mean() - 0.5) < 0.03
    assert abs(noise.mean()) < 0.005 and abs(noise.std() - 1) < 0.005 and noise.dtype == np.float32


def test_erasing_can_be_switched_off():
    image = np.ones((3, 8, 8), np.float32)
    for number in range(50):
        erase(image, generator(SEED, number), 0.0)
    assert (image == 1).all()
    assert len(rectangles(1.0, 200)[0]) == 200


@pytest.mark.parametrize('smoothing, want', [(0.1, [0.025, 0.925, 0.025, 0.025]), (0.0, [0, 1, 0, 0])])
def test_smooth_label(smoothing, want):
    target = smooth_label(1, 4, smoothing)
    np.testing.assert_allclose(target, want, atol=1e-7)
    assert target.dtype == np.float32


def black_and_white():
    images = np.stack([np.zeros((3, 32, 32), np.float32), np.ones((3, 32, 32), np.float32)])
    return images, np.stack([smooth_label(1, 4, 0.1), smooth_label(3, 4, 0.1)])


class Given:
    """A generator whose numbers are given."""

    def __init__(self, *numbers):
        self.numbers = iter(numbers)

    def random(self):
        return next(self.numbers)

    def beta(self, a, b):
        self.alpha = a, b
        return next(self.numbers)

    def integers(self, n):
        return next(self.numbers)


def test_mixup_by_hand():
    """mixup_target([1, 3], 4 classes, lam 0.7, smoothing 0.1) of timm."""
    images, targets = black_and_white()
    rng = Given(0.0, 0.5, 0.7)  # mix, not CutMix, share 0.7
    mix_pair(images, targets, rng, AugmentConfig())
    assert rng.alpha == (0.8, 0.8)
    np.testing.assert_allclose(images[0], 0.3, atol=1e-6)
    np.testing.assert_allclose(images[1], 0.7, atol=1e-6)
    np.testing.assert_allclose(targets, [[0.025, 0.655, 0.025, 0.295], [0.025, 0.295, 0.025, 0.655]], atol=1e-6)


def test_cutmix_by_hand():
    """Share 0.75: a box of half the side, 16, around (2, 20), of which 10 x 16 lie inside."""
    images, targets = black_and_white()
    rng = Given(0.0, 0.49, 0.75, 2, 20)
    mix_pair(images, targets, rng, AugmentConfig())
    assert rng.alpha == (1.0, 1.0)
    want = np.zeros((32, 32))
    want[0:10, 12:28] = 1
    assert (images[0] == want).all() and (images[1] == 1 - want).all()
    own = 1 - 160 / 1024
    one, three = smooth_label(1, 4, 0.1), smooth_label(3, 4, 0.1)
    np.testing.assert_allclose(targets, [own * one + (1 - own) * three, own * three + (1 - own) * one], atol=1e-6)


@pytest.mark.parametrize('share, centre, box', [
    (0.25, (112, 112), (56, 168, 56, 168)), (0.25, (0, 223), (0, 56, 167, 224)), (1.0, (112, 112), (0, 224, 0, 224)),
    (0.0, (10, 10), (10, 10, 10, 10)), (0.1, (100, 50), (65, 135, 15, 85)),  # sqrt(0.1) of 224: 70.8
    (1 / 9, (100, 100), (63, 137, 63, 137))])  # 74.67
def test_cut_box(share, centre, box):
    assert cut_box(Given(*centre), 224, 224, share) == box


def mixed(config, draws):
    """(the first image's own share, whether it was CutMix) of many pairs, with targets checked on the way."""
    own, cut = np.empty(draws), np.empty(draws, bool)
    for number in range(draws):
        images, targets = black_and_white()
        mix_pair(images, targets, generator(SEED, 2, number), config)
        own[number] = 1 - images[0, 0].mean(dtype=float)
        cut[number] = set(np.unique(images)) <= {0, 1} and images[0].any()
        first, second = smooth_label(1, 4, config.smoothing), smooth_label(3, 4, config.smoothing)
        np.testing.assert_allclose(targets[0], own[number] * first + (1 - own[number]) * second, atol=2e-6)
        np.testing.assert_allclose(targets[1], own[number] * second + (1 - own[number]) * first, atol=2e-6)
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    return own, cut


@pytest.mark.unmeasured
def test_mixing_statistics():
    """mixup: Beta(0.8, 0.8) has mean 1/2, variance 1/10.4; CutMix's corrected shares as 100,000 of timm's."""
    own, cut = mixed(AugmentConfig(), 4000)
    assert abs(cut.mean() - 0.5) < 0.04  # boxes without a pixel count as mixup
    blended, pasted = own[~cut & (own < 1)], own[cut]
    assert abs(blended.mean() - 0.5) < 0.035 and abs(blended.var() - 1 / 10.4) < 0.006
    assert abs(pasted.mean() - 0.682) < 0.02 and abs(pasted.var() - 0.0352) < 0.005


@pytest.mark.parametrize('config, cuts', [(AugmentConfig(cutmix=0), False), (AugmentConfig(mixup=0), True)])
def test_one_kind_of_mixing_alone(config, cuts):
    own, cut = mixed(config, 200)
    assert mixes(config) and (own < 1).mean() > 0.9
    assert (cut == (own < 1)).all() if cuts else not cut.any()


def test_mixing_can_be_rare_or_switched_off():
    own, _ = mixed(AugmentConfig(mix_prob=0.25, cutmix=0), 1000)
    assert abs((own < 1).mean() - 0.25) < 0.06
    for config in (AugmentConfig(mix_prob=0), AugmentConfig(mixup=0, cutmix=0)):
        assert not mixes(config)
