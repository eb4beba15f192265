"""Classification: images are to be given their class, the better the more of those held out are."""
import zlib
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type

import mxnet as mx
import numpy as np

from ..config import Config, DataConfig, ModelConfig
from ..data.labels import open_labelled
from ..data.sources import Source
from ..data.transforms import ClassifyEvalTransform, ClassifyTransform, Fields
from ..models import Classifier, Network, build_classifier, named_parameters
from ..models.cost import multiply_adds
from ..models.shards import WHOLE, Shard
from ..ops import OpBackend
from ..parallel.control import ControlPlane
from ..parallel.placement import Placement
from ..system.text import one_line
from . import metrics, pictures
from .classes import PredictorOfClasses, WithClasses, names_of_outputs
from .evaluator import SHOWN, LabelledEvaluator, left_out
from .pace import Pace, images_per_second
from .task import Metric, Predictor


class ClassEvaluator(LabelledEvaluator[Source, np.ndarray]):
    """Tells how many images get their class: val_top1, val_top5, val_ece in percent, val_loss.

    `_measure` also returns the predicted classes of this worker's images. The confusion matrix is drawn at the end.
    """
    metric = Metric('val_top1', higher_is_better=True)
    best = '{val_top1:.2f} %'

    def __init__(self, config: Config, source: Source, labels: np.ndarray, classes: Sequence[str],
                 control: ControlPlane):
        """Keeps what is measured; `labels` are the numbers (n,) of the images' `classes`."""
        super().__init__(config, source, control)
        self._labels, self._classes = labels, classes

    def report(self, placement: Placement, folder: Path) -> str:
        values, own = self._measure(placement)
        everybody = self._control.mesh.by_data(self._control.all_gather('predictions', own))
        predicted = np.concatenate([np.array(part, int) for parts in everybody for part in parts])
        matrix = metrics.confusion_matrix(self._labels, predicted, len(self._classes))
        scores = metrics.class_scores(self._labels, predicted, len(self._classes))
        text = (self._text(values, scores, matrix)
                + self._written(folder, values, metrics.class_table(scores, self._classes)))
        if self._control.rank == 0:
            try:
                pictures.confusion(matrix, self._classes, folder / 'confusion.png')
                text += ', confusion.png'
            except Exception as error:  # whatever a font or a cache folder has: the numbers are written
                text += f'\nwarning: confusion.png could not be drawn: {" ".join(str(error).split())}'
        return text

    def _measure(self, placement: Placement) -> Tuple[Dict[str, float], np.ndarray]:
        tally, predicted, pace, control = metrics.Tally(), [np.empty(0, int)], Pace(), self._control
        transform = ClassifyEvalTransform(self._config.data, self._config.model)
        for part in self._own_batches(transform, placement):
            answers = placement.outputs(part)
            if control.mesh.reports:  # or another worker has the answers about these images
                predicted.append(tally.add(answers, self._labels[part.index]))
            pace.add(len(predicted[-1]))
        tallies, paces = zip(*control.all_gather('evaluation', [tally.state().tolist(), pace.state()]))
        values = metrics.Tally(np.sum(tallies, axis=0)).values()
        values['val_images_per_second'] = images_per_second(paces)
        return values, np.concatenate(predicted)

    def _text(self, values: Dict[str, float], scores: np.ndarray, matrix: np.ndarray) -> str:
        lines = [f"top-1 {values['val_top1']:.2f} %, top-5 {values['val_top5']:.2f} % of {self.images:,} images, "
                 f"loss {values['val_loss']:.4f}, calibration error {values['val_ece']:.2f} %, "
                 f"{values['val_images_per_second']:,.0f} images/s",
                 metrics.class_table(scores, self._classes, SHOWN) + left_out(self._classes, 'F1')]
        confusions = metrics.worst_confusions(matrix, self._classes, 3)
        return '\n'.join(lines + ([f'most confused: {"; ".join(confusions)}'] if confusions else []))


class ClassPredictor(PredictorOfClasses):
    """Gives images the probabilities of their classes: (B, K)."""
    kind = 'a classifier, which reconstructs nothing'
    output = 'logits'
    told = 'classes'

    def __init__(self, config: Config, net: Network, state: Mapping[str, Any]):
        super().__init__(config, net, state)
        self._width = max(len(one_line(name)) for name in self.classes)

    @staticmethod
    def build_network(model: ModelConfig, state: Mapping[str, Any], backend: OpBackend, data: DataConfig
                      ) -> Classifier:
        return build_classifier(model, len(state['classes']), None, backend, data.mean, data.std)

    @staticmethod
    def state_of_weights(arrays: Mapping[str, np.ndarray], file: Path, classes: str) -> Dict[str, Any]:
        """Returns the names in the file `classes`; without one, the numbers of the classifier's outputs."""
        return {'classes': names_of_outputs(len(arrays['head.weight']), file, classes)}

    def transform(self, data: DataConfig) -> ClassifyEvalTransform:
        return ClassifyEvalTransform(data, self._config.model)

    def answer(self, image: mx.nd.NDArray) -> np.ndarray:
        """Returns the probabilities (B, K)."""
        return mx.nd.softmax(self.call(image), axis=1).asnumpy()

    def line(self, fields: Fields, answer: np.ndarray, top: int) -> str:
        """Says the `top` most probable classes, each with its probability."""
        return '   '.join(f'{one_line(name):<{self._width}} {value:.6f}' for name, value in self.ranked(answer)[:top])

    def record(self, fields: Fields, answer: np.ndarray) -> Dict[str, Any]:
        """Returns all classes and their probabilities, the most probable first."""
        return {'classes': [{'name': name, 'probability': value} for name, value in self.ranked(answer)]}

    def drawing(self, image: np.ndarray, fields: Fields, answer: np.ndarray) -> Optional[np.ndarray]:
        """Draws nothing."""
        return None

    def ranked(self, probabilities: np.ndarray) -> List[Tuple[str, float]]:
        """Returns (class name, probability) of one image, the most probable first."""
        return [(self.classes[number], float(probabilities[number])) for number in np.argsort(-probabilities)]


class Classification(WithClasses):
    """Labelled images; the better the more of those held out are given their class."""
    known = 'classes'
    predictor: Type[Predictor] = ClassPredictor

    def __init__(self, config: Config):
        self.config = config
        self._data = open_labelled(config.data, config.seed)
        self.source, self.held_out, self.classes = self._data.train, self._data.held_out, self._data.classes

    def build_network(self, initial: bool, backend: OpBackend, parts: Sequence[slice] = (), own: int = 0,
                      shard: Shard = WHOLE) -> Classifier:
        config = self.config
        return build_classifier(config.model, len(self.classes), config.seed if initial else None, backend,
                                config.data.mean, config.data.std, parts, own, shard)

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        net = Classifier(self.config.model, len(self.classes))
        return {name: p.shape for name, p in named_parameters(net).items()}

    def multiply_adds(self) -> int:
        return multiply_adds(self.config.model, decoder=False)

    def transform(self) -> ClassifyTransform:
        return ClassifyTransform(self.config.data, self.config.augment, self.config.model, self._data.train_labels,
                                 len(self.classes))

    def evaluator(self, control: ControlPlane) -> Optional[ClassEvaluator]:
        labels = self._data.held_out_labels
        if not self.held_out or labels is None:
            return None
        return ClassEvaluator(self.config, self.held_out, labels, self.classes, control)

    def facts(self) -> List[str]:
        return [f'{len(self.classes):,} classes']

    def annotations(self) -> List[int]:
        """Returns a checksum of the training images' labels, and one of the held-out images'."""
        return [zlib.crc32(labels.tobytes()) for labels in (self._data.train_labels, self._data.held_out_labels)
                if labels is not None]
