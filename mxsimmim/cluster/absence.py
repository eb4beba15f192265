"""Keep an eye on the hosts that a job goes on without."""
import asyncio
from typing import AbstractSet, Callable, Counter, Dict, Iterable, Sequence

from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.connections import AgentConnection, Lost
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.prepare import probe
from mxsimmim.cluster.spec import JobSpec

FIRST, LATEST = 2.0, 60.0  # seconds until a host is tried: the first time, and at most
AGAIN, MOST = 4, 5  # times as long, the first time, for each of so many times that it was away before


class Absence:
    """Hold the hosts that are away, and try each by itself until a job could start there; then `back` hears of it.

    Attributes:
        beside: the agents of other hosts of the job, which these must be like.
    """

    def __init__(self, spec: JobSpec, backend: Backend, back: Callable[[Host], None]) -> None:
        self.spec, self.backend, self.back = spec, backend, back
        self.beside: Sequence[AgentConnection] = ()
        self.tasks: Dict[Host, 'asyncio.Task[None]'] = {}
        self.times: Counter[Host] = Counter()
        self.ended = False

    @property
    def hosts(self) -> AbstractSet[Host]:
        """The hosts that are away now."""
        return self.tasks.keys()

    def add(self, hosts: Iterable[Host]) -> None:
        """Begin to try hosts that are away from now on."""
        for host in hosts:
            seconds = FIRST * AGAIN ** min(self.times[host], MOST)
            self.tasks[host] = asyncio.get_running_loop().create_task(self._wait_for(host, seconds))
            self.times[host] += 1

    async def _wait_for(self, host: Host, seconds: float) -> None:
        while not self.ended:
            await asyncio.sleep(seconds)
            try:
                await probe(self.spec, self.backend, host, self.beside)
                break
            except (Lost, ValueError):
                seconds = max(seconds, min(2 * seconds, LATEST))
        if not self.ended:
            del self.tasks[host]
            self.back(host)

    async def end(self) -> None:
        """Try no more."""
        self.ended = True
        left = set(self.tasks.values())
        while left:  # Python before 3.12: one that waits for what comes at this moment may miss that it is cancelled
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1)
