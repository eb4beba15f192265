"""What a segmenter gets right: pixels counted by true and predicted class, and what follows from that. NumPy only."""
from typing import Dict, Sequence

import numpy as np

from .class_table import by_class, percent


def count_pixels(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts pixels of each true class (row) by the predicted one (column), int64 (K, K + 1).

    Pixels whose truth is no class, 0 to K-1, are left out. The last column are those predicted as K: none of them.
    The counts of all images are the sum of those of their parts, however they are divided.
    """
    known = truth < classes
    pairs = truth[known].astype('int64') * (classes + 1) + predicted[known]
    return np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def intersection_over_union(counts: np.ndarray) -> np.ndarray:
    """Returns, of each class, the pixels that are it and predicted so over those that are either, float64 (K,).

    NaN for a class of which there is neither.
    """
    hits, truth, predicted = _sums(counts)
    with np.errstate(invalid='ignore'):
        return hits / (truth + predicted - hits)


def values(counts: np.ndarray) -> Dict[str, float]:
    """Returns miou, the mean over the classes that there are, and pixel_accuracy, of pixels of a class; from 0 to 1."""
    known = intersection_over_union(counts)
    known = known[~np.isnan(known)]
    pixels = counts.sum()
    return {'miou': float(known.mean()) if len(known) else float('nan'),
            'pixel_accuracy': float(np.trace(counts) / pixels) if pixels else float('nan')}


def class_table(counts: np.ndarray, names: Sequence[str], limit: int = 0) -> str:
    """Formats a line a class: share of pixels, IoU, accuracy, in percent; of more than `limit` those of least IoU."""
    hits, truth, _ = _sums(counts)
    overlap = intersection_over_union(counts)
    with np.errstate(invalid='ignore'):
        columns = 100 * np.stack([truth / truth.sum(), overlap, hits / truth], axis=1)

    def line(k: int) -> str:
        share, iou, accuracy = map(percent, columns[k])
        return f'   {share:>8}  {iou:>8}   {accuracy:>8}'
    return by_class(names, overlap, '     pixels       IoU   accuracy', line, limit)


def _sums(counts: np.ndarray) -> np.ndarray:
    """Pixels that are rightly of each class, that truly are, that are said to be, (3, K)."""
    return np.stack([np.diag(counts), counts.sum(axis=1), counts[:, :-1].sum(axis=0)])
