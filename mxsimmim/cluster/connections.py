"""Start agents, and speak to them over pipes or sockets: the launcher's side."""
import asyncio
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, TypeVar, Union

from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.messages import OPENING, Message, MessageStream
from mxsimmim.cluster.spec import Process
from mxsimmim.runtime import fault

PACKAGE = Path(__file__).parents[1]
SENT = ('system.guards', 'system.paths', 'runtime.environment', 'runtime.fault', 'runtime.report', 'cluster.messages',
        'cluster.rendezvous', 'cluster.inspection', 'cluster.agent')
# What an agent's Python runs: it reads the agent's program from its standard input.
BOOTSTRAP = 'import sys; exec(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())))'
LINES = 100  # of a command's standard error that are kept
ENDING = 2.0  # seconds that a command may take to end by SIGTERM
LAST_WORDS = 1.0  # seconds for what a command that ended still has to say


class Lost(Exception):
    """Tell of an agent that is gone; the text is what its command said last."""


class Problem(NamedTuple):
    """Say, in a line for the user, what is wrong with a host."""
    host: Host
    line: str


class HostError(ValueError):
    """Tell what keeps a job from starting on some hosts, a line a problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__('\n'.join(problem.line for problem in problems))
        self.hosts = frozenset(problem.host for problem in problems)


def program(call: str = 'main()') -> bytes:
    """Put the agent and all it imports of this package into one Python program."""
    texts = [('mxsimmim' + name, '') for name in ('', '.system', '.runtime', '.cluster')]
    texts += [('mxsimmim.' + name, (PACKAGE / (name.replace('.', '/') + '.py')).read_text('utf-8')) for name in SENT]
    return ('import sys, types\n'
            f'for name, text in {texts!a}:\n'
            '    module = sys.modules[name] = types.ModuleType(name)\n'
            "    exec(compile(text, name, 'exec'), module.__dict__)\n"
            f"sys.modules['mxsimmim.cluster.agent'].{call}\n").encode()


class Command:
    """Run a command on this machine, and keep what it says on its standard error: ssh, mpirun, rsync, a local agent.

    It has a session of its own, out of reach of the terminal's Ctrl-C.

    Raises:
        ValueError: there is no such command.
    """

    def __init__(self, argv: Sequence[str], environ: Optional[Mapping[str, str]] = None) -> None:
        try:
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ,
                                            stderr=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise ValueError(f"'{argv[0]}' cannot be started ({error.strerror}): install it on this machine") from None
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout, self.stderr = self.process.stdin, self.process.stdout, self.process.stderr
        self.loop = asyncio.get_running_loop()
        self.lines: List[str] = []
        self.silent: 'asyncio.Future[None]' = self.loop.create_future()  # done when its standard error has ended
        os.set_blocking(self.stderr.fileno(), False)
        self.loop.add_reader(self.stderr.fileno(), self._read)

    def _read(self) -> None:
        try:
            data = os.read(self.stderr.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not data:
            return self._stop_reading()
        rest, *lines = data.decode(errors='replace').split('\n')  # of a line that came in pieces, perhaps
        self.lines = (self.lines[:-1] + [''.join(self.lines[-1:]) + rest] + lines)[-LINES:]

    def _stop_reading(self) -> None:
        if not self.silent.done():
            self.loop.remove_reader(self.stderr.fileno())
            self.silent.set_result(None)

    def first_line(self) -> str:
        """Return the first line of its standard error."""
        return next((line.strip() for line in self.lines if line.strip()), '')

    def last_line(self) -> str:
        """Return the last line of its standard error, but for rules, or where an agent's Python crashed."""
        place = fault.place(self.lines)
        if place:
            return f'its agent crashed {place}'
        return next((line.strip() for line in reversed(self.lines) if line.strip(' \r-')), '')

    async def wait_for_last_words(self) -> None:
        """Wait until its standard error has ended, not longer than `LAST_WORDS`."""
        await asyncio.wait([self.silent], timeout=LAST_WORDS)

    async def end(self, seconds: float) -> None:
        """Wait for its end, then enforce it: first by SIGTERM, since srun and mpirun then end what they started.

        What it said last may still be on its way.
        """
        for end in (self.process.terminate, self.process.kill):
            limit = time.monotonic() + seconds
            while self.process.poll() is None and time.monotonic() < limit:
                await asyncio.sleep(0.02)
            end()
            seconds = ENDING
        self.process.wait()

    def close(self) -> None:
        """Let go of its pipes."""
        self._stop_reading()
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()


class AgentConnection:
    """Speak to one agent, which starts `processes` on a host.

    What the agent reports by itself goes to `on_event`, and, when the connection has ended, the event 'lost'.
    """

    def __init__(self, host: Host, processes: Sequence[Process], on_event: Callable[['AgentConnection', Message], None]
                 ) -> None:
        self.loop = asyncio.get_running_loop()
        self.host, self.processes, self.on_event = host, list(processes), on_event
        self.command: Optional[Command] = None  # that leads to the agent, where there is one for this agent
        self.starter: Optional[Command] = None  # that has started it together with others
        self.messages: Optional[MessageStream] = None
        self.facts: Dict[str, Any] = {}  # what the agent found on its host
        self.offset = 0.0  # seconds that the host's clock is ahead of ours
        self.heard = time.monotonic()
        self.awaited: Dict[str, asyncio.Future] = {'hello': self.loop.create_future()}  # by the event that answers
        self.closed = self.loop.create_future()
        self.reason = ''  # why the launcher gave it up

    @property
    def name(self) -> str:
        """What to call the host: as the hostfile does, else as it calls itself."""
        return self.host.name or self.facts.get('host') or platform.node()

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent to the agent."""
        return self.messages is not None and self.messages.open

    @property
    def speaks(self) -> bool:
        """Whether the agent runs. What is sent before, its Python may take off the pipe together with its program."""
        return self.is_open and self.messages is not None and not self.messages.opening

    def open(self, argv: Sequence[str]) -> None:
        """Start the agent by a command whose standard input and output carry the messages.

        Raises:
            ValueError: there is no such command.
        """
        self.command = Command(argv)
        self.messages = MessageStream(self.loop, self.command.stdout.fileno(), self.command.stdin.fileno(),
                                      self.receive, self.close, opening=OPENING)
        text = program()
        self.messages.write(b'%d\n' % len(text) + text)

    def receive(self, message: Message) -> None:
        """Hand a message to the request that it answers, else to `on_event`."""
        self.heard = time.monotonic()
        event = message['event']
        # A request whose sender was interrupted stays here as a future that is done.
        awaited = [name for name in self.awaited if not self.awaited[name].done()]
        if event == 'problem' and awaited:
            for name in awaited:
                self.awaited.pop(name).set_exception(ValueError(message['text']))
        elif event in awaited:
            self.awaited.pop(event).set_result(message)
        else:
            self.on_event(self, message)

    def close(self) -> None:
        """Answer all requests with nothing: the agent is gone."""
        for future in [*self.awaited.values(), self.closed]:
            if not future.done():
                future.set_result(None)
        self.awaited.clear()
        self.on_event(self, {'event': 'lost'})

    def give_up(self, reason: str) -> None:
        """Close the connection to an agent that is silent; `reason` is its last line, should nothing follow."""
        self.reason = reason
        if self.command and not self.starter:
            self.command.lines += [reason, '']
        if self.messages:
            self.messages.close()

    def last_words(self) -> str:
        """Return what the command that leads to the agent said last, or why the agent was given up."""
        if not self.starter:
            return (self.command.last_line() if self.command else '') or self.reason
        about = (line.strip() for line in reversed(self.starter.lines) if self.host.name in line)
        return self.reason or next(about, '') or self.starter.last_line()

    async def request(self, event: str, seconds: float, **message: Any) -> Message:
        """Send a message (if any) and wait for the event that answers it.

        Raises:
            Lost: the agent went away, or did not answer in time.
            ValueError: the agent's own words for what is wrong.
        """
        future = self.awaited.get(event)
        if message:
            future = self.awaited[event] = self.loop.create_future()
            if self.messages and self.messages.open:
                self.messages.send(**message)
            else:
                self.close()
        try:
            answer = await asyncio.wait_for(future, seconds) if future else None
        except asyncio.TimeoutError:
            self.awaited.pop(event, None)
            raise Lost(f'no answer within {seconds:.0f} s') from None
        if answer is None:
            command = self.command or self.starter
            if command:
                await command.wait_for_last_words()
            raise Lost(self.last_words() or 'it ended without a word')
        return answer

    def send(self, **message: Any) -> None:
        """Send a message that needs no answer; do nothing if the agent is gone."""
        if self.messages:
            self.messages.send(**message)

    async def end(self, seconds: float) -> None:
        """Make sure that the command that leads to the agent has ended, after `seconds` by force."""
        if self.command:
            if self.messages and self.messages.writer == self.command.stdin.fileno():
                self.messages.end_sending()
            self.command.stdin.close()
            await self.command.end(seconds)

    def release(self) -> None:
        """Close what is still open on this machine."""
        if self.messages:
            self.messages.close()
        if self.command:
            self.command.close()


Item = TypeVar('Item', bound=Union[Host, AgentConnection])


async def for_each(items: Sequence[Item], step: Callable[[Item], Awaitable[Any]]) -> List[Problem]:
    """Do one step for all hosts or agents at once.

    Returns:
        what went wrong, host by host: one for each `Lost` or `ValueError`.
    """
    results = await asyncio.gather(*map(step, items), return_exceptions=True)
    problems = []
    for item, result in zip(items, results):
        if isinstance(result, (Lost, ValueError)):
            host = item.host if isinstance(item, AgentConnection) else item
            problems.append(Problem(host, f'host {item.name}: {result}'))
        elif isinstance(result, BaseException):
            raise result
    return list(dict.fromkeys(problems))


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise a HostError of these problems, if there are any."""
    if problems:
        raise HostError(problems)
