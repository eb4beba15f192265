"""Loops in Python that numba compiles when they are first called: importing it alone takes 0.2 s and 65 MB."""
import functools
import threading
from typing import Any, Callable, Dict

_lock = threading.Lock()  # else each of several threads would compile the same
_made: Dict[Callable[..., Any], Callable[..., Any]] = {}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which numba compiles at its first call. It runs without Python's lock."""
    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if function not in _made:
            with _lock:
                if function not in _made:
                    import numba
                    _made[function] = numba.njit(nogil=True, error_model='numpy')(function)
        return _made[function](*arguments)
    return call
