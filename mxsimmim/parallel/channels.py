"""Channels: hand arrays to the neighbour along a pipeline and take its own, in order, without waiting for either.

Both ends of a channel send and receive: activations go one way, their gradients the other. Between two devices of one
worker it is a copy; between two workers a TCP connection whose messages are signed with the job's key. Of workers on
one host it carries arrays of the host alone, and tells where in shared memory the others lie. MXNet has no transfer
between two processes of its own, and Horovod none in which not all of a group take part.
"""
import contextlib
import hashlib
import hmac
import json
import math
import queue
import secrets
import socket
import threading
import time
from collections import deque
from typing import Any, Deque, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import mxnet as mx
import numpy as np

from ..cluster.messages import MAC, secret
from ..runtime import watchdog
from .control import DEADLINE, ControlError, ControlPlane, tune
from .slots import Address, Inbox, Outbox, open_boxes

OPENING = 120.0  # seconds until both neighbours must have connected, which listen already: no step's time is in it
GREETING = 5.0  # seconds for one who connects to show that it knows the key
NONCE = 16  # bytes
TICK = 0.5  # seconds after which one who waits looks whether the other end is still there
WAITING = 4  # arrays at each end: more would fill the memory of a worker that hands on what is faster than the next


class Channel(Protocol):
    """One end of a channel."""

    def send(self, array: mx.nd.NDArray) -> None:
        """Hand on what `array` holds at this point of the program; returns before it is computed."""

    def receive(self) -> mx.nd.NDArray:
        """Return the next array that the other end has sent, on this end's device.

        Raises:
            ControlError: the worker at the other end is gone or late.
        """


class LocalChannel:
    """One end of a channel between two devices of a worker; MXNet's engine waits where one must wait."""

    def __init__(self, context: mx.Context):
        self.context, self.other = context, self
        self._arrived: Deque[mx.nd.NDArray] = deque()

    def send(self, array: mx.nd.NDArray) -> None:
        """Begin to copy to the other end's device."""
        self.other._arrived.append(array.copyto(self.other.context))

    def receive(self) -> mx.nd.NDArray:
        """Return the next array, of which the copy may be under way."""
        assert self._arrived, 'the worker itself must have sent it before'
        return self._arrived.popleft()


def local_channel(first: mx.Context, second: mx.Context) -> Tuple[LocalChannel, LocalChannel]:
    """Make both ends of a channel between two devices of this worker."""
    ends = LocalChannel(first), LocalChannel(second)
    ends[0].other, ends[1].other = ends[1], ends[0]
    return ends


class Item(NamedTuple):
    """An array on its way, and the slot in shared memory in which it lies, if it does."""
    values: Any  # of MXNet or of NumPy; received ones are of NumPy
    slot: Optional[Address] = None


class SocketChannel:
    """One end of a channel between two workers. A thread sends what is computed, another one receives meanwhile.

    Whoever sends more than `WAITING` arrays that nobody receives waits, so that no host's memory fills with them. With
    an outbox or an inbox a device's arrays go or come through it.
    """

    def __init__(self, connection: socket.socket, key: bytes, peer: int, context: mx.Context, upper: bool,
                 outbox: Optional[Outbox] = None, inbox: Optional[Inbox] = None):
        """`peer` is the rank at the other end, `upper` whether it comes later in the pipeline."""
        self._connection, self._key, self._peer, self._context = connection, key, peer, context
        self._outbox, self._inbox = outbox, inbox
        self._names = (b'up', b'down') if upper else (b'down', b'up')
        self._outgoing: 'queue.Queue[Optional[Item]]' = queue.Queue(WAITING)
        self._arrived: 'queue.Queue[Item]' = queue.Queue(WAITING)
        self._lost: Optional[ControlError] = None
        self._threads = [threading.Thread(target=work, name=f'channel to rank {peer}', daemon=True)
                         for work in (self._send_all, self._receive_all)]
        for thread in self._threads:
            thread.start()

    def send(self, array: Union[mx.nd.NDArray, np.ndarray]) -> None:
        """Begin to copy to the host's memory, from where it is sent as soon as it is there.

        Raises:
            ControlError: the worker at the other end is gone.
        """
        item = Item(array) if isinstance(array, np.ndarray) else self._copied(array)
        limit = math.inf if watchdog.is_on() else time.monotonic() + DEADLINE
        with watchdog.doing(f'rank {self._peer} to take an array', together=True):
            while not self._lost:
                with contextlib.suppress(queue.Full):
                    return self._outgoing.put(item, timeout=TICK)
                if time.monotonic() > limit:
                    raise ControlError(f'channel: rank {self._peer} has taken nothing for {DEADLINE:g} s: its log says '
                                       'what it does')
        raise self._lost

    def receive(self, seconds: float = DEADLINE) -> mx.nd.NDArray:
        """Wait for the next array; `seconds` count where no watch of this process ends what takes too long.

        Raises:
            ControlError: the worker at the other end is gone, or has sent nothing for `seconds`.
        """
        values, slot = self._next(seconds)
        array = mx.nd.array(values, self._context, values.dtype)
        self._free(slot)
        return array

    def receive_values(self, seconds: float = DEADLINE) -> np.ndarray:
        """As `receive`, but in the host's memory."""
        values, slot = self._next(seconds)
        if slot:
            values = values.copy()
            self._free(slot)
        return values

    def close(self) -> None:
        """Send what is on its way, and say that nothing follows; what has not been received yet is lost."""
        with contextlib.suppress(queue.Full):
            self._outgoing.put(None, timeout=GREETING)
        self._threads[0].join(GREETING)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        while self._threads[1].is_alive():  # perhaps with an array for which there is no room
            with contextlib.suppress(queue.Empty):
                self._arrived.get(timeout=0.01)
        self._connection.close()
        if self._outbox:
            self._outbox.close()
        if self._inbox:
            self._inbox.close()

    def _copied(self, array: mx.nd.NDArray) -> Item:
        """Begin to copy to the host's memory: to a slot, if one is free."""
        taken = self._outbox.take(array) if self._outbox else None
        return Item(array.copyto(taken[1]), taken[0]) if taken else Item(array.copyto(mx.cpu()))

    def _next(self, seconds: float) -> Item:
        limit = math.inf if watchdog.is_on() else time.monotonic() + seconds
        with watchdog.doing(f'an array of rank {self._peer}', together=True):
            while True:
                lost = self._lost  # before the queue is looked at: what arrived before the end is still there
                with contextlib.suppress(queue.Empty):
                    return self._arrived.get(timeout=0 if lost else min(TICK, seconds))
                if lost:
                    raise lost
                if time.monotonic() > limit:
                    raise ControlError(f'channel: rank {self._peer} has sent nothing for {seconds:g} s: its log says '
                                       'what it does')

    def _free(self, slot: Optional[Address]) -> None:
        if slot:
            assert self._inbox
            self._inbox.free(slot)

    def _send_all(self) -> None:
        number = 0
        with contextlib.suppress(OSError):  # the other thread meets it, too
            while (item := self._outgoing.get()) is not None:
                try:
                    self._send_item(number, item)
                except mx.MXNetError as error:  # of an operator that has made the array
                    return self._lose(str(error))
                number += 1

    def _send_item(self, number: int, item: Item) -> None:
        values, slot = item
        if slot:
            values.wait_to_read()
            return self._send_head(number, np.dtype(values.dtype), values.shape, *slot)
        values = np.asarray(values if isinstance(values, np.ndarray) else values.asnumpy(), order='C')
        self._send_head(number, values.dtype, values.shape)
        self._connection.sendall(values.data.cast('B') if values.size else b'')
        self._connection.sendall(self._sign(0, number, values))

    def _send_head(self, number: int, dtype: 'np.dtype', shape: Sequence[int], *slot: int) -> None:
        head = json.dumps([dtype.name, shape, *slot]).encode()
        self._connection.sendall(len(head).to_bytes(2, 'big') + head + self._sign(0, number, head))

    def _receive_all(self) -> None:
        number, why = 0, f'rank {self._peer} has ended: its log says why'
        with contextlib.suppress(OSError):
            while True:
                head = self._read(int.from_bytes(self._read(2), 'big'))
                if not hmac.compare_digest(self._read(MAC), self._sign(1, number, head)):
                    why = f'what arrives is not signed by rank {self._peer}'
                    break
                dtype, shape, *slot = json.loads(head.decode())
                if slot:
                    assert self._inbox
                    item = Item(self._inbox.values(Address(*slot), dtype, shape), Address(*slot))
                else:
                    item = Item(np.empty(shape, dtype))
                    self._read_into(item.values.data.cast('B') if item.values.size else memoryview(b''))
                    if not hmac.compare_digest(self._read(MAC), self._sign(1, number, item.values)):
                        why = f'what arrives is not signed by rank {self._peer}'
                        break
                self._arrived.put(item)
                number += 1
        self._lose(why)

    def _lose(self, why: str) -> None:
        self._lost = ControlError(f'channel: {why}')

    def _sign(self, side: int, number: int, data: Any) -> bytes:
        return _mac(self._key, self._names[side] + number.to_bytes(8, 'big'), data)

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        self._read_into(memoryview(data))
        return bytes(data)

    def _read_into(self, data: memoryview) -> None:
        _read_into(self._connection, data)


def pipeline_channels(control: ControlPlane, context: mx.Context, axis: str = 'pipeline'
                      ) -> Tuple[Optional[SocketChannel], Optional[SocketChannel]]:
    """Open channels to the workers before and after this one in its pipeline; None where there is none.

    Or to those along another axis of the mesh. All workers of the job do this at once. Each listens in the network
    through which it reaches rank 0.

    Raises:
        ControlError: a neighbour cannot be reached, or does not know the job's key.
    """
    mesh = control.mesh
    stages, stage = mesh.group(axis), mesh.coordinate(axis)
    before, after = stages[max(stage - 1, 0):stage], stages[stage + 1:stage + 2]
    peers = [*before, *after]
    with watchdog.doing(f'channels to ranks {peers}', together=True), socket.socket() as listener:
        listener.bind((control.address, 0))
        listener.listen()
        places = control.all_gather('channels', listener.getsockname())
        # The one before first: it waits for this one.
        connections = {peer: _accept(listener, control.key, peer) if peer in after else
                       _connect(places[peer], control.key, mesh.rank) for peer in peers}
    boxes = open_boxes(control, [peer for peer in peers if places[peer][0] == control.address])  # of this host
    channels = {peer: SocketChannel(*connection, peer, context, peer in after, *boxes.get(peer, (None, None)))
                for peer, connection in connections.items()}
    return next(map(channels.get, before), None), next(map(channels.get, after), None)


def _connect(place: Sequence[Any], key: bytes, rank: int) -> Tuple[socket.socket, bytes]:
    try:
        connection = socket.create_connection(tuple(place), OPENING)
        nonce = bytearray(NONCE)
        _read_into(connection, memoryview(nonce))
        own = secret(key, bytes(nonce))
        connection.sendall(_mac(own, b'channel', str(rank).encode()))
    except OSError as error:
        raise ControlError(f'channel: {place[0]}:{place[1]} cannot be reached: {error}') from None
    return _ready(connection), own


def _accept(listener: socket.socket, key: bytes, peer: int) -> Tuple[socket.socket, bytes]:
    """Wait for the worker `peer`; whoever else connects is turned away."""
    limit = time.monotonic() + OPENING
    while time.monotonic() < limit:
        listener.settimeout(max(limit - time.monotonic(), 0.01))
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            connection.settimeout(GREETING)
            nonce, answer = secrets.token_bytes(NONCE), bytearray(MAC)
            own = secret(key, nonce)
            with contextlib.suppress(OSError):
                connection.sendall(nonce)
                _read_into(connection, memoryview(answer))
            if hmac.compare_digest(bytes(answer), _mac(own, b'channel', str(peer).encode())):
                return _ready(connection), own
            connection.close()
    raise ControlError(f'channel: rank {peer} has not connected within {OPENING:g} s: its log says what it does')


def _ready(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    tune(connection)
    return connection


def _mac(key: bytes, head: bytes, data: Any) -> bytes:
    digest = hmac.new(key, head, hashlib.sha256)
    digest.update(data)
    return digest.digest()


def _read_into(connection: socket.socket, data: memoryview) -> None:
    """Fill `data`.

    Raises:
        OSError: the connection ended before.
    """
    while data:
        size = connection.recv_into(data)
        if not size:
            raise ConnectionResetError('the connection has ended')
        data = data[size:]
