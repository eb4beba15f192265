"""From images with objects to samples: image, boxes, classes and masks, in arrays of one shape for all images."""
import functools
from typing import Sequence

import numpy as np

from ..config import DataConfig, ModelConfig
from ..config.model import MASK_SIDE, OBJECTS
from .decode import BrokenImage
from .dense_transforms import ViewsTransform, check_size, fill_colour
from .geometry import Size, View, padded, random_view, size_of
from .objects import Objects, WithObjects, within
from .regions import in_box
from .transforms import Fields, Transform, draw_uniform, empty_uniform

SMALLEST = 1.0  # pixels: boxes of which less of a side is left by the crop are left out


class ObjectsTransform(Transform):
    """Random scale, crop and flip of image and objects (large-scale jitter, Ghiasi et al. 2021, arXiv 2012.07177).

    At scale 1 the image just fits into the input. Fills, for M = `most`:

    image: uint8 (H, W, 3); what the image does not reach is filled with the mean colour.
    extent: int32 (4,), (h, w, H', W'): the input shows something in its first h rows and w columns, of an image of
        H' x W' pixels.
    boxes: float32 (M, 4), x0, y0, x1, y1 in pixels of the input; zeros after the last.
    classes: int32 (M,); -1 after the last.
    crowd: uint8 (M,), 1 where a box is of a crowd or difficult: such boxes come last.
    masks, if they are asked for: uint8 (M, MASK_SIDE, MASK_SIDE), 1 in the cells of the box whose middles the object
        covers.
    priority: float32 (anchors + M,) in [0, 1): which of a detector's anchors, of the boxes that it makes of them and of
        the objects are sampled, those with the highest numbers first.
    uniform: as in pre-training.

    Boxes that the crop leaves less than a pixel wide or high are left out, and so are some at random, crowds first,
    where there are more than M.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, source: WithObjects, masks: bool, most: int = OBJECTS):
        """Keep what is done; with `masks`, an object without one is a broken image."""
        self._most, self._candidates = most, model.candidates[0] + most
        self._data, self._model, self._source, self._masks = data, model, source, masks
        self._canvas, self._bicubic = model.size, data.interpolation == 'bicubic'
        self.upright = bool(data.exif_orientation)

    def allocate(self, count: int) -> Fields:
        most = self._most
        fields: Fields = {
            'image': np.empty((count, *self._canvas, 3), np.uint8), 'extent': np.empty((count, 4), np.int32),
            'boxes': np.empty((count, most, 4), np.float32), 'classes': np.empty((count, most), np.int32),
            'crowd': np.empty((count, most), np.uint8), 'priority': np.empty((count, self._candidates), np.float32),
            **empty_uniform(count, self._model)}
        if self._masks:
            fields['masks'] = np.empty((count, most, MASK_SIDE, MASK_SIDE), np.uint8)
        return fields

    def draw(self, rng: np.random.Generator) -> Fields:
        return {'priority': rng.random(self._candidates, np.float32), **draw_uniform(rng, self._model)}

    def __call__(self, image: np.ndarray, rng: np.random.Generator, index: int = 0) -> Fields:
        drawn, size, objects = self.draw(rng), size_of(image), objects_of(self._source, self._masks, index, image)
        view = random_view(rng, size, self._canvas, self._data.scale_jitter, self._data.flip, covers=False)
        boxes = view.boxes(objects.boxes, size)
        left = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= SMALLEST)
        left = rng.permutation(left)
        chosen = left[np.argsort(objects.crowd[left], kind='stable')][:self._most]
        chosen = chosen[np.lexsort((chosen, objects.crowd[chosen]))]
        return {'image': padded(view.pixels(image, self._bicubic), self._canvas, fill_colour(self._data)),
                'extent': np.array([*view.shape, *size], np.int32), **drawn,
                **self._arrays(objects, boxes, chosen, view, size)}

    def _arrays(self, objects: Objects, boxes: np.ndarray, chosen: np.ndarray, view: View, size: Size) -> Fields:
        most, count = self._most, len(chosen)
        fields: Fields = {'boxes': np.zeros((most, 4), np.float32), 'classes': np.full(most, -1, np.int32),
                          'crowd': np.zeros(most, np.uint8)}
        fields['boxes'][:count], fields['classes'][:count] = boxes[chosen], objects.classes[chosen]
        fields['crowd'][:count] = objects.crowd[chosen]
        if self._masks:
            fields['masks'] = np.zeros((most, MASK_SIDE, MASK_SIDE), np.uint8)
            for place, number in enumerate(chosen):
                region = objects.regions[number]
                if region is not None:
                    fields['masks'][place] = in_box(region, size, view, boxes[number], MASK_SIDE)
        return fields


def objects_of(source: WithObjects, masks: bool, index: int, image: np.ndarray) -> Objects:
    """What is in an image (H, W, 3), inside of it, with its size, and with its masks if they are asked for.

    Raises:
        BrokenImage: it cannot be read, is of an image of another size, or, with `masks`, lacks one.
    """
    objects, size = source.objects(index, masks), size_of(image)
    if objects.size:
        check_size(source.name(index), size, objects.size, 'its boxes are of one of')
    for number, region in enumerate(objects.regions):
        if masks and region is None and not objects.crowd[number]:
            raise BrokenImage(f"{source.name(index)}: object {number} of class '"
                              f"{source.classes[objects.classes[number]]}' has no mask, which the task needs: complete "
                              'the segmentations, or set model.masks=false')
    return objects if objects.size else within(objects, size)


class ObjectsViewsTransform(ViewsTransform):
    """Views of images whose truth is `objects_of` them."""

    def __init__(self, data: DataConfig, model: ModelConfig, source: WithObjects, masks: bool,
                 scales: Sequence[float] = (1,), flip: bool = False):
        super().__init__(data, model, functools.partial(objects_of, source, masks), scales, flip)
