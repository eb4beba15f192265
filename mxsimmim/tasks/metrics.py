"""What a classifier gets right: sums that add up over batches and workers, and tables of classes. NumPy only."""
from typing import Dict, List, Optional, Sequence

import numpy as np

from ..system.text import one_line
from .class_table import by_class, percent

TOP = 5
BINS = 15  # of confidence; Guo et al. 2017 (arXiv:1706.04599)
NONE = -1  # the predicted class of an image whose logits are not numbers


class Tally:
    """Sums over images. The state of all images is the sum of the states of their parts, however they are split."""

    def __init__(self, state: Optional[np.ndarray] = None):
        """Begins empty, or with what a `state` held."""
        # Images, top-1 hits, top-5 hits, negative log-likelihood; images, confidence and hits of each bin.
        self._sums = np.zeros(4 + 3 * BINS) if state is None else np.array(state, 'float64')
        assert self._sums.shape == (4 + 3 * BINS,)

    def state(self) -> np.ndarray:
        """Returns the sums, float64 (49,), to be added to others'."""
        return self._sums.copy()

    def add(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Counts a batch, logits (B, K) and labels (B,) of 0..K-1; returns the predicted classes (B,).

        Of equal logits the lower class counts as the larger one. An image with logits that are not numbers is no hit
        and predicted as `NONE`; its likelihood, hence the loss, is NaN.
        """
        count, classes = logits.shape
        assert labels.shape == (count,) and 0 <= labels.min(initial=0) <= labels.max(initial=0) < classes
        log = log_softmax(logits)
        known = ~np.isnan(log).any(axis=1)
        own = log[np.arange(count), labels]
        lower = np.arange(classes) < labels[:, None]
        rank = (logits > logits[np.arange(count), labels][:, None]).sum(1) + (
            (logits == logits[np.arange(count), labels][:, None]) & lower).sum(1)
        predicted = np.where(known, np.argmax(logits, axis=1), NONE)
        hit = known & (rank == 0)
        confidence = np.where(known, np.exp(log.max(axis=1)), 0.0)
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # (0, 1/15], (1/15, 2/15], …
        self._sums[:4] += count, hit.sum(), (known & (rank < TOP)).sum(), -own.sum()
        self._sums[4:] += np.concatenate([np.bincount(bins, weights, BINS) for weights in (None, confidence, hit)])
        return predicted

    def values(self) -> Dict[str, float]:
        """Returns val_top1, val_top5 and val_ece (expected calibration error), in percent, and val_loss, in nats."""
        images, top1, top5, loss = self._sums[:4]
        _, confidence, hits = self._sums[4:].reshape(3, BINS)
        assert images > 0
        return {'val_top1': 100 * top1 / images, 'val_top5': 100 * top5 / images, 'val_loss': loss / images,
                'val_ece': 100 * np.abs(hits - confidence).sum() / images}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns float64 (B, K); NaN in a row with NaN or +inf, and in one of nothing but -inf."""
    with np.errstate(invalid='ignore', divide='ignore'):
        shifted = logits.astype('float64') - logits.max(axis=1, keepdims=True).astype('float64')
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts images of each class (row) by the predicted one (column), int64 (K, K); `NONE` is left out."""
    known = predicted != NONE
    return np.bincount(labels[known] * classes + predicted[known], minlength=classes ** 2).reshape(classes, classes)


def class_scores(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns images, recall (a class's accuracy), precision and F1 in percent, float64 (K, 4); NaN for 0 of 0."""
    images = np.bincount(labels, minlength=classes)
    taken = np.bincount(predicted[predicted != NONE], minlength=classes)
    hits = np.bincount(labels[labels == predicted], minlength=classes)
    with np.errstate(invalid='ignore'):
        return np.stack([images, 100 * hits / images, 100 * hits / taken, 200 * hits / (images + taken)], axis=1)


def class_table(scores: np.ndarray, names: Sequence[str], limit: int = 0) -> str:
    """Formats `class_scores` as aligned lines; of more than `limit` classes the ones of least F1, those first."""
    def line(k: int) -> str:
        recall, precision, f1 = map(percent, scores[k, 1:])
        return f'   {int(scores[k, 0]):>6,}  {recall:>7}   {precision:>9}  {f1:>7}'
    return by_class(names, scores[:, 3], '   images   recall   precision       F1', line, limit)


def worst_confusions(matrix: np.ndarray, names: Sequence[str], limit: int) -> List[str]:
    """Says the largest entries off the diagonal of `confusion_matrix`, a line each."""
    off = matrix - np.diag(np.diag(matrix))
    mistakes = np.flatnonzero(off)  # few, where there are many classes
    order = mistakes[np.argsort(-off.flat[mistakes], kind='stable')[:limit]]
    return [f'{off.flat[i]:,} of {one_line(names[i // len(names)])} taken for {one_line(names[i % len(names)])}'
            for i in order]
