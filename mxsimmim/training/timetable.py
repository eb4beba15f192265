"""What a run will do when, computed before it starts."""
from typing import NamedTuple, Optional

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

    keep_every, check = config.checkpoint.keep_every, config.train.check_replicas
    return Timetable(per_epoch, total, period(config.validation.every), period(config.checkpoint.every),
                     period(keep_every) if keep_every else None, period(Duration(check, 'steps')) if check else 0)


def expected_step(config: Config, process: ProcessInfo) -> float:
    """Estimate the seconds of a step, roughly: three forward passes at 100 GFLOP/s, a CPU core's or two."""
    return 6 * multiply_adds(config.model) * config.train.batch_size / process.size / 1e11
