"""Masked loss on held-out images with masks that never change, so that the curve compares across epochs and runs."""
import math
from typing import Dict, Iterator, Optional

import numpy as np

from . import baselines
from ..config import Config
from ..data.loader import Batch, fixed_batches
from ..data.masks import average_distance
from ..data.sources import SEED, Source
from ..data.transforms import EvalTransform
from ..parallel.control import ControlPlane
from ..parallel.placement import Replicated
from .pictures import grid, to_uint8


class Validation:
    """Held-out images and their masks; neither depends on the run's seed. Each worker measures its part of them."""

    def __init__(self, config: Config, source: Source, control: ControlPlane):
        self._config, self._source, self._control = config, source, control
        self.images = min(config.validation.images, len(source))
        self._distances: Optional[float] = None

    def batches(self, part: int = 0, parts: int = 1) -> Iterator[Batch]:
        """One of `parts` parts of the images, in batches no larger than a worker's in training."""
        config = self._config
        batch = -(-config.train.batch_size // (config.train.accumulate * self._control.mesh.data))
        transform = EvalTransform(config.data, config.mask, config.model)
        return fixed_batches(self._source, transform, min(batch, self.images), self.images, SEED,
                             config.data.threads, config.data.max_broken, part=part, parts=parts)

    def measure(self, placement: Replicated) -> Dict[str, float]:
        """val_loss, the mean masked loss over the held-out images, and val_avg_dist, the AvgDist of their masks.

        Each image counts once, however many workers share them.
        """
        sums, masks, mesh = [], [], self._control.mesh
        for batch in self.batches(mesh.coordinate('data'), mesh.data):
            sums.append(placement.loss(batch))
            masks.append(batch.mask)
        if self._distances is None:  # while the device works; the masks never change
            self._distances = sum(len(mask) * average_distance(mask, self._config.model.patch_size) for mask in masks)
        own = [math.fsum(s.asscalar() for s in sums), self._distances]
        loss, distance = np.sum(self._control.all_gather('validation', own), axis=0) / self.images
        return {'val_loss': loss, 'val_avg_dist': distance}

    def picture(self, placement: Replicated) -> np.ndarray:
        """The first images: original, masked, reconstruction; uint8 (H, W, 3)."""
        batch = next(self.batches())
        batch = batch._replace(**{field: getattr(batch, field)[:self._config.validation.pictures]
                                  for field in ('image', 'mask', 'uniform', 'index')})
        predicted = to_uint8(placement.reconstruct(batch), self._config.data.mean, self._config.data.std)
        return grid(batch.image, batch.mask, predicted)

    def baselines(self) -> Dict[str, float]:
        """The same loss of two predictions without a network; of none where targets are normalised by cell."""
        config, sums = self._config, np.zeros(2)
        for batch in self.batches():
            image = ((batch.image / 255 - config.data.mean) / config.data.std).transpose(0, 3, 1, 2).astype('float32')
            pixels = batch.mask.repeat(config.model.patch_size, 1).repeat(config.model.patch_size, 2)
            sums += [baselines.masked_loss(image, predict(image, pixels), pixels, config.model.loss).sum()
                     for predict in (baselines.visible_mean, baselines.nearest_visible)]
        return dict(zip(('mean of the visible pixels', 'nearest visible pixel'), sums / self.images))


def table(first: Optional[float], last: float, others: Dict[str, float]) -> str:
    """Losses and their ratio to the mean of the visible pixels."""
    rows = {'at the start': first, 'at the end': last, **others}
    reference = others['mean of the visible pixels']
    lines = [f"{'validation loss':<28}{'':>9}   of the visible mean's"]
    lines += [f'  {name:<26}{value:>9.4f}   {value / reference:>6.2f}' for name, value in rows.items()
              if value is not None]
    return '\n'.join(lines)
