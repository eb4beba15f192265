"""Pre-training: the hidden part of an image is to be guessed from the rest, the better the lower the loss."""
import io
import math
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Type

import mxnet as mx
import numpy as np

from ..config import Config, DataConfig, ModelConfig
from ..data.loader import Batch, fixed_batches
from ..data.masks import average_distance
from ..data.sources import SEED, Source, hold_out, open_source
from ..data.transforms import EvalTransform, Fields, PretrainTransform
from ..models import Network, SimMIM, build_simmim, named_parameters
from ..models.cost import multiply_adds
from ..models.shards import WHOLE, Shard
from ..ops import OpBackend
from ..optim import weight_decays
from ..parallel.control import ControlPlane
from ..parallel.placement import Placement
from . import baselines
from .classes import check_classes
from .pictures import grid, to_uint8
from .task import Metric, Predictor


class MaskedEvaluator:
    """Measures the masked loss on held-out images with masks that never change, so that it compares across runs.

    Neither the images nor their masks depend on the run's seed.
    """
    metric = Metric('val_loss', higher_is_better=False)
    drawn = 'reconstruction'

    def __init__(self, config: Config, source: Source, control: ControlPlane):
        self._config, self._source, self._control = config, source, control
        self.images = min(config.validation.images, len(source))
        self._distances: Optional[float] = None

    def batches(self, part: int = 0, parts: int = 1, needed: Optional[Sequence[str]] = None) -> Iterator[Batch]:
        """Yields one of `parts` parts of the images, in batches no larger than a worker's in training.

        `needed` are the fields that are used, as for `Loader`.
        """
        config = self._config
        batch = -(-config.train.batch_size // (config.train.accumulate * self._control.mesh.data))
        transform = EvalTransform(config.data, config.mask, config.model)
        return fixed_batches(self._source, transform, min(batch, self.images), self.images, SEED,
                             config.data.threads, config.data.max_broken, part=part, parts=parts, needed=needed)

    def evaluate(self, placement: Placement) -> Dict[str, float]:
        """Returns val_loss, the mean masked loss over the held-out images, and val_avg_dist, their masks' AvgDist.

        Each image counts once, however many workers share them.
        """
        sums, masks, mesh = [], [], self._control.mesh
        for batch in self.batches(mesh.coordinate('data'), mesh.data, placement.inputs):
            sums.append(placement.loss(batch))
            masks.append(batch.fields['mask'])
        if self._distances is None:  # while the device works; the masks never change
            self._distances = sum(len(mask) * average_distance(mask, self._config.model.patch_size) for mask in masks)
        own = [math.fsum(s.asscalar() for s in sums) * mesh.reports, self._distances * mesh.reports]
        loss, distance = np.sum(self._control.all_gather('validation', own), axis=0) / self.images
        return {'val_loss': loss, 'val_avg_dist': distance}

    def picture(self, placement: Placement) -> Optional[np.ndarray]:
        """Draws the first images, on rank 0: original, masked, reconstruction; uint8 (H, W, 3)."""
        count = self._config.validation.pictures
        if not count:
            return None
        batch = next(self.batches(needed=placement.inputs))
        batch = Batch({name: array[:count] for name, array in batch.fields.items()}, batch.epoch, batch.index[:count])
        predicted = to_uint8(placement.reconstruct(batch), self._config.data.mean, self._config.data.std)
        if self._control.rank:  # which has a later stage, and perhaps no images
            return None
        return grid(batch.fields['image'], batch.fields['mask'], predicted)

    def report(self, placement: Placement, folder: Path) -> str:
        """Evaluates and compares with predictions that need no network; writes no file."""
        values = self.evaluate(placement)
        if self._control.rank:
            return ''
        return self._compared(None, values['val_loss']) or f"validation loss {values['val_loss']:.4f}"

    def conclude(self, rows: Sequence[Mapping[str, Any]], last_step: int, placement: Placement, folder: Path) -> str:
        """Compares the loss at the end with that at the start, and with predictions that need no network."""
        losses = {row['step']: row['val_loss'] for row in rows}
        if last_step not in losses or self._control.rank:
            return ''
        return self._compared(losses.get(0), losses[last_step])

    def _compared(self, first: Optional[float], last: float) -> str:
        """Nothing where targets are normalised by cell: then the loss is not of pixels."""
        return '' if self._config.model.norm_targets else table(first, last, self.baselines())

    def baselines(self) -> Dict[str, float]:
        """Returns the same loss of two predictions without a network; of none where targets are normalised by cell."""
        config, sums = self._config, np.zeros(2)
        for batch in self.batches():
            image, mask = batch.fields['image'], batch.fields['mask']
            image = ((image / 255 - config.data.mean) / config.data.std).transpose(0, 3, 1, 2).astype('float32')
            pixels = mask.repeat(config.model.patch_size, 1).repeat(config.model.patch_size, 2)
            sums += [baselines.masked_loss(image, predict(image, pixels), pixels, config.model.loss).sum()
                     for predict in (baselines.visible_mean, baselines.nearest_visible)]
        return dict(zip(('mean of the visible pixels', 'nearest visible pixel'), sums / self.images))


def table(first: Optional[float], last: float, others: Dict[str, float]) -> str:
    """Formats losses and their ratio to that of the mean of the visible pixels."""
    rows = {'at the start': first, 'at the end': last, **others}
    reference = others['mean of the visible pixels']
    lines = [f"{'validation loss':<28}{'':>9}   of the visible mean's"]
    lines += [f'  {name:<26}{value:>9.4f}   {value / reference:>6.2f}' for name, value in rows.items()
              if value is not None]
    return '\n'.join(lines)


class Reconstructor:
    """Reconstructs images of which a part is masked: uint8 (B, S, S, 3)."""
    command = 'reconstruct'
    kind = 'a pre-training, which knows no classes'
    advice = '`mxsimmim reconstruct` shows what it has learned, `mxsimmim finetune` makes a classifier of it'
    summary = 'pre-trained'
    classes: Tuple[str, ...] = ()
    output = 'reconstruction'
    score: Optional[int] = None

    def __init__(self, config: Config, net: Network, state: Mapping[str, Any]):
        assert isinstance(net, SimMIM)
        self._config, self._net, model = config, net, config.model
        self.inputs: Dict[str, Tuple[int, ...]] = {'image': (3, *model.size), 'mask': model.patches}

    @staticmethod
    def build_network(model: ModelConfig, state: Mapping[str, Any], backend: OpBackend, data: DataConfig) -> SimMIM:
        return build_simmim(model, None, backend, data.mean, data.std)

    @staticmethod
    def state_of_weights(arrays: Mapping[str, np.ndarray], file: Path, classes: str) -> Dict[str, Any]:
        return {}

    def transform(self, data: DataConfig) -> EvalTransform:
        return EvalTransform(data, self._config.mask, self._config.model)

    def call(self, image: Any, mask: Any) -> Any:
        """Maps images (B, 3, S, S) and masks (B, h, w), 1 = masked, to images (B, 3, S, S), normalised like these."""
        return self._net.reconstruct(image, mask)

    def answer(self, image: mx.nd.NDArray, mask: mx.nd.NDArray) -> np.ndarray:
        """Returns the reconstructions as pixels, uint8 (B, S, S, 3)."""
        return to_uint8(self.call(image, mask).asnumpy(), self._config.data.mean, self._config.data.std)

    def random_inputs(self, rng: np.random.Generator, images: int) -> List[np.ndarray]:
        image = rng.standard_normal((images, *self.inputs['image'])).astype('float32')
        return [image, (rng.random((images, *self.inputs['mask'])) < self._config.mask.ratio).astype('float32')]

    def line(self, fields: Fields, answer: np.ndarray, top: int) -> str:
        raise AssertionError('a picture is not said in a line')

    def record(self, fields: Fields, answer: np.ndarray) -> Dict[str, Any]:
        raise AssertionError('a picture is not said in words')

    def drawing(self, image: np.ndarray, fields: Fields, answer: np.ndarray) -> Optional[np.ndarray]:
        raise AssertionError('`mxsimmim reconstruct` draws')

    def body(self, fields: Fields, answer: np.ndarray, accepted: str) -> Tuple[str, bytes]:
        """Returns a PNG: original, masked, and the reconstruction pasted into what was masked, side by side."""
        from PIL import Image
        file = io.BytesIO()
        Image.fromarray(grid(fields['image'][None], fields['mask'][None], answer[None])).save(file, 'PNG')
        return 'image/png', file.getvalue()


class Pretraining:
    """Masked images; the better the lower the loss on those held out."""
    takes_encoder = False  # starts from random weights
    keeps_best = False
    predictor: Type[Predictor] = Reconstructor

    def __init__(self, config: Config):
        self.config = config
        self.source, self.held_out = self._open()

    def _open(self) -> Tuple[Source, Optional[Source]]:
        data = self.config.data
        source = open_source(data.path)
        if data.val_path:
            return source, open_source(data.val_path)
        return hold_out(source, data.val_fraction, SEED) if data.val_fraction else (source, None)

    def build_network(self, initial: bool, backend: OpBackend, parts: Sequence[slice] = (), own: int = 0,
                      shard: Shard = WHOLE) -> SimMIM:
        config = self.config
        return build_simmim(config.model, config.seed if initial else None, backend, config.data.mean, config.data.std,
                            parts, own, shard)

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        return {name: p.shape for name, p in named_parameters(SimMIM(self.config.model)).items()}

    def multiply_adds(self) -> int:
        return multiply_adds(self.config.model, decoder=True)

    def parameter_groups(self, net: Network) -> Dict[str, Tuple[float, float]]:
        """Returns (lr_scale, weight_decay) of each parameter by name."""
        optim = self.config.optim
        decays = weight_decays(named_parameters(net), optim.recipe, self.config.model.type, optim.weight_decay)
        return {name: (1.0, decay) for name, decay in decays.items()}

    def transform(self) -> PretrainTransform:
        return PretrainTransform(self.config.data, self.config.mask, self.config.model)

    def evaluator(self, control: ControlPlane) -> Optional[MaskedEvaluator]:
        return MaskedEvaluator(self.config, self.held_out, control) if self.held_out else None

    def facts(self) -> List[str]:
        return []

    def state(self) -> Dict[str, Any]:
        return {}

    def check_state(self, state: Mapping[str, Any], where: str, remedy: str) -> None:
        """Refuses a classifier's checkpoint."""
        check_classes(where, state.get('classes', ()), (), remedy)

    def annotations(self) -> List[int]:
        return []

    def check_annotations(self, theirs: Sequence[int], rank: int) -> None:
        """Does nothing: nothing is known about the images."""
