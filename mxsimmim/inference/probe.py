"""What a frozen network's features tell about classes: a linear classifier and the nearest neighbours, by block."""
import warnings
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import numpy as np

from ..config import Config
from ..data.labels import Labelled, few_of_each, open_labelled
from ..data.sources import notes_of, tell
from .features import blocks_named, cached
from .trained import load_for_inference

STRENGTHS = np.logspace(-2, 3, 6)  # C of the logistic regression: the inverse of its penalty
FOLDS = 3
NEIGHBOURS, TEMPERATURE = 20, 0.07  # Caron et al. 2021 (arXiv:2104.14294), after Wu et al. 2018 (arXiv:1805.01978)
SIMILARITIES = 1 << 25  # held at once


class Row(NamedTuple):
    """Top-1 of a block's features on the held-out images, percent, one a draw of the training images (S,)."""
    block: int
    linear: np.ndarray
    neighbours: np.ndarray


def probe(run: Path, config: Config, block: str, draws: int) -> str:
    """Probes the features of a run's network with the labelled images of config.data; returns a table.

    Where data.labels_per_class limits the training images, they are drawn anew for each of the seeds 0 to draws - 1.

    Args:
        run: its folder.
        config: the run's, with the images to use.
        block: a number from 1, 'all', or '' for the last one.
        draws: how many.

    Raises:
        ValueError: no such block, no labels, no held-out images, too few images of a class, …
    """
    trained = load_for_inference(run)
    blocks = blocks_named(block, trained.config.model)
    few = config.data.labels_per_class
    if draws < 1:
        raise ValueError(f'--seeds {draws}: at least one draw of the training images is needed')
    data = open_labelled(config.data.model_copy(update={'labels_per_class': 0}), config.seed)
    tell(notes_of(data.train, data.held_out))
    if data.held_out is None:
        raise ValueError(f'data.path={config.data.path}: there are no held-out images to measure with: set '
                         'data.val_path, or data.val_fraction=0.2')
    chosen = [few_of_each(data.train_labels, data.classes, few, seed) for seed in range(draws)] if few else [
        np.arange(len(data.train))]
    train, held_out = (cached(run, trained, config.data, source, blocks) for source in (data.train, data.held_out))
    rows = [measure(number, train[number], held_out[number], data, chosen) for number in blocks]
    return (f'{trained.config.name}, step {trained.step}: {len(chosen[0]):,} training images'
            + (f' ({few} of each class, {draws} draws)' if few else '')
            + f', {len(data.held_out):,} held out, {len(data.classes)} classes\n' + table(rows))


def measure(block: int, train: np.ndarray, held_out: np.ndarray, data: Labelled, chosen: Sequence[np.ndarray]) -> Row:
    """Makes both probes on features (n, C) and (m, C); `chosen` are the training images (s,) of each draw."""
    accuracies: Dict[str, List[float]] = {'linear': [], 'neighbours': []}
    for images in chosen:
        given = train[images], data.train_labels[images], held_out
        for name, predicted in (('linear', linear(*given)), ('neighbours', nearest(*given, len(data.classes)))):
            accuracies[name].append(100 * float((predicted == data.held_out_labels).mean()))
    return Row(block, **{name: np.array(values) for name, values in accuracies.items()})


def linear(train: np.ndarray, labels: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Predicts the classes (m,) of features (m, C) by logistic regression on standardised ones (n, C) with labels (n,).

    Its penalty is chosen by cross-validation among the training images; it is 1 where a class has but one.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds > 1:
        split = StratifiedKFold(folds, shuffle=True, random_state=0)
        regression = LogisticRegressionCV(Cs=STRENGTHS, cv=split, max_iter=1000)
    else:
        regression = LogisticRegression(C=1.0, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)  # a weak penalty on separable classes: close enough
        return make_pipeline(StandardScaler(), regression).fit(train, labels).predict(held_out)


def nearest(train: np.ndarray, labels: np.ndarray, held_out: np.ndarray, classes: int) -> np.ndarray:
    """Predicts the classes (m,) of features (m, C) by a vote of the 20 of (n, C) nearest in cosine similarity s.

    Each votes with exp(s / 0.07), all where there are fewer. Of equal votes the lower class wins.
    """
    train, held_out = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, held_out))
    count, chunk = min(NEIGHBOURS, len(train)), max(1, SIMILARITIES // len(train))
    predicted = []
    for start in range(0, len(held_out), chunk):
        similarity = held_out[start:start + chunk] @ train.T                                    # (chunk, n)
        near = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        weights = np.exp(np.take_along_axis(similarity, near, axis=1) / TEMPERATURE)
        votes = np.zeros((len(near), classes))
        np.add.at(votes, (np.arange(len(near))[:, None], labels[near]), weights)
        predicted.append(votes.argmax(axis=1))
    return np.concatenate(predicted)


def table(rows: Sequence[Row]) -> str:
    """Formats a line a block: mean, and standard deviation over several draws."""
    def cell(values: np.ndarray) -> str:
        return f'{values.mean():.2f} ± {values.std(ddof=1):.2f} %' if len(values) > 1 else f'{values[0]:.2f} %'
    lines = [f"block  {'linear top-1':>16}  {'k-NN top-1':>16}"]
    return '\n'.join(lines + [f'{row.block:>5}  {cell(row.linear):>16}  {cell(row.neighbours):>16}' for row in rows])
