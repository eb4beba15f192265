"""How well a classifier tells held-out images apart, the same numbers for any number of workers."""
import json
import time
from pathlib import Path
from typing import Dict, Sequence, Tuple

import numpy as np

from . import metrics, pictures
from ..config import Config
from ..data.loader import every_image
from ..data.sources import Source
from ..data.transforms import ClassifyEvalTransform
from ..parallel.control import ControlPlane
from ..parallel.placement import Replicated
from ..system.text import encode

SHOWN = 20  # classes in the text that is printed; the file has all


class Evaluation:
    """Labelled images, each counted once, whichever worker measures it."""

    def __init__(self, config: Config, source: Source, labels: np.ndarray, classes: Sequence[str],
                 control: ControlPlane):
        """labels are the numbers (n,) of the images' `classes`."""
        self._config, self._source, self._labels, self._classes = config, source, labels, classes
        self._control = control
        self.images = len(source)

    def measure(self, placement: Replicated) -> Dict[str, float]:
        """val_top1, val_top5, val_ece in percent, val_loss, and val_images_per_second of all workers together.

        Called by every worker at the same time.

        Raises:
            ValueError: an image that cannot be read; another in its place would count under a wrong label.
        """
        return self._measure(placement)[0]

    def report(self, placement: Replicated, folder: Path) -> str:
        """Measures, and says it in words; rank 0 writes evaluation.json, evaluation.txt and confusion.png to `folder`.

        Called by every worker at the same time; raises ValueError as `measure`, or where it cannot write.
        """
        values, own = self._measure(placement)
        predicted = np.concatenate([np.array(part, int) for part in self._control.all_gather('predictions', own)])
        matrix = metrics.confusion_matrix(self._labels, predicted, len(self._classes))
        scores = metrics.class_scores(self._labels, predicted, len(self._classes))
        text = self._text(values, scores, matrix)
        if self._control.rank == 0:
            self._write(folder, values, metrics.class_table(scores, self._classes))
            text += f'\n{folder}/evaluation.json, evaluation.txt (all classes)'
            try:
                pictures.confusion(matrix, self._classes, folder / 'confusion.png')
                text += ', confusion.png'
            except Exception as error:  # whatever a font or a cache folder has: the numbers are written
                text += f'\nwarning: confusion.png could not be drawn: {" ".join(str(error).split())}'
        return text

    def _measure(self, placement: Replicated) -> Tuple[Dict[str, float], np.ndarray]:
        """The values of all workers, and the predicted classes of this one's images."""
        tally, predicted, clock = metrics.Tally(), [np.empty(0, int)], [time.monotonic()]
        config, control = self._config, self._control
        batch = -(-config.train.batch_size // (config.train.accumulate * control.mesh.data))
        transform = ClassifyEvalTransform(config.data, config.model)
        for part in every_image(self._source, transform, batch, config.data.threads, control.mesh.coordinate('data'),
                                control.mesh.data):
            predicted.append(tally.add(placement.outputs(part), self._labels[part.index]))
            clock.append(time.monotonic())
        first = int(len(clock) > 2)  # is not timed if others are: it waits for files and for MXNet's preparations
        speed = [sum(map(len, predicted[1 + first:])), clock[-1] - clock[first]]
        gathered = np.array(control.all_gather('evaluation', np.concatenate([tally.state(), speed])))
        values = metrics.Tally(gathered[:, :-2].sum(axis=0)).values()
        values['val_images_per_second'] = gathered[:, -2].sum() / gathered[:, -1].max()
        return values, np.concatenate(predicted)

    def _text(self, values: Dict[str, float], scores: np.ndarray, matrix: np.ndarray) -> str:
        lines = [f"top-1 {values['val_top1']:.2f} %, top-5 {values['val_top5']:.2f} % of {self.images:,} images, "
                 f"loss {values['val_loss']:.4f}, calibration error {values['val_ece']:.2f} %, "
                 f"{values['val_images_per_second']:,.0f} images/s",
                 metrics.class_table(scores, self._classes, SHOWN)]
        if len(self._classes) > SHOWN:
            lines.append(f'({SHOWN} of {len(self._classes):,} classes, those of least F1)')
        confusions = metrics.worst_confusions(matrix, self._classes, 3)
        return '\n'.join(lines + ([f'most confused: {"; ".join(confusions)}'] if confusions else []))

    def _write(self, folder: Path, values: Dict[str, float], table: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            finite = {name: value if np.isfinite(value) else None for name, value in values.items()}
            (folder / 'evaluation.json').write_text(json.dumps({'images': self.images, **finite}, indent=1) + '\n')
            (folder / 'evaluation.txt').write_bytes(encode(table + '\n'))
        except OSError as error:
            raise ValueError(f'{folder}: cannot write the evaluation there: {error.strerror}') from None
