"""Saves checkpoints while training goes on: a thread that writes, and one that copies to a second place."""
import contextlib
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, Callable, Optional

from ..runtime import watchdog
from . import checkpoint
from .run_folder import CONFIG

PATIENCE = 600.0  # seconds that the end of a run waits for the second place, without which it is whole
LOOK = 0.1  # seconds between two signs that a thread waits for another one
STANDSTILL = 5.0  # seconds that training waits for saves, all together, before that is said


class Saver:
    """Has at most one checkpoint written at a time; an error of its thread is raised by whatever is called next.

    A context manager, which waits for all to be written, also where an error ends what was done meanwhile.
    """

    def __init__(self, log: Callable[[str], None], copies: Optional['SecondPlace'] = None):
        self._log, self._copies = log, copies
        self._thread: Optional[threading.Thread] = None
        self._error: Optional[BaseException] = None
        self._waited = 0.0  # seconds that saves had to wait for the one before; infinite once that is said

    def run(self, publish: Callable[[], Path]) -> None:
        """Call `publish`, which writes a checkpoint and returns its path; `wait` comes before."""
        assert self._thread is None or self._thread is threading.current_thread()
        path = publish()
        if self._copies:
            self._copies.offer(path)

    def start(self, publish: Callable[[], Path]) -> None:
        """As `run`, in a thread."""
        def work() -> None:
            yield_cores()
            try:
                self.run(publish)
            except BaseException as error:
                self._error = error
        assert self._thread is None
        self._thread = threading.Thread(target=work, name='checkpoint', daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that has failed, and do not wait for one that is under way."""
        if self._thread and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is done: the newest checkpoint is then the one that was begun last.

        Raises:
            CheckpointError: it failed.
        """
        thread, self._thread = self._thread, None
        if thread:
            outlast(thread)
        error, self._error = self._error, None
        if error:
            raise error

    def wait_for_turn(self) -> None:
        """As `wait`, before another one begins; say, once, if such waits have taken long."""
        start = time.monotonic()
        self.wait()
        self._waited += time.monotonic() - start
        if STANDSTILL < self._waited < math.inf:
            self._log(f'warning: training has waited {self._waited:.1f} s for checkpoints to be written: '
                      'checkpoint.every is shorter than that takes')
            self._waited = math.inf

    def finish(self) -> None:
        """Wait for the save and for its copy."""
        self.wait()
        if self._copies:
            self._copies.wait(PATIENCE)

    def __enter__(self) -> 'Saver':
        return self

    def __exit__(self, _kind: Any, error: Optional[BaseException], _trace: Any) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, Exception):  # no second Ctrl-C, which does not wait
            try:
                self.finish()
            except Exception as other:  # must not hide what went wrong first
                self._log(f'warning: {other}')


class SecondPlace:
    """Copies checkpoints to where the run has another folder, one at a time; what fails there is a warning.

    One that comes while another waits for its turn takes its place: a slow place holds nobody up.
    """

    def __init__(self, run: Path, keep: int, keep_every: Optional[int], log: Callable[[str], None]):
        """`run` is the folder of the copies, which can be used as that of the run itself."""
        self._run, self._rule, self._log = run, (keep, keep_every), log
        self._lock = threading.Lock()
        self._next: Optional[Path] = None
        self._thread: Optional[threading.Thread] = None

    def offer(self, path: Path) -> None:
        """Have a checkpoint copied."""
        with self._lock:
            skipped, self._next = self._next, path
            if not self._thread:
                self._thread = threading.Thread(target=self._work, name='second place', daemon=True)
                self._thread.start()
        if skipped:
            self._log(f'warning: {self._run} is slow: {skipped.name} is not copied there, {path.name} will be')

    def wait(self, seconds: float) -> None:
        """Wait until all is copied; after so many seconds say that it is not."""
        thread = self._thread
        if thread:
            outlast(thread, seconds)
            if thread.is_alive():
                self._log(f'warning: {self._run} takes longer than {seconds:g} s to copy a checkpoint: it is left '
                          'without it')

    def _work(self) -> None:
        yield_cores()
        while True:
            with self._lock:
                path, self._next = self._next, None
                if not path:
                    self._thread = None
                    return
            try:
                self._run.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path.parents[1] / CONFIG, self._run / CONFIG)
                checkpoint.copy(path, self._run / path.parent.name, *self._rule)
            except Exception as error:
                reason = (isinstance(error, OSError) and error.strerror) or error
                self._log(f'warning: {path.name} is not copied to {self._run} (checkpoint.copy_to): {reason}; the '
                          'run goes on')


def outlast(thread: threading.Thread, seconds: float = math.inf) -> None:
    """Wait for a thread that is under the deadline itself, or needs none, so many seconds at most."""
    end = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < end:
        thread.join(LOOK)
        watchdog.beat()


def yield_cores() -> None:
    """Give this thread the time that no other wants: on Linux each thread has a niceness of its own."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
