from typing import NamedTuple

class IRHeader(NamedTuple):
    flag: int
    label: float
    id: int
    id2: int

class MXRecordIO:
    def __init__(self, uri: str, flag: str) -> None: ...
    def write(self, buf: bytes) -> None: ...
    def close(self) -> None: ...

def pack(header: IRHeader, s: bytes) -> bytes: ...
