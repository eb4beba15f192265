"""The learning rate of each step."""
import bisect
import math
from typing import Callable

from ..config import OptimConfig, TrainConfig

REFERENCE_BATCH = 512  # the batch the configured rates are for


def learning_rates(optim: OptimConfig, train: TrainConfig, per_epoch: int, total: int) -> Callable[..., float]:
    """The learning rate of update k, counted from 0, as a function of k, and of a scale of the base rate alone.

    Linear warm-up from warmup_lr, then cosine to min_lr (Loshchilov and Hutter 2017, arXiv:1608.03983), a line to it
    (mmsegmentation's poly with power 1), or drops at milestones. The reference moves its schedule after each update, so
    updates 0 and 1 both use the warm-up rate and update k uses time k-1; it counts accumulated parts, the last one of
    an update being the one that moves it. Its cosine starts at step 0, not where the warm-up ends, and so does the
    line; the `fixed` recipe starts them there.
    """
    scale = train.batch_size / REFERENCE_BATCH
    base, first, last = optim.base_lr * scale, optim.warmup_lr * scale, optim.min_lr * scale
    warmup = optim.warmup.steps(per_epoch, total)
    milestones = sorted(m.steps(per_epoch, total) for m in optim.milestones)
    origin = warmup if optim.recipe == 'fixed' else 0

    def after_warmup(t: float, top: float) -> float:
        if optim.schedule == 'multistep':
            return top * optim.gamma ** bisect.bisect_right(milestones, t)
        if optim.schedule in ('cosine', 'linear') and total > origin:
            turn = min((t - origin) / (total - origin), 1.0)
            left = 1 - turn if optim.schedule == 'linear' else (1 + math.cos(math.pi * turn)) / 2
            return last + (top - last) * left
        return top

    def rate(update: float, scale: float = 1.0) -> float:
        t = max(update - 1 / train.accumulate, 0)  # a server that counts its own updates asks between two
        top = base * scale
        return first + t * (top - first) / warmup if t < warmup else after_warmup(t, top)

    return rate
