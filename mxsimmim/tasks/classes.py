"""The classes that images or pixels are told apart by, in the order of the logits."""
from itertools import zip_longest
from pathlib import Path
from typing import List, Sequence

from ..data.labels import read_classes


def names_of_outputs(count: int, file: Path, classes: str) -> List[str]:
    """Return the names in the file `classes` for the outputs of weights read from `file`; without one their numbers.

    Raises:
        ValueError: there are not `count` names.
    """
    if not classes:
        return [str(number) for number in range(count)]
    names = list(read_classes(classes))
    if len(names) != count:
        raise ValueError(f'{classes} names {len(names)} classes, and {file} has {count}: name each, one a line, in '
                         'the order of its outputs')
    return names


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
