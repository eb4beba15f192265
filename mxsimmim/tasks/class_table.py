"""Tables for people of what is known of each class. NumPy only."""
from typing import Callable, Sequence

import numpy as np

from ..system.text import one_line

LONGEST = 32  # characters of a class name


def by_class(names: Sequence[str], scores: np.ndarray, heading: str, line: Callable[[int], str], limit: int = 0
             ) -> str:
    """Format a line a class, its name and what `line` says of its number, below `heading`.

    Of more than `limit` classes, if that is not 0, those of least `scores` (K,), the least first.
    """
    rows: Sequence[int] = range(len(names))
    if limit and len(rows) > limit:
        rows = sorted(rows, key=lambda k: (np.nan_to_num(scores[k], nan=np.inf), k))[:limit]
    shown = {k: one_line(names[k] if len(names[k]) <= LONGEST else names[k][:LONGEST - 1] + '…') for k in rows}
    width = max(len('class'), *map(len, shown.values()))
    return '\n'.join([f"{'class':<{width}}{heading}", *(f'{shown[k]:<{width}}{line(k)}' for k in rows)])


def percent(value: float) -> str:
    """Format a percentage; - for NaN."""
    return '-' if np.isnan(value) else f'{value:.1f} %'
