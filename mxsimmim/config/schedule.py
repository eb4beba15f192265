"""Warm-ups and milestones of a run whose length was written elsewhere than they were."""
from typing import Any, Dict, List, Mapping, Tuple

from .schema import Config
from .values import ConfigError, Duration

WRITTEN = ('optim.warmup', 'optim.milestones')  # what was written with a certain train.length in mind


def check(config: Config, written: Mapping[str, Duration]) -> None:
    """Refuses what is wrong for any number of images.

    Args:
        written: the train.length that each of WRITTEN was written for, where another one came later.

    Raises:
        ConfigError: the warm-up is longer than the run, and was not written for a longer one.
    """
    warmup, length = config.optim.warmup, config.train.length
    longer = warmup.unit == '%' and warmup.value > 100 or warmup.unit == length.unit and warmup.value > length.value
    before = written.get('optim.warmup')
    meant = before is not None and not (before.unit == warmup.unit and warmup.value > before.value)
    if longer and (warmup.unit == '%' or not meant):
        raise ConfigError(f'optim.warmup={warmup} is longer than train.length={length}: shorten the warm-up, for '
                          'instance optim.warmup=5%')


def fitted(config: Config, written: Mapping[str, Duration], per_epoch: int) -> Tuple[Config, List[str]]:
    """The configuration with a warm-up that fits into the run, and what there is to say about it.

    A warm-up that is longer than the run, but was written for a longer one, keeps its share of that, in steps, at least
    one; so do milestones then. All else stays as it is: the same run as without this function.
    """
    optim, length = config.optim, config.train.length
    total = max(1, length.steps(per_epoch))
    warmup = optim.warmup.steps(per_epoch, total)
    drops = [milestone.steps(per_epoch, total) for milestone in optim.milestones]
    before = {key: max(1, old.steps(per_epoch)) for key, old in written.items()}

    def scaled(key: str, duration: Duration) -> Duration:
        if duration.unit == '%':
            return duration
        share = duration.steps(per_epoch) / before[key]
        return Duration(max(1, round(share * total)), 'steps')

    if warmup <= total or optim.warmup.steps(per_epoch) > before.get('optim.warmup', 0):
        beyond = optim.schedule == 'multistep' and 'optim.milestones' in written and min(drops) >= total
        return config, [f'the learning rate never drops: optim.milestones={_list(optim.milestones)} of '
                        f'train.length={written["optim.milestones"]} is not reached by {length}'] if beyond else []
    changes: Dict[str, Any] = {'warmup': scaled('optim.warmup', optim.warmup)}
    notes = [f'optim.warmup={optim.warmup} of train.length={written["optim.warmup"]} is longer than {length}, and '
             f'keeps its share: {changes["warmup"]}']
    if optim.schedule == 'multistep' and 'optim.milestones' in written:
        changes['milestones'] = tuple(scaled('optim.milestones', milestone) for milestone in optim.milestones)
        notes.append(f'so do optim.milestones={_list(optim.milestones)}: {_list(changes["milestones"])}')
    return config.model_copy(update={'optim': optim.model_copy(update=changes)}), notes


def _list(durations: Tuple[Duration, ...]) -> str:
    return f"[{', '.join(map(str, durations))}]"
