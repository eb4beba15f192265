"""The control plane: host values between the workers of a job, over TCP, every wait with a deadline.

It carries what is not an array of the model: agreement to stop, names, labels, counts, metrics, barriers. Rank 0 runs a
hub; each worker, rank 0 too, has one connection to it, whose messages are signed with the job's key. Calls are
collective: all workers make the same ones in the same order, and the hub refuses a call that does not match. Nothing
here goes through a kvstore or Horovod, so that whoever waits for an array can still be told that a worker is gone.
"""
import asyncio
import contextlib
import json
import secrets
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future, TimeoutError as NotYet
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple

from ..cluster.inspection import interfaces
from ..cluster.messages import Message, MessageStream, secret
from ..runtime import watchdog
from ..runtime.process import ProcessInfo
from ..runtime.watchdog import Peer
from ..system.points import reach
from .mesh import Mesh
from .protocol import job_key

# Seconds until all workers must have connected: the slowest imports MXNet from a busy disk, and rank 0 may have to wait
# for the folder of its run.
CONNECT = 180.0
DEADLINE = 1800.0  # seconds for the others to make the same call, in a process that no `watchdog.Watch` looks after
# Neither has to do with how long a step takes: a thread that does nothing else answers.
ASKING = 2.0  # seconds for rank 0 to say what it has heard of the others
CLOSING = 5.0  # seconds for the last messages of a worker that ends


class ControlError(ValueError):
    """Another worker is gone, late, or does something else; the text names it."""
    of_others = True


class Pending:
    """A call under way; `result` waits for the other workers."""

    def __init__(self, name: str, future: 'Future[Any]', missing: Callable[[], str]):
        self._name, self._future, self._missing = name, future, missing

    def result(self, seconds: Optional[float] = None) -> Any:
        """Return what the call gave, as soon as all workers have made it.

        By default the watch of this process ends a wait that is too long, and if there is none, `DEADLINE`.

        Raises:
            ControlError: a worker has ended, made another call, or has not made this one after `seconds`.
        """
        limit = seconds or (None if watchdog.is_on() else DEADLINE)
        try:
            with watchdog.doing(f"'{self._name}' of all workers", self._missing, together=True):
                answer = self._future.result(limit)
        except NotYet:
            raise ControlError(f"control plane: not all workers have come to '{self._name}' within {limit:g} s "
                               f'({self._missing()}); the logs of the others say what they do') from None
        if isinstance(answer, ControlError):
            raise answer
        return answer


class ControlPlane:
    """What one worker says to the others and hears of them; in a job of one worker, itself, without a network.

    `mesh` says where this worker stands among them; what is built on the control plane takes it from here.
    """

    def __init__(self, mesh: Optional[Mesh] = None, addresses: Sequence[Tuple[str, int]] = (), key: bytes = b'',
                 listener: Optional[socket.socket] = None, seconds: float = 0.0):
        """Connect to the hub at one of `addresses`; rank 0 runs it, on `listener`.

        All must have come within so many seconds, 0: `CONNECT`.

        Raises:
            ControlError: the hub cannot be reached, or is of another job.
        """
        self.mesh = mesh or Mesh()
        self.rank, self.size = self.mesh.rank, self.mesh.size
        self.key, self.address = key, '127.0.0.1'  # what signs the job's messages; of this worker, for the others
        self._waiting: List['Future[Any]'] = []
        self._asked: List['Future[Any]'] = []  # what is known of the others
        self._lost = ''
        self._hub: Optional[_Hub] = None
        if self.size == 1:
            return
        self._loop = asyncio.new_event_loop()
        if listener:
            self._hub = _Hub(self._loop, listener, self.size, key)
        self._thread = threading.Thread(target=self._loop.run_forever, name='control', daemon=True)
        self._thread.start()
        self._connection, nonce = _reach(addresses, seconds or CONNECT)
        reach('control.hello')
        self.address = self._connection.getsockname()[0]
        self._loop.call_soon_threadsafe(self._open, secret(key, nonce))
        self._post('hello', 'the start', self.rank).result(seconds or CONNECT)

    def all_gather(self, name: str, value: Any, seconds: Optional[float] = None) -> List[Any]:
        """Return every worker's value, by rank; what JSON can hold, NumPy's arrays and numbers as lists and numbers.

        `name` says in errors what is waited for. Floats arrive exactly.

        Raises:
            ControlError: see `Pending.result`.
        """
        return self.start_gather(name, value).result(seconds)

    def start_gather(self, name: str, value: Any) -> Pending:
        """Begin an `all_gather` without waiting for it; results may be asked for later, in any order."""
        return self._post('gather', name, value)

    def broadcast_object(self, name: str, make: Callable[[], Any], seconds: Optional[float] = None) -> Any:
        """Return to all workers what `make` returned on rank 0, where alone it is called.

        Raises:
            ControlError: see `Pending.result`; whatever `make` raises, on rank 0.
        """
        return self._post('broadcast', name, make() if self.rank == 0 else None).result(seconds)

    def barrier(self, name: str, seconds: Optional[float] = None) -> None:
        """Wait until all workers are here.

        Raises:
            ControlError: see `Pending.result`.
        """
        self.broadcast_object(name, lambda: None, seconds)

    def sign(self, status: Sequence[Any]) -> None:
        """Give rank 0 a sign of life; `status` are the fields of `Peer` but for `silent`."""
        if self.size > 1:
            self._loop.call_soon_threadsafe(lambda: self._channel.send(call='sign', status=list(status)))

    def peers(self) -> List[Peer]:
        """Return what rank 0 has heard of the other workers.

        Raises:
            ControlError: a worker has ended, or rank 0 does not answer.
        """
        if self.size == 1:
            return []
        try:
            return [Peer(status[0], silent, *status[1:]) if status else Peer(f'rank {rank}')
                    for rank, (silent, status, _) in enumerate(self._ask()) if rank != self.rank]
        except NotYet:
            raise ControlError('rank 0 does not answer: it is stopped, or cut off') from None

    def missing(self) -> str:
        """Say which workers have not made the call that others wait for; '' if nobody knows."""
        try:
            absent = [str(rank) for rank, (_, _, has_come) in enumerate(self._ask()) if not has_come]
        except (NotYet, ControlError):
            return ''
        return f'without rank{"s"[:len(absent) > 1]} {", ".join(absent)}' if absent else ''

    def _ask(self) -> List[Any]:
        """[seconds since its last sign of life, what that said, whether it waits in a call] of each rank."""
        future: 'Future[Any]' = Future()

        def ask() -> None:
            self._asked.append(future)
            self._channel.send(call='ask')
        self._loop.call_soon_threadsafe(ask)
        answer = ControlError(self._lost) if self._lost else future.result(ASKING)
        if isinstance(answer, ControlError):
            raise answer
        found: List[Any] = answer
        return found

    def close(self) -> None:
        """Say goodbye: from now on this worker may end without being missed. Rank 0 stays until all have."""
        if self.size == 1:
            return
        with contextlib.suppress(ControlError):
            self._post('bye', '', None).result(CLOSING)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSING)
        self._connection.close()
        if self._hub:
            self._hub.close()

    def __enter__(self) -> 'ControlPlane':
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        # After an error the connection ends with the process, without a goodbye: the others hear that this worker is
        # gone, but not before its launcher does, which names the process that ended first.
        if kind is None:
            self.close()

    def _open(self, key: bytes) -> None:
        number = self._connection.fileno()
        self._channel = MessageStream(self._loop, number, number, self._answered,
                                      lambda: self._lose('rank 0 has ended, or knows another key'), key,
                                      launcher=False)

    def _post(self, call: str, name: str, value: Any) -> Pending:
        future: 'Future[Any]' = Future()
        text = json.dumps(value, default=lambda other: other.tolist())
        if self.size == 1:
            future.set_result([json.loads(text)] if call == 'gather' else json.loads(text))
        else:
            self._loop.call_soon_threadsafe(self._send, future, call, name, text)
        return Pending(name, future, self.missing)

    def _send(self, future: 'Future[Any]', call: str, name: str, text: str) -> None:
        if self._lost:
            future.set_result(ControlError(self._lost))
        else:
            self._waiting.append(future)
            self._channel.send(call=call, name=name, text=text)

    def _answered(self, message: Message) -> None:
        """Answers come in the order of the calls."""
        if 'lost' in message:
            self._lose(message['lost'])
        elif 'known' in message:
            self._asked.pop(0).set_result(message['known'])
        elif self._waiting:
            self._waiting.pop(0).set_result(json.loads(message['text']))

    def _lose(self, why: str) -> None:
        self._lost = self._lost or f'control plane: {why}'
        for future in self._waiting:
            future.set_result(ControlError(self._lost))
        self._waiting.clear()


class _Hub:
    """Rank 0's end of all connections: answers a call when every worker has made it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, size: int, key: bytes):
        self._loop, self._listener, self._key = loop, listener, key
        self._connections: List[socket.socket] = []
        self._calls: List[Deque[Message]] = [deque() for _ in range(size)]  # not yet answered, by rank
        self._channels: Dict[int, MessageStream] = {}
        self._signs: Dict[int, Tuple[float, List[Any]]] = {}  # when each rank gave its last sign of life, and which
        self._leaving, self._lost = False, ''
        loop.add_reader(listener.fileno(), self._accept)

    def close(self) -> None:
        for opened in [self._listener, *self._connections]:
            opened.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._connections.append(connection)
        tune(connection)
        nonce = secrets.token_hex(16).encode()
        rank: List[int] = []  # of this connection, once it has said hello

        def received(message: Message) -> None:
            if not rank:
                own = json.loads(message['text'])
                if own in self._channels or own not in range(len(self._calls)):
                    return channel.close()
                rank.append(own)
                self._channels[own] = channel
            self._receive(rank[0], message)

        def closed() -> None:
            connection.close()
            if rank and not self._leaving:
                self._lose(f'rank {rank[0]} has ended: its log says why')
        number = connection.fileno()
        channel = MessageStream(self._loop, number, number, received, closed, secret(self._key, nonce))
        channel.write(nonce + b'\n')
        if self._lost:
            channel.send(lost=self._lost)

    def _receive(self, rank: int, message: Message) -> None:
        if message['call'] == 'sign':
            self._signs[rank] = time.monotonic(), message['status']
            return
        if message['call'] == 'ask':
            return self._channels[rank].send(known=self._known())
        self._calls[rank].append(message)
        while all(self._calls):
            calls = [calls.popleft() for calls in self._calls]
            other = next((rank for rank, call in enumerate(calls)
                          if (call['call'], call['name']) != (calls[0]['call'], calls[0]['name'])), None)
            if other is not None:
                return self._lose(f"rank {other} is at '{calls[other]['name']}', rank 0 at '{calls[0]['name']}'")
            self._leaving = self._leaving or calls[0]['call'] == 'bye'
            text = f"[{','.join(call['text'] for call in calls)}]" if calls[0]['call'] == 'gather' else calls[0]['text']
            for channel in self._channels.values():
                channel.send(text=text)

    def _known(self) -> List[Any]:
        now = time.monotonic()
        signs = [self._signs.get(rank) for rank in range(len(self._calls))]
        return [[sign and now - sign[0], sign and sign[1], bool(calls)] for sign, calls in zip(signs, self._calls)]

    def _lose(self, why: str) -> None:
        self._lost = self._lost or why
        for channel in list(self._channels.values()):
            channel.send(lost=self._lost)


def connect(process: ProcessInfo, environ: Mapping[str, str], mesh: Optional[Mesh] = None, seconds: float = 0.0
            ) -> ControlPlane:
    """Join the control plane of this worker's job; its launcher says where, or else Horovod carries that to all, once.

    By default all workers of the mesh hold a whole model, and have `CONNECT` seconds to come.

    Raises:
        ControlError: the hub cannot be reached.
        ValueError: the launcher left no key.
    """
    if process.size == 1:
        return ControlPlane()
    listener = None
    if process.control:
        host, _, port = process.control.rpartition(':')
        addresses, key = [(host, int(port))], job_key(environ)
        if process.rank == 0:
            listener = _listen(host, int(port), process.size)
    else:
        if process.rank == 0:
            listener = _listen('', 0, process.size)
        addresses, key = _by_horovod(listener)
    mesh = mesh or Mesh(data=process.size, rank=process.rank)
    return ControlPlane(mesh, addresses, secret(key, b'control plane'), listener, seconds)


def _listen(host: str, port: int, size: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the launcher holds the port until now
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ControlError(f'control plane: {host}:{port} cannot be listened at: {error.strerror}') from None
    listener.listen(size)
    return listener


def _by_horovod(listener: Optional[socket.socket]) -> Tuple[List[Tuple[str, int]], bytes]:
    """Rank 0's addresses, all networks first and loopback last, and a key that it makes."""
    import horovod.mxnet as hvd
    import mxnet as mx
    import numpy as np
    hvd.init()
    words = np.zeros(4096, 'float32')
    if listener:
        known = sorted(interfaces().values(), key=lambda address: address.startswith('127.'))
        text = json.dumps([known, listener.getsockname()[1], secrets.token_hex(32)]).encode()
        words[:len(text)] = np.frombuffer(text, 'uint8')
    words = hvd.broadcast(mx.nd.array(words), 0, name='control plane').asnumpy().astype('uint8')
    known, port, key = json.loads(words.tobytes().rstrip(b'\0'))
    return [(address, port) for address in known], bytes.fromhex(key)


def tune(connection: socket.socket) -> None:
    """Has small messages sent at once, and a host that vanishes missed after half a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _reach(addresses: Sequence[Tuple[str, int]], seconds: float) -> Tuple[socket.socket, bytes]:
    """A connection to the first address that answers, and the nonce it greets with."""
    limit = time.monotonic() + seconds
    while True:
        for address in addresses:
            try:
                connection = socket.create_connection(address, timeout=5)
                nonce = b''
                while not nonce.endswith(b'\n'):
                    data = connection.recv(64)
                    if not data or len(nonce) > 64:
                        raise OSError('it is not a job of ours')
                    nonce += data
                tune(connection)
                return connection, nonce.strip()
            except OSError as error:
                why = error
        if time.monotonic() > limit:
            places = ', '.join(f'{host}:{port}' for host, port in addresses)
            raise ControlError(f'control plane: rank 0 cannot be reached at {places} within {seconds:g} s: {why}')
        time.sleep(0.1)
