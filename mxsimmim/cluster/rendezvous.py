"""Let Horovod's ranks find one another: a small HTTP store of byte strings. Sent to every host.

Gloo asks for ``/scope/key`` by GET until it is there (404 until then). In each scope, rank 3 PUTs its address as ``3``
and a word about it as ``rank_3``, and DELETEs ``3`` when it is connected to all. Others may still be reading then, so a
scope is forgotten when all its ranks have said so: a second `hvd.init` must not find the addresses of the first.
"""
import asyncio
from typing import Dict, Set, Tuple

LIMIT = 1 << 20  # bytes of a value; Gloo's are addresses
DEADLINE = 5.0  # seconds for one request, so that a stranger's silence costs nothing


class Rendezvous:
    """Serve one connection a request, as HTTP/1.0 does."""

    def __init__(self) -> None:
        self.scopes: Dict[str, Dict[str, bytes]] = {}
        self.connected: Dict[str, Set[str]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            status, value = await asyncio.wait_for(self._answer(reader), DEADLINE)
            writer.write(b'HTTP/1.0 %s\r\nContent-Length: %d\r\n\r\n' % (status.encode(), len(value)) + value)
            await asyncio.wait_for(writer.drain(), DEADLINE)
        except (asyncio.TimeoutError, OSError, ValueError, EOFError):
            pass  # not a rank of ours, or one that has died: the supervision sees that
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> Tuple[str, bytes]:
        method, path, _ = (await reader.readline()).decode('latin-1').split()
        size = 0
        while True:
            name, _, text = (await reader.readline()).decode('latin-1').partition(':')
            if not name.strip():
                break
            if name.lower() == 'content-length':
                size = int(text)
        scope, slash, key = path[1:].partition('/')
        if not 0 <= size <= LIMIT or not slash or method not in ('GET', 'PUT', 'DELETE'):
            return '400 Bad Request', b''
        value = await reader.readexactly(size)
        if method == 'PUT':
            self.scopes.setdefault(scope, {})[key] = value
        elif method == 'DELETE':
            self._connected(scope, key)
        elif key in self.scopes.get(scope, {}):
            return '200 OK', self.scopes[scope][key]
        else:
            return '404 Not Found', b''
        return '200 OK', b''

    def _connected(self, scope: str, key: str) -> None:
        ranks = {name for name in self.scopes.get(scope, {}) if not name.startswith('rank_')}
        self.connected.setdefault(scope, set()).add(key)
        if self.connected[scope] >= ranks:
            self.scopes.pop(scope, None)
            del self.connected[scope]
