"""Two predictions of hidden pixels that need no network: what a trained one has to beat."""
import numpy as np


def masked_loss(image: np.ndarray, predicted: np.ndarray, pixels: np.ndarray, loss: str) -> np.ndarray:
    """Returns the mean error over masked pixels and channels, one number an image (B,).

    image and predicted (B, 3, H, W), pixels (B, H, W) with 1 for masked, loss 'l1' or 'mse'.
    """
    error = np.abs(predicted - image) if loss == 'l1' else np.square(predicted - image)
    hidden = pixels[:, None].astype('float32')
    return (error * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)) / 3


def visible_mean(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Fills each image's channels with their mean over visible pixels; shapes as in `masked_loss`."""
    seen = 1 - pixels[:, None].astype('float32')
    mean = (image * seen).sum((2, 3), keepdims=True) / seen.sum((2, 3), keepdims=True)
    return np.broadcast_to(mean, image.shape)


def nearest_visible(image: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Replaces each pixel by the nearest visible one of its image; shapes as in `masked_loss`."""
    from scipy import ndimage  # here: 0.1 s, for the end of a run alone
    filled = np.empty_like(image)
    for b, hidden in enumerate(pixels):
        y, x = ndimage.distance_transform_edt(hidden, return_distances=False, return_indices=True)
        filled[b] = image[b][:, y, x]
    return filled
