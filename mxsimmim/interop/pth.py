"""PyTorch's checkpoint files, read and written without PyTorch, and without running anything that a file says.

A checkpoint is a pickle, and a pickle is a program: its instructions name callables and call them. Here every name is
looked up in one dict of functions of our own, which only describe tensors or forget what they are given; so nothing is
ever imported, and a name outside that dict ends the reading.
"""
import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections import deque
from pathlib import Path
from typing import (
    Any,
    BinaryIO,
    Callable,
    ClassVar,
    Deque,
    Dict,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np

from ..system.text import drawn
from .choice import usual

LEGACY_MAGIC = 0x1950a86a20f9469cfc6c  # the first pickle of a file of torch.save before PyTorch 1.6
LEGACY_PROTOCOL = 1001
ALIGNMENT = 64  # of the storages in a file of torch.save, bytes
LARGEST = 8  # times the size of its file: what the tensors of an honest file never fill
STORAGES = {'DoubleStorage': 'float64', 'FloatStorage': 'float32', 'HalfStorage': 'float16',
            'BFloat16Storage': 'bfloat16', 'LongStorage': 'int64', 'IntStorage': 'int32', 'ShortStorage': 'int16',
            'CharStorage': 'int8', 'ByteStorage': 'uint8', 'BoolStorage': 'bool', 'UntypedStorage': 'uint8'}
DTYPES = {**{name: name for name in STORAGES.values()}, 'uint16': 'uint16', 'uint32': 'uint32', 'uint64': 'uint64'}
# What checkpoints hold beside tensors: settings, counters, numpy scalars. Read as an empty dict.
FORGOTTEN = ['argparse.Namespace', 'yacs.config.CfgNode', 'torch.Size', 'torch.device', 'torch.Generator',
             'collections.Counter', 'collections.defaultdict', 'types.SimpleNamespace', 'typing.Any', 'builtins.int',
             'builtins.str', 'builtins.float', 'pathlib.Path', 'pathlib.PosixPath', 'pathlib.PurePosixPath',
             'datetime.datetime', 'datetime.timedelta', 'easydict.EasyDict', 'addict.addict.Dict',
             'mmengine.logging.history_buffer.HistoryBuffer', 'mmengine.config.config.ConfigDict',
             'omegaconf.dictconfig.DictConfig', 'omegaconf.listconfig.ListConfig', 'omegaconf.nodes.AnyNode',
             'omegaconf.base.ContainerMetadata', 'omegaconf.base.Metadata', 'builtins.dict', 'builtins.list',
             'builtins.set', '__builtin__.dict', '__builtin__.list', '__builtin__.set', '_codecs.encode', 'numpy.dtype',
             'numpy.ndarray', 'numpy.core.multiarray.scalar', 'numpy.core.multiarray._reconstruct',
             'numpy._core.multiarray.scalar', 'numpy._core.multiarray._reconstruct']
KINDS = re.compile(r'\w+Storage|(float|complex|c?q?u?int|bits)\w*\d\w*')  # torch's names of types that are no others


class _Refusal(ValueError):
    """What `read_pth` raises; its text is for the user."""


def refusal(path: Path, problem: str) -> _Refusal:
    """What to raise where a file of weights cannot be read; `problem` follows the path."""
    return _Refusal(f'{path} {problem}')


class Storage(NamedTuple):
    """The memory that one or more tensors are views of."""
    key: str
    dtype: str  # a value of STORAGES
    size: int   # elements

    @property
    def bytes(self) -> int:
        return self.size * _numpy_type(self.dtype).itemsize


class Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""
    storage: Storage
    dtype: str
    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]


Choose = Callable[[Sequence[str]], Mapping[str, str]]  # of all names: those to read, and what to call them


def read_pth(path: Path, choose: Choose = usual) -> Dict[str, np.ndarray]:
    """The tensors of a file of torch.save: of its 'model' or 'state_dict' where it has one, else all that have a name.

    Names are the file's own, with dots between those of nested dicts; each array is writable, in C order and of the
    file's type, except that bfloat16, which numpy does not have, becomes float32. What is not a tensor is skipped.

    Raises:
        ValueError: no such file, not a checkpoint, damaged, or one that would run code; names file and finding.
    """
    path = Path(path)
    try:
        with open(path, 'rb') as stream:
            is_zip = stream.read(4) == b'PK\x03\x04'
            stream.seek(0)
            tree, storage_bytes = (_open_zip if is_zip else _open_legacy)(path, stream)
            return _tensors(path, tree, storage_bytes, choose)
    except OSError as error:
        raise ValueError(f'{path}: cannot be read: {error.strerror or error}') from None


def _numpy_type(dtype: str) -> np.dtype:
    """Of the bytes in the file; bfloat16 is read as 16-bit integers first."""
    return np.dtype('uint16' if dtype == 'bfloat16' else dtype).newbyteorder('<')


def _tensors(path: Path, tree: Any, read: Callable[[Storage], bytes], choose: Choose) -> Dict[str, np.ndarray]:
    """The arrays of `tree` that are chosen, whose storages `read` fetches."""
    every = _named(path, tree)
    tensors = {called: every[name] for name, called in choose(list(every)).items()}
    views: Dict[Storage, Dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        views.setdefault(tensor.storage, {})[name] = tensor
    needed = sum(storage.bytes for storage in views)
    needed += sum(math.prod(t.shape) * _numpy_type(t.dtype).itemsize for t in tensors.values())
    if needed > LARGEST * path.stat().st_size:
        raise refusal(path, f'is damaged: its tensors would fill {needed:,} bytes, more than {LARGEST} times its '
                       f'{path.stat().st_size:,}')
    arrays: Dict[str, np.ndarray] = {}
    for storage, named in views.items():  # one at a time, so that memory holds the weights once
        content = read(storage)
        arrays.update({name: as_array(tensor, content) for name, tensor in named.items()})
    return {name: arrays[name] for name in tensors}


def _named(path: Path, tree: Any) -> Dict[str, Tensor]:
    """The tensors in a tree of dicts, by their keys with dots between. One dict may be in many places of the tree."""
    found: Dict[str, Tensor] = {}
    unnamed, spent, limit = 0, 0, LARGEST * path.stat().st_size + 10 ** 6
    # Prefixes, None where there is no name, in lists and under numbers, and what is there.
    queue: Deque[Tuple[Optional[str], Any]] = deque([('', tree)])
    while queue:
        prefix, node = queue.popleft()
        if isinstance(node, Tensor):
            unnamed += 1
        inner = node.items() if isinstance(node, dict) else enumerate(node) if type(node) is list else ()
        for key, value in inner:
            name = prefix + key if isinstance(key, str) and prefix is not None else None
            spent += 1 + len(name or '')
            if spent > limit:
                raise refusal(path, 'is damaged: its dicts contain each other over and over')
            if isinstance(value, Tensor) and name is not None:
                found[name] = value
            elif isinstance(value, (dict, list, Tensor)):
                queue.append((name if name is None else f'{name}.', value))
    if found:
        return found
    held = f'holds {unnamed} tensors, but none by name (in a list, or of an optimizer)' if unnamed else \
        'holds no tensors'
    raise refusal(path, f"{held}: write it with torch.save({{'model': net.state_dict()}}, FILE)")


def as_array(tensor: Tensor, content: bytes) -> np.ndarray:
    """Copies a tensor out of the bytes of its storage; bfloat16, which NumPy does not have, as float32."""
    dtype = _numpy_type(tensor.dtype)
    flat = np.frombuffer(content, dtype)
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset:], tensor.shape, strides)
    if tensor.dtype == 'bfloat16':  # the upper half of a float32
        return (view.astype('uint32', order='C') << 16).view('float32')
    return view.astype(dtype.newbyteorder('='), order='C')


class _Unpickler(pickle._Unpickler):  # the one in Python: its memo and its reads allocate no more than the file holds
    """Runs a pickle's instructions over `Tensor`, `Storage`, the functions in GLOBALS and plain Python values.

    Tuples become lists, so that nothing nested can be hashed: a few shared tuples would hash for ever.
    """
    stack: List[Any]

    def __init__(self, path: Path, stream: BinaryIO):
        super().__init__(stream, encoding='utf-8')
        self._path = path
        self.storages: Dict[str, Storage] = {}  # all that were named, by key

    def find_class(self, module: str, name: str) -> Any:
        """Looks the name up; never imports."""
        if f'{module}.{name}' not in GLOBALS:
            anew = "write it anew in PyTorch: torch.save({'model': net.state_dict()}, FILE)"
            if module == 'torch' and KINDS.fullmatch(name) or (module in ('torch._utils', 'torch._tensor')
                                                               and name.startswith('_rebuild_')):
                raise refusal(self._path, f'holds a tensor of a kind that is not read here ({module}.{name}): make it '
                              f'a plain tensor of float32, and {anew}')
            raise refusal(self._path, f'would run {f"{module}.{name}"!r}, which weights do not need; if you trust it, '
                           + anew)
        return GLOBALS[f'{module}.{name}']

    def persistent_load(self, pid: Any) -> Storage:
        """A storage: ('storage', type, key, device, elements); up to PyTorch 1.5 a view of it follows, always None."""
        kind, dtype, key, _, size, *view = pid
        if kind != 'storage' or dtype not in STORAGES.values() or any(view) or type(key) is not str \
                or type(size) is not int or not 0 <= size < 2 ** 60:
            raise ValueError('a persistent object that is not a storage')
        self.storages[key] = Storage(key, dtype, size)
        return self.storages[key]

    def get_extension(self, code: int) -> NoReturn:
        raise refusal(self._path, f"would run 'copyreg extension {code}', which no checkpoint of weights needs")

    def load_build(self) -> None:
        self.stack.pop()  # the state of an object; nothing here is one

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.stack[-1](*args)  # a function of GLOBALS in the place of a class

    def load_other(self) -> NoReturn:
        raise ValueError('not an instruction of torch.save')

    dispatch: ClassVar[Dict[int, Any]] = {**dict.fromkeys(range(256), load_other), **pickle._Unpickler.dispatch}
    dispatch.update({pickle.BUILD[0]: load_build, pickle.NEWOBJ[0]: load_newobj,
                     pickle.TUPLE[0]: dispatch[pickle.LIST[0]], pickle.EMPTY_TUPLE[0]: dispatch[pickle.EMPTY_LIST[0]]})
    for _size, _code in enumerate((pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 1):
        dispatch[_code[0]] = lambda self, n=_size: self.stack.append([self.stack.pop() for _ in range(n)][::-1])
    for _code in (pickle.NEWOBJ_EX, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EMPTY_SET,
                  pickle.ADDITEMS, pickle.FROZENSET):
        dispatch[_code[0]] = load_other


def _rebuild(storage: Storage, offset: int, shape: tuple, strides: tuple, *_: Any, dtype: str = '') -> Tensor:
    """A tensor that lies within its storage and is no larger than it; of the storage's type by default."""
    numbers = (offset, *shape, *strides)
    if type(storage) is not Storage or any(type(n) is not int or n < 0 for n in numbers) \
            or len(shape) != len(strides) or len(shape) > 32:
        raise ValueError('not a tensor')
    dtype = dtype or storage.dtype
    elements, size = math.prod(shape), storage.bytes // _numpy_type(dtype).itemsize
    end = offset + 1 + sum((side - 1) * stride for side, stride in zip(shape, strides)) if elements else offset
    if max(elements, end) > size:
        raise ValueError(f'a tensor of shape {tuple(shape)}, strides {tuple(strides)} and offset {offset} does not fit '
                         f'into its storage of {size} elements')
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _rebuild_v3(storage: Storage, offset: int, shape: tuple, strides: tuple, grad: bool, hooks: Any, dtype: str,
                *_: Any) -> Tensor:
    return _rebuild(storage, offset, shape, strides, dtype=DTYPES[dtype])


GLOBALS: Dict[str, Any] = {
    'collections.OrderedDict': lambda items=(): dict(items),
    'torch._utils._rebuild_tensor': _rebuild,
    'torch._utils._rebuild_tensor_v2': _rebuild,
    'torch._utils._rebuild_tensor_v3': _rebuild_v3,
    'torch._utils._rebuild_parameter': lambda data, *_: data,
    'torch._utils._rebuild_parameter_with_state': lambda data, *_: data,
    'torch.storage.UntypedStorage': 'uint8',
    **{f'torch.{name}': dtype for name, dtype in {**STORAGES, **DTYPES}.items()},
    **{name: lambda *_: {} for name in FORGOTTEN},
}


def _unpickle(path: Path, stream: BinaryIO) -> Tuple[Any, Dict[str, Storage]]:
    """The next object in the stream, and the storages it names, by key."""
    unpickler = _Unpickler(path, stream)
    try:
        return unpickler.load(), unpickler.storages
    except _Refusal:
        raise
    except Exception as error:  # wherever nonsense instructions lead
        raise refusal(path, f'is cut short, damaged, or not of torch.save: {error!r:.200}') from None


def _open_zip(path: Path, stream: BinaryIO) -> Tuple[Any, Callable[[Storage], bytes]]:
    """The format since PyTorch 1.6: a zip of NAME/data.pkl and NAME/data/KEY, none of them compressed."""
    try:
        archive = zipfile.ZipFile(stream)
        entries = {entry.filename: entry for entry in archive.infolist()}
    except Exception as error:  # zipfile raises many kinds
        raise refusal(path, f'is cut short or damaged: {error}') from None

    def read(name: str, size: Optional[int] = None) -> bytes:
        entry = entries.get(name)
        if entry is None:
            raise refusal(path, f'has no entry {name!r}: it is damaged, or a zip file that torch.save did not write')
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise refusal(path, f'has a compressed entry {name!r}; torch.save compresses nothing')
        if size not in (None, entry.file_size):
            raise refusal(path, f'is damaged: {name!r} has {entry.file_size:,} bytes, its tensors need {size:,}')
        try:
            return archive.read(entry)
        except Exception as error:
            raise refusal(path, f'is cut short or damaged: {error}') from None

    prefix = next(iter(entries), '').split('/')[0] + '/'
    if prefix + 'constants.pkl' in entries:
        raise refusal(path, "is a TorchScript program, not a checkpoint: write torch.save({'model': "
                       'net.state_dict()}, FILE) instead')
    tree, _ = _unpickle(path, io.BytesIO(read(prefix + 'data.pkl')))
    if prefix + 'byteorder' in entries and read(prefix + 'byteorder') != b'little':
        raise refusal(path, 'was written on a big-endian machine: load it and write it anew in PyTorch here')
    return tree, lambda storage: read(f'{prefix}data/{storage.key}', storage.bytes)


def _open_legacy(path: Path, stream: BinaryIO) -> Tuple[Any, Callable[[Storage], bytes]]:
    """The format up to PyTorch 1.5: five pickles (magic, version, machine, tree, keys), then a storage for each key.

    A storage is its number of elements, 8 bytes, and its elements.
    """
    if _unpickle(path, stream)[0] != LEGACY_MAGIC:
        raise refusal(path, 'is a pickle, but not of torch.save')
    (version, _), _, (tree, storages), (keys, _) = (_unpickle(path, stream) for _ in range(4))
    if version != LEGACY_PROTOCOL or not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) \
            or set(keys) != set(storages):
        raise refusal(path, 'is damaged, or of an unknown version of the format before PyTorch 1.6')
    starts, position = {}, stream.tell()
    for key in keys:
        starts[key] = position
        position += 8 + storages[key].bytes
    if position != path.stat().st_size:
        raise refusal(path, f'is cut short or damaged: it has {path.stat().st_size:,} bytes and needs {position:,}')

    def read(storage: Storage) -> bytes:
        stream.seek(starts[storage.key])
        size, = struct.unpack('<q', stream.read(8))
        if (size, storages[storage.key]) != (storage.size, storage):
            raise refusal(path, f'is damaged: storage {storage.key!r} has {size} elements, its tensors need '
                           f'{storage.size}')
        return stream.read(storage.bytes)

    return tree, read


def write_pth(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes ``{'model': OrderedDict of tensors}`` as torch.save does; the file is whole or is not there.

    Raises:
        ValueError: a type that PyTorch does not have, or a file that cannot be written; named.
    """
    path = Path(path)
    staged = path.with_name(f'.{path.name}.tmp-{os.getpid()}')
    try:
        with open(staged, 'wb') as stream, zipfile.ZipFile(stream, 'w') as archive:
            prefix = drawn(path.stem) or 'archive'
            _add(archive, f'{prefix}/data.pkl', _pickle(arrays))
            _add(archive, f'{prefix}/byteorder', b'little')
            for key, array in enumerate(arrays.values()):
                _add(archive, f'{prefix}/data/{key}', array.astype(array.dtype.newbyteorder('<')).tobytes())
            _add(archive, f'{prefix}/version', b'3\n')
        os.replace(staged, path)
    except OSError as error:
        raise ValueError(f'{path}: cannot be written: {error.strerror or error}') from None
    finally:
        staged.unlink(missing_ok=True)


def _add(archive: zipfile.ZipFile, name: str, content: Any) -> None:
    """An uncompressed entry whose content begins at a multiple of ALIGNMENT, so that it can be mapped into memory."""
    entry = zipfile.ZipInfo(name)  # of 1980: the same weights give the same file
    assert archive.fp is not None
    header = 30 + len(name.encode()) + 4  # bytes before the padding: fixed fields, name, the field's own header
    padding = -(archive.fp.tell() + header) % ALIGNMENT
    entry.extra = struct.pack('<2sH', b'FB', padding) + b'Z' * padding  # the field that PyTorch itself pads with
    archive.writestr(entry, content)


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The instructions, of protocol 2, that build the dict; tensor number k is all of storage k, in C order."""
    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack('<I', len(value.encode())) + value.encode()

    def integers(*values: int) -> bytes:
        return b''.join(pickle.dumps(value, 2)[2:-1] for value in values)  # without the header and the STOP

    ordered_dict = b'ccollections\nOrderedDict\n' + pickle.EMPTY_TUPLE + pickle.REDUCE
    storages = {dtype: name for name, dtype in STORAGES.items() if name not in ('UntypedStorage', 'BFloat16Storage')}
    out = [pickle.PROTO + b'\x02', pickle.EMPTY_DICT, text('model'), ordered_dict, pickle.MARK]
    for key, (name, array) in enumerate(arrays.items()):
        if array.dtype.name not in storages:
            raise ValueError(f'{name} is of type {array.dtype}; the file can hold {", ".join(storages)}')
        shape = array.shape
        strides = (math.prod(shape[axis + 1:]) for axis in range(len(shape)))
        out += [text(name), b'ctorch._utils\n_rebuild_tensor_v2\n', pickle.MARK,
                pickle.MARK, text('storage'), f'ctorch\n{storages[array.dtype.name]}\n'.encode(), text(str(key)),
                text('cpu'), integers(array.size), pickle.TUPLE, pickle.BINPERSID,
                integers(0), pickle.MARK, integers(*shape), pickle.TUPLE, pickle.MARK, integers(*strides), pickle.TUPLE,
                pickle.NEWFALSE, ordered_dict, pickle.TUPLE, pickle.REDUCE]
    return b''.join(out + [pickle.SETITEMS, pickle.SETITEM, pickle.STOP])
