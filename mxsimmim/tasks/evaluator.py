"""What evaluators on labelled images have in common; each image counts once, whichever worker measures it."""
import json
import math
from pathlib import Path
from typing import Any, Dict, Generic, Iterator, Mapping, Optional, Sequence, Tuple, TypeVar

import numpy as np

from ..config import Config
from ..data.loader import Batch, every_image
from ..data.sources import Source
from ..data.transforms import Transform
from ..parallel.control import ControlPlane
from ..parallel.placement import Placement
from ..system.text import encode
from .task import Metric

SHOWN = 20  # classes in the text that is printed; the file has all

S = TypeVar('S', bound=Source)
M = TypeVar('M')  # what is measured beside the values


class LabelledEvaluator(Generic[S, M]):
    """Measures a network on all held-out images of `source`."""
    metric: Metric
    best: str  # how the best weights are told of, with the names of the values
    drawn = ''

    def __init__(self, config: Config, source: S, control: ControlPlane):
        self._config, self._source, self._control = config, source, control
        self.images = len(source)

    def evaluate(self, placement: Placement) -> Dict[str, float]:
        """Returns `metric` and others, and val_images_per_second, of all workers together.

        Called by every worker at the same time.

        Raises:
            ValueError: an image that cannot be read, or what is known of it cannot: another in its place would count
                under a wrong label.
        """
        return self._measure(placement)[0]

    def picture(self, placement: Placement) -> Optional[np.ndarray]:
        """Draws nothing."""
        return None

    def report(self, placement: Placement, folder: Path) -> str:
        """Evaluates, and says it in words; rank 0 writes evaluation.json, evaluation.txt and perhaps more to `folder`.

        Called by every worker at the same time; raises ValueError as `evaluate`, or where it cannot write.
        """
        raise NotImplementedError

    def conclude(self, rows: Sequence[Mapping[str, Any]], last_step: int, placement: Placement, folder: Path) -> str:
        """Writes the evaluation of the last weights, as `report`, and says which were the best."""
        known = [row for row in rows if row[self.metric.name] is not None]  # where nothing is labelled there is none
        best = max(known, key=self.metric.score, default=None)
        return self.report(placement, folder) + (
            f'\nbest: {self.best.format(**best)} at step {best["step"]}, kept in {folder}/best' if best else '')

    def _measure(self, placement: Placement) -> Tuple[Dict[str, float], M]:
        """The values of all workers, and what else is measured."""
        raise NotImplementedError

    def _own_batches(self, transform: Transform, placement: Placement, views: int = 1) -> Iterator[Batch]:
        """This worker's images, in batches no larger than one in training, of which each image has so many `views`."""
        train, mesh = self._config.train, self._control.mesh
        size = -(-train.batch_size // (train.accumulate * mesh.data * views))
        return every_image(self._source, transform, size, self._config.data.threads, mesh.coordinate('data'), mesh.data,
                           placement.inputs)

    def _first_batch(self, transform: Transform, placement: Placement) -> Optional[Batch]:
        """The images that are drawn; None where there are none, or for another rank than 0."""
        count = min(self._config.validation.pictures, self.images)
        if not count or self._control.rank:
            return None
        return next(every_image(self._source, transform, count, self._config.data.threads, needed=placement.inputs))

    def _written(self, folder: Path, values: Mapping[str, Any], table: str) -> str:
        """Have rank 0 write the evaluation, see `write_evaluation`, and say so."""
        if self._control.rank:
            return ''
        write_evaluation(folder, {'images': self.images, **values}, table)
        return f'\n{folder}/evaluation.json, evaluation.txt (all classes)'


def left_out(classes: Sequence[str], measure: str) -> str:
    """Say that of more than `SHOWN` classes those of least `measure` are shown."""
    return f'\n({SHOWN} of {len(classes):,} classes, those of least {measure})' if len(classes) > SHOWN else ''


def write_evaluation(folder: Path, values: Mapping[str, Any], table: str) -> None:
    """Writes evaluation.json, in which numbers that are not finite are null, and evaluation.txt to a folder.

    Raises:
        ValueError: it cannot be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'evaluation.json').write_text(json.dumps(_finite(values), indent=1) + '\n')
        (folder / 'evaluation.txt').write_bytes(encode(table + '\n'))
    except OSError as error:
        raise ValueError(f'{folder}: cannot write the evaluation there: {error.strerror}') from None


def _finite(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {name: _finite(value) for name, value in values.items()}
    return values if math.isfinite(values) else None
