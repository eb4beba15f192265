from typing import Any, Iterator, List, Mapping, Optional

import numpy as np

from .ndarray import NDArray

class DataBatch:
    data: List[NDArray]
    label: Optional[List[NDArray]]
    pad: Optional[int]

class DataIter(Iterator[DataBatch]):
    def __next__(self) -> DataBatch: ...
    def next(self) -> DataBatch: ...
    def reset(self) -> None: ...

class NDArrayIter(DataIter):
    def __init__(self, data: Mapping[str, np.ndarray], label: Optional[Mapping[str, np.ndarray]] = ...,
                 batch_size: int = ...) -> None: ...

def ImageRecordIter(**options: Any) -> DataIter: ...
