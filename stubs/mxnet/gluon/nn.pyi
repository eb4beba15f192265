from typing import Any, Iterator, Optional

from .block import HybridBlock
from .parameter import Parameter

class Dense(HybridBlock):
    weight: Parameter
    bias: Optional[Parameter]
    _units: int
    def __init__(self, units: int, activation: Optional[str] = ..., use_bias: bool = ..., flatten: bool = ...,
                 in_units: int = ...) -> None: ...

class GELU(HybridBlock): ...

class HybridSequential(HybridBlock):
    def add(self, *blocks: HybridBlock) -> None: ...
    def __getitem__(self, key: int) -> Any: ...  # a block of the type that was added
    def __iter__(self) -> Iterator[Any]: ...  # by __getitem__
    def __len__(self) -> int: ...

class Activation(HybridBlock):
    def __init__(self, activation: str) -> None: ...
