from typing import Sequence, Union

from . import NDArray

def normal(loc: float = ..., scale: float = ..., shape: Union[int, Sequence[int]] = ...) -> NDArray: ...
