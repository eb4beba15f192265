"""Named points of the code at which tests make faults happen, where nothing could aim from outside.

A test names a folder in MXSIMMIM_FAULTS; without it, `reach` returns at once. A file there bears the name of a point,
and holds two numbers: a signal, and at which of a process's arrivals it is sent. One process takes the file, the first
that has come so often, and the file is then called NAME.taken.
"""
import contextlib
import os
from typing import Dict

FOLDER = os.environ.get('MXSIMMIM_FAULTS', '')
_arrivals: Dict[str, int] = {}


def reach(point: str) -> None:
    """Go on, unless a fault waits here for this process."""
    if FOLDER:
        _arrive(point)


def _arrive(point: str) -> None:
    arrivals = _arrivals[point] = _arrivals.get(point, 0) + 1
    file = os.path.join(FOLDER, point)
    with contextlib.suppress(FileNotFoundError):  # no fault waits here, or another process was faster
        with open(file, encoding='ascii') as stream:
            number, arrival = map(int, stream.read().split())
        if arrivals >= arrival:
            os.rename(file, f'{file}.taken')
            os.kill(os.getpid(), number)
