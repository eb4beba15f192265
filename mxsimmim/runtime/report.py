"""What a process tells whoever started it, so that a restart can be decided on: how far it came, and what ended it.

The launcher's agent names a file for each process and reads it when it asks for signs of life and when the process has
ended. Without one nothing is written.
"""
import contextlib
import json
import os
import threading
from typing import Any, Dict

FILE = 'MXSIMMIM_REPORT_FILE'
LONGEST = 2000  # characters of an error
_told: Dict[str, Any] = {}
_lock = threading.Lock()


def tell(**values: Any) -> None:
    """Add to what this process has told.

    That is `checkpoint` (step of the newest), `step` (updates done), `error`, `stalled` (what it waited for in vain).
    """
    path = os.environ.get(FILE)
    with _lock:  # a thread tells of checkpoints
        _told.update(values)
        if path:
            with contextlib.suppress(OSError):  # a report is not worth a training
                # Bytes: a codec may have to be imported, and the import that another thread waits for has the lock.
                with open(f'{path}.new', 'wb') as file:
                    file.write(json.dumps(_told).encode())
                os.replace(f'{path}.new', path)


def tell_error(error: BaseException) -> None:
    """Tell what ends this process, if it would again at the same step.

    That is neither what other machines or people can mend, such as a full disk, a lack of memory or a lost connection,
    nor another worker's end, of which that one tells.
    """
    passing = isinstance(error, (OSError, MemoryError)) or isinstance(error.__cause__, OSError)
    if not passing and not getattr(error, 'of_others', False):
        tell(error=f'{type(error).__name__}: {error}'[:LONGEST])


def read(path: str) -> Dict[str, Any]:
    """Return what has been told in a file; {} if nothing has."""
    try:
        with open(path, encoding='ascii') as file:
            told = json.load(file)
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
