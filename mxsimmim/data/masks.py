"""Which patches are hidden, and how far a hidden pixel is from a visible one."""
import math

import numpy as np


def random_mask(rng: np.random.Generator, img_size: int, mask_patch: int, ratio: float, patch: int) -> np.ndarray:
    """One image's mask on the encoder's token grid.

    Square cells of `mask_patch` pixels are masked whole: the first ceil(ratio * cells) of a random permutation, so
    every image has the same number (SimMIM, Xie et al. 2022, section 3.2).

    Args:
        rng: source of the permutation, one draw.
        img_size: side of the image, pixels; a multiple of `mask_patch`.
        mask_patch: side of a cell, pixels; a multiple of `patch`.
        ratio: share of the cells to mask.
        patch: side of a token, pixels.

    Returns:
        uint8 (h, w) with h = w = img_size / patch; 1 = masked.
    """
    assert img_size % mask_patch == 0 and mask_patch % patch == 0, (img_size, mask_patch, patch)
    side = img_size // mask_patch
    cells = np.zeros(side * side, np.uint8)
    cells[rng.permutation(side * side)[:math.ceil(ratio * side * side)]] = 1
    tokens = mask_patch // patch
    return cells.reshape(side, side).repeat(tokens, axis=0).repeat(tokens, axis=1)


def average_distance(masks: np.ndarray, patch: int) -> float:
    """AvgDist of the paper: the mean distance from a masked pixel to the nearest visible pixel of its image.

    Distances are Euclidean, between pixel centres, so the smallest is 1.

    Args:
        masks: (N, h, w), 1 = masked.
        patch: side of a token, pixels.

    Returns:
        The mean over all masked pixels of all N images, in pixels.

    Raises:
        ValueError: nothing is masked, or all of an image is.
    """
    from scipy.ndimage import distance_transform_edt  # here: 0.1 s, for validation alone
    masked = int(np.count_nonzero(masks)) * patch * patch
    if masked == 0:
        raise ValueError(f'none of the {len(masks)} masks hides anything: there is no distance to measure')
    total = 0.0
    for number, mask in enumerate(masks):
        if mask.all():
            raise ValueError(f'mask {number} of {len(masks)} hides the whole image: lower mask.ratio')
        total += distance_transform_edt(mask.repeat(patch, axis=0).repeat(patch, axis=1)).sum()
    return float(total) / masked
