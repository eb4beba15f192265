"""RecordIO files of images, as MXNet reads and writes them."""
import contextlib
import os
import re
import struct
from pathlib import Path
from typing import BinaryIO, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from ..system.files import sync_file

PURPOSES = {'train', 'training'}, {'val', 'valid', 'validation', 'dev'}, {'test', 'testing'}  # words in files' names
KEPT_OPEN = 64  # of more files, each is opened to read a record: there may be thousands
HEADER_LABELS = 16  # at most

# RecordIO (dmlc-core's recordio.h, MXNet's recordio.py), all little-endian. A file is a row of parts: the magic number,
# a word with a kind (3 bits) and a length (29 bits), the bytes, zeros up to a multiple of 4. A record is one part of
# kind 0; or, where its bytes hold the magic number at a multiple of 4, parts of kinds 1, 2, …, 2, 3 around each such
# place, where the number itself is left out. Of images, the bytes begin with flag, label, id, id2; if flag > 0 then as
# many more float32 labels follow.
_MAGIC = struct.pack('<I', 0xced7230a)
_PART = struct.Struct('<4sI')
_IMAGE = struct.Struct('<IfQQ')
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LONGEST = (1 << 29) - 1


def open_records(paths: Sequence[str]) -> Union['Records', 'Chunks']:
    """The images of a RecordIO file, or of several in this order; ValueError as `Records`."""
    return Records(paths[0]) if len(paths) == 1 else Chunks(paths)


def record_files(folder: str) -> List[str]:
    """The RecordIO files in a folder, sorted by name, that are parts of one set; none if there are none.

    Raises:
        ValueError: their names say that they are for different purposes.
    """
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith('.rec') and not name.startswith('.'))
    files = [os.path.join(folder, name) for name in names]
    own = [[file for file, name in zip(files, names) if words & set(re.split('[^a-z]+', name.lower()))]
           for words in PURPOSES]
    different = sorted({some[0] for some in own if some})
    if len(different) > 1:
        raise ValueError(f'{folder} holds RecordIO files for different purposes, {" and ".join(different)}: name the '
                         "one to use; several are separated by semicolons, 'a.rec;b.rec'")
    return files


class Records:
    """The images of a RecordIO file.

    Offsets come from the .idx file beside it, else from one pass over the file. The headers of face data sets, records
    of labels without bytes, are passed over; in such a file the first of an image's labels is its class.

    Raises:
        ValueError: a file that is cut short, not RecordIO, without images, or not what its .idx describes.
    """

    def __init__(self, path: str, keep_open: bool = True):
        self._path = path
        try:
            file = open(path, 'rb', buffering=0)  # only ever read at offsets, so threads can share it
        except OSError as error:
            raise ValueError(f'{path}: cannot be read: {error.strerror}') from None
        self._file: Optional[BinaryIO] = file
        self._size = os.fstat(file.fileno()).st_size
        index = Path(path).with_suffix('.idx')
        offsets = self._indexed(index) if index.exists() else self._scanned()
        if not len(offsets):
            raise ValueError(f'{path} holds no record: pack it again with tools/pack_records.py')
        self._numbers = np.setdiff1d(np.arange(len(offsets)), self._headers(offsets))
        self._offsets, self.headers = offsets[self._numbers], len(offsets) - len(self._numbers)
        if not len(self._offsets):
            raise ValueError(f'{path} holds no image: each of its {self.headers:,} records has labels, but no bytes')
        self.notes = _skipped(path, self.headers)
        if not keep_open:
            self._file = None
            file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def name(self, index: int) -> str:
        return f'{self._path}#{self._numbers[index]}'

    def read(self, index: int) -> bytes:
        with self._opened() as file:
            data = _MAGIC.join(os.pread(file, length, start)
                               for start, length, _ in self._parts(file, int(self._offsets[index])))
        labels = _IMAGE.unpack_from(data)[0] if len(data) >= _IMAGE.size else 0
        if len(data) < _IMAGE.size + 4 * labels:
            raise ValueError(f'{self.name(index)}: no image record: its {len(data)} bytes cannot begin with {labels:,} '
                             'labels: pack images by mxnet.recordio.pack, im2rec or tools/pack_records.py')
        return data[_IMAGE.size + 4 * labels:]

    def labels(self) -> np.ndarray:
        """The class number in each record, int64 (n,), without reading the images.

        Raises:
            ValueError: a record with several labels, or with one that is no class number.
        """
        found = np.empty(len(self), np.int64)
        with self._opened() as file:
            for index, offset in enumerate(self._offsets):
                start, _, _ = next(self._parts(file, int(offset)))
                header = os.pread(file, _IMAGE.size + 4, start).ljust(_IMAGE.size + 4, b'\0')
                count, label, _, _ = _IMAGE.unpack_from(header)
                if count:
                    label, = struct.unpack_from('<f', header, _IMAGE.size)
                several = count > 1 and not self.headers
                if several or not 0 <= label < 2 ** 31 or label != int(label):
                    what = f'{count} labels' if several else f'the label {label:g}'
                    raise ValueError(f'{self.name(index)} has {what}, not a class number such as 0, 1, 2, …: pack the '
                                     'images again with tools/pack_records.py, from class folders')
                found[index] = label
        return found

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        if self._file is not None:
            yield self._file.fileno()
        else:
            with open(self._path, 'rb', buffering=0) as file:
                yield file.fileno()

    def _parts(self, file: int, offset: int) -> Iterator[Tuple[int, int, int]]:
        """(where its bytes start, their length, where the next part starts) of each part of a record."""
        kind = None
        while kind in (None, _FIRST, _MIDDLE):
            header = os.pread(file, _PART.size, offset)
            if len(header) < _PART.size:
                raise ValueError(f'{self._path} is cut short: a record is missing at byte {offset} of {self._size}: '
                                 'copy or pack it again')
            magic, word = _PART.unpack(header)
            if magic != _MAGIC:
                raise ValueError(f'{self._path}: no record at byte {offset} of {self._size}: not a RecordIO file, '
                                 'damaged, or the .idx file beside it belongs to another one')
            kind, length = word >> 29, word & _LONGEST
            start = offset + _PART.size
            offset = start + -(-length // 4) * 4
            if offset > self._size:
                raise ValueError(f'{self._path} is cut short: the record at byte {start - _PART.size} ends at byte '
                                 f'{offset}, the file at {self._size}: copy or pack it again')
            yield start, length, offset

    def _headers(self, offsets: np.ndarray) -> List[int]:
        """The records with labels and no bytes: only the shortest are looked into."""
        with self._opened() as file:
            order = np.argsort(offsets)
            sizes = np.diff(offsets[order], append=self._size)
            return [int(number) for number in order[sizes <= _PART.size + _IMAGE.size + 4 * HEADER_LABELS]
                    if _is_header(os.pread(file, _PART.size + _IMAGE.size, offsets[number]))]

    def _scanned(self) -> np.ndarray:
        offsets, end = [], 0
        with self._opened() as file:
            while end < self._size:
                offsets.append(end)
                *_, (_, _, end) = self._parts(file, end)
        return np.array(offsets, np.int64)

    def _indexed(self, index: Path) -> np.ndarray:
        try:
            lines = [line for line in index.read_text().splitlines() if line.strip()]
            offsets = np.array([int(line.split('\t')[1]) for line in lines], np.int64)
        except (ValueError, IndexError, OSError):
            raise ValueError(f'{index} cannot be read as key, tab, offset a line: delete it, the .rec file suffices'
                             ) from None
        if len(offsets):
            with self._opened() as file:
                *_, (_, _, end) = self._parts(file, offsets.max())
            if end != self._size:
                raise ValueError(f'{index} ends at byte {end} of the {self._size} of {self._path}: it belongs to '
                                 'another file; delete it, the .rec file suffices')
        return offsets


class Chunks:
    """The images of several RecordIO files, as im2rec --chunks and several prefixes leave them, one after the other."""

    def __init__(self, paths: Sequence[str]):
        self._files = [Records(path, keep_open=len(paths) <= KEPT_OPEN) for path in paths]
        self._ends = np.cumsum([len(file) for file in self._files])
        self.notes = [f'{len(paths)} RecordIO files, {paths[0]} to {paths[-1]}: {len(self):,} images']
        self.notes += _skipped(f'{paths[0]} to {paths[-1]}', sum(file.headers for file in self._files))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        file, own = self._place(index)
        return file.name(own)

    def read(self, index: int) -> bytes:
        file, own = self._place(index)
        return file.read(own)

    def labels(self) -> np.ndarray:
        """As `Records.labels`."""
        return np.concatenate([file.labels() for file in self._files])

    def _place(self, index: int) -> Tuple[Records, int]:
        number = int(np.searchsorted(self._ends, index, side='right'))
        return self._files[number], index - int(self._ends[number]) + len(self._files[number])


def _is_header(record: bytes) -> bool:
    """Whether the bytes of a file from a record on begin with one that has labels and nothing else."""
    if len(record) < _PART.size + _IMAGE.size:
        return False
    magic, word = _PART.unpack_from(record)
    labels = _IMAGE.unpack_from(record, _PART.size)[0]
    return magic == _MAGIC and word >> 29 == _WHOLE and labels > 0 and word & _LONGEST == _IMAGE.size + 4 * labels


def _skipped(where: str, headers: int) -> List[str]:
    return [f'{where}: {headers:,} record{"s"[:headers > 1]} without an image, as the headers of face data sets, '
            'passed over'] if headers else []


class RecordWriter:
    """Writes OUT.rec and OUT.idx beside their place.

    `commit` moves them there; leaving the `with` block without it removes them.

    Raises:
        ValueError: the name does not end in .rec, or the file cannot be made.
    """

    def __init__(self, path: str):
        if not path.endswith('.rec'):
            raise ValueError(f'{path}: the name of a RecordIO file ends in .rec')
        self._final = Path(path), Path(path).with_suffix('.idx')
        self._written = tuple(final.with_name(f'.{final.name}.{os.getpid()}') for final in self._final)
        self.records, self.bytes = 0, 0
        self._lines: List[str] = []
        with self._explained():
            self._file = open(self._written[0], 'wb')

    def write(self, image: bytes, label: float) -> None:
        """Appends an encoded image.

        Raises:
            ValueError: it has half a gigabyte or more, or the disk is full.
        """
        data = _IMAGE.pack(0, label, self.records, 0) + image
        if len(data) > _LONGEST:
            raise ValueError(f'an image of {len(image)} bytes: a record holds at most {_LONGEST - _IMAGE.size}')
        pieces = _split_at_magic(data)
        kinds = [_FIRST] + [_MIDDLE] * (len(pieces) - 2) + [_LAST] if len(pieces) > 1 else [_WHOLE]
        parts = [_PART.pack(_MAGIC, kind << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
                 for kind, piece in zip(kinds, pieces)]
        with self._explained():
            self._file.writelines(parts)
        self._lines.append(f'{self.records}\t{self.bytes}\n')
        self.records += 1
        self.bytes += sum(map(len, parts))

    def commit(self) -> None:
        """Puts both files in place, on the disk; ValueError if it is full."""
        with self._explained():
            with open(self._written[1], 'w') as index:
                index.writelines(self._lines)
            self._file.flush()
            sync_file(self._written[0])
            if self._final[1].exists():
                self._final[1].unlink()  # an old index must never stand beside the new records
            for written, final in zip(self._written, self._final):
                os.replace(written, final)

    def __enter__(self) -> 'RecordWriter':
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk, which was said when it was met
            self._file.close()
        for path in self._written:
            if path.exists():
                path.unlink()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f'{self._final[0]}: {error.strerror} after {self.records:,} images, '
                             f'{self.bytes / 1e6:,.1f} MB: choose another place or free some space; nothing was left '
                             'behind') from None


def _split_at_magic(data: bytes) -> List[bytes]:
    """The pieces of `data` between magic numbers at multiples of 4."""
    pieces, start, found = [], 0, data.find(_MAGIC)
    while found >= 0:
        if found % 4 == 0:
            pieces.append(data[start:found])
            start = found + 4
        found = data.find(_MAGIC, found + 1)
    return pieces + [data[start:]]
