"""Named arrays in a safetensors file, read and written one by one: a whole model's need not fit into memory."""
import json
import math
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
from safetensors import safe_open

from .arrays import Gathered, WhenAsked

TYPES = {'float16': 'F16', 'float32': 'F32', 'float64': 'F64', 'int8': 'I8', 'int32': 'I32', 'int64': 'I64',
         'uint8': 'U8', 'bool': 'BOOL'}  # of MXNet's arrays


class Stored(WhenAsked):
    """The arrays of a file, each read when it is asked for.

    The file is open only then, so that its folder can be deleted meanwhile, also on NFS.
    """

    def __init__(self, file: Path):
        """Read what is in the file.

        Raises:
            SafetensorError: it is no safetensors file.
        """
        self._file = str(file)
        with safe_open(self._file, 'numpy') as content:
            super().__init__(list(content.keys()), self._read)

    def _read(self, name: str) -> np.ndarray:
        with safe_open(self._file, 'numpy') as content:
            return content.get_tensor(name)

    def shapes(self) -> Dict[str, Tuple[int, ...]]:
        """Return the shapes of the arrays, which are not read."""
        with safe_open(self._file, 'numpy') as content:
            return {name: tuple(content.get_slice(name).get_shape()) for name in self._names}


def write_arrays(file: Path, arrays: Gathered) -> None:
    """Write a safetensors file, array by array.

    The library itself wants all of them in memory, copies them and lets no other thread of Python run meanwhile. The
    head is JSON in a multiple of 8 bytes: https://github.com/huggingface/safetensors, "Format".
    """
    head: Dict[str, Any] = {}
    end = 0
    for name, (kind, shape) in arrays.kinds.items():
        size = np.dtype(kind).itemsize * math.prod(shape)
        head[name] = {'dtype': TYPES[kind], 'shape': shape, 'data_offsets': [end, end + size]}
        end += size
    text = json.dumps(head).encode()
    text += b' ' * (-len(text) % 8)
    with open(file, 'wb') as stream:
        stream.write(len(text).to_bytes(8, 'little') + text)
        for array in arrays.values:
            stream.write(np.ascontiguousarray(array).data)
