"""What a run will do, computed before it starts: when what happens, and how a batch is divided."""
from typing import List, NamedTuple, Optional, Sequence

from ..config import Config, Duration
from ..data.sampling import apportion, steps_per_epoch
from ..models.cost import multiply_adds
from ..parallel.strategies import Strategy
from ..tasks.registry import Task
from ..runtime.process import ProcessInfo


class Timetable(NamedTuple):
    """When what happens, in steps."""
    per_epoch: int
    total: int
    validate: int
    save: int
    keep_every: Optional[int]
    check: int  # 0 for never


def timetable_of(config: Config, samples: int, mode: Strategy) -> Timetable:
    """The plan for this many training images.

    Raises:
        ValueError: the batch is larger than the data, or the warm-up longer than the run.
    """
    per_epoch = steps_per_epoch(samples, config.train.batch_size)
    total = max(1, config.train.length.steps(per_epoch))
    warmup = config.optim.warmup.steps(per_epoch, total)
    if warmup > total:
        raise ValueError(f'optim.warmup={config.optim.warmup} is {warmup} steps, longer than the {total} of '
                         f'train.length={config.train.length}: shorten the warm-up, for instance optim.warmup=5%')

    meeting = config.train.local_steps if mode.aggregation in ('local_sgd', 'elastic') else 1

    def period(length: Duration) -> int:
        """At least 1, and where workers meet."""
        return -(-max(1, length.steps(per_epoch, total)) // meeting) * meeting

    keep_every, check = config.checkpoint.keep_every, config.train.check_replicas
    return Timetable(per_epoch, total, period(config.validation.every), period(config.checkpoint.every),
                period(keep_every) if keep_every else None, period(Duration(check, 'steps')) if check else 0)


def expected_step(config: Config, place: ProcessInfo) -> float:
    """Seconds of a step, roughly: three forward passes at 100 GFLOP/s, a CPU core's or two."""
    return 6 * multiply_adds(config.model) * config.train.batch_size / place.size / 1e11


def split_batch(task: Task, images: int, weights: Sequence[float], least: Sequence[int]) -> List[int]:
    """`apportion`, but no worker's part ends within images that the task's transform mixes; the last takes the rest."""
    group = task.transform().group
    groups = [-(-count // group) for count in [*least[:-1], least[-1] - images % group]]
    if group > 1 and sum(groups) > images // group:
        raise ValueError(f'train.batch_size={images} is too small: with mixup or CutMix, which take {group} images, '
                         f'the workers need {", ".join(str(group * n) for n in groups)} of them (devices x '
                         'train.accumulate): raise it')
    parts = apportion(images // group, weights, groups)
    return [part * group for part in parts[:-1]] + [images - sum(parts[:-1]) * group]
