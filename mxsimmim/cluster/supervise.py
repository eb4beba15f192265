"""From a plan to a running job to its end: the only part of the launcher that acts."""
import argparse
import asyncio
import os
import platform
import signal
import sys
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from mxsimmim.system import guards, text
from mxsimmim.cluster import job, options as command_line, prepare
from mxsimmim.cluster.messages import Message
from mxsimmim.cluster.job import Process
from mxsimmim.cluster.seats import Seat
from mxsimmim.cluster.terminal import Terminal

SETTLE = 0.5  # seconds after the first failure in which others may turn out to be earlier
CHECKPOINT, HURRIED, REST = 6.0, 2.0, 1.0  # seconds: workers told to stop; after a failure; servers after them
CLOSING = 5.0  # seconds that servers may take to end by themselves after the last worker
PING, SILENCE = 2.0, 10.0  # seconds between signs of life, and without one until a host is lost


class Exit(NamedTuple):
    """A process that ended; `code` is minus the number of the signal that killed it, `time` is ours."""
    process: Process
    code: int
    time: float
    tail: Sequence[str]
    crash: str = ''  # in native code: where Python was


class Job:
    """A job from its first connection to its last log line."""

    def __init__(self, options: argparse.Namespace, hosts: Sequence[job.Host], terminal: Terminal) -> None:
        self.options, self.terminal = options, terminal
        self.loop = asyncio.get_event_loop()
        self.processes = job.place(options.num_workers, options.num_servers, hosts, options.horovod)
        self.hosts = list(hosts[:1 + max(process.host for process in self.processes)])  # those that are needed
        self.seats: List[Seat] = []
        self.exits: Dict[Process, Exit] = {}
        self.failed: List[Exit] = []
        self.lost: List[Seat] = []
        self.files: Dict[str, Any] = {}
        self.running = self.ending = False
        self.signal = 0
        self.changed, self.hurry = asyncio.Event(), asyncio.Event()
        self.pinged = time.monotonic()

    # -- what happens

    def notice(self, seat: Seat, message: Message) -> None:
        """Takes note of what an agent reports by itself."""
        event = message['event']
        if event == 'output':
            self.terminal.put(message['stream'], message['data'].encode('latin-1'), message['missed'])
        elif event == 'exit':
            process = next(p for p in self.processes if p[:2] == (message['role'], message['index']))
            self.exits[process] = Exit(process, message['code'], message['time'] - seat.offset, message['tail'],
                                       message['crash'])
        elif event == 'log':
            self.keep(f"{message['role']}-{message['index']}.log", message['data'].encode('latin-1'))
        elif event == 'lost' and not self.ending and seat not in self.lost:
            self.lost.append(seat)
        self.changed.set()

    def stop(self, number: int) -> None:
        """A signal to the launcher: the first ends the job in good order, the next one at once."""
        if self.signal or self.ending:
            self.hurry.set()
        self.signal = self.signal or number
        self.changed.set()

    def ping(self) -> None:
        now = time.monotonic()
        slept = now - self.pinged > 2 * PING  # suspended (Ctrl-Z): the silence was ours
        self.pinged = now
        for seat in self.seats:
            if seat.channel and seat.channel.open:
                seat.channel.send(do='ping')
                seat.heard = now if slept else seat.heard
                if self.running and now - seat.heard > SILENCE:
                    seat.said += [f'nothing heard of it for {SILENCE:.0f} s', '']
                    seat.channel.close()
        self.loop.call_later(PING, self.ping)

    # -- what is done

    async def work(self) -> int:
        """The whole job; the launcher's exit status."""
        self.ping()
        try:
            await prepare.prepare(self)
            self.running = True
            await self.until(lambda: self.signal or self.failures() or self.lost or not self.left('worker'), None)
            if not self.signal and (self.failures() or self.lost):
                await asyncio.sleep(SETTLE)
            self.failed, self.ending = self.failures(), True
            await self.wind_down()
        finally:
            self.ending = True
            await self.finish()
        speaking = [seat.silent for seat in self.lost if seat.process and not seat.silent.done()]
        if speaking:  # their last words
            await asyncio.wait(speaking, timeout=1)
        return self.verdict()

    async def until(self, condition: Callable[[], object], seconds: Optional[float]) -> None:
        """Waits for a condition, a deadline, or the user's impatience."""
        limit = None if seconds is None else time.monotonic() + seconds
        while not condition() and not self.hurry.is_set():
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), limit and max(0, limit - time.monotonic()))
            except asyncio.TimeoutError:
                return

    async def wind_down(self) -> None:
        """Ends the processes: workers first, who need the servers to save a checkpoint."""
        if self.left('worker'):
            self.send(['worker'], signal.SIGTERM)
            await self.until(lambda: not self.left('worker'), CHECKPOINT if self.signal else HURRIED)
        elif not self.failed:
            await self.until(lambda: not self.left(), CLOSING)
        self.send(['server', 'scheduler'], signal.SIGTERM)
        await self.until(lambda: not self.left(), REST)

    async def finish(self) -> None:
        """Has every agent kill what is left, hand over its logs, and go."""
        for seat in self.seats:
            if seat.channel:
                seat.channel.send(do='finish', fetch=self.options.launcher != 'local')
        answering = [seat for seat in self.seats if seat.facts and not seat.closed.done()]
        while answering:  # as long as they have something to say: their logs may be long
            await asyncio.wait([seat.closed for seat in answering], timeout=1)
            answering = [seat for seat in answering if not seat.closed.done() and not self.hurry.is_set()
                         and time.monotonic() - seat.heard < SILENCE]
        await asyncio.gather(*[seat.end(3 if seat.facts else 0.5) for seat in self.seats])
        for name, file in self.files.items():
            file.close()
            os.replace(file.name, os.path.join(prepare.LOGS, name))

    def keep(self, name: str, data: bytes) -> None:
        """Collects a log from another host; it takes its place when it is whole."""
        if name not in self.files:
            os.makedirs(prepare.LOGS, exist_ok=True)
            self.files[name] = open(os.path.join(prepare.LOGS, f'.{name}.part'), 'wb')
        self.files[name].write(data)

    def send(self, roles: Sequence[str], number: int) -> None:
        for seat in self.seats:
            if seat.channel and seat.channel.open:
                seat.channel.send(do='signal', roles=list(roles), number=int(number))

    # -- what is known

    def seat(self, process: Process) -> Seat:
        """The agent that runs a process: of its host, or with mpirun its own."""
        by_process = self.options.launcher == 'mpi'
        return self.seats[self.processes.index(process) if by_process else process.host]

    def left(self, role: str = '') -> List[Process]:
        """Processes that still run, as far as anyone knows."""
        return [p for p in self.processes if p not in self.exits and p.role.startswith(role)
                and self.seat(p).channel.open]

    def failures(self) -> List[Exit]:
        """Processes that failed, the first one first."""
        return sorted((exit for exit in self.exits.values() if exit.code), key=lambda exit: exit.time)

    def name(self, where: Any) -> str:
        """What to call a host, given itself or an agent on it."""
        return where.name or getattr(where, 'facts', {}).get('host') or platform.node()

    def verdict(self) -> int:
        """Says what went wrong, if anything did, and returns the exit status."""
        if self.signal:
            self.terminal.say(f'stopped by {signal.Signals(self.signal).name}')
            return 128 + self.signal
        for seat in self.lost:
            self.terminal.say(f"host {self.name(seat)} was lost: {seat.last() or 'its agent ended without a word'}")
        if not self.failed:
            return 1 if self.lost else 0
        first, *others = self.failed
        log = os.path.join(prepare.LOGS, f'{first.process.role}-{first.process.index}.log')
        host = self.name(self.seat(first.process))
        self.terminal.say(f'{first.process} on {host} {how(first.code)}; its log is {log}'
                          + (', its last lines:' if first.tail else ', and empty'))
        self.terminal.say(*(f'  | {line}' for line in first.tail))
        if first.crash:
            self.terminal.say(f'{first.process} crashed {first.crash}')
        if first.code in (-signal.SIGKILL, 128 + signal.SIGKILL):  # the launcher had killed nothing yet
            self.terminal.say(f'if nobody sent that signal, {host} ran out of memory (`dmesg` there says so): start '
                              'fewer processes a host, or lower train.batch_size')
        if others:
            self.terminal.say('after it: ' + ', '.join(f'{other.process} {how(other.code)}' for other in others))
        return first.code if first.code > 0 else 128 - first.code


def how(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f'failed with exit code {code}'
    known = {int(number): number.name for number in signal.Signals}
    return f'was killed by {known.get(-code, f"signal {-code}")}'


async def run(options: argparse.Namespace, terminal: Terminal) -> int:
    hosts = [job.Host('')]
    if options.hostfile:
        hosts = job.read_hostfile(command_line.contents(options.hostfile), options.hostfile)
    if options.launcher == 'local' and 'OMP_NUM_THREADS' in os.environ:
        for given in options.given.values():
            given.setdefault('OMP_NUM_THREADS', os.environ['OMP_NUM_THREADS'])
    work = Job(options, hosts, terminal)
    task = asyncio.ensure_future(work.work())

    def stop(number: int) -> None:
        work.stop(number)
        if not work.running and not work.hurry.is_set():
            task.cancel()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            work.loop.add_signal_handler(number, stop, number)
    work.loop.add_signal_handler(signal.SIGTSTP, terminal.say, 'a job cannot be suspended; Ctrl-C ends it')
    try:
        return await task
    except asyncio.CancelledError:
        return work.verdict()


def main(argv: Sequence[str]) -> int:
    """The launcher; its exit status."""
    guards.name_crashes()
    text.open_streams()
    terminal = Terminal()
    try:
        return asyncio.run(run(command_line.parse(argv), terminal))
    except prepare.Refused as error:
        terminal.put(1, f'{error}\n'.encode(errors='replace'))
        return 2
    except ValueError as error:
        if isinstance(error, UnicodeError):
            raise
        terminal.say(*(f'error: {line}' for line in str(error).splitlines()))
        return 2
    finally:
        terminal.flush()
        sys.stdout.flush()
