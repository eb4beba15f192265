"""Run a job: attempts at it, signals, and what the user is told at the end."""
import asyncio
import signal
import time
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

from mxsimmim.cluster.attempt import Attempt
from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.outcome import Outcome, exit_status, summary
from mxsimmim.cluster.prepare import ConfigurationError
from mxsimmim.cluster.restarts import USAGE, Failure, brief, decide, failure_of, history
from mxsimmim.cluster.run_status import tell_failure
from mxsimmim.cluster.spec import JobSpec
from mxsimmim.cluster.terminal import Terminal
from mxsimmim.system.notify import send

TOLD = 50  # latest restarts that a job's processes are told of


class Supervisor:
    """Run jobs on one kind of cluster. An attempt shares nothing with the one before but the job's specification."""

    def __init__(self, backend: Backend, terminal: Terminal) -> None:
        self.backend, self.terminal = backend, terminal
        self.attempt: Optional[Attempt] = None  # under way
        self.notify = '', ''  # see `Outcome`

    def run(self, spec: JobSpec) -> int:
        """Attempt a job until it ends well, its restarts are spent, or the user stops it.

        Returns:
            the launcher's exit status: that of the last attempt.

        Raises:
            ValueError: nothing was started; the text says why, a line a problem.
        """
        return asyncio.run(self._run(spec))

    async def _run(self, spec: JobSpec) -> int:
        loop = asyncio.get_running_loop()
        stopped: 'asyncio.Future[int]' = loop.create_future()

        def stop(number: int) -> None:
            if not stopped.done():
                stopped.set_result(number)
            if self.attempt:
                self.attempt.stop(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, stop, number)
        loop.add_signal_handler(signal.SIGTSTP, self.terminal.say, 'a job cannot be suspended; Ctrl-C ends it')
        failures: List[Failure] = []
        restarts: List[Tuple[float, str]] = []
        while True:
            try:
                outcome = await self._attempt(spec, restarts)
            except ValueError as error:
                if not failures:
                    raise
                failures.append(_not_started(error))
                self.terminal.say(*failures[-1].causes)
            else:
                self.notify = outcome.notify if outcome.notify[1] else self.notify
                self.terminal.say(*summary(outcome))
                if outcome.signal or not exit_status(outcome):
                    await self._tell(event='end', status=exit_status(outcome))
                    return exit_status(outcome)
                failures.append(failure_of(outcome))
            decision = decide(failures, spec.max_restarts)
            if decision.why:
                self.terminal.say(decision.why)
            self._mark(spec, failures[-1], decision.seconds)
            await self._tell(event='failure', causes=list(failures[-1].causes), restart_in=decision.seconds)
            if decision.seconds is None:
                self.terminal.say(*history(failures))
                return failures[-1].status
            await asyncio.wait([stopped], timeout=decision.seconds)
            if stopped.done():
                self._mark(spec, failures[-1], None)
                outcome = Outcome(signal=stopped.result())
                self.terminal.say(*summary(outcome))
                await self._tell(event='end', status=exit_status(outcome))
                return exit_status(outcome)
            restarts = [*restarts, (round(time.time(), 3), brief(failures[-1]))][-TOLD:]
            await self._tell(event='restart', number=len(failures), cause=restarts[-1][1])

    async def _attempt(self, spec: JobSpec, restarts: Sequence[Tuple[float, str]]) -> Outcome:
        self.attempt = Attempt(spec, self.backend, self.terminal, restarts)
        try:
            return await self.attempt.run()
        finally:
            self.attempt = None

    def _mark(self, spec: JobSpec, failure: Failure, restart_in: Optional[float]) -> None:
        """Tell whoever looks at the run, if the job got so far that it has one."""
        if self.notify[1]:
            tell_failure(Path(spec.directory, self.notify[1]), failure, restart_in)

    async def _tell(self, **event: Any) -> None:
        """Tell the command of the job's `notify.command`, if it got so far that it told us."""
        command, run = self.notify
        if command:
            problem = await asyncio.get_running_loop().run_in_executor(None, send, command, {'run': run, **event})
            if problem:
                self.terminal.say(f'warning: {problem}')


def _not_started(error: ValueError) -> Failure:
    """Sum up a restart that came to nothing, as when a host does not answer."""
    lines = str(error).splitlines()
    return Failure(USAGE if isinstance(error, ConfigurationError) else 1, lines)
