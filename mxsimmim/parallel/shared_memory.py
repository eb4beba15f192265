"""Shared memory of a host, in which its workers reduce arrays without sending them to each other.

Its file has no name (memfd_create(2)): nothing can be left of it when the last process ends, and no file system limits
it, as containers limit /dev/shm.
"""
import ctypes
import mmap
import os
from typing import Any, Sequence

import mxnet as mx
import numpy as np

from ..ops import OpBackend, library
from ..runtime import mxnet_private, watchdog
from .control import DEADLINE, ControlPlane

LINE = 64  # bytes of a cache line: arrays begin one, and each task's counters have one


def is_supported(context: mx.Context, backend: OpBackend) -> bool:
    """Tell whether what these operators compute on this device can lie in memory that its host's workers share.

    MXNet takes memory that it has not allocated for that of cpu(0), not of other CPU contexts.
    """
    return context == mx.cpu() and backend.is_native and hasattr(os, 'memfd_create')


class HostTask(ctypes.Structure):
    """As `Task` of ops/src/host_sum.cc."""
    _fields_ = [('group', ctypes.c_void_p), ('arrived', ctypes.c_void_p), ('arrays', ctypes.c_void_p),
                ('workers', ctypes.c_int32), ('me', ctypes.c_int32), ('size', ctypes.c_int64),
                ('targets', ctypes.c_int32), ('times', ctypes.c_uint32)]


class SharedMemoryGroup:
    """float32 arrays, of which each worker of a host has its own and sees those of the others."""

    def __init__(self, sizes: Sequence[int], ranks: Sequence[int], rank: int, control: ControlPlane, everybody: bool):
        """All workers of the job do this at once.

        sizes: elements of each array. ranks: this host's workers, `rank` among them. everybody: sums are for all of
        these, not for the first alone.

        Raises:
            OSError: in all workers, if one of them could not have the memory.
        """
        workers, me = len(ranks), ranks.index(rank)
        self.first = me == 0
        offsets = np.cumsum([0] + [-(-4 * size // LINE) * LINE for size in sizes])
        # Each worker's part begins a page: pages lie near the worker that touches them first.
        head, part = (-(-int(size) // mmap.PAGESIZE) * mmap.PAGESIZE
                      for size in ((2 * len(sizes) + 1) * LINE, offsets[-1]))
        self._processes = np.array(control.all_gather('process numbers', os.getpid()), 'int32')[ranks]
        own = range(0 if self.first else head + me * part, head + (me + 1) * part)
        self._memory = mapped(head + workers * part, own, self.first, ranks[0], self._processes[0], control)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._addresses = begin + head + np.arange(workers) * part + offsets[:-1, None]  # (arrays, workers) addresses
        self.arrays = [mx.nd.from_numpy(np.frombuffer(self._memory, 'float32', size, int(address) - begin))
                       for size, address in zip(sizes, self._addresses[:, me])]

        self._group, self._sum, self._copy, self._lost = (library.function(f'mxsimmim_host_{name}')
                                                          for name in ('group', 'sum', 'copy', 'lost'))
        self._group.restype = ctypes.c_void_p
        seconds = 0.0 if watchdog.is_on() else DEADLINE
        group = self._group(ctypes.c_void_p(begin), self._processes.ctypes, workers, ctypes.c_double(seconds))

        def task(number: int, array: int, targets: int) -> HostTask:
            return HostTask(group, begin + (1 + number) * LINE, self._addresses[array].ctypes.data, workers, me,
                            sizes[array], targets, 0)

        self._sums = [task(2 * i, i, workers if everybody else 1) for i in range(len(sizes))]
        self._copies = [task(2 * i + 1, i, 0) for i in range(len(sizes))]

    def all_reduce(self, i: int) -> None:
        """Replace all workers' arrays `i` by their sum, or, if the job has more hosts, the first worker's.

        As `broadcast`, this waits for nothing, and MXNet orders it among what else is done with the array. All workers
        do the same with an array in the same order; among arrays there is none.
        """
        self._push(self._sum, self._sums[i], i)

    def broadcast(self, i: int) -> None:
        """Overwrite all others' arrays `i` with the first worker's."""
        self._push(self._copy, self._copies[i], i)

    def _push(self, function: Any, task: HostTask, i: int) -> None:
        mxnet_private.push_host_task(function, task, (self.arrays[i],))

    def check(self) -> None:
        """See that all workers of the host are there.

        Raises:
            RuntimeError: another worker has ended, or is late where no watch looks after this process; since then all
                sums are NaN.
        """
        process = self._lost()
        if process < 0:
            raise RuntimeError(f'the workers of this host have not all come to a sum within {DEADLINE:g} s: their logs '
                               'say what they do')
        if process:
            raise RuntimeError(f'process {process}, a worker of this host, has ended before its job: its log says why')


def mapped(size: int, own: range, first: bool, rank: int, process: int, control: ControlPlane) -> mmap.mmap:
    """Map memory of `size` bytes, zeros, that the worker called `rank`, its `process`, makes and the others open.

    Each worker takes the pages of its `own` bytes now: a page for which there is no room when it is first written to is
    SIGBUS.

    Raises:
        OSError: in all workers, if one of them could not have the memory.
    """
    file, error = -1, ''
    try:
        if first:
            file = os.memfd_create('mxsimmim')
            os.ftruncate(file, size)
    except OSError as failure:
        error = str(failure)
    number = control.all_gather('shared memory', file)[rank]
    try:
        if not first:
            file = os.open(f'/proc/{process}/fd/{number}', os.O_RDWR | os.O_CLOEXEC)
        if not error:
            os.posix_fallocate(file, own.start, len(own))
        memory = mmap.mmap(file, size) if not error else None
    except OSError as failure:
        error = str(failure)
    errors = control.all_gather('shared memory is open', error)  # now all have it, or some have not
    if file >= 0:
        os.close(file)
    failed = next((rank for rank, text in enumerate(errors) if text), None)
    if failed is not None:
        raise OSError(f'rank {failed} cannot share memory on its host: {errors[failed]}')
    assert memory is not None
    return memory
