"""Keep an eye on the hosts that a job goes on without."""
import asyncio
from typing import AbstractSet, Callable, Counter, Dict, Iterable, Optional, Sequence, Set

from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.connections import AgentConnection, Lost
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.prepare import probe
from mxsimmim.cluster.spec import JobSpec, without

FIRST, LATEST = 2.0, 60.0  # seconds until a host is tried: the first time, and at most
AGAIN, MOST = 4, 5  # times as long, the first time, for each of so many times that it was away before


class Absence:
    """Hold the hosts that are away, and try each by itself until a job could start there; then `back` hears of it.

    Attributes:
        beside: the agents of other hosts of the job, which these must be like.
        refused: numbers of workers that the job's command refused while hosts were away.
    """

    def __init__(self, spec: JobSpec, backend: Backend, back: Callable[[Host], None]) -> None:
        self.spec, self.backend, self.back = spec, backend, back
        self.beside: Sequence[AgentConnection] = ()
        self.tasks: Dict[Host, 'asyncio.Task[None]'] = {}
        self.times: Counter[Host] = Counter()
        self.refused: Set[int] = set()

    @property
    def hosts(self) -> AbstractSet[Host]:
        """The hosts that are away now."""
        return self.tasks.keys()

    def job(self, more: AbstractSet[Host] = frozenset()) -> Optional[JobSpec]:
        """Describe what is left of the job, without `more` hosts, too; None: not enough."""
        return without(self.spec, self.hosts | more, self.refused)

    def add(self, hosts: Iterable[Host], failing: bool = False) -> None:
        """Begin to try hosts that are away from now on; those that answer, but have `failing` processes, later."""
        for host in hosts:
            seconds = (LATEST if failing else FIRST) * AGAIN ** min(self.times[host], MOST)
            self.tasks[host] = asyncio.get_running_loop().create_task(self._wait_for(host, seconds))
            self.times[host] += 1

    async def _wait_for(self, host: Host, seconds: float) -> None:
        task = asyncio.current_task()
        while self.tasks.get(host) is task:
            await asyncio.sleep(seconds)
            try:
                await probe(self.spec, self.backend, host, self.beside)
                break
            except (Lost, ValueError):
                seconds = max(seconds, min(2 * seconds, LATEST))
        if self.tasks.get(host) is task:
            del self.tasks[host]
            self.back(host)

    async def forget(self) -> None:
        """Try none any more, and take all for present."""
        left = set(self.tasks.values())
        self.tasks.clear()
        while left:  # Python before 3.12: one that waits for what comes at this moment may miss that it is cancelled
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1)
