"""Which loss is a spike. Pure functions."""
import math
from statistics import median
from typing import NamedTuple, Optional, Sequence

WINDOW = 100  # losses that a loss is compared with
LEAST = 20  # of them, without which nothing is a spike
NORMAL = 1.4826  # of a normal distribution, the standard deviation over the median absolute deviation
FLOOR = 1e-3  # times the median: the least that counts as a deviation, where losses hardly differ


class Spike(NamedTuple):
    """A loss far above those before it, by so many robust deviations from their median."""
    spike_loss: float
    median: float
    deviations: float


def spike_of(recent: Sequence[float], loss: float, limit: float) -> Optional[Spike]:
    """Return what makes `loss` a spike after the `recent` losses, oldest first, or None.

    It is one if it is more than `limit` robust deviations above their median. A robust deviation is what the median
    absolute deviation says of the standard deviation, which single outliers hardly move (Rousseeuw and Croux 1993).
    Losses that are not finite count as if they were not there.
    """
    known = [value for value in recent if math.isfinite(value)][-WINDOW:]
    if len(known) < LEAST or not math.isfinite(loss):
        return None
    middle = median(known)
    deviation = max(NORMAL * median(abs(value - middle) for value in known), FLOOR * abs(middle), 1e-12)
    found = Spike(loss, middle, (loss - middle) / deviation)
    return found if found.deviations > limit else None
