"""Which sample is taken when: pure functions of counts, seed and step, so that any run can be entered anywhere."""
import functools
from typing import List, Sequence, Tuple

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """Random numbers that depend on nothing but `key`, e.g. (seed, epoch, sample); non-negative, in 10 microseconds.

    The counter-based Philox of Salmon et al. (2011), keyed through numpy's SeedSequence. That hash does not see
    trailing zeros, hence the length in front: generator(1) and generator(1, 0) differ.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((len(key),) + key)))


def split(count: int, parts: int) -> List[slice]:
    """Contiguous slices that cover 0..count, larger ones first, no two differing by more than one in length."""
    base, larger = divmod(count, parts)
    starts = [part * base + min(part, larger) for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in zip(starts, starts[1:])]


def steps_per_epoch(samples: int, batch: int) -> int:
    """Updates an epoch.

    All batches are full. The samples % batch that are left over are dropped: other ones every epoch, as the order
    changes.

    Raises:
        ValueError: not one batch can be filled.
    """
    if batch > samples:
        raise ValueError(f'a batch of {batch} images cannot be filled from {samples}: '
                         f'lower train.batch_size to {samples} at most, or add images')
    return samples // batch


@functools.lru_cache(maxsize=2)  # a step asks for the order its predecessor used
def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of 0..samples, int64 (samples,), read-only."""
    order = generator(seed, epoch).permutation(samples)
    order.flags.writeable = False
    return order


def batch_at(step: int, samples: int, batch: int, seed: int) -> Tuple[int, np.ndarray]:
    """(epoch, sample indices int64 (batch,)) of the global batch of an update, counted from 0 over the whole run.

    Raises:
        ValueError: not one batch can be filled.
    """
    epoch, position = divmod(step, steps_per_epoch(samples, batch))
    return epoch, epoch_order(samples, seed, epoch)[position * batch:(position + 1) * batch]


def data_step(update: int, skipped: Sequence[Tuple[int, int]]) -> int:
    """The number, in the order of the data, of the batch that update number `update` takes; both count from 0.

    `skipped` says (update, batches): from that update on so many batches have been left out.
    """
    return update + sum(batches for first, batches in skipped if first <= update)


def apportion(count: int, weights: Sequence[float], least: Sequence[int]) -> List[int]:
    """`count` divided in proportion to `weights`, each part an integer of at least `least`, by largest remainders.

    Raises:
        ValueError: the least parts together exceed `count`.
    """
    if sum(least) > count:
        raise ValueError(f'a batch of {count} images is too small for {len(least)} workers that need '
                         f'{", ".join(map(str, least))} (devices x train.accumulate): raise train.batch_size')
    exact = [count * weight / sum(weights) for weight in weights]
    parts = [max(int(share), low) for share, low in zip(exact, least)]
    while sum(parts) != count:
        step = 1 if sum(parts) < count else -1
        candidates = [i for i in range(len(parts)) if step > 0 or parts[i] > least[i]]
        nearest = max(candidates, key=lambda i: (step * (exact[i] - parts[i]), -i))
        parts[nearest] += step
    return parts


def part_of(parts: Sequence[int], number: int) -> slice:
    """Where part `number` lies in what `apportion` divided."""
    start = sum(parts[:number])
    return slice(start, start + parts[number])
