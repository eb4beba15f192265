"""Arrays that one worker of a host hands to another in shared memory; which one is where, their connection tells.

The sender has a file without a name (memfd_create(2)), in which slots are for an array each, and a pipe, through which
the receiver says which slots are free. The receiver opens both in the sender's /proc folder.
"""
import contextlib
import mmap
import os
import sys
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import mxnet as mx
import numpy as np

from .control import ControlPlane

SLOTS = 8  # what waits to be computed or received; one that is never needed takes no memory
Place = Tuple[int, Sequence[int], Sequence[str]]  # process, its file and its pipe, and which ones these must be


class Address(NamedTuple):
    """Which slot it is, and where in the file: elsewhere after it has become larger."""
    number: int
    offset: int


class Slot(NamedTuple):
    """Memory for an array."""
    offset: int  # in the file
    array: mx.nd.NDArray  # all of it


class Outbox:
    """The sender's slots, each as large as the largest array that was in it."""

    def __init__(self) -> None:
        self._slots: Dict[int, Slot] = {}
        self._free: Set[int] = set()
        self._has_failed = False
        self._file, (self._freed, end) = os.memfd_create('mxsimmim'), os.pipe()
        os.set_blocking(self._freed, False)
        self._open = self._file, self._freed, end
        self.place: Place = os.getpid(), [self._file, end], [_name(os.getpid(), number) for number in (self._file, end)]

    def take(self, like: mx.nd.NDArray) -> Optional[Tuple[Address, mx.nd.NDArray]]:
        """Return a free slot and it as an array of this type and shape, on cpu(0).

        None if all are taken, or there is no memory for it, which is said once.
        """
        with contextlib.suppress(BlockingIOError):
            self._free |= set(os.read(self._freed, SLOTS))
        if not self._free or self._has_failed:
            return None
        number = min(self._free)  # so that no more are used than must be
        slot = self._slots.get(number)
        if slot is None or slot.array.dtype != like.dtype or slot.array.size < like.size:
            try:
                slot = self._slots[number] = self._made(like.size, np.dtype(like.dtype))
            except OSError as error:
                print(f'mxsimmim: no shared memory for {like.shape}: {error}: activations go over TCP', file=sys.stderr)
                self._has_failed = True
                return None
        self._free.remove(number)
        return Address(number, slot.offset), slot.array[:like.size].reshape(like.shape)

    def close(self) -> None:
        """Close what is open; the receiver still has what was sent."""
        for number in self._open:
            os.close(number)

    def _made(self, size: int, dtype: 'np.dtype') -> Slot:
        """Make a slot at the end of the file, with all its pages: one that is not there when written to is SIGBUS."""
        end, nbytes = os.fstat(self._file).st_size, size * dtype.itemsize
        offset = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        os.posix_fallocate(self._file, offset, nbytes)
        memory = mmap.mmap(self._file, nbytes, offset=offset)
        return Slot(offset, mx.nd.from_numpy(np.frombuffer(memory, dtype)))


class Inbox:
    """The receiver's view of another worker's slots."""

    def __init__(self, place: Place):
        """Open what `Outbox.place` says, and tell its worker that all slots are free.

        Raises:
            OSError: it cannot be opened; that process may be in a container of its own.
        """
        process, numbers, names = place
        if [_name(process, number) for number in numbers] != list(names):
            raise FileNotFoundError(f'process {process} is another one here')
        self._memory: Dict[int, Tuple[int, mmap.mmap]] = {}  # of a slot: where it is, and what is there
        self._file, self._pipe = (os.open(f'/proc/{process}/fd/{number}', mode | os.O_CLOEXEC)
                                  for number, mode in zip(numbers, (os.O_RDWR, os.O_WRONLY)))
        os.write(self._pipe, bytes(range(SLOTS)))

    def values(self, slot: Address, dtype: str, shape: Sequence[int]) -> np.ndarray:
        """Return what is in a slot, without a copy: it stays so until the slot is freed.

        Raises:
            OSError: it cannot be mapped.
        """
        size, (number, offset) = int(np.prod(shape)), slot
        if self._memory.get(number, (-1,))[0] != offset:  # the first array there is the largest
            self._memory[number] = offset, mmap.mmap(self._file, size * np.dtype(dtype).itemsize, offset=offset)
        return np.frombuffer(self._memory[number][1], dtype, size).reshape(shape)

    def free(self, slot: Address) -> None:
        """Let the sender use a slot again."""
        with contextlib.suppress(BrokenPipeError):  # it is gone, as its connection will tell
            os.write(self._pipe, bytes([slot.number]))

    def close(self) -> None:
        """Close what is open; values that are used remain."""
        os.close(self._file)
        os.close(self._pipe)


Boxes = Tuple[Optional[Outbox], Optional[Inbox]]


def open_boxes(control: ControlPlane, peers: Sequence[int]) -> Dict[int, Boxes]:
    """Return what goes to and what comes from these workers of this host in shared memory.

    All workers of the job do this at once. Where memory cannot be shared there is None, and rank 0 says why.
    """
    outboxes: Dict[int, Outbox] = {}
    inboxes: Dict[int, Inbox] = {}
    errors: List[Tuple[int, str]] = []
    for peer in peers if hasattr(os, 'memfd_create') else ():
        try:
            outboxes[peer] = Outbox()
        except OSError as error:
            errors.append((peer, f'rank {control.rank} has nothing to share with rank {peer}: {error}'))
    places = control.all_gather('shared memory of channels', {peer: box.place for peer, box in outboxes.items()})
    for peer in outboxes:
        try:
            if str(control.rank) in places[peer]:
                inboxes[peer] = Inbox(places[peer][str(control.rank)])
        except OSError as error:
            errors.append((peer, f'rank {control.rank} cannot see memory of rank {peer}: {error}'))
    told = control.all_gather('shared memory of channels is open', errors)
    reasons = [why for errors in told for _, why in errors]
    if reasons and control.rank == 0:
        print(f'mxsimmim: {reasons[0]}: activations go over TCP', file=sys.stderr)
    for peer in peers:
        if peer in outboxes and control.rank in [rank for rank, _ in told[peer]]:  # which does not see it
            outboxes.pop(peer).close()
    return {peer: (outboxes.get(peer), inboxes.get(peer)) for peer in peers}


def _name(process: int, number: int) -> str:
    """Return what a file of a process is, which no other file of this machine is."""
    path = f'/proc/{process}/fd/{number}'
    return f'{os.readlink(path)} {os.stat(path).st_ino}'
