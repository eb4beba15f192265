"""The curves of a run."""
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from ..system import drawing
from .run_logger import read_metrics

SCORES = {  # of tasks with labels, the first of which tells whose they are: what they are, and what the loss is
    ('val_top1', 'val_top5'): ('correct among the first 1 or 5 guesses (%)', 'cross entropy'),
    ('val_miou', 'val_pixel_accuracy'): ('mean IoU and share of pixels right', 'cross entropy'),
    ('val_box_ap', 'val_mask_ap'): ('average precision', 'loss of proposals, boxes and masks')}


def plot(run: Path, out: Path) -> None:
    """Draws loss, learning rate, gradient norm and images/s of a run over its steps into the PNG file `out`.

    Of a task with labels, its score takes the place of the gradient norm.

    Raises:
        ValueError: the run has no metrics, or `out` cannot be written.
    """
    records = read_metrics(run)
    if not any('loss' in record or 'val_loss' in record for record in records):
        raise ValueError(f'{run}: nothing to plot yet: its metrics.jsonl has {len(records)} records, and none with a '
                         f'loss; wait for the first one (every log.every steps)')
    figure = drawing.figure((12, 8))
    losses, rate, norm, speed = figure.subplots(2, 2, sharex=True).flat
    figure.suptitle(f'{drawing.escape(Path(run).resolve().name)}: {max(record["step"] for record in records):,} steps')
    scores = next((names for names in SCORES if any(names[0] in record for record in records)), None)
    panels = ((losses, ('loss', 'val_loss'), SCORES[scores][1] if scores else 'loss on masked pixels'),
              (rate, ('lr',), 'learning rate'),
              (norm, scores, SCORES[scores][0]) if scores else
              (norm, ('grad_norm',), 'gradient norm (L2, before clipping)'),
              (speed, ('images_per_second',), 'speed (images/s)'))
    for axes, names, label in panels:
        _curves(axes, records, names)
        axes.set_ylabel(label)
    for axes in (losses,) if scores else (losses, norm):
        _mark_skipped(axes, records)
    for axes in (norm, speed):
        axes.set_xlabel('step (updates)')
    rate.ticklabel_format(axis='y', scilimits=(0, 0))
    rate.set_ylim(bottom=0)
    speed.set_ylim(bottom=0)
    losses.legend(loc='upper right')
    if scores:
        norm.legend(loc='lower right')
    drawing.save(figure, out)


def _points(records: List[Dict[str, Any]], name: str) -> Tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have `name`; NaN, a gap in a curve, where the value was not finite."""
    points = [(record['step'], record[name]) for record in records if name in record]
    steps, values = zip(*points) if points else ((), ())
    return np.array(steps), np.array(values, float)  # None becomes NaN


def _curves(axes: Any, records: List[Dict[str, Any]], names: Sequence[str]) -> None:
    """One curve a name; losses and norms that span more than a factor of ten get a logarithmic scale."""
    labels = {'loss': 'training', 'val_loss': 'validation', 'val_top1': 'top-1', 'val_top5': 'top-5',
              'val_miou': 'mIoU', 'val_pixel_accuracy': 'pixel accuracy', 'val_box_ap': 'boxes', 'val_mask_ap': 'masks'}
    colors = {'loss': 'C0', 'val_loss': 'C1', 'lr': 'C2', 'grad_norm': 'C3', 'images_per_second': 'C4',
              'val_top1': 'C1', 'val_top5': 'C5', 'val_miou': 'C1', 'val_pixel_accuracy': 'C5',
              'val_box_ap': 'C1', 'val_mask_ap': 'C5'}
    drawn = []
    for name in names:
        steps, values = _points(records, name)
        if len(steps):
            axes.plot(steps, values, color=colors[name], label=labels.get(name), linewidth=1.2,
                      marker='.' if len(steps) < 100 else None)
        drawn += list(values[np.isfinite(values)])
    axes.grid(alpha=0.3)
    if not drawn:
        axes.text(0.5, 0.5, 'not recorded', transform=axes.transAxes, ha='center', color='0.5')
    elif {'loss', 'grad_norm'} & set(names) and 0 < 10 * min(drawn) < max(drawn):
        axes.set_yscale('log')


def _mark_skipped(axes: Any, records: List[Dict[str, Any]]) -> None:
    """A grey line at each record whose count of skipped updates has grown since the one before."""
    steps, counts = _points(records, 'skipped')
    grown = np.diff(counts, prepend=0)
    for index in np.flatnonzero(grown > 0):
        axes.axvline(steps[index], color='0.6', linewidth=0.8, zorder=0)
    if (grown > 0).any():
        axes.plot([], [], color='0.6', label=f'updates skipped: {int(grown[grown > 0].sum())}')
