"""Start processes on one host for the launcher, report what becomes of them, and leave none behind.

The launcher sends the agent to the host, together with the modules it imports, and so the two never differ. The agent's
parent, the guardian, does nothing but wait: should the agent be killed, orphans fall to the guardian,
which kills them. Neither has threads, so that code may run safely between fork and exec.
"""
import asyncio
import contextlib
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional

from mxsimmim.cluster import inspection
from mxsimmim.cluster.messages import OPENING, Message, MessageStream
from mxsimmim.cluster.rendezvous import Rendezvous
from mxsimmim.runtime import environment, fault, report
from mxsimmim.system import guards

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's linux/prctl.h
SILENCE = 20.0  # seconds without a word from the launcher after which its machine is taken to be gone
BACKLOG = 4 << 20  # bytes on their way to the launcher beyond which output goes to the log alone
TAIL, SHOWN = 10, 8192  # last lines of a log that a summary shows, and characters of them
libc = ctypes.CDLL(None)


class Child:
    """Hold a process of the job, the leader of its own session and process group."""

    def __init__(self, role: str, index: int, process: Any, log: str, begin: int, report_file: str) -> None:
        """`begin` is the size that its log had."""
        self.role, self.index, self.process, self.log, self.begin = role, index, process, log, begin
        self.report_file, self.ended, self.told = report_file, False, False  # told: to end, by SIGTERM


class Agent:
    """Obey messages: each `do` names a method, its other entries are the arguments."""

    def __init__(self, loop: asyncio.AbstractEventLoop, private: str, reader: int, writer: int, secret: bytes,
                 place: str) -> None:
        self.loop, self.private, self.address = loop, private, ''
        self.children: List[Child] = []
        self.pipes: Dict[int, Callable[[], None]] = {}
        self.held: List[socket.socket] = []
        self.environ: Dict[str, str] = {}
        self.done = loop.create_future()
        self.abandoned, self.missed = False, 0
        self.heard = time.monotonic()
        self.messages = MessageStream(loop, reader, writer, self.obey, self.abandon, secret, launcher=False)
        self.messages.write(b'' if secret else OPENING)
        loop.add_signal_handler(signal.SIGCHLD, self.reap)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.abandon)
        loop.call_later(SILENCE, self.watch)
        self.messages.send(event='hello', place=os.environ.get(place, ''))

    def obey(self, message: Message) -> None:
        self.heard = time.monotonic()
        try:
            getattr(self, 'do_' + message.pop('do'))(**message)
        except (OSError, ValueError) as error:
            self.messages.send(event='problem', text=str(error))

    def do_ping(self) -> None:
        self.messages.send(event='pong', time=time.time(),
                           reports=[report.read(child.report_file) for child in self.children])

    def do_inspect(self, directory: str, environ: Dict[str, Optional[str]], needs: Dict[str, Any]) -> None:
        """Enter the working directory, and tell the launcher about the host."""
        self.environ = changed(os.environ, {'PATH': os.path.dirname(sys.executable) + os.pathsep
                                            + os.environ.get('PATH', os.defpath), **environ})
        try:
            os.chdir(os.path.expanduser(directory))
        except OSError as error:
            raise ValueError(f"working directory '{directory}' cannot be entered ({error.strerror}): make it there, "
                             'or let --sync-dst-dir copy it') from None
        needs['near'] = needs['near'] or self.address
        self.messages.send(event='facts', facts=inspection.collect_facts(needs, self.environ))

    def do_reserve(self, address: str) -> None:
        """Reserve a port for ps-lite's scheduler, which binds it itself.

        A bound socket that never listens keeps it: the kernel gives the port to nobody who asks for any, and ZeroMQ can
        bind it too and listen, since both set SO_REUSEADDR.
        """
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((address, 0))
        self.held.append(held)
        self.messages.send(event='reserved', port=held.getsockname()[1])

    def do_rendezvous(self, address: str) -> None:
        """Start the store that Horovod's ranks meet at."""
        listener = socket.socket()
        listener.bind((address, 0))
        self.loop.create_task(asyncio.start_server(Rendezvous().serve, sock=listener))
        self.messages.send(event='reserved', port=listener.getsockname()[1])

    def do_reach(self, address: str, port: int) -> None:
        """Check that this host gets through to the scheduler's: nobody listens there yet, so a refusal is good news."""
        try:
            socket.create_connection((address, port), timeout=3).close()
        except ConnectionRefusedError:
            pass
        except OSError as error:
            raise ValueError(f'cannot reach {address}:{port}, where the job meets ({error}): open the firewall between '
                             'the hosts for it, or choose another network with --interface') from None
        self.messages.send(event='reached')

    def do_start(self, processes: List[Message], logs: str, key: str, header: str) -> None:
        """Start processes, whose servers and control plane sign with `key`; their logs go to the folder `logs`.

        With a `header` the logs go on after this line; else they begin anew.
        """
        path = os.path.join(self.private, 'key')
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as file:
            file.write(key)
        try:
            os.makedirs(logs, exist_ok=True)
            for process in processes:
                open(log_of(logs, process['role'], process['index']), 'ab').close()
        except OSError as error:
            raise ValueError(f'cannot write {error.filename} in {os.getcwd()} ({error.strerror}): start the job in a '
                             'folder that you may write to') from None
        for process in processes:
            process['environ']['MXSIMMIM_KEY_FILE'] = path
            self.spawn(logs=logs, header=header, **process)
        self.messages.send(event='started')

    def spawn(self, logs: str, header: str, role: str, index: int, argv: List[str],
              environ: Dict[str, Optional[str]], part: List[int], live: bool) -> None:
        """Start one process on its part of the cores; output goes to its log and, if `live`, to the launcher too."""
        path = log_of(logs, role, index)
        me, kept = os.getpid(), os.O_APPEND if header else os.O_APPEND | os.O_TRUNC
        log = os.open(path, os.O_WRONLY | os.O_CREAT | kept, 0o644)
        os.write(log, header.encode())
        begin, told = os.fstat(log).st_size, os.path.join(self.private, f'report-{role}-{index}')
        environ[report.FILE] = told
        pipes = [os.pipe(), os.pipe()] if live else []
        outputs = [writer for _, writer in pipes] or [log, log]
        cpus = environment.cpus_of_part(part[0], part[1])

        def prepare() -> None:
            die_with(me, signal.SIGKILL)
            os.sched_setaffinity(0, cpus)
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=outputs[0], stderr=outputs[1],
                                       env=changed(self.environ, environ), start_new_session=True,
                                       preexec_fn=prepare)
        except OSError as error:
            raise ValueError(f'{role} {index} cannot be started: {argv[0]}: {error.strerror}') from None
        finally:
            for descriptor in set(outputs) - {log}:
                os.close(descriptor)
        for stream, (reader, _) in enumerate(pipes):
            os.set_blocking(reader, False)
            self.pipes[reader] = functools.partial(self.copy, reader, log, stream)
            self.loop.add_reader(reader, self.pipes[reader])
        if not live:
            os.close(log)
        self.children.append(Child(role, index, process, path, begin, told))

    def copy(self, reader: int, log: int, stream: int) -> None:
        """Move what a live process has written, not more than a pipe can hold at a time."""
        for _ in range(16):
            try:
                data = os.read(reader, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self.loop.remove_reader(reader)
                del self.pipes[reader]
                return os.close(reader)
            with contextlib.suppress(OSError):  # a full disk: the terminal still shows it
                os.write(log, data)
            if len(self.messages.outgoing) > BACKLOG:
                self.missed += 1
                continue
            self.messages.send(event='output', stream=stream, data=data.decode('latin-1'), missed=self.missed)
            self.missed = 0

    def reap(self) -> None:
        """Report children that ended. Orphans of theirs, which the kernel hands to this process, end unmentioned."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for child in self.children:
                if child.process.pid == pid and not child.ended:
                    self.ended(child, status)

    def ended(self, child: Child, status: int) -> None:
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        child.ended, child.process.returncode = True, code
        for copy in list(self.pipes.values()):
            copy()
        lines = tail(child.log, child.begin)
        shown = '\n'.join(fault.split(lines)[0])[-SHOWN:].splitlines()[-TAIL:]
        self.messages.send(event='exit', role=child.role, index=child.index, code=code, time=time.time(),
                           tail=shown, crash=fault.place(lines) if code else '',
                           report=report.read(child.report_file))

    def do_signal(self, roles: List[str], number: int) -> None:
        """Send a signal to the processes of some roles; SIGTERM once, as a second one would keep them from saving."""
        self.tell_stopped()
        for child in self.children:
            if child.role in roles and not child.ended and not (child.told and number == signal.SIGTERM):
                child.told = child.told or number == signal.SIGTERM
                send(os.killpg, child.process.pid, number)

    def tell_stopped(self) -> None:
        """Report children that a signal or a debugger has stopped: a job waits for such a one, and it says nothing."""
        for child in self.children:
            with contextlib.suppress(OSError):
                if not child.ended and stat(child.process.pid)[0] in 'tT':
                    self.messages.send(event='stopped', role=child.role, index=child.index)

    def do_finish(self, fetch: bool) -> None:
        """End whatever is left, hand over the logs and go."""
        self.sweep()
        for child in self.children if fetch else ():
            self.messages.send(event='log', role=child.role, index=child.index, data='')  # an empty one is a log, too
            with contextlib.suppress(OSError), open(child.log, 'rb') as file:
                for data in iter(lambda: file.read(1 << 20), b''):
                    self.messages.send(event='log', role=child.role, index=child.index, data=data.decode('latin-1'))
        self.messages.send(event='bye')
        self.leave()

    def sweep(self) -> None:
        kill_descendants(self.reap)

    def watch(self) -> None:
        """Give up on a launcher whose machine has vanished: a connection may stay open for hours then."""
        if time.monotonic() - self.heard > SILENCE:
            self.messages.close()
        self.loop.call_later(2, self.watch)

    def abandon(self) -> None:
        """End all in 8 s, without a launcher: workers may save a checkpoint, for which they need the servers."""
        if self.abandoned or self.done.done():
            return
        self.abandoned = True
        self.do_signal(['worker'], signal.SIGTERM)
        self.loop.call_later(5, self.do_signal, ['server', 'scheduler'], signal.SIGTERM)
        deadline = self.loop.time() + 7

        def poll() -> None:
            if self.loop.time() > deadline or all(child.ended for child in self.children):
                self.sweep()
                self.leave()
            else:
                self.loop.call_later(0.1, poll)
        poll()

    def leave(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


def changed(environ: Any, changes: Dict[str, Optional[str]]) -> Dict[str, str]:
    """Copy an environment with some variables set, and those that are None removed."""
    return {name: value for name, value in {**environ, **changes}.items() if value is not None}


def send(how: Callable[[int, int], None], pid: int, number: int) -> None:
    """Send a signal by `os.kill` or `os.killpg`, if there is still somebody to take it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # ended meanwhile, or has become another user's
        how(pid, number)


def die_with(parent: int, number: int) -> None:
    """Between fork and exec: let this process get signal `number` when its parent dies, and start with no handlers."""
    libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    for handled in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(handled, signal.SIG_DFL)
    if os.getppid() != parent:
        os._exit(1)


def log_of(logs: str, role: str, index: int) -> str:
    """Name the log of a process."""
    return os.path.join(logs, f'{role}-{index}.log')


def tail(path: str, begin: int = 0) -> List[str]:
    """Read the last lines of a log, none before byte number `begin`; none if it is gone."""
    try:
        with open(path, 'rb') as file:
            file.seek(max(begin, os.path.getsize(path) - fault.WINDOW))
            return file.read().decode(errors='surrogateescape').rstrip().splitlines()
    except OSError:
        return []


def stat(pid: int) -> List[str]:
    """Read what /proc says of a process: its state, its parent, ….

    Raises:
        OSError: it has ended.
    """
    with open(f'/proc/{pid}/stat') as file:
        return file.read().rpartition(')')[2].split()


def descendants(root: int) -> List[int]:
    """List all processes below one, from /proc."""
    below: Dict[int, List[int]] = {}
    for name in filter(str.isdigit, os.listdir('/proc')):
        try:
            parent = int(stat(int(name))[1])
        except OSError:
            continue  # ended meanwhile
        below.setdefault(parent, []).append(int(name))
    found = [root]
    for pid in found:
        found += below.get(pid, [])
    return found[1:]


def kill_descendants(collect: Callable[[], None], deadline: float = 2.0) -> None:
    """Kill every process below this one, also those that are forked meanwhile; `collect` takes their exit statuses."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        collect()
        alive = descendants(os.getpid())
        if not alive:
            return
        for pid in alive:
            send(os.kill, pid, signal.SIGKILL)
        time.sleep(0.02)


def guard(agent: int, private: str) -> None:
    """Be the guardian: wait for the agent, wake it if it is stopped, kill what it may have left, and clear up."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: send(os.kill, agent, number))
    while True:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if pid == agent and os.WIFSTOPPED(status):
            send(os.kill, agent, signal.SIGCONT)  # or the launcher would give the host up, and all of it would stay
        elif pid == agent:
            break
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects the rest
    kill_descendants(lambda: None)
    shutil.rmtree(private, ignore_errors=True)
    os._exit(0)


async def serve(loop: asyncio.AbstractEventLoop, private: str, reader: int, writer: int, secret: bytes,
                address: str, place: str) -> None:
    """Be the agent until it is done, and until its last messages are on their way."""
    agent = Agent(loop, private, reader, writer, secret, place)
    agent.address = address or (os.environ.get('SSH_CONNECTION', '').split() + [''] * 4)[2]
    await agent.done
    deadline = time.monotonic() + 60  # for logs on their way through a slow network
    while agent.messages.open and agent.messages.outgoing and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def main(reader: int = 0, writer: int = 1, secret: bytes = b'', address: str = '', place: str = '') -> None:
    """Run an agent that talks through two descriptors.

    Args:
        address: where others reach this host, if it is known.
        place: the variable that says which of many agents, all started by one command, this one is.
    """
    guards.name_crashes()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    private = tempfile.mkdtemp(prefix='mxsimmim-')  # mode 0700
    guardian, agent = os.getpid(), os.fork()
    if agent:
        guard(agent, private)
    die_with(guardian, signal.SIGTERM)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(serve(loop, private, reader, writer, secret, address, place))
    shutil.rmtree(private, ignore_errors=True)  # in case that the guardian was killed
    os._exit(0)
