"""Segmentation: pixels are to be given their class, the better the larger the mean overlap on images held out."""
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

import numpy as np

from ..config import Config, DataConfig, ModelConfig
from ..data.decode import BrokenImage
from ..data.dense_transforms import SegmentTransform, SegmentViewsTransform, WholeTransform
from ..data.geometry import Size, View, padded
from ..data.segmentation import Segmented, ignored_number, open_segmented
from ..data.sources import Source
from ..data.transforms import Fields
from ..data.views import Answer, returned
from ..models import Segmenter, build_segmenter, named_parameters
from ..models.segmenter import segmenter_cost
from ..models.shards import WHOLE, Shard
from ..ops import OpBackend
from ..parallel.control import ControlPlane
from ..parallel.placement import Placement
from ..system.text import one_line
from . import overlap, pictures
from .classes import PredictorOfClasses, WithClasses, names_of_outputs
from .evaluator import SHOWN, LabelledEvaluator, left_out
from .looks import answers_of
from .metrics import log_softmax
from .pace import Pace, images_per_second
from .task import Metric, Predictor

STRIP = 1 << 26  # logits of an image's pixels at a time
PNG = 'image/png'
COUNTED = 64  # images of which the classes' shares are known before training


def class_map(answers: Sequence[Answer], size: Size, canvas: Size) -> np.ndarray:
    """Returns the class of each pixel of an image, int32 (H, W); where logits are not numbers, how many there are.

    Args:
        answers: views that together show all of the image; of several the probabilities are averaged.
        size: of the image.
        canvas: of the network's input.
    """
    likeliest, classes = np.empty(size, 'int32'), len(answers[0][1])
    step = max(1, STRIP // (classes * size[1]))
    for top in range(0, size[0], step):
        strip = slice(top, min(top + step, size[0]))
        if len(answers) == 1:
            (view, logits), = answers
            total = returned(logits, view, size, canvas, strip)[1]
        else:
            total = np.zeros((classes, strip.stop - top, size[1]), 'float32')
            for view, logits in answers:
                (rows, columns), large = returned(logits, view, size, canvas, strip)
                total[:, rows, columns] += softmax(large)
        likeliest[strip] = np.where(np.isfinite(total).all(axis=0), total.argmax(axis=0), classes)
    return likeliest


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities of classes, the first axis."""
    with np.errstate(invalid='ignore'):
        found = np.exp(logits - logits.max(axis=0))
        return found / found.sum(axis=0)


class PixelEvaluator(LabelledEvaluator[Segmented, np.ndarray]):
    """Compares the class of each pixel: val_miou, val_pixel_accuracy, val_loss.

    `_measure` also returns the counts of pixels (K, K + 1).
    """
    metric = Metric('val_miou', higher_is_better=True)
    best = 'mIoU {val_miou:.4f}'
    drawn = 'prediction'

    def picture(self, placement: Placement) -> Optional[np.ndarray]:
        """Draws the first images, their maps and the predicted ones, as the network sees them; uint8 (H, W, 3)."""
        transform = SegmentViewsTransform(self._config.data, self._config.model, self._source)
        batch = self._first_batch(transform, placement)
        if batch is None:
            return None
        canvas, ignored = self._config.model.size, ignored_number(len(self._source.classes))
        every = answers_of(placement, batch)
        predicted = [class_map([(View(canvas, (0, 0), canvas), logits)], canvas, canvas) for (_, logits), in every]
        truth = [padded(view.nearest(labels), canvas, ignored)
                 for labels, ((view, _),) in zip(batch.fields['truth'], every)]
        return pictures.segmented(batch.fields['image'][:, 0], np.stack(predicted), np.stack(truth),
                                  len(self._source.classes))

    def report(self, placement: Placement, folder: Path) -> str:
        values, counts = self._measure(placement)
        classes = self._source.classes
        of_classes = dict(zip(classes, overlap.intersection_over_union(counts).tolist()))
        return (f"mIoU {values['val_miou']:.4f}, pixel accuracy {values['val_pixel_accuracy']:.4f} of {self.images:,} "
                f"images, loss {values['val_loss']:.4f}, {values['val_images_per_second']:,.1f} images/s\n"
                + overlap.class_table(counts, classes, SHOWN) + left_out(classes, 'IoU')
                + self._written(folder, {**overlap.values(counts), **values, 'iou': of_classes},
                                overlap.class_table(counts, classes)))

    def _measure(self, placement: Placement) -> Tuple[Dict[str, float], np.ndarray]:
        config, control, classes = self._config, self._control, len(self._source.classes)
        counts, loss, pace = np.zeros((classes, classes + 1), 'int64'), np.zeros(2), Pace()
        canvas, looks = config.model.size, config.validation
        transform = SegmentViewsTransform(config.data, config.model, self._source, looks.scales, looks.flip)
        for part in self._own_batches(transform, placement, transform.most):
            for truth, answers in zip(part.fields['truth'], answers_of(placement, part)):
                counts += overlap.count_pixels(truth, class_map(answers, truth.shape, canvas), classes)
                for view, logits in answers:
                    loss += cross_entropy(logits, padded(view.nearest(truth), canvas, ignored_number(classes)))
            pace.add(len(part.index))
        every, losses, paces = zip(*control.all_gather('evaluation', [counts.tolist(), loss.tolist(), pace.state()]))
        counts = np.sum(every, axis=0, dtype='int64')
        entropy, pixels = np.sum(losses, axis=0)
        found = {f'val_{name}': value for name, value in overlap.values(counts).items()}
        found.update(val_loss=entropy / max(1, pixels), val_images_per_second=images_per_second(paces))
        return found, counts


def cross_entropy(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Returns (sum of the cross entropy, number) of pixels with a class, at the places of logits (K, h, w).

    The class at such a place is that of the middle of what it stands for in truth (H, W).
    """
    classes, *grid = logits.shape
    rows, columns = (((np.arange(places) + 0.5) * side / places).astype(int)
                     for places, side in zip(grid, truth.shape))
    seen = truth[np.ix_(rows, columns)]
    known = seen < classes
    log = log_softmax(logits[:, known].T)
    return np.array([-log[np.arange(len(log)), seen[known]].sum(), len(log)])


def class_shares(source: Segmented) -> np.ndarray:
    """Returns the share of each class in the pixels of up to `COUNTED` images, and one more pixel of each; (K,)."""
    counts = np.ones(len(source.classes))
    for index in range(0, len(source), -(-len(source) // COUNTED)):
        with contextlib.suppress(BrokenImage):  # the loader will say so
            counts += np.bincount(source.label_map(index).ravel(), minlength=len(counts))[:len(counts)]
    return counts / counts.sum()


class MapPredictor(PredictorOfClasses):
    """Tells the class of each pixel of an image, by logits (B, K, h, w)."""
    kind = 'a segmenter, which reconstructs nothing'
    output = 'logits'
    told = 'classes of pixels'

    @staticmethod
    def build_network(model: ModelConfig, state: Mapping[str, Any], backend: OpBackend, data: DataConfig) -> Segmenter:
        return build_segmenter(model, len(state['classes']), None, backend, data.mean, data.std)

    @staticmethod
    def state_of_weights(arrays: Mapping[str, np.ndarray], file: Path, classes: str) -> Dict[str, Any]:
        """Returns the names in the file `classes`; without one, the numbers of the classes."""
        return {'classes': names_of_outputs(len(arrays['decode_head.conv_seg.weight']), file, classes)}

    def transform(self, data: DataConfig) -> WholeTransform:
        return WholeTransform(data, self._config.model)

    def line(self, fields: Fields, answer: np.ndarray, top: int) -> str:
        """Says the `top` largest classes, each with its share of the pixels."""
        largest = self._shares(self._map(fields, answer))[:top]
        return '   '.join(f'{one_line(each["name"])} {100 * each["share"]:.1f} %' for each in largest)

    def record(self, fields: Fields, answer: np.ndarray) -> Dict[str, Any]:
        """Returns height, width, and the classes that there are with their shares of the pixels, the largest first."""
        found = self._map(fields, answer)
        return {'height': found.shape[0], 'width': found.shape[1], 'classes': self._shares(found)}

    def drawing(self, image: np.ndarray, fields: Fields, answer: np.ndarray) -> np.ndarray:
        """Draws an image, uint8 (H, W, 3), and beside it the colours of its classes: (H, 2W, 3)."""
        found = self._map(fields, answer)
        return np.concatenate([image, pictures.overlaid(image, found, len(self.classes))], axis=1)

    def body(self, fields: Fields, answer: np.ndarray, accepted: str) -> Tuple[str, bytes]:
        """Returns the map as a PNG of a palette, whose values are class numbers, if that is accepted; else JSON.

        That is what `record` returns, and the same PNG in base64 under the name map.
        """
        file = io.BytesIO()
        pictures.palette_image(self._map(fields, answer), len(self.classes)).save(file, 'PNG')
        if PNG in accepted:
            return PNG, file.getvalue()
        content = {**self.record(fields, answer), 'map': base64.b64encode(file.getvalue()).decode()}
        return 'application/json; charset=utf-8', json.dumps(content).encode()

    def _map(self, fields: Fields, answer: np.ndarray) -> np.ndarray:
        height, width, *size = fields['extent'].tolist()
        view = View((height, width), (0, 0), (height, width))
        return class_map([(view, answer)], (size[0], size[1]), self._config.model.size)

    def _shares(self, found: np.ndarray) -> List[Dict[str, Any]]:
        shares = np.bincount(found.ravel(), minlength=len(self.classes))[:len(self.classes)] / found.size
        return [{'name': self.classes[number], 'share': float(shares[number])}
                for number in np.argsort(-shares, kind='stable') if shares[number]]


class Segmentation(WithClasses):
    """Images with a class for each pixel; the better the larger the mean overlap on those held out."""
    known = 'label maps'
    predictor: Type[Predictor] = MapPredictor

    def __init__(self, config: Config):
        self.config = config
        self._train, self._held_out = open_segmented(config.data, config.seed)
        self.source: Source = self._train
        self.held_out: Optional[Source] = self._held_out
        self.classes = self._train.classes

    def build_network(self, initial: bool, backend: OpBackend, parts: Sequence[slice] = (), own: int = 0,
                      shard: Shard = WHOLE) -> Segmenter:
        """Builds the network, which is always whole."""
        assert not parts and shard == WHOLE
        config = self.config
        net = build_segmenter(config.model, len(self.classes), config.seed if initial else None, backend,
                              config.data.mean, config.data.std)
        if initial:
            net.begin_with(class_shares(self._train))
        return net

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        net = Segmenter(self.config.model, len(self.classes))
        return {name: p.shape for name, p in named_parameters(net).items()}

    def multiply_adds(self) -> int:
        return segmenter_cost(self.config.model, len(self.classes))

    def transform(self) -> SegmentTransform:
        return SegmentTransform(self.config.data, self.config.augment, self.config.model, self._train)

    def evaluator(self, control: ControlPlane) -> Optional[PixelEvaluator]:
        return PixelEvaluator(self.config, self._held_out, control) if self._held_out else None

    def facts(self) -> List[str]:
        return [f'{len(self.classes):,} classes of pixels']

    def annotations(self) -> List[int]:
        """Returns checksums of the training images' label maps, and of the held-out images'."""
        return [data.checksum() for data in (self._train, self._held_out) if data]
