"""The number of masked cells, their shape, and AvgDist against sums done by hand."""
import math

import numpy as np
import pytest

from mxsimmim.data.masks import average_distance, random_mask
from mxsimmim.data.sampling import generator


@pytest.mark.parametrize('img_size, mask_patch, ratio, patch, masked_cells', [
    (192, 32, 0.6, 4, 22), (224, 32, 0.6, 16, 30), (224, 32, 0.5, 16, 25), (192, 64, 0.6, 16, 6), (32, 4, 0.6, 4, 39),
    (224, 32, 0.001, 32, 1)])
def test_number_of_masked_cells(img_size, mask_patch, ratio, patch, masked_cells):
    mask = random_mask(generator(3), img_size, mask_patch, ratio, patch)
    tokens, side = mask_patch // patch, img_size // mask_patch
    assert mask.dtype == np.uint8 and mask.shape == (img_size // patch,) * 2
    assert mask.sum() == masked_cells * tokens ** 2 == math.ceil(ratio * side ** 2) * tokens ** 2
    cells = mask.reshape(side, tokens, side, tokens).transpose(0, 2, 1, 3).reshape(side * side, -1)
    assert (cells.min(1) == cells.max(1)).all()  # cells are masked whole


def test_mask_is_the_head_of_a_permutation():
    order = generator(7).permutation(49)
    mask = random_mask(generator(7), 224, 32, 0.6, 32)
    assert set(np.flatnonzero(mask)) == set(order[:30])


def test_every_cell_is_masked_equally_often():
    rng = generator(11)
    share = np.mean([random_mask(rng, 192, 32, 0.6, 32) for _ in range(4000)], axis=0)
    assert np.abs(share - 22 / 36).max() < 5 * math.sqrt(22 / 36 * 14 / 36 / 4000)


def test_average_distance_of_one_square():
    """In a hidden 4 x 4 square, 12 pixels touch a visible one and the 4 inner ones are 2 away."""
    mask = np.zeros((1, 3, 3), np.uint8)
    mask[0, 1, 1] = 1
    assert average_distance(mask, 4) == pytest.approx((12 * 1 + 4 * 2) / 16)
    assert average_distance(mask, 1) == 1


def test_average_distance_of_a_half_plane_and_of_a_corner():
    half = np.zeros((1, 4, 4), np.uint8)
    half[0, :, 2:] = 1  # 2 columns of 8 pixels: distances 1 .. 16
    assert average_distance(half, 8) == pytest.approx(sum(range(1, 17)) / 16)
    corner = 1 - np.pad(np.ones((1, 1)), (0, 1))[None].astype(np.uint8)  # (0, 0) visible in 2 x 2
    assert average_distance(corner, 1) == pytest.approx((1 + 1 + math.sqrt(2)) / 3)


def test_average_distance_is_over_the_pixels_of_all_images():
    masks = np.zeros((2, 3, 3), np.uint8)
    masks[0, 1, 1] = 1  # 16 pixels, 1.25 on average
    masks[1, :, 2] = 1  # 48 pixels: distances 1 .. 4
    assert average_distance(masks, 4) == pytest.approx((16 * 1.25 + 48 * 2.5) / 64)


def test_average_distance_without_a_distance():
    with pytest.raises(ValueError, match='none of the 2 masks hides anything'):
        average_distance(np.zeros((2, 3, 3), np.uint8), 4)
    with pytest.raises(ValueError, match='mask 1 of 2 hides the whole image: lower mask.ratio'):
        average_distance(np.stack([np.eye(3), np.ones((3, 3))]).astype(np.uint8), 4)
