"""Files of weights, by their endings."""
import logging
import math
from pathlib import Path
from typing import Callable, Dict, Union

import numpy as np

from .choice import network, split_key
from .pth import Choose, Storage, Tensor, as_array, read_pth, refusal


def read_weights(path: Union[str, Path], log: Callable[[str], None] = logging.getLogger(__name__).warning
                 ) -> Dict[str, np.ndarray]:
    """The arrays of a network in a .safetensors file, or in any other file as `read_pth` reads it.

    Args:
        path: FILE, or FILE:KEY where the file holds several networks; see `choice.network`.
        log: is told what else the file holds.

    Raises:
        ValueError: naming the file, what is wrong with it and the way out.
    """
    file, key = split_key(path)
    read = _read_safetensors if file.suffix == '.safetensors' else read_pth
    return read(file, lambda names: network(file, names, key, log))


def _read_safetensors(path: Path, choose: Choose) -> Dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize
    types = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16', 'I64': 'int64', 'I32': 'int32',
             'I16': 'int16', 'I8': 'int8', 'U64': 'uint64', 'U32': 'uint32', 'U16': 'uint16', 'U8': 'uint8',
             'BOOL': 'bool'}
    try:
        entries = deserialize(path.read_bytes())
    except OSError as error:
        raise ValueError(f'{path}: cannot be read: {error.strerror or error}') from None
    except SafetensorError as error:
        raise refusal(path, f'is cut short, damaged or no safetensors file: {error}') from None
    if not entries:
        raise refusal(path, 'holds no tensors')
    arrays = {}
    chosen = choose([name for name, _ in entries])
    for name, entry in entries:
        if name not in chosen:
            continue
        shape, dtype = tuple(entry['shape']), types.get(entry['dtype'])
        if dtype is None:
            raise refusal(path, f"holds {name!r} of type {entry['dtype']}, which numpy does not have")
        strides = tuple(math.prod(shape[axis + 1:]) for axis in range(len(shape)))
        arrays[chosen[name]] = as_array(Tensor(Storage('', dtype, math.prod(shape)), dtype, 0, shape, strides),
                                         bytes(entry['data']))
    return arrays
