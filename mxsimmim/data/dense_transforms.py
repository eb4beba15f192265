"""From images with label maps to samples: the same geometry for both, colours for the image alone."""
import functools
from typing import Any, Callable, Sequence

import numpy as np

from ..config import AugmentConfig, DataConfig, ModelConfig
from .decode import BrokenImage
from .geometry import Size, padded, random_view, size_of, whole_view
from .photometric import distort
from .segmentation import Segmented, ignored_number
from .transforms import Fields, Transform, draw_uniform, empty_uniform
from .views import NUMBERS, as_numbers, most_views, views_of

LARGEST_SHARE = 0.75  # of one class in a crop: others are tried
TRIES = 10


class SegmentTransform(Transform):
    """Random scale, crop and flip of image and label map, then random colours.

    Fills image, uint8 (H, W, 3); label_map, (H, W), uint8 or int32 as `Segmented.label_map` has them; and uniform as in
    pre-training. At scale 1 the image just covers the input. What the image does not reach is filled with the mean
    colour, and ignored. A crop is drawn again where one class has more than three quarters of it, ten times at most.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig, model: ModelConfig, source: Segmented):
        self._data, self._augment, self._model, self._source = data, augment, model, source
        self._canvas, self._bicubic = model.size, data.interpolation == 'bicubic'
        self._ignored = ignored_number(len(source.classes))
        self.upright = bool(data.exif_orientation)

    def allocate(self, count: int) -> Fields:
        kind = np.uint8 if self._ignored <= 255 else np.int32
        return {'image': np.empty((count, *self._canvas, 3), np.uint8),
                'label_map': np.empty((count, *self._canvas), kind), **empty_uniform(count, self._model)}

    def draw(self, rng: np.random.Generator) -> Fields:
        return draw_uniform(rng, self._model)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        drawn, labels = self.draw(rng), label_map_of(self._source, index, image)
        view = random_view(rng, size_of(image), self._canvas, self._data.scale_jitter, self._data.flip, covers=True)
        shown = view.nearest(labels)
        for _ in range(TRIES - 1):
            if largest_share(shown, self._ignored) <= LARGEST_SHARE:
                break
            view = view.elsewhere(rng)
            shown = view.nearest(labels)
        pixels = view.pixels(image, self._bicubic)
        if self._augment.photometric:
            pixels = distort(pixels, rng)
        return {'image': padded(pixels, self._canvas, fill_colour(self._data)),
                'label_map': padded(shown, self._canvas, self._ignored), **drawn}


class WholeTransform(Transform):
    """The whole image, as large as fits, in the upper left corner of the input: fills image and extent.

    extent, int32 (4,), is (h, w, H, W): the input shows the image in its first h rows and w columns, and the image has
    H x W pixels. A point (x, y) of the input is (x W / w, y H / h) of the image.
    """

    def __init__(self, data: DataConfig, model: ModelConfig):
        self._data, self._canvas, self._bicubic = data, model.size, data.interpolation == 'bicubic'
        self.upright = bool(data.exif_orientation)

    def allocate(self, count: int) -> Fields:
        return {'image': np.empty((count, *self._canvas, 3), np.uint8), 'extent': np.empty((count, 4), np.int32)}

    def draw(self, rng: np.random.Generator) -> Fields:
        return {}

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        view = whole_view(size_of(image), self._canvas)
        return {'image': padded(view.pixels(image, self._bicubic), self._canvas, fill_colour(self._data)),
                'extent': np.array([*view.shape, *image.shape[:2]], np.int32)}


class ViewsTransform(Transform):
    """All views of an image, see `views_of`: fills image, views and truth.

    image, uint8 (V, H, W, 3), has each in the upper left corner of the input, and views, int32 (V, 7), its numbers, or
    zeros where an image has fewer. truth is what is known of the image.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, truth: Callable[[int, np.ndarray], Any],
                 scales: Sequence[float] = (1,), flip: bool = False):
        """Keep what is done; `truth` is asked about an image by its number and its pixels."""
        self._data, self._canvas, self._truth, self._scales, self._flip = data, model.size, truth, scales, flip
        self.most = most_views(self._canvas, scales, flip)
        self._bicubic = data.interpolation == 'bicubic'
        self.upright = bool(data.exif_orientation)

    def allocate(self, count: int) -> Fields:
        return {'image': np.empty((count, self.most, *self._canvas, 3), np.uint8),
                'views': np.empty((count, self.most, NUMBERS), np.int32), 'truth': np.empty(count, object)}

    def draw(self, rng: np.random.Generator) -> Fields:
        return {}

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        fields = {name: array[0] for name, array in self.allocate(1).items() if name != 'truth'}
        fields['views'][:] = 0
        for number, view in enumerate(views_of(size_of(image), self._canvas, self._scales, self._flip)):
            fields['image'][number] = padded(view.pixels(image, self._bicubic), self._canvas, fill_colour(self._data))
            fields['views'][number] = as_numbers(view)
        return {**fields, 'truth': self._truth(index, image)}


class SegmentViewsTransform(ViewsTransform):
    """Views of images whose truth is the label map as `Segmented.label_map` has it, of the image's own size."""

    def __init__(self, data: DataConfig, model: ModelConfig, source: Segmented, scales: Sequence[float] = (1,),
                 flip: bool = False):
        super().__init__(data, model, functools.partial(label_map_of, source), scales, flip)


def label_map_of(source: Segmented, index: int, image: np.ndarray) -> np.ndarray:
    """The label map of an image (H, W, 3).

    Raises:
        BrokenImage: it cannot be read, or has another size.
    """
    labels = source.label_map(index)
    check_size(source.name(index), size_of(image), size_of(labels), 'its label image')
    return labels


def check_size(name: str, size: Size, known: Size, what: str) -> None:
    """See that what is known of an image of this size is of one of the size `known`; BrokenImage if not."""
    (height, width), (h, w) = size, known
    if (height, width) != (h, w):
        turned = (' (is it turned by its EXIF orientation? data.exif_orientation says whether that counts)'
                  if (height, width) == (w, h) else '')
        raise BrokenImage(f'{name} has {height} x {width} pixels, but {what} {h} x {w}{turned}: make them again from '
                          'the same image, or remove both')


def largest_share(labels: np.ndarray, ignored: int) -> float:
    """The share of the commonest class in the pixels (h, w) that count; 1 where none do."""
    counts = np.bincount(labels.ravel(), minlength=ignored + 1)
    counts[ignored] = 0
    return float(counts.max() / max(1, counts.sum())) if counts.any() else 1.0


def fill_colour(data: DataConfig) -> np.ndarray:
    """The mean colour, uint8 (3,), that padding has."""
    return np.array([round(255 * mean) for mean in data.mean], np.uint8)
