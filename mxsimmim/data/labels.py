"""Which class an image belongs to: class folders, a table, a RecordIO file's own labels, the digits."""
import csv
import os
import re
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..config import DataConfig
from ..system.text import advice, decode, one_line
from .recordio import Chunks, Records
from .sampling import generator
from .scenes import is_scenes
from .sources import (
    SEED,
    Digits,
    ImageFiles,
    Source,
    Subset,
    extensions,
    hold_out,
    is_ignored,
    open_source,
    other_files,
)


class Labelled(NamedTuple):
    """Images and the numbers of their classes, in the order of `classes`."""
    train: Source
    train_labels: np.ndarray  # int64 (n,)
    held_out: Optional[Source]
    held_out_labels: Optional[np.ndarray]  # int64
    classes: Tuple[str, ...]


def open_labelled(data: DataConfig, seed: int) -> Labelled:
    """Training and held-out images with their classes, as `data` describes them.

    The same images are held out as in pre-training; `seed` draws the training images that data.labels_per_class keeps.

    Raises:
        ValueError: images without a class, classes without images, unknown classes, a table that does not match, fewer
            than two classes, too few images of a class.
    """
    if data.val_labels and not data.val_path:
        raise ValueError(f'data.val_labels={data.val_labels} names the classes of the images of data.val_path: set '
                         'that, too')
    train, train_labels, classes = labelled_source(data.path, read_classes(data.classes), data.labels, 'data.labels')
    if len(classes) < 2:
        raise ValueError(f"{data.path} has one class, '{classes[0]}': a classifier needs two or more")
    held_out, held_out_labels = None, None
    if data.val_path:
        held_out, held_out_labels, _ = labelled_source(data.val_path, classes, data.val_labels, 'data.val_labels')
    elif data.val_fraction:
        whole = train_labels
        train, held_out = hold_out(train, data.val_fraction, SEED)
        train_labels, held_out_labels = whole[train.indices], whole[held_out.indices]
    if data.labels_per_class:
        kept = few_of_each(train_labels, classes, data.labels_per_class, seed)
        train, train_labels = Subset(train, kept), train_labels[kept]
    return Labelled(train, train_labels, held_out, held_out_labels, classes)


def labelled_source(path: str, classes: Sequence[str] = (), table: str = '',
                    key: str = '') -> Tuple[Source, np.ndarray, Tuple[str, ...]]:
    """(images, int64 (n,) numbers of their classes, class names).

    Args:
        path: as for `open_source`.
        classes: names in the order of their numbers, any other being an error; empty: as found.
        table: file of 'relative path,class' lines for the images in the folder `path`, see `_rows`. Where no class is
            called by a number, numbers in it are those of `classes`.
        key: what sets `table`, for messages; empty if nothing does.

    Raises:
        ValueError: see `open_labelled`.
    """
    if is_scenes(path):
        raise ValueError(f'{path} has several digits in an image, and so no class: a classifier takes data.path=digits')
    source = open_source(path)
    if table and not isinstance(source, ImageFiles):
        raise ValueError(f'{key}={table} names the classes of files in a folder, but {path} is not a folder of '
                         f'images: leave {key} out, or give the folder')
    if isinstance(source, ImageFiles):
        files = [source.name(index) for index in range(len(source))]
        names, are_numbers = (_from_table(path, files, table, classes, key) if table else
                              (_from_folders(path, files, classes, key), False))
        if not are_numbers:
            return (source,) + _numbered(names, classes)
        labels = np.array(list(map(int, names)), np.int64)
    else:
        assert isinstance(source, (Digits, Records, Chunks))
        labels = source.labels()
    highest, from_one = int(labels.max()), ' (labels seem to begin at 1)' if labels.min() == 1 else ''
    if classes and highest >= len(classes):
        first = int(labels.argmax())
        raise ValueError(f'{source.name(first)} has label {highest}, but there are only {len(classes)} classes, 0 to '
                         f'{len(classes) - 1}{from_one}: complete data.classes, or give images of the same classes')
    if not classes and highest >= len(source):
        raise ValueError(f'{path} has labels up to {highest}, but only {len(source)} images{from_one}: pack it again, '
                         'or name all classes in data.classes')
    if not classes:
        source.notes = [*source.notes, *_unused(path, labels, from_one)]
    return source, labels, tuple(classes) or tuple(map(str, range(highest + 1)))


def _unused(path: str, labels: np.ndarray, from_one: str) -> List[str]:
    """A sentence about the numbers, up to the highest label, that no image has."""
    empty = np.flatnonzero(np.bincount(labels) == 0)
    if not len(empty):
        return []
    which = ', '.join(map(str, empty[:5])) + (', …' if len(empty) > 5 else '')
    return [f'{path}: no image has label {which}{from_one}; '
            + ('this class stays' if len(empty) == 1 else f'these {len(empty):,} classes stay') + ' empty']


def read_classes(file: str) -> Tuple[str, ...]:
    """The names in `file`, one a line; none if `file` is ''.

    Raises:
        ValueError: no such file, no name in it, or one twice.
    """
    if not file:
        return ()
    lines: Dict[str, int] = {}
    for number, line in enumerate(read_lines(file, 'data.classes'), 1):
        name = line.strip()
        if name in lines:
            raise ValueError(f"{file}, line {number}: class '{name}' is already in line {lines[name]}: remove one")
        if name:
            lines[name] = number
    if not lines:
        raise ValueError(f'{file} names no class: write one a line, or leave data.classes out')
    return tuple(lines)


def few_of_each(labels: np.ndarray, classes: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Positions, ascending, of `count` random images of each class; a larger `count` keeps those of a smaller one.

    Raises:
        ValueError: a class has fewer.
    """
    rng = generator(seed, 0, 0, 0)
    kept: List[np.ndarray] = []
    for number, name in enumerate(classes):
        own = np.flatnonzero(labels == number)
        if not len(own):
            raise ValueError(f"data.labels_per_class={count}, but class '{name}' has no training image: add "
                             'some, leave it out of data.classes, or number the labels from 0 without gaps')
        if len(own) < count:
            raise ValueError(f"data.labels_per_class={count}, but class '{name}' has {len(own)} training images: lower "
                             'it, or add images')
        kept.append(rng.permutation(own)[:count])
    return np.sort(np.concatenate(kept))


def _numbered(names: Sequence[str], classes: Sequence[str]) -> Tuple[np.ndarray, Tuple[str, ...]]:
    classes = tuple(classes) or tuple(sorted(set(names)))
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in names], np.int64), classes


def _from_folders(path: str, files: Sequence[str], classes: Sequence[str], key: str) -> List[str]:
    """The name of each file's class folder, the first below `path`."""
    with os.scandir(path) as entries:
        folders = {entry.name for entry in entries if entry.is_dir() and not is_ignored(entry.name)}
    inside = [_below(path, file).split(os.sep) for file in files]
    outside = [os.path.join(path, *parts) for parts in inside if len(parts) == 1]
    if outside:
        raise ValueError(f'{len(outside):,} of the {len(files):,} images in {path} are in no class folder, the first '
                         f'is {outside[0]}: move images to {path}/CLASS/'
                         + (f', or name their classes in a file, {key}' if key else ''))
    empty = sorted(folders - {parts[0] for parts in inside})
    if empty:
        folder = os.path.join(path, empty[0])
        others = other_files(folder)
        raise ValueError(f'class folder {folder} has no images' + (f', but {others}' if others else '')
                         + ': add some or remove the folder')
    unknown = sorted(folders - set(classes)) if classes else []
    if unknown:
        raise ValueError(f"{os.path.join(path, unknown[0])} is not one of the {len(classes)} classes "
                         f'{listed_classes(classes)}: rename or remove the folder' + advice(classes, 'data.classes'))
    return [parts[0] for parts in inside]


def _from_table(path: str, files: Sequence[str], table: str, classes: Sequence[str],
                key: str) -> Tuple[List[str], bool]:
    """Each file's class by the lines of `table`; and whether these are numbers, of `classes` if there are any."""
    wanted, known = {_below(path, file) for file in files}, set(classes)
    found: Dict[str, Tuple[str, int]] = {}  # relative path -> class, line
    rows, is_list = _rows(table, key)
    for number, row in rows:
        line = f'{table}, line {number}'
        if len(row) != 2 or not all(field.strip() for field in row):
            raise ValueError(f"{line} is not 'relative path,class' (separated by a tab in a .tsv file): found "
                             f'{", ".join(map(repr, row))[:100]}')
        file, name = os.path.normpath(row[0].strip()), row[1].strip()
        if file not in wanted and '\\' in file:  # written on Windows
            file = file.replace('\\', '/')
        if file not in wanted and number == rows[0][0] and os.path.splitext(file)[1][1:].lower() not in extensions():
            continue  # a heading
        if file not in wanted:
            raise ValueError(f'{line}: there is no image {file} in {path}, below which paths are: remove the line, or '
                             'add it' + advice([file], table))
        if file in found:
            raise ValueError(f'{line}: {file} is already in line {found[file][1]}: remove one')
        found[file] = name, number
    are_numbers = all(name.isdecimal() for name, _ in found.values()) and (
        not any(name.isdecimal() for name in classes) if classes else is_list)
    for name, number in found.values() if known and not are_numbers else ():
        if name not in known:
            whose = 'of data.classes,' if key == 'data.labels' else 'classes'
            raise ValueError(f"{table}, line {number}: class '{name}' is not one of the {len(classes)} {whose} "
                             f'{listed_classes(classes)}: correct it or complete data.classes' + advice([name], table))
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(f'{len(missing):,} of the {len(files):,} images in {path} have no line in {table}, the first '
                         f'is {missing[0]}: add their lines, or remove them')
    return [found[_below(path, file)][0] for file in files], are_numbers


def _rows(table: str, key: str) -> Tuple[List[Tuple[int, List[str]]], bool]:
    """(line number, [path, class]) of each line that is not empty; and whether it is a list, whose classes are numbers.

    Commas separate them, or tabs in a .tsv file. Lists are what other programs read: a tab (Swin Transformer's
    train_map.txt) or blanks (Caffe's) between path and number; in MXNet's .lst files, index, number and path.
    """
    lines, kind = read_lines(table, key), os.path.splitext(table)[1].lower()
    first = next((line for line in lines if line.strip()), '')
    is_list = kind not in ('.csv', '.tsv') and ('\t' in first or ',' not in first)
    if first.strip().isdecimal():  # ILSVRC's own order of the classes, which is that of no folder
        raise ValueError(f'{table} has numbers, but no paths, as ILSVRC2012_validation_ground_truth.txt: write '
                         "'relative path,class' lines, or take the val_map.txt of Swin Transformer")
    if is_list and '\t' not in first:  # paths may have blanks
        return [(number, line.strip().rsplit(None, 1)) for number, line in enumerate(lines, 1) if line.strip()], True
    ended = (line + '\n' for line in lines)  # a name in quotes may have some
    reader = csv.reader(ended, delimiter='\t' if is_list or kind == '.tsv' else ',')
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f'{table}, line {reader.line_num}: {error}: write relative path,class a line') from None
    if kind == '.lst':
        rows = [(number, [row[2], re.sub(r'\.0*$', '', row[1].strip())] if len(row) == 3 else row)
                for number, row in rows]
    return rows, is_list


def _below(path: str, file: str) -> str:
    return file[len(path):].lstrip(os.sep)  # relpath takes ten times as long


def read_lines(file: str, key: str) -> List[str]:
    """The lines of the text file that `key` names; ValueError if it is none."""
    try:
        with open(file, 'rb') as opened:
            text = decode(opened.read())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'not UTF-16 text, as which it is marked'
        raise ValueError(f'{key}={file} cannot be read: {reason}') from None
    lines = text.split('\n')
    for number, line in enumerate(lines, 1):
        if '\0' in line:
            raise ValueError(f'{key}={file}, line {number}: has a zero byte: not a text, or UTF-16 without its mark: '
                             f'iconv -f UTF-16LE -t UTF-8 {file} > new.txt')
    return lines


def listed_classes(classes: Sequence[str]) -> str:
    """The first of the names, for messages."""
    return ', '.join(map(one_line, classes[:5])) + (', …' if len(classes) > 5 else '')
