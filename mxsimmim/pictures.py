"""Drawing: original, masked and reconstruction side by side, the curves of a run, confused classes, embeddings."""
import atexit
import math
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from .monitor import read_metrics
from .text import drawn

TITLES = ('original', 'masked', 'reconstruction')
SIDE = 96  # pixels; smaller images are enlarged to at least this
GREY, WHITE = 128, 255
FIELDS = 1500  # a side of a drawn matrix, about as many as its pixels


def to_uint8(normalised: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(N, 3, H, W), with `mean` subtracted and divided by `std` per channel of [0, 1], to (N, H, W, 3) of 0 to 255.

    What lies outside is clipped; NaN becomes 0.
    """
    images = normalised.transpose(0, 2, 3, 1) * np.asarray(std, 'float32') + np.asarray(mean, 'float32')
    return np.rint(np.nan_to_num(images.clip(0, 1)) * 255).astype('uint8')


def grid(image: np.ndarray, mask: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """One row an image: original, masked cells grey, and the reconstruction pasted into the masked cells.

    Args:
        image: (N, H, W, 3), uint8.
        mask: (N, h, w), 1 = masked; h divides H and w divides W.
        reconstruction: (N, H, W, 3), uint8; only its masked cells are shown.

    Returns:
        (H', W', 3), uint8: titles above, images enlarged by whole numbers to 96 pixels or more, many rows side by side.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, height, width, _ = image.shape
    assert reconstruction.shape == image.shape and len(mask) == count > 0
    hidden = mask.astype(bool).repeat(height // mask.shape[1], 1).repeat(width // mask.shape[2], 2)[..., None]
    triples = np.stack([image, np.where(hidden, np.uint8(GREY), image), np.where(hidden, reconstruction, image)], 1)
    scale = max(1, math.ceil(SIDE / min(height, width)))
    triples = triples.repeat(scale, 2).repeat(scale, 3)  # (N, 3, H, W, 3)
    height, width = triples.shape[2:4]

    across = max(1, round(math.sqrt(count / 2)))  # triples side by side: about 3:2 in all
    font = ImageFont.load_default(max(11, width // 14))
    gap, top = max(2, width // 48), int(1.6 * font.size)
    block = 3 * (width + gap) + 2 * gap  # wider between triples than inside one
    rows = math.ceil(count / across)
    canvas = Image.new('RGB', (across * block - gap, top + rows * (height + gap)), (WHITE,) * 3)
    draw = ImageDraw.Draw(canvas)
    for index, triple in enumerate(triples):
        row, column = divmod(index, across)
        for part, pixels in enumerate(triple):
            left = gap + column * block + part * (width + gap)
            canvas.paste(Image.fromarray(pixels), (left, top + row * (height + gap)))
            if row == 0:
                draw.text((left + width // 2, top // 2), TITLES[part], fill=0, font=font, anchor='mm')
    return np.asarray(canvas)


def plot(run: Path, out: Path) -> None:
    """Draws loss, learning rate, gradient norm and images/s of a run over its steps into the PNG file `out`.

    Of a classifier, accuracy takes the place of the gradient norm.

    Raises:
        ValueError: the run has no metrics, or `out` cannot be written.
    """
    records = read_metrics(run)
    if not any('loss' in record or 'val_loss' in record for record in records):
        raise ValueError(f'{run}: nothing to plot yet: its metrics.jsonl has {len(records)} records, and none with a '
                         f'loss; wait for the first one (every log.every steps)')
    figure = _figure((12, 8))
    losses, rate, norm, speed = figure.subplots(2, 2, sharex=True).flat
    figure.suptitle(f'{_escape(Path(run).resolve().name)}: {max(record["step"] for record in records):,} steps')
    classifier = any('val_top1' in record for record in records)
    panels = ((losses, ('loss', 'val_loss'), 'cross entropy' if classifier else 'loss on masked pixels'),
              (rate, ('lr',), 'learning rate'),
              (norm, ('val_top1', 'val_top5'), 'correct among the first 1 or 5 guesses (%)') if classifier else
              (norm, ('grad_norm',), 'gradient norm (L2, before clipping)'),
              (speed, ('images_per_second',), 'speed (images/s)'))
    for axes, names, label in panels:
        _curves(axes, records, names)
        axes.set_ylabel(label)
    for axes in (losses,) if classifier else (losses, norm):
        _mark_skipped(axes, records)
    for axes in (norm, speed):
        axes.set_xlabel('step (updates)')
    rate.ticklabel_format(axis='y', scilimits=(0, 0))
    rate.set_ylim(bottom=0)
    speed.set_ylim(bottom=0)
    losses.legend(loc='upper right')
    if classifier:
        norm.legend(loc='lower right')
    _save(figure, out)


def confusion(matrix: np.ndarray, classes: Sequence[str], out: Path) -> None:
    """Draws integer (K, K), images of each true class (row) by predicted class, in shares of the row, as a PNG file.

    Up to 20 classes each field has its number of images, up to 50 each row and column its class; beyond 1,500 a field
    stands for several neighbours.

    Raises:
        ValueError: `out` cannot be written.
    """
    count, title = len(classes), f'{np.trace(matrix):,} of {matrix.sum():,} images right'
    starts = np.arange(0, count, -(-count // FIELDS))
    if len(starts) < count:
        matrix = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(max(5.0, 0.45 * count), 14.0)
    figure = _figure((side + 2, side + 1))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, extent=(-0.5, count - 0.5, count - 0.5, -0.5))
    figure.colorbar(image, label='share of the true class', shrink=0.8)
    axes.set_xlabel('predicted class')
    axes.set_ylabel('true class')
    axes.set_title(title)
    if count <= 50:
        names = [_escape(name if len(name) <= 20 else name[:19] + '…') for name in classes]
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(count), names)
    if count <= 20:
        for row, column in zip(*np.nonzero(matrix)):
            axes.text(column, row, f'{matrix[row, column]:,}', ha='center', va='center', fontsize=8,
                      color='white' if shares[row, column] > 0.5 else 'black')
    _save(figure, out)


def embedding(points: np.ndarray, labels: Optional[np.ndarray], classes: Sequence[str], title: str, out: Path) -> None:
    """Draws points (n, 2), coloured by their labels (n,) into `classes` if there are any, as a PNG file.

    Up to 20 classes have a legend.

    Raises:
        ValueError: `out` cannot be written.
    """
    width, height = np.ptp(points, axis=0)
    figure = _figure((9, min(max(8 * height / max(width, 1e-9), 5), 12)))
    import matplotlib
    axes = figure.subplots()
    size = min(max(3e4 / len(points), 4), 40)
    if labels is None:
        axes.scatter(*points.T, s=size, linewidths=0)
    else:
        few = len(classes) <= 20
        colors = matplotlib.colormaps['tab10' if len(classes) <= 10 else 'tab20' if few else 'hsv']
        for number in np.unique(labels):
            color = colors(int(number) if few else number / len(classes))
            axes.scatter(*points[labels == number].T, s=size, linewidths=0, color=color,
                         label=_escape(classes[number]))
        if few:
            axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), markerscale=max(1, (60 / size) ** 0.5))
    axes.set_title(_escape(title))
    axes.set_xticks([])  # neither axis means anything, only what is near what
    axes.set_yticks([])
    axes.set_aspect('equal', 'datalim')
    _save(figure, out)


def _figure(size: Tuple[float, float]) -> Any:
    """A figure of matplotlib's, inches; without pyplot: no display, no state.

    Where there is no home to keep its fonts in, it gets a folder that goes when the process ends: it would end itself,
    or complain.

    Raises:
        ValueError: matplotlib does not load.
    """
    try:
        if 'matplotlib' not in sys.modules and not os.environ.get('MPLCONFIGDIR'):
            home = os.path.expanduser('~')  # stays as it is where nobody knows
            places = [os.environ.get(f'XDG_{kind}_HOME') or os.path.join(home, f'.{kind.lower()}')
                      for kind in ('CONFIG', 'CACHE')]
            if not all(place.startswith('/') and _writable(Path(place, 'matplotlib')) for place in places):
                os.environ['MPLCONFIGDIR'] = tempfile.mkdtemp(prefix='mxsimmim-matplotlib-')
                atexit.register(shutil.rmtree, os.environ['MPLCONFIGDIR'], ignore_errors=True)
        from matplotlib.figure import Figure
    except Exception as error:
        way_out = 'install it again' if isinstance(error, ImportError) else 'set MPLCONFIGDIR to a folder of your own'
        raise ValueError(f'matplotlib, which draws, does not load here ({error}): {way_out}') from error
    return Figure(figsize=size, layout='constrained')


def _writable(folder: Path) -> bool:
    """Whether there is such a folder to write to, or it can be made."""
    return os.access(next(place for place in (folder, *folder.parents) if place.exists()), os.W_OK | os.X_OK)


def _escape(name: str) -> str:
    """What a font can draw, of which matplotlib takes no part for mathematics."""
    return drawn(name).replace('$', r'\$')


def _save(figure: Any, out: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Glyph')  # which its font does not have: a box is drawn
            figure.savefig(out, format='png', dpi=110)
    except OSError as error:
        raise ValueError(f'{out}: cannot be written: {error.strerror or error}; choose another place') from error


def _points(records: List[Dict[str, Any]], name: str) -> Tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have `name`; NaN, a gap in a curve, where the value was not finite."""
    points = [(record['step'], record[name]) for record in records if name in record]
    steps, values = zip(*points) if points else ((), ())
    return np.array(steps), np.array(values, float)  # None becomes NaN


def _curves(axes: Any, records: List[Dict[str, Any]], names: Sequence[str]) -> None:
    """One curve a name; losses and norms that span more than a factor of ten get a logarithmic scale."""
    labels = {'loss': 'training', 'val_loss': 'validation', 'val_top1': 'top-1', 'val_top5': 'top-5'}
    colors = {'loss': 'C0', 'val_loss': 'C1', 'lr': 'C2', 'grad_norm': 'C3', 'images_per_second': 'C4',
              'val_top1': 'C1', 'val_top5': 'C5'}
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
