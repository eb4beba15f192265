"""Detection: objects are to be found, with boxes and masks, the better the higher the precision on images held out."""
import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

import numpy as np

from ..config import Config, DataConfig, ModelConfig
from ..data.dense_transforms import WholeTransform
from ..data.detection import open_objects
from ..data.geometry import Size, View, padded, whole_view
from ..data.object_transforms import ObjectsTransform, ObjectsViewsTransform
from ..data.objects import Objects, WithObjects
from ..data.regions import bitmap
from ..data.sources import Source
from ..data.transforms import Fields
from ..models import Detector, build_detector, named_parameters
from ..models.detector import detector_cost
from ..models.from_gluoncv import model_zoo
from ..models.shards import WHOLE, Shard
from ..ops import OpBackend
from ..parallel.control import ControlPlane
from ..parallel.placement import Placement
from ..system.text import one_line
from . import pictures
from .classes import PredictorOfClasses, WithClasses, names_of_outputs
from .detections import Found, decoded, found_in, needed
from .evaluator import SHOWN, LabelledEvaluator, left_out
from .looks import answers_of
from .pace import Pace, images_per_second
from .precision import Comparison, Precisions
from .task import Metric, Predictor

CERTAIN = 0.5  # score from which a box is drawn
LARGE = 256  # pixels a side that pictures of boxes have at least


class BoxEvaluator(LabelledEvaluator[WithObjects, Precisions]):
    """Compares the objects found with those that are there: val_box_ap, val_box_ap50, val_mask_ap, val_mask_ap50.

    The last two only where there are masks. `_measure` also returns the precision of each class.
    """
    metric = Metric('val_box_ap', higher_is_better=True)
    best = 'box AP {val_box_ap:.4f}'
    drawn = 'prediction'

    def picture(self, placement: Placement) -> Optional[np.ndarray]:
        """Draws the first images, what is there and what is found, as the network sees them; uint8 (H, W, 3)."""
        config, classes, canvas = self._config, self._source.classes, self._config.model.size
        transform = ObjectsViewsTransform(config.data, config.model, self._source, config.model.masks)
        batch = self._first_batch(transform, placement)
        if batch is None:
            return None
        times = math.ceil(LARGE / min(canvas))  # or names would cover what they name
        large = canvas[0] * times, canvas[1] * times
        rows = []
        for image, objects, ((_, answer),) in zip(batch.fields['image'][:, 0], batch.fields['truth'],
                                                  answers_of(placement, batch)):
            image = image.repeat(times, 0).repeat(times, 1)
            found = found_in([(whole_view(canvas, canvas), answer)], large)
            rows.append([image, pictures.boxed(image, classes, *present(objects, large)),
                         drawn(image, found, classes)])
        return pictures.side_by_side(np.array(rows), pictures.ANNOTATED)

    def report(self, placement: Placement, folder: Path) -> str:
        values, scores = self._measure(placement)
        classes, found = self._source.classes, scores.values()
        text = ', '.join(f'{what} {found[name]:.4f}' for name, what in (
            ('box_ap', 'box AP'), ('box_ap50', 'box AP50'), ('mask_ap', 'mask AP'), ('mask_ap50', 'mask AP50'),
            ('voc_map', 'VOC mAP')) if name in found)
        of_classes = dict(zip(classes, scores.box[0].tolist()))
        return (text + f" of {self.images:,} images, {values['val_images_per_second']:,.1f} images/s\n"
                + scores.table(classes, SHOWN) + left_out(classes, 'box AP')
                + self._written(folder, {**found, **values, 'class_box_ap': of_classes}, scores.table(classes)))

    def _measure(self, placement: Placement) -> Tuple[Dict[str, float], Precisions]:
        config, control = self._config, self._control
        comparison, pace, looks = Comparison(config.model.masks), Pace(), config.validation
        transform = ObjectsViewsTransform(config.data, config.model, self._source, config.model.masks, looks.scales,
                                          looks.flip)
        for part in self._own_batches(transform, placement, transform.most):
            for objects, found in zip(part.fields['truth'], answers_of(placement, part)):
                comparison.add(found_in(found, objects.size), objects, objects.size)
            pace.add(len(part.index))
        parts = control.mesh.by_data(control.all_gather('evaluation', [comparison.state(), pace.state()]))
        states, paces = zip(*(part for parts_of in parts for part in parts_of))
        scores = comparison.precisions(states, len(self._source.classes))
        values = {f'val_{name}': value for name, value in scores.values().items() if name != 'voc_map'}
        return {**values, 'val_images_per_second': images_per_second(paces)}, scores


def present(objects: Objects, canvas: Size) -> Tuple[np.ndarray, np.ndarray, List[np.ndarray]]:
    """Returns boxes, class numbers and masks, if all have one, of an image's objects on a canvas; without crowds."""
    assert objects.size
    view, own = whole_view(objects.size, canvas), np.flatnonzero(~objects.crowd)
    regions = [objects.regions[number] for number in own]
    masks = [bitmap(region, objects.size) for region in regions if region is not None]
    masks = masks if len(masks) == len(own) else []
    return (view.boxes(objects.boxes[own], objects.size), objects.classes[own],
            [padded(view.nearest(mask), canvas, 0) for mask in masks])


def drawn(image: np.ndarray, found: Found, classes: Sequence[str]) -> np.ndarray:
    """Draws on an image, uint8 (H, W, 3), what was found in it for `CERTAIN`."""
    sure = np.flatnonzero(found.scores >= CERTAIN)
    masks = [decoded(found.masks[number]) for number in sure] if found.masks else []
    return pictures.boxed(image, classes, found.boxes[sure], found.classes[sure], masks, found.scores[sure])


class BoxPredictor(PredictorOfClasses):
    """Finds the objects of an image, class, score, box and mask, by detections as `Detector` has them."""
    kind = 'a detector, which reconstructs nothing'
    output = 'detections'
    told = 'classes of objects'
    score: Optional[int] = 4

    @staticmethod
    def build_network(model: ModelConfig, state: Mapping[str, Any], backend: OpBackend, data: DataConfig) -> Detector:
        needed()
        return build_detector(model, len(state['classes']), None, backend, data.mean, data.std)

    @staticmethod
    def state_of_weights(arrays: Mapping[str, np.ndarray], file: Path, classes: str) -> Dict[str, Any]:
        """Returns the names in the file `classes`; without one, the numbers of the classes."""
        return {'classes': names_of_outputs(len(arrays['roi_head.bbox_head.fc_cls.weight']) - 1, file, classes)}

    def transform(self, data: DataConfig) -> WholeTransform:
        return WholeTransform(data, self._config.model)

    def line(self, fields: Fields, answer: np.ndarray, top: int) -> str:
        """Says the `top` most certain objects: class, score, box."""
        found = self.record(fields, answer)['objects'][:top]
        return '   '.join(f'{one_line(each["name"])} {each["score"]:.3f} '
                          f'[{", ".join(f"{value:.0f}" for value in each["box"])}]' for each in found) or 'nothing'

    def record(self, fields: Fields, answer: np.ndarray) -> Dict[str, Any]:
        """Returns height, width and the objects, the most certain first: name, score, box, and mask if there are any.

        A box is x0, y0, x1, y1 in pixels, a mask COCO's compressed run lengths.
        """
        found = self._found(fields, answer)
        objects = [{'name': self.classes[number], 'score': float(score), 'box': [round(float(x), 2) for x in box],
                    **({'mask': found.masks[place]} if found.masks else {})}
                   for place, (box, score, number) in enumerate(zip(found.boxes, found.scores, found.classes))]
        return {'height': int(fields['extent'][2]), 'width': int(fields['extent'][3]), 'objects': objects}

    def drawing(self, image: np.ndarray, fields: Fields, answer: np.ndarray) -> np.ndarray:
        """Draws on an image, uint8 (H, W, 3), the objects that were found for `CERTAIN`."""
        return drawn(image, self._found(fields, answer), self.classes)

    def _found(self, fields: Fields, answer: np.ndarray) -> Found:
        height, width, *size = (int(side) for side in fields['extent'])
        return found_in([(View((height, width), (0, 0), (height, width)), answer)], (size[0], size[1]))


class Detection(WithClasses):
    """Images with boxes and masks of objects; the better the higher their average precision on those held out."""
    known = 'boxes'
    predictor: Type[Predictor] = BoxPredictor

    def __init__(self, config: Config):
        needed()
        model_zoo()
        self.config = config
        self._train, self._held_out = open_objects(config.data, config.seed)
        for data, key in ((self._train, 'labels'), (self._held_out, 'val_labels')):
            if config.model.masks and data and not data.has_masks:
                raise ValueError(f'data.{key}={getattr(config.data, key) or config.data.labels} has boxes alone, and '
                                 'model.masks=true asks for masks, too: set model.masks=false')
        self.source: Source = self._train
        self.held_out: Optional[Source] = self._held_out
        self.classes = self._train.classes

    def build_network(self, initial: bool, backend: OpBackend, parts: Sequence[slice] = (), own: int = 0,
                      shard: Shard = WHOLE) -> Detector:
        """Builds the network, which is always whole."""
        assert not parts and shard == WHOLE
        config = self.config
        return build_detector(config.model, len(self.classes), config.seed if initial else None, backend,
                              config.data.mean, config.data.std)

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        net = Detector(self.config.model, len(self.classes))
        return {name: p.shape for name, p in named_parameters(net).items()}

    def multiply_adds(self) -> int:
        return detector_cost(self.config.model, len(self.classes))

    def transform(self) -> ObjectsTransform:
        return ObjectsTransform(self.config.data, self.config.model, self._train, self.config.model.masks)

    def evaluator(self, control: ControlPlane) -> Optional[BoxEvaluator]:
        return BoxEvaluator(self.config, self._held_out, control) if self._held_out else None

    def facts(self) -> List[str]:
        return [f'{len(self.classes):,} classes of objects']

    def annotations(self) -> List[int]:
        """Returns checksums of the training images' objects, and of the held-out images'."""
        return [data.checksum() for data in (self._train, self._held_out) if data]
