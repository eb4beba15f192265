"""Communicators: reduce arrays that lie on several devices and in several workers.

A communicator belongs to one group of a mesh. MXNet's kvstore reduces the devices of one worker, or those of all
workers: its servers count every worker, so it cannot reduce a part of them. Horovod reduces subgroups by its process
sets. The workers of a host reduce what lies in memory that all of them see, see `SharedMemoryGroup`. Host values go
through the control plane, and the weights of train.store=dist_async through `WeightServers`, which reduce nothing.
"""
import copy
import os
import sys
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import mxnet as mx

from ..ops import OpBackend
from ..runtime import mxnet_private
from ..runtime.process import ALONE, ProcessInfo
from .control import ControlPlane
from .mesh import AXES
from .shared_memory import SharedMemoryGroup, is_supported

Copies = List[mx.nd.NDArray]  # of one array, one a device


class Handle(NamedTuple):
    """Arrays that all workers know by the same keys.

    A server keeps one array for each key, as long as the job lives. Arrays that are reduced after each other, such as
    the moments of an optimiser and what they belong to, therefore share keys: `with_arrays`.
    """
    keys: Tuple[int, ...]
    arrays: Tuple[Copies, ...]

    def with_arrays(self, arrays: Sequence[Copies]) -> 'Handle':
        """Return a handle of other arrays of the same shapes and types, under the same keys."""
        assert [first.shape for first, *_ in arrays] == [first.shape for first, *_ in self.arrays]
        return Handle(self.keys, tuple(arrays))

    def part(self, first: int, end: Optional[int] = None) -> 'Handle':
        """Return a handle of the arrays from number `first` up to `end`."""
        return Handle(self.keys[first:end], self.arrays[first:end])


class Communicator:
    """Reduces arrays in place; this one over the devices of a single worker.

    All calls return before the arrays are computed, and MXNet orders what is done with an array afterwards.
    """

    def __init__(self, name: str, process: ProcessInfo = ALONE, control: Optional[ControlPlane] = None):
        """`control` is the job's control plane, where it has more than one worker.

        Raises:
            ValueError: this build of MXNet has no such store.
        """
        self.rank, self.size = process.rank, process.size  # within the group
        self.control = control or ControlPlane()
        assert self.control.size == self.size, 'a job of several workers needs its control plane'
        self._latest: Dict[int, mx.nd.NDArray] = {}  # key -> what was reduced under it last
        self._next = 0
        try:
            self._store = mx.kv.create(name)
        except mx.MXNetError as error:
            raise ValueError(f'train.store={name}: this build of MXNet does not have it '
                             f'({str(error).strip().splitlines()[-1]}): use train.store=device') from error

    def over(self, axes: Sequence[str]) -> 'Communicator':
        """Return the communicator of the workers that differ from this one along these axes of the mesh alone."""
        assert len(self.control.mesh.group(*axes)) == self.size, axes
        return self

    def allocate(self, sizes: Sequence[int], contexts: Sequence[mx.Context], backend: OpBackend) -> List[Copies]:
        """Return zeros (n,) of float32 where they are reduced fastest; all workers ask for the same ones at once.

        `backend` computes what they will hold.
        """
        return [[mx.nd.zeros((size,), ctx=ctx) for ctx in contexts] for size in sizes]

    def register(self, arrays: Sequence[Copies]) -> Handle:
        """Give these arrays new keys; all workers register arrays of the same shapes and types in the same order.

        The first ones are reduced first where many wait.
        """
        keys = tuple(range(self._next, self._next + len(arrays)))
        self._next += len(arrays)
        self._declare(keys, arrays)
        return Handle(keys, tuple(arrays))

    def _declare(self, keys: Sequence[int], arrays: Sequence[Copies]) -> None:
        for key, copies in zip(keys, arrays):
            if len(copies) > 1:
                self._store.init(key, mx.nd.zeros_like(copies[0]))

    def all_reduce(self, handle: Handle) -> None:
        """Replace each array's copies by their sum over all devices and workers."""
        for key, copies in zip(handle.keys, handle.arrays):
            if self.size > 1 or len(copies) > 1:
                self._in_turn(key, copies[0])
                # A CPU push keeps the pushed array as its buffer and the pull writes into it: fine, it is the output.
                self._store.pushpull(key, copies, out=copies, priority=-key)

    def _in_turn(self, key: int, array: mx.nd.NDArray) -> None:
        """Wait for what is under way under this key, if it is another array.

        Uses of one array are ordered by MXNet's engine. Those of one key are not: of two arrays reduced under it, one
        worker's second was added to another worker's first.
        """
        previous = self._latest.get(key)
        if previous is not None and previous is not array:
            previous.wait_to_read()
        self._latest[key] = array

    def broadcast(self, handle: Handle, root: int = 0) -> None:
        """Overwrite every copy in every worker with the first one of worker `root`; nothing in a job of one worker."""
        if self.size > 1:
            for first, *others in handle.arrays:
                for array in others + ([first] if self.rank != root else []):
                    array[:] = 0
            self.all_reduce(handle)


class ServerCommunicator(Communicator):
    """MXNet's parameter servers; several devices of a worker are reduced before anything is sent."""

    def _declare(self, keys: Sequence[int], arrays: Sequence[Copies]) -> None:
        self._store.init(list(keys), [mx.nd.zeros_like(first) for first, *_ in arrays])
        # MXNet does not order one worker's first pushes after another's initialisation: without this, one may pull the
        # other's first gradient for its weights.
        mx.nd.waitall()
        mxnet_private.barrier(self._store)


# The axes of a mesh along which workers reduce: gradients of a part, of what several parts have, tokens, scalars.
GROUPS = ('data',), ('data', 'tensor'), ('pipeline', 'data'), ('tensor',), AXES


class HorovodCommunicator(Communicator):
    """Horovod's allreduce. It reads one device a process: devices are reduced before it, and written to after it.

    The group are the workers along the mesh's data axis; `over` returns those of other groups. One that has not all
    workers is a process set of Horovod's. CPU arrays from `allocate` are first reduced within each host, in shared
    memory. Horovod then reduces the sums of the hosts, in a process set of the first worker of each.
    """

    def __init__(self, _name: str, process: ProcessInfo, control: Optional[ControlPlane] = None):
        """Join Horovod's job.

        Raises:
            ValueError: Horovod is missing, was built without MXNet, or sees other processes than we do.
        """
        super().__init__('device', process, control)
        mesh = self.control.mesh
        hosts = {ranks: _Hosts(ranks, process.firsts) for axes in GROUPS for ranks in mesh.groups(*axes)}
        among = (ranks for group in hosts.values() for ranks in (group.ranks, group.leaders))
        sets = self._join(process, dict.fromkeys(ranks for ranks in among if 1 < len(ranks) < process.size))
        self._others: Dict[Tuple[int, ...], HorovodCommunicator] = {}  # by their ranks, this one among them
        self._form(hosts[mesh.group('data')], sets, '')
        for axes in GROUPS:
            ranks = mesh.group(*axes)
            if ranks not in self._others:
                copy.copy(self)._form(hosts[ranks], sets, '.'.join([*axes, '']))

    def over(self, axes: Sequence[str]) -> Communicator:
        return self._others[self.control.mesh.group(*axes)]

    def _join(self, process: ProcessInfo, groups: Iterable[Tuple[int, ...]]) -> Dict[Tuple[int, ...], Any]:
        """Begin Horovod with process sets of these groups, which all workers name alike."""
        try:
            import horovod.mxnet as hvd
        except Exception as error:  # one that was built for other versions raises anything
            raise ValueError(f'train.store=horovod: Horovod does not load here ({error}): `make test` in a checkout '
                             'builds it for the installed mxnet; or use servers: tools/launch.py -s 1') from None
        sets = {ranks: hvd.ProcessSet(ranks) for ranks in groups}
        if sets:
            os.environ.update(by_itself(process))
        hvd.init(process_sets=list(sets.values()))
        self._horovod = hvd
        if (hvd.rank(), hvd.size()) != (process.rank, process.size):
            raise ValueError(f'Horovod calls this process {hvd.rank()} of {hvd.size()}, its launcher {process.rank} of '
                             f'{process.size}: start the job with tools/launch.py --horovod')
        return sets

    def _form(self, hosts: '_Hosts', sets: Mapping[Tuple[int, ...], Any], prefix: str) -> None:
        """Be the communicator of this group, with names of its own for its arrays."""
        self._hosts, self._prefix = hosts, prefix
        self.rank, self.size = hosts.ranks.index(self.control.rank), len(hosts.ranks)
        self._group, self._leaders = sets.get(hosts.ranks), sets.get(hosts.leaders)
        self._others[hosts.ranks] = self
        self._latest, self._next = {}, 0
        self._memories: List[SharedMemoryGroup] = []
        self._shared: Dict[int, Tuple[SharedMemoryGroup, int]] = {}  # id of an array -> its memory, its number there

    def allocate(self, sizes: Sequence[int], contexts: Sequence[mx.Context], backend: OpBackend) -> List[Copies]:
        own = is_supported(contexts[0], backend)
        # All workers of the job do this at once, whatever their groups.
        able, several = zip(*self.control.all_gather('who can share memory', [own, self._hosts.several]))
        if not all(able) or not any(several):
            return super().allocate(sizes, contexts, backend)
        ranks = self._hosts.of(self.control.rank)
        try:
            memory = SharedMemoryGroup(sizes, ranks, self.control.rank, self.control, len(ranks) == self.size)
        except OSError as error:
            print(f'mxsimmim: {error}: workers of one host send each other their gradients', file=sys.stderr)
            return super().allocate(sizes, contexts, backend)
        self._memories.append(memory)
        self._shared.update({id(array): (memory, i) for i, array in enumerate(memory.arrays)})
        others = super().allocate(sizes, contexts[1:], backend)
        return [[array, *more] for array, more in zip(memory.arrays, others)]

    def all_reduce(self, handle: Handle) -> None:
        for memory in self._memories:
            memory.check()
        # The last first, as a backward pass yields them: sums in shared memory are made in this order.
        for key, (first, *others) in zip(reversed(handle.keys), reversed(handle.arrays)):
            if others:
                self._store.pushpull(key, [first] + others, out=[first] + others, priority=-key)
            shared = self._shared.get(id(first))
            if shared is None:
                self._in_turn(key, first)
                self._allreduce(key, first, self._group)
            else:
                memory, i = shared
                memory.all_reduce(i)
                if self._hosts.leaders != self._hosts.ranks[:1]:  # there are several
                    if memory.first:
                        self._allreduce(key, first, self._leaders)
                    memory.broadcast(i)
            for other in others:
                first.copyto(other)

    def _allreduce(self, key: int, array: mx.nd.NDArray, among: Any) -> None:
        """Begin Horovod's, in this process set; without one among all workers."""
        if self.size > 1:
            self._horovod.allreduce_(array, op=self._horovod.Sum, name=f'{self._prefix}{key}', priority=-key,
                                     **({'process_set': among} if among else {}))


def by_itself(process: ProcessInfo) -> Dict[str, str]:
    """Return what tells Horovod that each process has a host to itself, before it makes process sets.

    Of the ranks of a set it connects those that have one local rank in the job, under the local rank that each has in
    the set. Where hosts have unequal numbers of a set's ranks these differ, and they wait for each other for ever.
    Nothing here uses these connections.
    """
    rank, size = str(process.rank), str(process.size)
    return {'HOROVOD_LOCAL_RANK': '0', 'HOROVOD_LOCAL_SIZE': '1', 'HOROVOD_CROSS_RANK': rank,
            'HOROVOD_CROSS_SIZE': size, 'HOROVOD_HOSTNAME': f'rank-{rank}'}


class _Hosts:
    """The workers of a group, by the hosts that they are on."""

    def __init__(self, ranks: Tuple[int, ...], firsts: Sequence[int]):
        """`firsts` are the first ranks of all hosts, none where nobody knows them: then each has a host of its own."""
        self.ranks = ranks
        host = {rank: sum(first <= rank for first in firsts) if firsts else rank for rank in ranks}
        self._of = {rank: [other for other in ranks if host[other] == host[rank]] for rank in ranks}
        self.leaders = tuple(dict.fromkeys(self._of[rank][0] for rank in ranks))
        self.several = len(self.leaders) < len(ranks)  # on one of the hosts

    def of(self, rank: int) -> List[int]:
        """Return those on the host of this rank."""
        return self._of[rank]


COMMUNICATORS: Dict[str, Callable[[str, ProcessInfo, Optional[ControlPlane]], Communicator]] = {
    'local': Communicator, 'device': Communicator, 'nccl': Communicator,
    'dist_sync': ServerCommunicator, 'dist_device_sync': ServerCommunicator, 'horovod': HorovodCommunicator,
}


def make_communicator(name: str, process: ProcessInfo = ALONE, control: Optional[ControlPlane] = None) -> Communicator:
    """Make the communicator of this train.store for this process, whose job has this control plane.

    Raises:
        ValueError: it cannot be had here.
    """
    return COMMUNICATORS[name](name, process, control)
