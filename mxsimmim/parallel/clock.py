"""The stopwatch of a training step."""
import time
from typing import Iterable, Iterator, List, TypeVar

import mxnet as mx

T = TypeVar('T')


class Clock:
    """Where a step's time goes: waiting for data, computing, waiting for other workers; seconds.

    Waiting for data is counted always; the others on steps that are timed, which cannot overlap with their neighbours.
    """

    def __init__(self) -> None:
        self._mark = 0.0
        self.steps: List[float] = []  # how long each timed step computed, until somebody empties the list
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self.data = self.compute = self.communication = 0.0
        self.timed = 0

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`, counting the time until each is there."""
        began = time.monotonic()
        for item in items:
            self.data += time.monotonic() - began
            yield item
            began = time.monotonic()

    def start(self) -> None:
        """Begin to time a step."""
        mx.nd.waitall()
        self._mark = time.monotonic()

    def computed(self) -> None:
        """Take the time at which the step's gradients are there."""
        now = time.monotonic()
        self.steps.append(now - self._mark)
        self.timed += 1
        self.compute, self._mark = self.compute + now - self._mark, now

    def communicated(self) -> None:
        """Wait until everything else is there, too, and take the time."""
        mx.nd.waitall()
        now = time.monotonic()
        self.communication, self._mark = self.communication + now - self._mark, now
