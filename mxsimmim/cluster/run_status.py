"""Add to a run's status.json what its launcher alone knows: which process ended first, and whether it starts again."""
import contextlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Optional

from mxsimmim.cluster.restarts import Failure

FILE = 'status.json'  # `training.status` says what it holds
PATIENCE = 2.0  # seconds for the disk


def write(path: Path, told: Any) -> None:
    """Replace a file of JSON in one go; OSError where the disk does not take it."""
    beside = path.with_name(f'.{path.name}.tmp')
    beside.write_text(json.dumps(told), encoding='utf-8')
    os.replace(beside, path)


def tell_failure(run: Path, failure: Failure, restart_in: Optional[float]) -> None:
    """Note in the folder of a run that its job failed: state, causes, workers that ended by themselves.

    Nothing happens where this machine does not see the folder, or its disk does not take it.
    """
    def tell() -> None:
        with contextlib.suppress(OSError, ValueError):
            told = json.loads((run / FILE).read_text(encoding='utf-8'))
            told.update(state='failed' if restart_in is None else 'restarting', causes=list(failure.causes),
                        gone=list(failure.gone), time=time.time())
            write(run / FILE, told)
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    thread.join(PATIENCE)  # no job waits for a file system that hangs
