"""What every HTTP service of ours does around its answers: an address, a warning to the user, an end in good order."""
import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import sys
from typing import Any, Awaitable, Callable, Optional


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one.

    Raises:
        ValueError: the address is taken, forbidden or not of this machine.
    """
    if not 0 <= port < 65536:
        raise ValueError(f'--port={port} must be in 0 to 65535')
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)  # now, so that two services on one port cannot both believe that they have it
    except OSError as error:
        hint = {errno.EADDRINUSE: f'port {port} is taken, choose another with --port',
                errno.EACCES: f'port {port} is not for ordinary users, choose one from 1024 with --port'}
        raise ValueError(f'cannot listen on {host}:{port}: {hint.get(error.errno or 0, error.strerror)}') from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Return whether other machines cannot reach a socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def address(listener: socket.socket) -> str:
    """Return where a browser finds a socket."""
    host, port = listener.getsockname()[:2]
    return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def warn_of_strangers(listener: socket.socket, host: str, what: str) -> None:
    """Say on standard error what strangers can do, if a socket hears more than this machine."""
    if not is_loopback(listener):
        print(f'mxsimmim: warning: whoever reaches {host} can {what}, without password or encryption: put a proxy with '
              'both before it, or leave --host out', file=sys.stderr, flush=True)


async def serve(app: Any, listener: socket.socket, finish: Optional[Callable[[], Awaitable[None]]] = None) -> None:
    """Answer requests with an application of aiohttp's until SIGTERM or SIGINT; then `finish` what is under way."""
    from aiohttp import web
    logging.getLogger('aiohttp.server').setLevel(logging.CRITICAL)  # else a traceback for each stranger's nonsense
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Compressed uploads stay as they are, which is no image: unpacking them could fill the memory.
    runner = web.AppRunner(app, handle_signals=False, access_log=None, auto_decompress=False, lingering_time=1,
                           shutdown_timeout=1)
    await runner.setup()
    site = web.SockSite(runner, listener)
    await site.start()
    await stop.wait()
    loop.remove_reader(listener)
    await asyncio.sleep(0)  # what was accepted last is attached now; closed before, it would be neither read nor ended
    await site.stop()
    if finish:
        await finish()  # before aiohttp's own end, which reads no more of an upload that has begun
    await runner.cleanup()
