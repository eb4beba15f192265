"""Run a job: attempts at it, signals, and what the user is told at the end."""
import asyncio
import signal

from mxsimmim.cluster.attempt import Attempt
from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.outcome import exit_status, summary
from mxsimmim.cluster.spec import JobSpec
from mxsimmim.cluster.terminal import Terminal


class Supervisor:
    """Run jobs on one kind of cluster. An attempt shares nothing with the one before but the job's specification."""

    def __init__(self, backend: Backend, terminal: Terminal) -> None:
        self.backend, self.terminal = backend, terminal

    def run(self, spec: JobSpec) -> int:
        """Make one attempt at a job.

        Returns:
            the launcher's exit status.

        Raises:
            ValueError: nothing was started; the text says why, a line a problem.
        """
        return asyncio.run(self._run(spec))

    async def _run(self, spec: JobSpec) -> int:
        attempt = Attempt(spec, self.backend, self.terminal)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, attempt.stop, number)
        loop.add_signal_handler(signal.SIGTSTP, self.terminal.say, 'a job cannot be suspended; Ctrl-C ends it')
        outcome = await attempt.run()
        self.terminal.say(*summary(outcome))
        return exit_status(outcome)
