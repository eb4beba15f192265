"""Workers of a job as threads of one process that add up arrays in the order of their ranks, and trainers of them."""
import functools
import threading

import numpy as np

from mxsimmim.parallel.communicators import Communicator
from mxsimmim.runtime.process import ProcessInfo
from mxsimmim.training.build import build_trainer
from mxsimmim.training.checkpoint import newest

from .workers import SECONDS, each


class Meeting:
    """Where threads show each other their values."""

    def __init__(self, size):
        self._barrier, self._values = threading.Barrier(size, timeout=SECONDS), [None] * size

    def exchange(self, rank, value):
        self._values[rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


class Together(Communicator):
    """What a kvstore or Horovod is to workers in processes. Sums are bit for bit the same in all workers and runs."""

    def __init__(self, process, control, meeting):
        super().__init__('local', process, control)
        self._meeting = meeting

    def all_reduce(self, handle):
        def total(arrays):
            return functools.reduce(np.add, arrays)
        for copies in handle.arrays:
            own = total([copy.asnumpy() for copy in copies])
            summed = total(self._meeting.exchange(self.rank, own))
            for copy in copies:
                copy[:] = summed


def together(count, work, transport='ps'):
    """[work(build)] of workers at once, where `build(config, folder=None)` makes a trainer of theirs.

    With `folder` it goes on from the newest checkpoint there, which rank 0 alone reads.
    """
    meeting = Meeting(count)

    def one(control):
        process = ProcessInfo(rank=control.rank, size=count, servers=1, transport=transport)

        def build(config, folder=None, logger=None):
            control.barrier('what has been saved')
            saved = newest(folder, print) if folder else None
            if saved and control.rank:
                saved = saved._replace(arrays={})
            return build_trainer(config, process, communicator=Together(process, control, meeting), checkpoint=saved,
                                 logger=logger)
        return work(build)
    results = each(count, one)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
