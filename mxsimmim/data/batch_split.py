"""How many images of each batch every worker takes."""
from typing import List, Sequence, Tuple

from .sampling import apportion, part_of


def split_batch(images: int, weights: Sequence[float], least: Sequence[int], group: int = 1) -> List[int]:
    """Divide a batch of `images` in proportion to `weights`, one a worker, as `sampling.apportion` does.

    No worker's part ends within the `group` of images that a transform mixes with each other; the last worker takes
    what fills no group.

    Raises:
        ValueError: the workers need more images than there are; worker i needs `least[i]`, in whole groups.
    """
    groups = [-(-count // group) for count in [*least[:-1], least[-1] - images % group]]
    if group > 1 and sum(groups) > images // group:
        raise ValueError(f'train.batch_size={images} is too small: with mixup or CutMix, which take {group} images, '
                         f'the workers need {", ".join(str(group * n) for n in groups)} of them (devices x '
                         'train.accumulate): raise it')
    parts = apportion(images // group, weights, groups)
    return [part * group for part in parts[:-1]] + [images - sum(parts[:-1]) * group]


def split_by_speed(images: Sequence[int], seconds: Sequence[float], least: Sequence[int], group: int = 1) -> List[int]:
    """Divide the same batch anew, in proportion to the images a second of workers that took `seconds` for `images`."""
    return split_batch(sum(images), [n / t for n, t in zip(images, seconds)], least, group)


class BatchSplit:
    """The present division of batches among workers. Whoever needs it holds this object, as it may change."""

    def __init__(self, images: Sequence[int], rank: int, least: Sequence[int], group: int = 1):
        """`images` are those of each worker, of which this one is `rank`; `least` and `group` as in `split_batch`."""
        self._images, self._rank, self._least, self._group = tuple(images), rank, least, group

    @property
    def images(self) -> Tuple[int, ...]:
        """Images of each worker, by rank."""
        return self._images

    @property
    def part(self) -> slice:
        """Where this worker's images lie in a batch."""
        return part_of(self._images, self._rank)

    @property
    def fraction(self) -> float:
        """This worker's images over those of all."""
        return self._images[self._rank] / sum(self._images)

    def rebalance(self, seconds: Sequence[float]) -> bool:
        """Follow the speed of the workers, which took `seconds` for their parts; return whether anything changed."""
        before, self._images = self._images, tuple(split_by_speed(self._images, seconds, self._least, self._group))
        return self._images != before
