"""Keep the logs of a job's processes, a file each, in the folder `logs` where the launcher was started."""
import contextlib
import os
import re
from typing import IO, Dict, Sequence

from mxsimmim.cluster.spec import Process

FOLDER = 'logs'


def log_path(process: Process) -> str:
    """Name the log of a process."""
    return os.path.join(FOLDER, f'{process.role}-{process.index}.log')


def remove_other_logs(processes: Sequence[Process]) -> None:
    """Remove logs of an earlier job with more processes, which would look like this one's."""
    own = {os.path.basename(log_path(process)) for process in processes}
    for name in os.listdir(FOLDER) if os.path.isdir(FOLDER) else ():
        if re.fullmatch(r'(worker|server|scheduler)-\d+\.log', name) and name not in own:
            with contextlib.suppress(OSError):  # of somebody else
                os.remove(os.path.join(FOLDER, name))


class FetchedLogs:
    """Collect logs from other hosts; each takes its place when all are whole."""

    def __init__(self) -> None:
        self.files: Dict[str, IO[bytes]] = {}  # by path

    def write(self, process: Process, data: bytes) -> None:
        """Add to the log of a process."""
        path = log_path(process)
        if path not in self.files:
            os.makedirs(FOLDER, exist_ok=True)
            self.files[path] = open(os.path.join(FOLDER, f'.{os.path.basename(path)}.part'), 'wb')
        self.files[path].write(data)

    def close(self) -> None:
        """Put all logs in their places."""
        for path, file in self.files.items():
            file.close()
            os.replace(file.name, path)
        self.files.clear()
