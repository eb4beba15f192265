"""Run a job: attempts at it, signals, and what the user is told at the end."""
import asyncio
import signal
import time
from pathlib import Path
from typing import Any, Iterable, List, Optional, Sequence, Tuple

from mxsimmim.cluster.absence import Absence
from mxsimmim.cluster.attempt import Attempt
from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.connections import HostError
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.outcome import Outcome, exit_status, summary
from mxsimmim.cluster.prepare import ConfigurationError
from mxsimmim.cluster.restarts import OFTEN, USAGE, Failure, brief, decide, failing_host, failure_of, history
from mxsimmim.cluster.run_status import tell_failure
from mxsimmim.cluster.spec import JobSpec
from mxsimmim.cluster.terminal import Terminal
from mxsimmim.system.notify import send

TOGETHER = 1.0  # seconds in which a scheduler may send SIGTERM to a script and to the launcher in it
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

        begun = 0.0

        def stop(number: int) -> None:
            nonlocal begun
            if not stopped.done():
                stopped.set_result(number)
                begun = time.monotonic()
            elif number == signal.SIGTERM and time.monotonic() - begun < TOGETHER:
                return
            if self.attempt:
                self.attempt.stop(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, stop, number)
        loop.add_signal_handler(signal.SIGTSTP, self.terminal.say, 'a job cannot be suspended; Ctrl-C ends it')
        absence = Absence(spec, self.backend, lambda host: self._is_back(host, left(absence)))
        try:
            return await self._attempts(spec, absence, stopped)
        finally:
            await absence.forget()

    async def _attempts(self, spec: JobSpec, absence: Absence, stopped: 'asyncio.Future[int]') -> int:
        """Make attempts until there is no other; `stopped` has the signal by which the user ends them."""
        failures: List[Failure] = []
        before = self.backend.restarts()
        restarts: List[Tuple[float, str]] = list(before)
        written = -1  # step of the newest checkpoint
        while True:
            job = left(absence)
            failure: Optional[Failure] = None
            try:
                outcome = await self._attempt(job, absence, stopped, restarts, written)
            except ValueError as error:
                if isinstance(error, HostError) and self._leave_out(error, absence):
                    continue
                if isinstance(error, ConfigurationError) and await self._with_fewer(job, absence, error):
                    continue
                if not failures and len(restarts) == len(before):
                    raise
                failure = _not_started(error)
                self.terminal.say(*failure.causes)
            else:
                self.notify = outcome.notify if outcome.notify[1] else self.notify
                written = max(written, outcome.checkpoint)
                self.terminal.say(*summary(outcome))
                if not outcome.planned:
                    if outcome.signal or not exit_status(outcome):
                        await self._tell(event='end', status=exit_status(outcome))
                        return exit_status(outcome)
                    failure = failure_of(outcome)
                    if failure.status == USAGE and await self._with_fewer(job, absence):
                        continue
            if failure:
                failures.append(failure._replace(checkpoint=written, reduced=job.workers < spec.workers))
                decision = decide(failures, spec.max_restarts)
                if decision.why:
                    self.terminal.say(decision.why)
                if decision.seconds is not None:
                    self._leave_out_failing(failing_host(failures), absence)
                self._mark(spec, failure, decision.seconds)
                await self._tell(event='failure', causes=list(failure.causes), restart_in=decision.seconds)
                if decision.seconds is None:
                    self.terminal.say(*history(failures))
                    return failure.status
                await asyncio.wait([stopped], timeout=decision.seconds)
                if stopped.done():
                    self._mark(spec, failure, None)
            if not stopped.done():
                cause = brief(failure) if failure else returned(job, left(absence))
                restarts.append((round(time.time(), 3), cause))
                await self._tell(event='restart', number=len(restarts), cause=cause)

    async def _attempt(self, job: JobSpec, absence: Absence, stopped: 'asyncio.Future[int]',
                       restarts: Sequence[Tuple[float, str]], written: int) -> Outcome:
        self.attempt = Attempt(job, self.backend, self.terminal, restarts[-TOLD:], written)
        if stopped.done():  # before it began
            self.attempt.stop(stopped.result())
        known = [agent for agent in absence.beside if agent.facts and agent.host in job.hosts]
        absence.beside = [*self.attempt.agents, *known[:1]]  # these have no facts yet
        try:
            return await self.attempt.run()
        finally:
            self.attempt = None

    def _leave_out(self, error: HostError, absence: Absence) -> bool:
        """Go on without the hosts that a start failed on, if enough are left, and say so."""
        job = absence.job(error.hosts)
        if not job:
            return False
        absence.add(error.hosts)
        self.terminal.say(*str(error).splitlines(), f'left out for now: {names(error.hosts)}; {goes_on(job, absence)}')
        return True

    def _leave_out_failing(self, name: str, absence: Absence) -> None:
        """Go on without the host of this name, if there is one and enough are left, and say so."""
        hosts = frozenset(host for host in absence.spec.hosts if host.name == name)
        job = absence.job(hosts) if len(hosts) == 1 else None  # another port is another host
        if job:
            absence.add(hosts, failing=True)
            self.terminal.say(f'left out for now: {names(hosts)}, which {OFTEN} failures in a row came from; '
                              f'{goes_on(job, absence)}')

    async def _with_fewer(self, job: JobSpec, absence: Absence, error: Optional[ValueError] = None) -> bool:
        """Go on with fewer workers than the command has refused, with this error, while hosts are away, and say so.

        Where there are no fewer that it may take, the job needs all hosts from now on.
        """
        if job.workers == absence.spec.workers:
            return False
        absence.refused.add(job.workers)
        fewer = absence.job()
        if not fewer:
            await absence.forget()
            return False
        self.terminal.say(*str(error or '').splitlines(),
                          f'the command refuses {job.workers} workers; {goes_on(fewer, absence)}')
        return True

    def _is_back(self, host: Host, job: JobSpec) -> None:
        """Have the attempt under way make room for one at `job`, if that has more workers."""
        if self.attempt and job.workers > self.attempt.spec.workers:
            self.terminal.say(f'host {host.name} is back: after the next checkpoint the job goes on with {job.workers} '
                              'workers')
            self.attempt.stop_at_checkpoint()

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


def left(absence: Absence) -> JobSpec:
    """Describe what is left of a job without the hosts that are away."""
    job = absence.job()
    assert job, 'no host is left out that it needs'
    return job


def goes_on(job: JobSpec, absence: Absence) -> str:
    """Say how many workers a job goes on with."""
    return f'the job goes on with {job.workers} of {absence.spec.workers} workers'


def returned(before: JobSpec, after: JobSpec) -> str:
    """Say in a line why a job that goes on with other hosts was started again."""
    found = set(after.hosts) - set(before.hosts)
    return f'{names(found)} {"is" if len(found) == 1 else "are"} back'


def names(hosts: Iterable[Host]) -> str:
    """List hosts for the user."""
    return ', '.join(sorted(f'host {host.name}' for host in hosts))
