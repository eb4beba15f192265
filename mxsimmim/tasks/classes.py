"""The classes that images are told apart by, in the order of the logits."""
from itertools import zip_longest
from typing import Sequence


def check_classes(where: str, theirs: Sequence[str], ours: Sequence[str], remedy: str) -> None:
    """Compare the classes of two sources.

    Raises:
        ValueError: the classes `theirs`, of `where`, are not `ours`, of the data here, in the same order.
    """
    for number, (old, new) in enumerate(zip_longest(theirs, ours)):
        if old != new:
            old, new = (f"'{name}'" if name is not None else 'missing' for name in (old, new))
            raise ValueError(f'{where} has {len(theirs)} classes, the data here have {len(ours)}, and class {number} '
                             f'is {old} there, {new} here: {remedy}')
