"""What pre-training and fine-tuning do differently: data, network, validation. The loop is the same."""
import hashlib
import os
import zlib
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from mxnet.gluon import HybridBlock

from ..config import configfile
from ..config import Config
from ..data.labels import open_labelled
from ..data.sources import Source, hold_out, open_source
from ..data.transforms import ClassifyTransform, PretrainTransform
from .evaluation import Evaluation
from ..models import build_classifier, build_simmim, named_parameters
from ..ops import OpBackend
from ..optim import parameter_groups, weight_decays
from ..parallel.control import ControlPlane
from ..parallel.placement import Replicated
from .classes import check_classes
from .validation import SEED, Validation, table


class Pretraining:
    """Masked images; the better the lower the loss on those held out."""
    takes_encoder = False  # of model.pretrained: starts from random weights
    classes: Tuple[str, ...] = ()
    labels: Sequence[np.ndarray] = ()

    def __init__(self, config: Config):
        self.config = config
        self.source, self.held_out = self._open()

    def _open(self) -> Tuple[Source, Optional[Source]]:
        data = self.config.data
        source = open_source(data.path)
        if data.val_path:
            return source, open_source(data.val_path)
        return hold_out(source, data.val_fraction, SEED) if data.val_fraction else (source, None)

    def network(self, initial: bool, backend: OpBackend) -> HybridBlock:
        """The network, computing with `backend`, with random weights if they are to be used."""
        config = self.config
        return build_simmim(config.model, config.seed if initial else None, backend, config.data.mean, config.data.std)

    def groups(self, net: HybridBlock) -> Dict[str, Tuple[float, float]]:
        """(lr_scale, weight_decay) of each parameter."""
        optim = self.config.optim
        decays = weight_decays(named_parameters(net), optim.recipe, self.config.model.type, optim.weight_decay)
        return {name: (1.0, decay) for name, decay in decays.items()}

    def transform(self) -> PretrainTransform:
        """What is done to a training image."""
        return PretrainTransform(self.config.data, self.config.mask, self.config.model)

    def validation(self, control: ControlPlane) -> Optional[Validation]:
        """Loss on the held-out images, if there are any."""
        return Validation(self.config, self.held_out, control) if self.held_out else None

    @staticmethod
    def score(values: Mapping[str, float]) -> float:
        """Of a validation; the higher the better."""
        return -values['val_loss']

    def picture(self, validation: Validation, placement: Replicated) -> Optional[np.ndarray]:
        """What a validation draws, uint8 (H, W, 3)."""
        return validation.picture(placement) if self.config.validation.pictures else None

    def conclusion(self, validation: Validation, rows: List[Dict[str, Any]], last: int, _placement: Replicated,
                   _folder: Path) -> str:
        """What is said at the end, of the validations in the log `rows`."""
        losses = {row['step']: row['val_loss'] for row in rows}
        if last not in losses or self.config.model.norm_targets:
            return ''
        return table(losses.get(0), losses[last], validation.baselines())


class Classification:
    """Labelled images; the better the more of those held out are given their class."""
    takes_encoder = True

    def __init__(self, config: Config):
        self.config = config
        self._data = open_labelled(config.data, config.seed)
        self.source, self.held_out, self.classes = self._data.train, self._data.held_out, self._data.classes
        self.labels = [part for part in (self._data.train_labels, self._data.held_out_labels) if part is not None]

    def network(self, initial: bool, backend: OpBackend) -> HybridBlock:
        """As in `Pretraining`."""
        config = self.config
        return build_classifier(config.model, len(self.classes), config.seed if initial else None, backend,
                                config.data.mean, config.data.std)

    def groups(self, net: HybridBlock) -> Dict[str, Tuple[float, float]]:
        """As in `Pretraining`, with layer decay."""
        optim = self.config.optim
        return parameter_groups(net, optim.layer_decay, optim.weight_decay, optim.recipe)

    def transform(self) -> ClassifyTransform:
        """As in `Pretraining`."""
        return ClassifyTransform(self.config.data, self.config.augment, self.config.model, self._data.train_labels,
                                 len(self.classes))

    def validation(self, control: ControlPlane) -> Optional[Evaluation]:
        """As in `Pretraining`."""
        if not self.held_out:
            return None
        return Evaluation(self.config, self.held_out, self._data.held_out_labels, self.classes, control)

    @staticmethod
    def score(values: Mapping[str, float]) -> float:
        """As in `Pretraining`."""
        return values['val_top1']

    def picture(self, _validation: Evaluation, _placement: Replicated) -> Optional[np.ndarray]:
        """Nothing: the confusion matrix is drawn at the end."""
        return None

    def conclusion(self, validation: Evaluation, rows: List[Dict[str, Any]], last: int, placement: Replicated,
                   folder: Path) -> str:
        """As in `Pretraining`; writes the evaluation to the run's folder."""
        best = max(rows, key=self.score)
        return (validation.report(placement, folder)
                + f'\nbest: {best["val_top1"]:.2f} % at step {best["step"]}, kept in {folder}/best')


Task = Union[Pretraining, Classification]
TASKS = {'pretrain': Pretraining, 'classify': Classification}


def check_same_job(config: Config, task: Task, control: ControlPlane) -> None:
    """Compares configuration, images, classes, labels and the number of held-out images of all workers.

    Raises:
        ValueError: in the workers that differ from rank 0, naming what.
    """
    source, held_out = task.source, len(task.held_out or ())
    some = '\n'.join(os.path.basename(source.name(i * len(source) // 1000)) for i in range(1000))
    names = hashlib.sha256(some.encode('utf-8', 'surrogatepass')).hexdigest()  # rank 0 sends it to every worker
    labels = [zlib.crc32(part.tobytes()) for part in task.labels]
    own = {'config': configfile.to_dict(config), 'samples': len(source), 'names': names, 'classes': list(task.classes),
           'labels': labels, 'held_out': held_out}
    first = control.broadcast_object('comparison of configurations and images', lambda: own)
    changed = configfile.differences(configfile.from_dict(first['config'], 'rank 0'), config,
                                     configfile.FREE_BETWEEN_WORKERS)
    if changed:
        raise ValueError(f'rank {control.rank} is configured differently from rank 0: '
                         + ', '.join(f'{key} (rank 0 {old}, here {new})' for key, old, new in changed)
                         + ': give all workers the same files and the same command')
    if (first['samples'], first['names']) != (len(source), names):
        raise ValueError(f'data.path={config.data.path}: rank {control.rank} finds {len(source):,} images here, rank 0 '
                         f'{first["samples"]:,}, or others: all workers need the same images')
    if first['held_out'] != held_out:
        raise ValueError(f'data.val_path={config.data.val_path}: rank {control.rank} finds {held_out:,} images here, '
                         f'rank 0 {first["held_out"]:,}: all workers need the same images')
    check_classes('rank 0', first['classes'], task.classes, 'all workers need the same')
    data = config.data
    for number, where in enumerate((f'data.labels={data.labels}, data.path={data.path}',
                                    f'data.val_labels={data.val_labels}, data.val_path={data.val_path}')):
        if first['labels'][number:number + 1] != labels[number:number + 1]:
            raise ValueError(f'{where}: some images have other classes for rank {control.rank} than for rank 0: all '
                             'workers need the same')
