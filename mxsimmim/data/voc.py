"""Boxes in Pascal VOC's XML, a file an image."""
import os
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple
from xml.parsers import expat

import numpy as np

from ..system.text import one_line
from .objects import Columns, ObjectTable, class_numbers
from .regions import LARGEST

CORNERS = 'xmin', 'ymin', 'xmax', 'ymax'
DEPTH = 4  # of what is read: annotation/object/bndbox/xmin


class Boxed(NamedTuple):
    """An object of a file."""
    line: int
    name: str
    box: Tuple[float, ...]
    difficult: bool


def read_voc(files: Sequence[str], classes: Sequence[str], key: str) -> ObjectTable:
    """The objects of images in XML files, one an image, in their order.

    VOC counts pixels from 1 and means the last ones to be inside, so that its box (1, 1, w, h) is all of an image.

    Args:
        files: paths.
        classes: names in the order of their numbers; empty: those of all files, sorted.
        key: what else to change if a class is none of these.

    Raises:
        ValueError: a class that is none of `classes`; or no file can be read.
    """
    columns, broken = Columns([], [], [], []), {}
    sizes = np.zeros((len(files), 2), np.int32)
    names: List[str] = []
    places: List[Tuple[str, int]] = []
    for number, file in enumerate(files):
        try:
            size, found = read_file(file)
        except ValueError as error:
            broken[number] = str(error)
            continue
        sizes[number] = size
        for boxed in found:
            names.append(boxed.name)
            places.append((file, boxed.line))
            columns.image.append(number)
            columns.box.append((boxed.box[0] - 1, boxed.box[1] - 1, boxed.box[2], boxed.box[3]))
            columns.crowd.append(boxed.difficult)

    def where(place: int) -> str:
        return '{}, line {}'.format(*places[place])

    if len(broken) == len(files):
        raise ValueError(f'{broken[0]}; and no other file of {len(files):,} can be used')
    numbers, known = class_numbers(names, classes, where, key)
    columns.kind.extend(numbers)
    return ObjectTable(known, sizes, columns, broken, where)


def read_file(file: str) -> Tuple[Tuple[int, int], List[Boxed]]:
    """((height, width), objects) of one file; the size is (0, 0) if it is not there.

    Raises:
        ValueError: with file and line: not XML, or not VOC's; an object without a name or a whole bndbox.
    """
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = reader.text, reader.doctype
    parser.buffer_text, reader.parser = True, parser
    try:
        with open(file, 'rb') as opened:
            parser.Parse(opened.read(), True)
    except OSError as error:
        raise ValueError(f'{file}: cannot be read: {error.strerror}') from error
    except expat.ExpatError as error:
        raise ValueError(f'{file}, line {error.lineno}: not XML: {expat.ErrorString(error.code)}') from None
    except LookupError as error:
        raise ValueError(f'{file}, line 1: {error}: save it as UTF-8') from None
    except ValueError as error:
        raise ValueError(f'{file}, line {parser.CurrentLineNumber}: {error}') from None
    return reader.size, reader.found


class _Reader:
    """Collects the texts of annotation/size and of each annotation/object, whose parts are not looked into."""

    def __init__(self) -> None:
        self.parser: Any = None
        self.found: List[Boxed] = []
        self.size = 0, 0
        self._path: List[str] = []
        self._texts: Dict[str, str] = {}  # by path inside of the object, or of the size
        self._line = 0

    def doctype(self, *_: Any) -> None:
        raise ValueError('a document type, which no annotation needs: remove it')

    def start(self, tag: str, _: Any) -> None:
        self._path.append(tag)
        if self._path[0] != 'annotation':
            raise ValueError(f"begins with <{one_line(tag)[:40]}>, and Pascal VOC's files with <annotation>")
        if len(self._path) == 2:
            self._texts, self._line = {}, self.parser.CurrentLineNumber
        if len(self._path) <= DEPTH:
            self._texts['/'.join(self._path[2:])] = ''

    def text(self, text: str) -> None:
        if len(self._path) <= DEPTH:
            self._texts['/'.join(self._path[2:])] += text

    def end(self, tag: str) -> None:
        if len(self._path) == 2 and tag == 'object':
            self.found.append(self._boxed())
        elif len(self._path) == 2 and tag == 'size':
            sides = [self._texts.get(side, '').strip() for side in ('height', 'width')]
            if all(side.isdecimal() and int(side) < LARGEST for side in sides):
                self.size = int(sides[0]), int(sides[1])
        self._path.pop()

    def _boxed(self) -> Boxed:
        texts = {key: text.strip() for key, text in self._texts.items()}
        name = texts.get('name', '')
        what = f"object '{one_line(name)}'" if name else 'an object'
        missing = [key for key in ('name', *(f'bndbox/{corner}' for corner in CORNERS)) if not texts.get(key)]
        if missing:
            raise ValueError(f'{what} from line {self._line} has no {missing[0]}')
        try:
            box = tuple(float(texts[f'bndbox/{corner}']) for corner in CORNERS)
        except ValueError as error:
            raise ValueError(f'{what} from line {self._line}: bndbox: {error}') from None
        if not all(abs(side) < LARGEST for side in box):
            raise ValueError(f'{what} from line {self._line}: bndbox has numbers that are no pixels')
        return Boxed(self._line, name, box, texts.get('difficult', '0') not in ('', '0'))


def xml_files(folder: str) -> Dict[str, str]:
    """The XML files in a folder by name without extension.

    Raises:
        ValueError: there are none, or the folder cannot be listed.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f'{folder}: cannot be listed: {error.strerror}') from None
    found = {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names
             if name.lower().endswith('.xml') and not name.startswith('.')}
    if not found:
        raise ValueError(f"{folder} has no .xml file of Pascal VOC's kind")
    return found
