"""What a run will do when, computed before it starts."""
import time
from typing import Callable, NamedTuple, Optional

from ..config import Config, Duration
from ..data.sampling import steps_per_epoch
from ..models.cost import multiply_adds
from ..parallel.strategies import Strategy
from ..runtime.process import ProcessInfo


class Timetable(NamedTuple):
    """When what happens, in steps."""
    per_epoch: int
    total: int
    validate: int
    save: int
    keep_every: Optional[int]
    check: int  # 0 for never
    save_seconds: Optional[float] = None  # between two checkpoints, where they go by the clock, besides `save`


class Alarm:
    """Rings once every so many seconds, for the first time after so many; None: never."""

    def __init__(self, seconds: Optional[float], clock: Callable[[], float] = time.monotonic):
        self._seconds, self._clock, self._since = seconds, clock, clock()

    def rings(self) -> bool:
        """Return whether it rings now; once for each time, however late it is asked."""
        ringing = self._seconds is not None and self._clock() - self._since >= self._seconds
        if ringing:
            self._since = self._clock()
        return ringing


def timetable_of(config: Config, samples: int, strategy: Strategy) -> Timetable:
    """Compute the timetable of a run over this many training images.

    Raises:
        ValueError: the batch is larger than the data, or the warm-up longer than the run.
    """
    per_epoch = steps_per_epoch(samples, config.train.batch_size)
    total = max(1, config.train.length.steps(per_epoch))
    warmup = config.optim.warmup.steps(per_epoch, total)
    if warmup > total:
        raise ValueError(f'optim.warmup={config.optim.warmup} is {warmup} steps, longer than the {total} of '
                         f'train.length={config.train.length}: shorten the warm-up, for instance optim.warmup=5%')

    meeting = 1 if strategy.aggregation_can.every_step else config.train.local_steps

    def period(length: Duration) -> int:
        """At least 1, and where workers meet."""
        return -(-max(1, length.steps(per_epoch, total)) // meeting) * meeting

    every, keep_every, check = config.checkpoint.every, config.checkpoint.keep_every, config.train.check_replicas
    by_clock = every.unit == 'minutes'
    return Timetable(per_epoch, total, period(config.validation.every), total if by_clock else period(every),
                     period(keep_every) if keep_every else None, period(Duration(check, 'steps')) if check else 0,
                     60 * every.value if by_clock else None)


def expected_step(config: Config, process: ProcessInfo) -> float:
    """Estimate the seconds of a step, roughly: three forward passes at 100 GFLOP/s, a CPU core's or two."""
    return 6 * multiply_adds(config.model) * config.train.batch_size / process.size / 1e11
