"""The launcher's side of its agents: starting them, and speaking to them over pipes or sockets."""
import asyncio
import os
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from mxsimmim.runtime import fault
from mxsimmim.cluster import mpi
from mxsimmim.cluster.messages import OPENING, Message, MessageStream, secret

PACKAGE = Path(__file__).parents[1]
SENT = ('system.guards', 'system.paths', 'runtime.environment', 'runtime.fault', 'cluster.messages',
        'cluster.rendezvous', 'cluster.inspection', 'cluster.agent')
# What an agent's Python runs: it reads the agent's program from its standard input.
BOOTSTRAP = 'import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))'


class Lost(Exception):
    """An agent that is gone; the text says what its channel said last."""


def program(call: str = 'main()') -> bytes:
    """The agent and all it imports of this package, as one Python program."""
    texts = [('mxsimmim' + name, '') for name in ('', '.system', '.runtime', '.cluster')]
    texts += [('mxsimmim.' + name, (PACKAGE / (name.replace('.', '/') + '.py')).read_text('utf-8')) for name in SENT]
    return ('import sys, types\n'
            f'for name, text in {texts!a}:\n'
            '    module = sys.modules[name] = types.ModuleType(name)\n'
            "    exec(compile(text, name, 'exec'), module.__dict__)\n"
            f"sys.modules['mxsimmim.cluster.agent'].{call}\n").encode()


class Seat:
    """One agent: a place for processes of the job."""

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str, host: int,
                 notice: Callable[['Seat', Message], None]) -> None:
        self.loop, self.name, self.host, self.notice = loop, name, host, notice
        self.process: Optional[subprocess.Popen] = None
        self.channel: Optional[MessageStream] = None
        self.facts: Dict[str, Any] = {}
        self.offset = 0.0  # seconds that the host's clock is ahead of ours
        self.heard = time.monotonic()
        self.waiting: Dict[str, asyncio.Future] = {'hello': loop.create_future()}  # by the event that answers
        self.closed = loop.create_future()
        self.said: List[str] = []
        self.silent = loop.create_future()

    def start(self, argv: Sequence[str], environ: Optional[Dict[str, str]] = None) -> None:
        """Starts the command that leads to the agent, in a session of its own: out of reach of the terminal's Ctrl-C.

        Raises:
            ValueError: there is no such command.
        """
        try:
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ,
                                            stderr=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise ValueError(f"'{argv[0]}' cannot be started ({error.strerror}): install it on this machine") from None
        os.set_blocking(self.process.stderr.fileno(), False)
        self.loop.add_reader(self.process.stderr.fileno(), self.listen)

    def open(self, argv: Sequence[str]) -> None:
        """Starts the agent by a command whose standard input and output are the channel."""
        self.start(argv)
        self.channel = MessageStream(self.loop, self.process.stdout.fileno(), self.process.stdin.fileno(), self.receive,
                               self.close, opening=OPENING)
        text = program()
        self.channel.write(b'%d\n' % len(text) + text)

    def listen(self) -> None:
        """Keeps what ssh, mpirun or an agent in trouble says on its standard error."""
        try:
            data = os.read(self.process.stderr.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self.loop.remove_reader(self.process.stderr.fileno())
            self.silent.set_result(None)
            return
        rest, *lines = data.decode(errors='replace').split('\n')  # of a line that came in pieces, perhaps
        self.said = (self.said[:-1] + [''.join(self.said[-1:]) + rest] + lines)[-100:]

    def receive(self, message: Message) -> None:
        self.heard = time.monotonic()
        event = message['event']
        # A question whose asker was interrupted stays here as a future that is done.
        waiting = [name for name in self.waiting if not self.waiting[name].done()]
        if event == 'problem' and waiting:
            for name in waiting:
                self.waiting.pop(name).set_exception(ValueError(message['text']))
        elif event in waiting:
            self.waiting.pop(event).set_result(message)
        else:
            self.notice(self, message)

    def close(self) -> None:
        for future in list(self.waiting.values()) + [self.closed]:
            if not future.done():
                future.set_result(None)
        self.waiting.clear()
        self.notice(self, {'event': 'lost'})

    async def ask(self, event: str, seconds: float, **message: Any) -> Message:
        """Sends a message (if any) and waits for the event that answers it.

        Raises:
            Lost: the agent went away, or did not answer in time.
            ValueError: the agent's own words for what is wrong.
        """
        future = self.waiting.get(event)
        if message:
            future = self.waiting[event] = self.loop.create_future()
            if self.channel.open:
                self.channel.send(**message)
            else:
                self.close()
        try:
            answer = await asyncio.wait_for(future, seconds) if future else None
        except asyncio.TimeoutError:
            self.waiting.pop(event, None)
            raise Lost(f'no answer within {seconds:.0f} s') from None
        if answer is None:
            if self.process:
                await asyncio.wait([self.silent], timeout=1)  # for its last words
            raise Lost(self.last() or 'it ended without a word')
        return answer

    def first(self) -> str:
        """The first line that its standard error had."""
        return next((line.strip() for line in self.said if line.strip()), '')

    def last(self) -> str:
        """The last line that its standard error had, but for rules, or where the agent crashed."""
        place = fault.place(self.said)
        if place:
            return f'its agent crashed {place}'
        return next((line.strip() for line in reversed(self.said) if line.strip(' \r-')), '')

    async def end(self, seconds: float) -> None:
        """Makes sure that the agent's process here is gone."""
        if not self.process:
            return
        self.process.stdin.close()
        limit = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < limit:
            await asyncio.sleep(0.02)
        self.process.kill()
        self.process.wait()


def answer_calls(loop: asyncio.AbstractEventLoop, listener: socket.socket, key: bytes, seats: Sequence[Seat]) -> None:
    """Takes the calls of agents that mpirun started; each finds its seat by its rank."""
    text = program(mpi.CALL)

    def accept() -> None:
        connection, _ = listener.accept()
        nonce = secrets.token_hex(16).encode()

        def hello(message: Message) -> None:
            seat = seats[message['rank']]
            if seat.channel:
                return channel.close()
            seat.channel, channel.received = channel, seat.receive
            channel.closed = lambda: (connection.close(), seat.close())
            seat.receive(message)
        channel = MessageStream(loop, connection.fileno(), connection.fileno(), hello, connection.close,
                          secret(key, nonce))
        channel.write(mpi.greeting(key, nonce, text))
    loop.add_reader(listener.fileno(), accept)
