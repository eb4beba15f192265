"""Masked loss on held-out images with masks that never change, so that the curve compares across epochs and runs."""
from typing import Dict, Iterator, Optional

import numpy as np

from . import baselines
from .config import Config
from .data.loader import Batch, fixed_batches
from .data.masks import average_distance
from .data.sources import Source
from .data.transforms import EvalTransform
from .parallel.placement import Replicated
from .pictures import grid, to_uint8


SEED = 0  # of masks and of which images are held out: the same for every run, whatever its own seed


class Validation:
    """Held-out images and their masks; neither depends on the run's seed."""

    def __init__(self, config: Config, source: Source):
        self._config, self._source = config, source
        self.images = min(config.validation.images, len(source))
        self._avg_dist: Optional[float] = None

    def batches(self) -> Iterator[Batch]:
        """The images in batches no larger than those of training."""
        config = self._config
        size = -(-config.train.batch_size // config.train.accumulate)
        transform = EvalTransform(config.data, config.mask, config.model)
        return fixed_batches(self._source, transform, min(size, self.images), self.images, SEED,
                             config.data.threads)

    def measure(self, placement: Replicated) -> Dict[str, float]:
        """val_loss, the mean masked loss over the held-out images, and val_avg_dist, the AvgDist of their masks."""
        sums, masks = [], []
        for batch in self.batches():
            sums.append(placement.loss(batch))
            masks.append(batch.mask)
        if self._avg_dist is None:  # while the device works; the masks never change
            self._avg_dist = average_distance(np.concatenate(masks), self._config.model.patch_size)
        return {'val_loss': sum(s.asscalar() for s in sums) / self.images, 'val_avg_dist': self._avg_dist}

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
