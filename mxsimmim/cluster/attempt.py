"""Follow one start of a job from its first connection to its last log line."""
import asyncio
import signal
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.connections import AgentConnection
from mxsimmim.cluster.logs import FetchedLogs
from mxsimmim.cluster.messages import Message
from mxsimmim.cluster.outcome import Exit, Outcome
from mxsimmim.cluster.prepare import agents_of, prepare
from mxsimmim.cluster.spec import JobSpec, Process
from mxsimmim.cluster.terminal import Terminal

SETTLE = 0.5  # seconds after the first failure in which others may turn out to be earlier
HURRIED, REST = 2.0, 1.0  # seconds: workers told to stop after a failure; servers after them
CLOSING = 5.0  # seconds that servers may take to end by themselves after the last worker
PING, SILENCE = 2.0, 10.0  # seconds between signs of life of agents, which are always idle, and until a host is lost
STOPPED = 128 + signal.SIGTERM, -signal.SIGTERM  # exit codes of workers that were told to stop


class Attempt:
    """Hold everything that one start of a job has: connections, processes that ended, logs. Used once.

    Raises:
        ValueError: a host would get more workers than it takes.
    """

    def __init__(self, spec: JobSpec, backend: Backend, terminal: Terminal,
                 restarts: Sequence[Tuple[float, str]] = (), written: int = -1) -> None:
        """`restarts` and `written` are those of `prepare`."""
        self.spec, self.backend, self.terminal, self.restarts, self.written = spec, backend, terminal, restarts, written
        self.loop = asyncio.get_running_loop()
        self.agents = agents_of(spec, backend, self.on_event)
        self.exits: Dict[Process, Exit] = {}
        self.failed: List[Exit] = []
        self.lost: List[AgentConnection] = []
        self.stopped: Dict[Process, str] = {}  # by a signal or a debugger, and on which host
        self.logs = FetchedLogs()
        self.running = self.ending = self.finishing = False  # finishing: agents are told to go
        self.signal, self.checkpoint, self.notify = 0, -1, ('', '')
        self.stop_after: Optional[int] = None  # the step of a checkpoint; the next one is the last of this attempt
        self.stopping = False  # because of that, the workers were told to stop
        self.changed, self.hurry = asyncio.Event(), asyncio.Event()
        self.preparing: Optional['asyncio.Task[None]'] = None
        self.pinged = time.monotonic()
        self.pinger: Optional[asyncio.TimerHandle] = None

    # -- what happens

    def on_event(self, agent: AgentConnection, message: Message) -> None:
        """Take note of what an agent reports by itself."""
        event = message['event']
        if event == 'output':
            self.terminal.put(message['stream'], message['data'].encode('latin-1'), message['missed'])
        elif event in ('exit', 'log', 'stopped'):
            process = next(p for p in agent.processes if p[:2] == (message['role'], message['index']))
            if event == 'log':
                self.logs.write(process, message['data'].encode('latin-1'))
            elif event == 'stopped':
                self.stopped[process] = agent.name
            else:
                self.exits[process] = Exit(process, agent.name, message['code'], message['time'] - agent.offset,
                                           message['tail'], message['crash'], message['report'])
                self._note([message['report']])
        elif event == 'pong':
            self._note(message['reports'])
        elif event == 'lost' and not self.finishing and agent not in self.lost:
            self.lost.append(agent)
        self.changed.set()

    def _note(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Take note of what processes tell of themselves."""
        for report in reports:
            self.checkpoint = max(self.checkpoint, report.get('checkpoint', -1))
            if 'notify' in report:
                self.notify = report['notify'], report['run']
        if self.stop_after is not None and self.checkpoint > self.stop_after and not self.stopping:
            self.stopping = True
            self._signal(['worker'], signal.SIGTERM)

    def stop(self, number: int) -> None:
        """React to a signal to the launcher: the first ends the attempt in good order, the next one at once."""
        if self.signal or self.ending:
            self.hurry.set()
        elif self.preparing and not self.running:
            self.preparing.cancel()
        self.signal = self.signal or number
        self.changed.set()

    def stop_at_checkpoint(self) -> None:
        """Have the workers stop when they have written their next checkpoint; they write one more where they stop."""
        self.stop_after = self.checkpoint

    def _ping(self) -> None:
        """Exchange signs of life with all agents, and give up those that gave none for `SILENCE` seconds."""
        now = time.monotonic()
        slept = now - self.pinged > 2 * PING  # suspended (Ctrl-Z): the silence was ours
        self.pinged = now
        for agent in self.agents:
            if agent.speaks:
                agent.send(do='ping')
                agent.heard = now if slept else agent.heard
                if self.running and now - agent.heard > SILENCE:
                    agent.give_up(f'nothing heard of it for {SILENCE:.0f} s')
        self.pinger = self.loop.call_later(PING, self._ping)

    # -- what is done

    async def run(self) -> Outcome:
        """Prepare, wait for the end, and clear up whatever happens.

        Raises:
            ValueError: nothing was started; the text says why, a line a problem.
        """
        self._ping()
        try:
            self.preparing = self.loop.create_task(prepare(self.spec, self.backend, self.agents, self.terminal.say,
                                                            self.restarts, self.written))
            if self.signal:  # before it began
                self.preparing.cancel()
            await self.preparing
            self.running = True
            await self._until(lambda: self.signal or self.failures() or self.lost or not self.left('worker'), None)
            if not self.signal and (self.failures() or self.lost):
                await asyncio.sleep(SETTLE)
            self.failed, self.ending = self.failures(), True
            await self._wind_down()
        except asyncio.CancelledError:
            if not self.signal:  # it was not `stop`
                raise
        finally:
            self.ending = self.finishing = True
            await self._finish()
        lost = tuple((agent.name, agent.last_words()) for agent in self.lost)
        planned = self.stopping and not (self.signal or self.failed or lost) and any(
            exit.code in STOPPED for exit in self.exits.values())
        return Outcome(self.signal, tuple(self.failed), lost, self.checkpoint, self.notify, planned,
                       tuple(self.stopped.items()))

    async def _until(self, condition: Callable[[], object], seconds: Optional[float]) -> None:
        """Wait for a condition, a deadline, or the user's impatience."""
        limit = None if seconds is None else time.monotonic() + seconds
        while not condition() and not self.hurry.is_set():
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), limit and max(0, limit - time.monotonic()))
            except asyncio.TimeoutError:
                return

    async def _wind_down(self) -> None:
        """End the processes: workers first, who need the servers to save a checkpoint."""
        if self.left('worker'):
            self._signal(['worker'], signal.SIGTERM)
            await self._until(lambda: not self.left('worker'), self.backend.grace if self.signal else HURRIED)
        elif not self.failed:
            await self._until(lambda: not self.left(), CLOSING)
        self._signal(['server', 'scheduler'], signal.SIGTERM)
        await self._until(lambda: not self.left(), REST)

    async def _finish(self) -> None:
        """Have every agent kill what is left, hand over its logs, and go; then let go of all connections."""
        for agent in self.agents:
            agent.send(do='finish', fetch=self.backend.fetches_logs)
        answering = [agent for agent in self.agents if agent.facts and not agent.closed.done()]
        while answering:  # as long as they have something to say: their logs may be long
            await asyncio.wait([agent.closed for agent in answering], timeout=1)
            answering = [agent for agent in answering if not agent.closed.done() and not self.hurry.is_set()
                         and time.monotonic() - agent.heard < SILENCE]
        await asyncio.gather(*[agent.end(3 if agent.facts else 0.5) for agent in self.agents])
        self.logs.close()
        commands = [agent.command or agent.starter for agent in self.lost]
        await asyncio.gather(*[command.wait_for_last_words() for command in commands if command])
        for agent in self.agents:
            agent.release()
        if self.pinger:
            self.pinger.cancel()

    def _signal(self, roles: Sequence[str], number: int) -> None:
        for agent in self.agents:
            agent.send(do='signal', roles=list(roles), number=int(number))

    # -- what is known

    def left(self, role: str = '') -> List[Process]:
        """List the processes that still run, as far as anyone knows."""
        return [process for agent in self.agents if agent.is_open for process in agent.processes
                if process not in self.exits and process.role.startswith(role)]

    def failures(self) -> List[Exit]:
        """List the processes that failed, the first one first; workers that stopped as they were told did not."""
        return sorted((exit for exit in self.exits.values() if exit.code and not (
            self.stopping and exit.process.role == 'worker' and exit.code in STOPPED)), key=lambda exit: exit.time)
