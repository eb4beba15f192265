"""How fast images are evaluated."""
import time
from typing import List, Sequence


class Pace:
    """Counts the images of batches, and times them from here on.

    The first batch is not timed if there are others: it waits for files and for MXNet's preparations.
    """

    def __init__(self) -> None:
        self._sizes: List[int] = []
        self._clock = [time.monotonic()]

    def add(self, images: int) -> None:
        """Count a batch that is done."""
        self._sizes.append(images)
        self._clock.append(time.monotonic())

    def state(self) -> List[float]:
        """Returns images and seconds, JSON-ready."""
        first = int(len(self._sizes) > 1)
        return [float(sum(self._sizes[first:])), self._clock[-1] - self._clock[first]]


def images_per_second(states: Sequence[Sequence[float]]) -> float:
    """Returns the rate of workers that begin together: the images of all in the time of the slowest."""
    images, seconds = zip(*states)
    return float(sum(images) / max(seconds))
