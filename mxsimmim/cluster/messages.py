"""Exchange messages between two processes: length, optional signature, JSON. Sent to every host."""
import asyncio
import hashlib
import hmac
import json
import os
from typing import Any, Callable, Dict

LIMIT = 1 << 26  # bytes of one message; ours are far smaller
MAC = 32  # bytes of a signature
OPENING = b'\n<mxsimmim>\n'  # where an agent's words begin: a login shell may have printed its own before

Message = Dict[str, Any]


def secret(key: bytes, nonce: bytes) -> bytes:
    """Derive the key that signs the messages of one connection."""
    return hmac.new(key, nonce, hashlib.sha256).digest()


class MessageStream:
    """Send and receive messages over two descriptors (or one socket, given twice) without ever blocking.

    With a `secret`, every message is signed together with its direction and number: over a network, a stranger can
    neither forge, repeat nor reorder one. A stream that breaks or is closed by the peer calls `closed` once. Whatever
    arrives before `opening` is skipped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, reader: int, writer: int, received: Callable[[Message], None],
                 closed: Callable[[], None], secret: bytes = b'', launcher: bool = True, opening: bytes = b'') -> None:
        self.loop, self.reader, self.writer, self.received, self.closed = loop, reader, writer, received, closed
        self.secret, self.names = secret, (b'launcher', b'agent') if launcher else (b'agent', b'launcher')
        self.incoming, self.outgoing, self.counts, self.open = bytearray(), bytearray(), [0, 0], True
        self.opening, self.sending = opening, True
        for descriptor in {reader, writer}:
            os.set_blocking(descriptor, False)
        loop.add_reader(reader, self._read)

    def send(self, **message: Any) -> None:
        """Queue a message; once nothing can be sent any more, do nothing."""
        if self.open and self.sending:
            body = json.dumps(message, ensure_ascii=False).encode(errors='surrogateescape')  # any bytes in words
            signed = self._sign(0, body) + body
            self.write(len(signed).to_bytes(4, 'big') + signed)

    def write(self, data: bytes) -> None:
        """Queue bytes that are no message."""
        self.outgoing += data
        self._flush()

    def end_sending(self) -> None:
        """Forget what is queued and send nothing more, since `writer` is about to be closed; still receive."""
        self.sending = False
        self.outgoing.clear()
        self.loop.remove_writer(self.writer)

    def close(self) -> None:
        """Stop sending and receiving, and tell the owner; the descriptors stay the owner's to close."""
        if self.open:
            self.open = False
            self.loop.remove_reader(self.reader)
            if self.sending:
                self.loop.remove_writer(self.writer)
            self.closed()

    def _sign(self, side: int, body: bytes) -> bytes:
        if not self.secret:
            return b''
        self.counts[side] += 1
        return hmac.new(self.secret, self.names[side] + self.counts[side].to_bytes(8, 'big') + body,
                        hashlib.sha256).digest()

    def _flush(self) -> None:
        try:
            while self.outgoing:
                del self.outgoing[:os.write(self.writer, self.outgoing)]
            self.loop.remove_writer(self.writer)
        except BlockingIOError:
            self.loop.add_writer(self.writer, self._flush)
        except OSError:
            self.close()

    def _read(self) -> None:
        try:
            data = os.read(self.reader, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b''
        self.incoming += data
        if self.opening and self.opening in self.incoming:
            del self.incoming[:self.incoming.index(self.opening) + len(self.opening)]
            self.opening = b''
        while self.open and not self.opening and len(self.incoming) >= 4:
            size = int.from_bytes(self.incoming[:4], 'big')
            if size > LIMIT:
                return self.close()
            if len(self.incoming) < 4 + size:
                break
            signed = bytes(self.incoming[4:4 + size])
            del self.incoming[:4 + size]
            body = signed[MAC:] if self.secret else signed
            if not hmac.compare_digest(signed[:len(signed) - len(body)], self._sign(1, body)):
                return self.close()
            self.received(json.loads(body.decode(errors='surrogateescape')))
        if not data:
            self.close()
