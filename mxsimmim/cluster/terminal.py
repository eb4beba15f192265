"""Write to the terminal without waiting for it."""
import os
import queue
import threading
import time

from mxsimmim.system.text import encode, shown


class Terminal:
    """Write for the job without ever keeping it waiting: a stopped terminal or a slow pipe costs lines, not time.

    One daemon thread writes; the process may end while it is stuck.
    """

    def __init__(self) -> None:
        self.queue: 'queue.Queue' = queue.Queue(1000)
        self.missed = 0
        threading.Thread(target=self._write, daemon=True).start()

    def put(self, stream: int, data: bytes, missed: int = 0) -> None:
        """Queue output of rank 0, as it came: `stream` is 0 for standard output, 1 for standard error."""
        self.missed += missed
        try:
            self.queue.put_nowait((stream + 1, data))
        except queue.Full:
            self.missed += 1

    def say(self, *lines: str) -> None:
        """Queue lines of the launcher's own."""
        self.put(1, encode(shown(''.join(f'launch: {line}\n' for line in lines))))

    def flush(self, seconds: float = 5.0) -> None:
        """Wait until all is written, not longer than `seconds`."""
        if self.missed:
            self.say(f'{self.missed} blocks of output were not shown here; the logs have them')
        limit = time.monotonic() + seconds
        while self.queue.unfinished_tasks and time.monotonic() < limit:
            time.sleep(0.01)

    def _write(self) -> None:
        broken = set()
        while True:
            descriptor, data = self.queue.get()
            try:
                while data and descriptor not in broken:
                    data = data[os.write(descriptor, data):]
            except OSError:
                broken.add(descriptor)  # a closed terminal or pipe
            self.queue.task_done()
