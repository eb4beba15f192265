"""One thread that owns the network and answers several callers at once."""
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any, Callable, Iterable, List, Optional, Tuple

WAIT = 0.003  # seconds that the first of a batch waits for others


class Batcher:
    """Groups what callers put in, computes it in one thread, and gives each its own answer."""

    def __init__(self, compute: Callable[[List[Any]], Iterable[Any]], largest: int, note: Callable[[int], None]):
        """Start the thread.

        Args:
            compute: answers of a list of items, in their order; only ever called in the thread.
            largest: items given to it at most.
            note: told the size of each batch.
        """
        self._compute, self._largest, self._note = compute, largest, note
        self._queue: 'queue.SimpleQueue[Any]' = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name='batcher', daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Count the items that wait."""
        return self._queue.qsize()

    def put(self, item: Any) -> 'Future[Any]':
        """Queues an item; its answer, or the exception that computing it raised, comes through the future."""
        future: 'Future[Any]' = Future()
        self._queue.put((item, future))
        return future

    def close(self) -> None:
        """Answers what is queued and ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        last = False
        while not last:
            taken, last = self._take()
            taken = [(item, future) for item, future in taken if future.set_running_or_notify_cancel()]
            if not taken:
                continue
            self._note(len(taken))
            try:
                answers = self._compute([item for item, _ in taken])
            except Exception as error:  # the callers raise it
                for _, future in taken:
                    future.set_exception(error)
            else:
                for (_, future), answer in zip(taken, answers):
                    future.set_result(answer)

    def _take(self) -> Tuple[List[Tuple[Any, 'Future[Any]']], bool]:
        """(what is queued, at least one and at most a batch; whether the end was met)."""
        taken: List[Any] = []
        deadline: Optional[float] = None
        while len(taken) < self._largest:
            try:
                entry = self._queue.get(timeout=None if deadline is None else max(0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if entry is None:
                return taken, True
            taken.append(entry)
            deadline = deadline or time.monotonic() + WAIT
        return taken, False
