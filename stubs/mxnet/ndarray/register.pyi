from typing import Any, Callable

from ..base import OpHandle

def _make_ndarray_function(handle: OpHandle, name: str, func_name: str) -> Callable[..., Any]: ...
