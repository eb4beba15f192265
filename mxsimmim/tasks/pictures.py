"""Drawing: reconstructions, segmentations and detections side by side, confused classes, embeddings."""
import colorsys
import math
from pathlib import Path
from typing import Any, List, Optional, Sequence

import numpy as np

from ..system import drawing
from ..system.text import one_line

TITLES = ('original', 'masked', 'reconstruction')
ANNOTATED = ('image', 'truth', 'prediction')
SIDE = 96  # pixels; smaller images are enlarged to at least this
GREY, WHITE = 128, 255
COVER = 0.7  # of a colour over the image
TINT = 0.5  # of an object's colour over it
FIELDS = 1500  # a side of a drawn matrix, about as many as its pixels


def to_uint8(normalised: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Turns normalised images (N, 3, H, W) into pixels (N, H, W, 3) of 0 to 255.

    `mean` was subtracted from channels of [0, 1], and the rest divided by `std`. What lies outside is clipped; NaN
    becomes 0.
    """
    images = normalised.transpose(0, 2, 3, 1) * np.asarray(std, 'float32') + np.asarray(mean, 'float32')
    return np.rint(np.nan_to_num(images.clip(0, 1)) * 255).astype('uint8')


def grid(image: np.ndarray, mask: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Draws a row an image: original, masked cells grey, and the reconstruction pasted into the masked cells.

    Args:
        image: (N, H, W, 3), uint8.
        mask: (N, h, w), 1 = masked; h divides H and w divides W.
        reconstruction: (N, H, W, 3), uint8; only its masked cells are shown.

    Returns:
        (H', W', 3), uint8: titles above, images enlarged by whole numbers to 96 pixels or more, many rows side by side.
    """
    count, height, width, _ = image.shape
    assert reconstruction.shape == image.shape and len(mask) == count > 0
    hidden = mask.astype(bool).repeat(height // mask.shape[1], 1).repeat(width // mask.shape[2], 2)[..., None]
    masked, restored = (np.where(hidden, pixels, image) for pixels in (np.uint8(GREY), reconstruction))
    return side_by_side(np.stack([image, masked, restored], 1), TITLES)


def segmented(image: np.ndarray, predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Draws a row an image: uint8 (N, H, W, 3), its true map and the predicted one, integers (N, H, W) each."""
    maps = (overlaid(image, found, classes) for found in (truth, predicted))
    return side_by_side(np.stack([image, *maps], 1), ANNOTATED)


def overlaid(image: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """Lays the colours of classes, integers (…, H, W), over the greys of an image, uint8 (…, H, W, 3)."""
    grey = image.mean(axis=-1, keepdims=True)
    return np.rint(palette(classes)[np.minimum(found, classes)] * COVER + grey * (1 - COVER)).astype('uint8')


def boxed(image: np.ndarray, names: Sequence[str], boxes: np.ndarray, classes: np.ndarray,
          masks: Sequence[np.ndarray] = (), scores: Optional[np.ndarray] = None) -> np.ndarray:
    """Draws objects on an image, uint8 (H, W, 3): their masks, boxes, class names and, if there are any, scores.

    Args:
        names: of all classes, of which each has its colour.
        boxes: (n, 4), x0, y0, x1, y1 in pixels.
        classes: (n,), numbers.
        masks: bool (H, W), one an object or none at all.
        scores: (n,), from 0 to 1.
    """
    from PIL import Image, ImageDraw, ImageFont

    colours, tinted = palette(len(names))[classes], image.copy()
    for mask, colour in zip(masks, colours):
        tinted[mask] = np.rint(tinted[mask] * (1 - TINT) + colour * TINT).astype('uint8')
    picture = Image.fromarray(tinted)
    draw, size = ImageDraw.Draw(picture), max(11, min(image.shape[:2]) // 32)
    font = ImageFont.load_default(size)
    labels: List[str] = [one_line(names[number]) for number in classes]
    if scores is not None:
        labels = [f'{label} {100 * score:.0f}' for label, score in zip(labels, scores)]
    corners = boxes.round().astype(int).tolist()
    for (x0, y0, x1, y1), label, colour in zip(corners, labels, map(tuple, colours.tolist())):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=max(1, size // 9))
        place = x0, max(0, y0 - size - 2)
        draw.rectangle(draw.textbbox(place, label, font), fill=colour)
        draw.text(place, label, fill=0 if sum(colour) > 3 * GREY else (WHITE,) * 3, font=font)
    return np.asarray(picture)


def palette(classes: int) -> np.ndarray:
    """Returns a colour for each class, uint8 (K + 1, 3): hues a golden section apart; white for none of them."""
    colors = [colorsys.hsv_to_rgb(number * 0.618034 % 1, 1 - 0.2 * (number % 3), 1 - 0.15 * (number % 4))
              for number in range(classes)]
    return np.rint(255 * np.array([*colors, (1, 1, 1)])).astype('uint8')


def palette_image(found: np.ndarray, classes: int) -> Any:
    """Returns a Pillow image of integers (H, W), with a palette of colours; of over 255 classes 16 bits of grey."""
    from PIL import Image
    if classes > 255:
        return Image.fromarray(found.astype('uint16'))
    image = Image.fromarray(found.astype('uint8'), 'P')
    image.putpalette(palette(classes).tobytes())
    return image


def side_by_side(triples: np.ndarray, titles: Sequence[str]) -> np.ndarray:
    """Draws uint8 (N, T, H, W, 3): N rows of T pictures, below a title each; returns (H', W', 3).

    Pictures are enlarged by whole numbers to 96 pixels or more; of many rows several stand side by side.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, parts, height, width, _ = triples.shape
    scale = max(1, math.ceil(SIDE / min(height, width)))
    triples = triples.repeat(scale, 2).repeat(scale, 3)  # (N, T, H, W, 3)
    height, width = triples.shape[2:4]

    across = max(1, round(math.sqrt(count / 2)))  # rows side by side: about 3:2 in all
    size = max(11, width // 14)
    font = ImageFont.load_default(size)
    gap, top = max(2, width // 48), int(1.6 * size)
    block = parts * (width + gap) + 2 * gap  # wider between rows than inside one
    rows = math.ceil(count / across)
    canvas = Image.new('RGB', (across * block - gap, top + rows * (height + gap)), (WHITE,) * 3)
    draw = ImageDraw.Draw(canvas)
    for index, triple in enumerate(triples):
        row, column = divmod(index, across)
        for part, pixels in enumerate(triple):
            left = gap + column * block + part * (width + gap)
            canvas.paste(Image.fromarray(pixels), (left, top + row * (height + gap)))
            if row == 0:
                draw.text((left + width // 2, top // 2), titles[part], fill=0, font=font, anchor='mm')
    return np.asarray(canvas)


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
    figure = drawing.figure((side + 2, side + 1))
    axes = figure.subplots()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, extent=(-0.5, count - 0.5, count - 0.5, -0.5))
    figure.colorbar(image, label='share of the true class', shrink=0.8)
    axes.set_xlabel('predicted class')
    axes.set_ylabel('true class')
    axes.set_title(title)
    if count <= 50:
        names = [drawing.escape(name if len(name) <= 20 else name[:19] + '…') for name in classes]
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(count), names)
    if count <= 20:
        for row, column in zip(*np.nonzero(matrix)):
            axes.text(column, row, f'{matrix[row, column]:,}', ha='center', va='center', fontsize=8,
                      color='white' if shares[row, column] > 0.5 else 'black')
    drawing.save(figure, out)


def embedding(points: np.ndarray, labels: Optional[np.ndarray], classes: Sequence[str], title: str, out: Path) -> None:
    """Draws points (n, 2), coloured by their labels (n,) into `classes` if there are any, as a PNG file.

    Up to 20 classes have a legend.

    Raises:
        ValueError: `out` cannot be written.
    """
    width, height = np.ptp(points, axis=0)
    figure = drawing.figure((9, min(max(8 * height / max(width, 1e-9), 5), 12)))
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
                         label=drawing.escape(classes[number]))
        if few:
            axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), markerscale=max(1, (60 / size) ** 0.5))
    axes.set_title(drawing.escape(title))
    axes.set_xticks([])  # neither axis means anything, only what is near what
    axes.set_yticks([])
    axes.set_aspect('equal', 'datalim')
    drawing.save(figure, out)
