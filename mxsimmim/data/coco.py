"""COCO's instances in JSON, with any categories, read element by element into columns."""
import json
import os
import re
from array import array
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..system.text import one_line
from .decode import BrokenImage
from .geometry import Size
from .objects import Columns, ObjectTable, class_numbers
from .regions import LARGEST, Region, region_of

KEYS = 'id', 'file_name', 'height', 'width', 'name'  # of images and categories
_blanks = re.compile(r'[ \t\r\n]*')


class Element(NamedTuple):
    """One of the values in a list at the top of a JSON file."""
    section: str  # its key
    value: Any
    start: int  # offsets in bytes
    stop: int


def read_coco(file: str, classes: Sequence[str]) -> Tuple[List[str], ObjectTable]:
    """(file names of the images, their objects) of a file of instances; masks stay in the file until they are read.

    Args:
        file: its path.
        classes: names in the order of their numbers; empty: the categories in the order of their ids.

    Raises:
        ValueError: not JSON, without a section, an image or category that is none or is there twice, a category that is
            none of `classes`, or no annotation that can be used.
    """
    try:
        with open(file, 'rb') as opened:
            text = opened.read().decode('latin-1')  # one character a byte, so that offsets are those in the file
    except OSError as error:
        raise ValueError(f'{file}: cannot be read: {error.strerror}') from None
    found: Dict[str, List[Element]] = {'images': [], 'categories': []}
    listed = _Annotations()
    for element in elements(text, file):
        if element.section == 'annotations':
            listed.add(element)
        elif element.section in found:
            value = {key: element.value.get(key) for key in KEYS} if isinstance(element.value, dict) else {}
            found[element.section].append(element._replace(value=value))

    counted = [0, 1]  # an offset and its line, from which the next is counted: a million annotations may be bad

    def line(start: int) -> str:
        offset, number = counted if counted[0] <= start else (0, 1)
        counted[:] = start, number + text.count('\n', offset, start)
        return f'{file}, line {counted[1]}'

    def annotation(place: int) -> str:
        value = json.loads(text[listed.starts[place]:listed.stops[place]])
        return f"{line(listed.starts[place])}: annotation {value.get('id') if isinstance(value, dict) else ''}"

    for section, present in (*found.items(), ('annotations', listed.starts)):
        if not present:
            raise ValueError(f"{file}: '{section}' is missing or empty: an instances file has the lists images, "
                             'annotations and categories')
    images, names, sizes = _images(found['images'], line)
    unsized = np.flatnonzero((sizes == 0).any(axis=1))
    if listed.masks and len(unsized):
        raise ValueError(f"{line(found['images'][unsized[0]].start)}: an image without 'height' and 'width', which its "
                         'masks need')
    numbers, classes = _categories(found['categories'], classes, line)
    columns, broken = listed.columns(images, numbers, annotation)
    if not columns.image and broken:
        raise ValueError(f'{next(iter(broken.values()))}; and no other annotation can be used')
    masks = _Masks(file, np.array([listed.starts, listed.stops]).T[listed.kept]) if listed.masks else None
    table = ObjectTable(classes, sizes, columns, broken, lambda place: annotation(listed.kept[place]),
                        masks.read if masks else None)
    if listed.strangers:
        table.notes.append(f"{file}: {len(listed.strangers):,} annotations left out, whose images 'images' does not "
                           f'list, the first: {annotation(listed.strangers[0])}')
    return names, table


def elements(text: str, file: str) -> Iterator[Element]:
    """The values in the lists of a JSON object; ValueError, with `file` and line, if the text is none."""
    decoder, place = json.JSONDecoder(), 3 * text.startswith('\xef\xbb\xbf')

    def skip(place: int, wanted: str = '') -> int:
        place = _blanks.match(text, place).end()  # type: ignore[union-attr]  # it always matches
        if wanted and text[place:place + 1] not in tuple(wanted):
            raise json.JSONDecodeError(f"expecting '{wanted[0]}'", text, place)
        return place

    try:
        place = skip(skip(place, '{') + 1, '"}')
        while text[place] != '}':
            section, place = decoder.raw_decode(text, place)
            place = skip(skip(place, ':') + 1)
            if text[place:place + 1] == '[':
                place = skip(place + 1)
                while text[place:place + 1] != ']':
                    value, stop = decoder.raw_decode(text, place)
                    yield Element(section, value, place, stop)
                    place = skip(stop, ',]')
                    place = skip(place + 1) if text[place] == ',' else place
                place += 1
            else:
                _, place = decoder.raw_decode(text, place)
            place = skip(place, ',}')
            place = skip(place + 1, '"') if text[place] == ',' else place
    except json.JSONDecodeError as error:
        raise ValueError(f'{file}, line {error.lineno}, column {error.colno}: not JSON: {error.msg[0].lower()}'
                         f'{error.msg[1:]}; an instances file is an object with the lists images, annotations and '
                         'categories') from None
    except RecursionError:
        raise ValueError(f'{file}: not an instances file: nested too deeply') from None
    except ValueError:  # thousands of digits
        raise ValueError(f'{file}: not an instances file: a number is too long') from None


def utf8(text: str) -> str:
    """A string of a file that was read as Latin-1, unless escapes have made it what it is."""
    try:
        return text.encode('latin-1').decode('utf-8')
    except UnicodeError:
        return text


def _images(found: Sequence[Element], where: Callable[[int], str]) -> Tuple[Dict[Any, int], List[str], np.ndarray]:
    """Numbers of the images by id, their file names, int32 (n, 2) heights and widths, 0 where they are not given."""
    numbers: Dict[Any, int] = {}
    names: List[str] = []
    sizes = np.zeros((len(found), 2), np.int32)
    for number, element in enumerate(found):
        value = element.value
        if not isinstance(value.get('file_name'), str) or not _is_id(value.get('id')):
            raise ValueError(f"{where(element.start)}: an image without 'id' or 'file_name'")
        if numbers.setdefault(value['id'], number) != number:
            raise ValueError(f"{where(element.start)}: image {value['id']} is there twice: remove one")
        names.append(utf8(value['file_name']))
        size = [value.get('height'), value.get('width')]
        if all(type(side) is int and 0 < side < LARGEST for side in size):
            sizes[number] = size
    return numbers, names, sizes


def _categories(found: Sequence[Element], classes: Sequence[str], where: Callable[[int], str]
                ) -> Tuple[Dict[Any, int], Tuple[str, ...]]:
    """Class numbers of the categories by id, and names of the classes."""
    names: Dict[Any, str] = {}
    for element in found:
        value = element.value
        if not isinstance(value.get('name'), str) or not _is_id(value.get('id')):
            raise ValueError(f"{where(element.start)}: a category without 'id' or 'name'")
        if value['id'] in names or utf8(value['name']) in names.values():
            raise ValueError(f"{where(element.start)}: category {value['id']}, '{one_line(utf8(value['name']))}', is "
                             'there twice: remove one')
        names[value['id']] = utf8(value['name'])
    ids = list(names) if classes else sorted(names, key=lambda id: (str(type(id)), id))
    numbers, known = class_numbers([names[id] for id in ids], classes or [names[id] for id in ids],
                                   lambda place: where(found[list(names).index(ids[place])].start), 'data.classes')
    return dict(zip(ids, numbers)), known


class _Annotations:
    """What the annotations say, all but the masks, and where each is: numbers in arrays, as there may be a million."""

    def __init__(self) -> None:
        self.starts, self.stops = array('q'), array('q')
        self.images: List[Any] = []
        self.kinds: List[Any] = []
        self.boxes, self.crowd = array('d'), array('b')
        self.problems: Dict[int, str] = {}  # by place
        self.masks = False  # whether any has one
        self.kept: List[int] = []  # places of those that are in the columns
        self.strangers: List[int] = []  # of those of no image

    def add(self, element: Element) -> None:
        value = element.value if isinstance(element.value, dict) else {}
        box, crowd, place = value.get('bbox'), value.get('iscrowd', 0), len(self.starts)
        if not isinstance(box, list) or not _is_box(box):
            self.problems[place] = f'its bbox is {str(box)[:60]}, not [x, y, width, height]'
            box = [0, 0, 0, 0]
        if crowd not in (0, 1):
            self.problems[place], crowd = f'its iscrowd is {str(crowd)[:40]}, neither 0 nor 1', 0
        self.boxes.extend((box[0], box[1], box[0] + box[2], box[1] + box[3]))
        self.crowd.append(int(crowd))
        self.images.append(value.get('image_id'))
        self.kinds.append(value.get('category_id'))
        self.starts.append(element.start)
        self.stops.append(element.stop)
        self.masks |= bool(value.get('segmentation'))

    def columns(self, images: Dict[Any, int], kinds: Dict[Any, int], where: Callable[[int], str]
                ) -> Tuple[Columns, Dict[int, str]]:
        """Those that can be used; and what is wrong with images of others. `where` names the annotation at a place."""
        columns = Columns([], [], [], [])
        broken: Dict[int, str] = {}
        for place, (image, kind) in enumerate(zip(self.images, self.kinds)):
            number = images.get(image) if _is_id(image) else None
            if number is None:
                self.strangers.append(place)
                continue
            if not _is_id(kind) or kind not in kinds:
                self.problems.setdefault(place, f'its category_id {str(kind)[:40]} is in no category of the file')
            if place in self.problems:
                broken.setdefault(number, f'{where(place)} of image {image}: {self.problems[place]}')
                continue
            self.kept.append(place)
            columns.image.append(number)
            columns.kind.append(kinds[kind])
        boxes, crowd = np.array(self.boxes).reshape(-1, 4)[self.kept], np.array(self.crowd)[self.kept]
        return columns._replace(box=boxes, crowd=crowd), broken


def _is_id(value: Any) -> bool:
    return type(value) in (int, str)


def _is_box(value: List[Any]) -> bool:
    return len(value) == 4 and all(type(side) in (int, float) and -LARGEST < side < LARGEST for side in value)


class _Masks:
    """Masks, read from the file when they are asked for: those of COCO would take 200 MB."""

    def __init__(self, file: str, spans: np.ndarray):
        self._name, self._spans = file, spans  # int64 (n, 2): from and up to which byte annotations lie
        self._file = open(file, 'rb', buffering=0)  # only ever read at offsets, so threads can share it

    def read(self, place: int, size: Size) -> Optional[Region]:
        start, stop = map(int, self._spans[place])
        name = ''
        try:
            found = json.loads(os.pread(self._file.fileno(), stop - start, start))
            name = f" {found.get('id')} of image {found.get('image_id')}"
            return region_of(found['segmentation'], size) if found.get('segmentation') else None
        except (OSError, ValueError, AttributeError) as error:  # also of a file that has changed
            raise BrokenImage(f'{self._name}, line {self._line(start)}: the segmentation of annotation{name}: {error}'
                              ) from error

    def _line(self, offset: int) -> int:
        with open(self._name, 'rb') as file:
            return file.read(offset).count(b'\n') + 1
