"""Ends a process that waits in vain, and says for what, who keeps it waiting and where each thread is.

What a training waits for may never come: an image of a file system whose server is gone, the gradients of a worker that
is stopped, a disk. Native code and the kernel then wait for ever. Whoever may wait therefore says for what, with
`doing`, and a thread of `Watch` looks whether it takes longer than the deadline. Standard library only.
"""
import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import report

LEAST, STEPS, RECORDS = 300.0, 20, 3  # an automatic deadline: seconds, steps, times between two records, at least
START, UNKNOWN = 10, 1800.0  # until the first record: times the deadline, or, if it is automatic, seconds
IMPORT = 15.0  # an automatic deadline, of imports in a job: times START, it is less than the others wait for a worker
TOGETHER = 1.25  # times the deadline, to wait for others: whoever keeps them waiting ends before and says why
LOOKS, SELDOM = 8, 10.0  # looks, each with a sign of life, in a deadline; seconds between two of them at most
MISSED = 3  # signs of life, after which a worker counts as silent
EXCHANGE = 'computation and exchange of gradients'
LAST_WORDS, LEAVING = 3.0, 10.0  # seconds to tell a run's folder and whoever is notified; until the end, whatever hangs


class doing:
    """Say, while entered, what this thread may wait for. What is entered within counts for itself.

    Entering, leaving and `beat` are progress: the deadline counts from the last of them.
    """
    __slots__ = ('what', 'about', 'together', 'since')

    def __init__(self, what: str, about: Callable[[], str] = str, together: bool = False):
        """Keep what to say.

        about: says more when it is asked, from another thread. together: all workers do this, so that it may be another
        one that this one waits for.
        """
        self.what, self.about, self.together, self.since = what, about, together, 0.0

    def __enter__(self) -> None:
        self.since = time.monotonic()
        _under_way.setdefault(threading.get_ident(), []).append(self)

    def __exit__(self, *_: Any) -> None:
        thread = threading.get_ident()
        _under_way[thread].pop()
        if not _under_way[thread]:
            del _under_way[thread]
        beat()


_under_way: Dict[int, List[doing]] = {}  # by thread, the innermost last
_watch: Optional['Watch'] = None


def beat() -> None:
    """Count the deadline of what this thread does from now: it goes on."""
    stack = _under_way.get(threading.get_ident())
    if stack:
        stack[-1].since = time.monotonic()


def is_on() -> bool:
    """Tell whether this process is watched."""
    return _watch is not None


def measured(per_second: float, record: int) -> None:
    """Tell the watch, if there is one, how many steps are made in a second, of which `record` lie between records."""
    if _watch and per_second > 0:
        _watch.step_seconds, _watch.record = 1 / per_second, record


def deadline(asked: float, step: Optional[float], record: int) -> float:
    """Return the seconds that one thing may take.

    asked: by the configuration; 0: automatic. step: seconds; None before the first record. record: steps between two.
    """
    if step is None:
        return START * asked or UNKNOWN
    return asked or max(LEAST, max(STEPS, RECORDS * record) * step)


def pause_of(asked: float) -> float:
    """Return the seconds between two looks, at each of which a worker gives a sign of life; all at the same pace."""
    return min(SELDOM, (asked or LEAST) / LOOKS)


class Peer(NamedTuple):
    """What is known of another worker."""
    name: str
    silent: float = math.inf  # seconds since its last sign of life; inf: there was none
    what: str = ''  # that it waited for then
    together: bool = False  # whether that may be to wait for others


def judge(peers: Sequence[Peer], pause: float) -> Tuple[bool, str]:
    """Tell whether another worker is at work, and else, in words, who keeps all waiting.

    `pause` is that between two signs of life, in seconds.
    """
    absent = [peer for peer in peers if peer.silent > MISSED * pause]
    if absent:
        return False, '; '.join(
            f'{peer.name} has not come so far as to be heard of' if math.isinf(peer.silent) else
            f'nothing is heard of {peer.name} for {peer.silent:.4g} s, since it waited for {peer.what}: it is stopped, '
            'or cut off' for peer in absent)
    if not all(peer.together for peer in peers):
        return True, ''
    return False, ('all workers wait: for a server, if there are any, or for what the network lost' if peers else '')


class Watch:
    """Watches this process while entered; see `deadline` for how long it may wait."""

    def __init__(self, name: str, asked: float, show_native: Callable[[int], None] = lambda file: None):
        """`name` is what others call this process; `show_native` writes native stacks into a file by its number."""
        self.name, self._asked, self._show_native = name, asked, show_native
        self._pause = pause_of(asked)
        self.step_seconds: Optional[float] = None
        self.record = 1
        self.step: Callable[[], int] = int  # updates done
        self.last_words: Callable[[str], None] = lambda text: None  # tells others than the log why this ends
        self._peers: Callable[[], List[Peer]] = list
        self._sign: Callable[[List[Any]], None] = lambda status: None
        self._base = doing('what comes before and after the training')
        self._ended = threading.Event()

    @property
    def limit(self) -> float:
        """Seconds that one thing may take now."""
        return deadline(self._asked, self.step_seconds, self.record)

    def join(self, peers: Callable[[], List[Peer]], sign: Callable[[List[Any]], None]) -> None:
        """Ask `peers` for the other workers from now on, and tell them by `sign` what this one does."""
        self._peers, self._sign = peers, sign
        self._give_sign()

    def __enter__(self) -> 'Watch':
        global _watch
        _watch = self
        self._thread = threading.get_ident()
        self._base.__enter__()
        self._looks = threading.Thread(target=self._run, name='watchdog', daemon=True)
        self._looks.start()
        return self

    def __exit__(self, *_: Any) -> None:
        global _watch
        _watch = None
        self._ended.set()
        self._looks.join(LEAVING)  # it knows the trainer: MXNet aborts if a kvstore outlives the interpreter
        self._base.__exit__()

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._ended.wait(self._pause):
            now = time.monotonic()
            current = [each for stack in list(_under_way.values()) for each in stack[-1:]]
            if now - looked > 2 * self._pause + 1:  # this process was suspended: that was no waiting
                for each in current:
                    each.since += now - looked
            for each in current:
                self._look_at(each, now)
            looked = now
            with contextlib.suppress(RuntimeError):  # the connection is being closed
                self._give_sign()

    def _give_sign(self) -> None:
        own = (_under_way.get(self._thread) or [self._base])[-1]
        self._sign([self.name, own.what, own.together])

    def _look_at(self, each: doing, now: float) -> None:
        limit, age = self.limit, now - each.since
        if age <= limit * (TOGETHER if each.together else 1):
            return
        why = ''
        if each.together:
            try:
                peers = self._peers()
            except ValueError as error:  # another worker has ended
                why = str(error)
            else:
                works, why = judge(peers, self._pause)
                if works:  # under a deadline of its own
                    return
        if time.monotonic() - each.since >= age:  # nothing came while the others were asked
            try:
                self._tell(each, age, limit, why)
            finally:
                os._exit(1)

    def _tell(self, each: doing, age: float, limit: float, why: str) -> None:
        """Say all that is known, to whoever can be told."""
        end_within(LEAVING, 1)
        about, step = '', self.step()
        with contextlib.suppress(Exception):  # this is no time for another error
            about = each.about()
        text = (f'{self.name} has waited {age:.4g} s for {each.what}{about and f" ({about})"} after step {step}, '
                f'longer than runtime.deadline allows ({limit:.4g} s){why and f": {why}"}')
        report.tell(stalled=text, step=step)
        teller = threading.Thread(target=self.last_words, args=(text,), daemon=True)
        teller.start()
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error
            print('mxsimmim: the threads of this process, by Python and by native code:', file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr)
            self._show_native(sys.stderr.fileno())
        teller.join(LAST_WORDS)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f'mxsimmim: error: {text}', file=sys.stderr, flush=True)


def end_within(seconds: float, status: int) -> None:
    """End this process with this status, should it not have ended by itself within so many seconds."""
    def end() -> None:
        time.sleep(seconds)
        os._exit(status)
    threading.Thread(target=end, daemon=True).start()
