"""Communicators: reduce arrays that lie on several devices and in several workers, by MXNet's names of stores.

Every one offers `keys` and `sum`; broadcasts are made of sums. `WeightServers`, for dist_async, is the exception: there
the parameter server decides what becomes of what it is sent. Host values go through the control plane.
"""
import os
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import mxnet as mx

from ..ops import OpBackend
from ..runtime.process import ALONE, ProcessInfo
from .control import ControlPlane
from .shared_memory import SharedMemoryGroup, usable

Copies = List[mx.nd.NDArray]  # of one array, one a device


class Communicator:
    """Adds up arrays, in place. This one knows only the devices of one process."""

    def __init__(self, name: str, world: ProcessInfo = ALONE, control: Optional[ControlPlane] = None):
        """`control` is the job's control plane, where it has more than one worker.

        Raises:
            ValueError: this build of MXNet has no such store.
        """
        self.rank, self.size = world.rank, world.size
        self.control = control or ControlPlane()
        assert self.control.size == self.size, 'a job of several workers needs its control plane'
        self._latest: Dict[int, mx.nd.NDArray] = {}  # key -> what was summed under it last
        self._next = 0
        try:
            self._store = mx.kv.create(name)
        except mx.MXNetError as error:
            raise ValueError(f'train.store={name}: this build of MXNet does not have it '
                             f'({str(error).strip().splitlines()[-1]}): use train.store=device') from error

    def zeros(self, sizes: Sequence[int], contexts: Sequence[mx.Context], backend: OpBackend) -> List[Copies]:
        """Arrays (n,) of float32 where `sum` adds them up fastest; all workers ask for the same ones at once.

        `backend` computes on them.
        """
        return [[mx.nd.zeros((size,), ctx=ctx) for ctx in contexts] for size in sizes]

    def keys(self, arrays: Sequence[Copies]) -> List[int]:
        """Makes these arrays known, by shape and type; all workers in the same order."""
        keys = list(range(self._next, self._next + len(arrays)))
        self._next += len(arrays)
        self._declare(keys, arrays)
        return keys

    def _declare(self, keys: List[int], arrays: Sequence[Copies]) -> None:
        for key, copies in zip(keys, arrays):
            if len(copies) > 1:
                self._store.init(key, mx.nd.zeros_like(copies[0]))

    def sum(self, keys: Sequence[int], arrays: Sequence[Copies]) -> None:
        """Replaces each array's copies by their sum over all devices and workers, without waiting for it.

        The first keys have the highest priority.
        """
        for key, copies in zip(keys, arrays):
            if self.size > 1 or len(copies) > 1:
                self._in_turn(key, copies[0])
                # A CPU push keeps the pushed array as its buffer and the pull writes into it: fine, it is the output.
                self._store.pushpull(key, copies, out=copies, priority=-key)

    def _in_turn(self, key: int, array: mx.nd.NDArray) -> None:
        """Waits for what is under way under this key, if it is another array.

        Uses of one array are ordered by MXNet's engine. Those of one key are not: of two arrays summed under it, one
        worker's second was added to another worker's first.
        """
        previous = self._latest.get(key)
        if previous is not None and previous is not array:
            previous.wait_to_read()
        self._latest[key] = array

    def broadcast(self, keys: Sequence[int], arrays: Sequence[Copies]) -> None:
        """Overwrites every copy in every worker with rank 0's first one; the keys' own arrays have these shapes."""
        if self.size > 1:
            for first, *others in arrays:
                for array in others + ([first] if self.rank else []):
                    array[:] = 0
            self.sum(keys, arrays)


class ServerCommunicator(Communicator):
    """MXNet's parameter servers; several devices of a worker are added up before anything is sent."""

    def _declare(self, keys: List[int], arrays: Sequence[Copies]) -> None:
        self._store.init(keys, [mx.nd.zeros_like(first) for first, *_ in arrays])
        # MXNet does not order one worker's first pushes after another's initialisation: without this, one may pull the
        # other's first gradient for its weights.
        mx.nd.waitall()
        self._store._barrier()


class HorovodCommunicator(Communicator):
    """Horovod's allreduce. It looks at one device a process only: devices are added up before, and copied to after.

    What `zeros` made on CPUs the workers of each host first add up in their memory. Horovod is left with the sums of
    hosts, which the first worker of each holds.
    """

    def __init__(self, _name: str, world: ProcessInfo, control: Optional[ControlPlane] = None):
        """
        Raises:
            ValueError: Horovod is missing, was built without MXNet, or sees other processes than we do.
        """
        super().__init__('device', world, control)
        try:
            import horovod.mxnet as hvd
        except Exception as error:  # one that was built for other versions raises anything
            raise ValueError(f'train.store=horovod: Horovod does not load here ({error}): `make test` in a checkout '
                             'builds it for the installed mxnet; or use servers: tools/launch.py -s 1') from None
        # Of each host the first worker, if they are to add up what their hosts have.
        firsts = world.firsts if 1 < len(world.firsts) < world.size else ()
        self._hosts = hvd.ProcessSet(firsts) if firsts else None
        hvd.init(process_sets=[self._hosts] if firsts else [])
        self._horovod = hvd
        if (hvd.rank(), hvd.size()) != (world.rank, world.size):
            raise ValueError(f'Horovod calls this process {hvd.rank()} of {hvd.size()}, its launcher {world.rank} of '
                             f'{world.size}: start the job with tools/launch.py --horovod')
        self._firsts = world.firsts
        self._memories: List[SharedMemoryGroup] = []
        self._shared: Dict[int, Tuple[SharedMemoryGroup, int]] = {}  # id of an array -> its memory, its number there

    def zeros(self, sizes: Sequence[int], contexts: Sequence[mx.Context], backend: OpBackend) -> List[Copies]:
        own = usable(contexts[0], os.environ, backend)
        if not 0 < len(self._firsts) < self.size or not all(self.control.all_gather('who can share memory', own)):
            return super().zeros(sizes, contexts, backend)
        ends = self._firsts[1:] + (self.size,)
        ranks = next(list(range(first, end)) for first, end in zip(self._firsts, ends) if self.rank < end)
        try:
            memory = SharedMemoryGroup(sizes, ranks, self.rank, self.control, not self._hosts)
        except OSError as error:
            print(f'mxsimmim: {error}: workers of one host send each other their gradients', file=sys.stderr)
            return super().zeros(sizes, contexts, backend)
        self._memories.append(memory)
        self._shared.update({id(array): (memory, i) for i, array in enumerate(memory.arrays)})
        return [[array, *others] for array, others in zip(memory.arrays, super().zeros(sizes, contexts[1:], backend))]

    def sum(self, keys: Sequence[int], arrays: Sequence[Copies]) -> None:
        for memory in self._memories:
            memory.check()
        # The last first, as a backward pass yields them: sums in memory are made in this order.
        for key, (first, *others) in zip(reversed(keys), reversed(arrays)):
            if others:
                self._store.pushpull(key, [first] + others, out=[first] + others, priority=-key)
            memory, i = self._shared.get(id(first), (None, 0))
            if memory is None:
                self._in_turn(key, first)
                self._allreduce(key, first)
            else:
                memory.sum(i)
                if self._hosts:
                    if memory.first:
                        self._allreduce(key, first, process_set=self._hosts)
                    memory.copy(i)
            for other in others:
                first.copyto(other)

    def _allreduce(self, key: int, array: mx.nd.NDArray, **among: Any) -> None:
        self._horovod.allreduce_(array, op=self._horovod.Sum, name=str(key), priority=-key, **among)


COMMUNICATORS: Dict[str, Callable[[str, ProcessInfo, Optional[ControlPlane]], Communicator]] = {
    'local': Communicator, 'device': Communicator, 'nccl': Communicator,
    'dist_sync': ServerCommunicator, 'dist_device_sync': ServerCommunicator, 'horovod': HorovodCommunicator,
}


def make_communicator(name: str, world: ProcessInfo, control: Optional[ControlPlane] = None) -> Communicator:
    """The store of this name for this process, whose job has this control plane.

    Raises:
        ValueError: it cannot be had here.
    """
    return COMMUNICATORS[name](name, world, control)
