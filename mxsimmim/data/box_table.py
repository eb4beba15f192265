"""Boxes in a table: path, x0, y0, x1, y1, class a line."""
import csv
import os
from typing import Dict, List, Sequence, Tuple

import numpy as np

from ..system.text import one_line
from .labels import read_lines
from .objects import Columns, ObjectTable, class_numbers
from .regions import LARGEST

FORM = 'path,x0,y0,x1,y1,class'


def read_table(file: str, classes: Sequence[str], key: str) -> Tuple[List[str], List[str], ObjectTable]:
    """(paths of the images, where each is named first, their objects), in the order in which they are named.

    A line has six fields, separated by commas, or tabs in a .tsv file; an image without objects is a line with a path
    alone, or with five empty fields after it. A first line without numbers is a heading.

    Args:
        file: its path.
        classes: names in the order of their numbers; empty: those of the file, sorted.
        key: what names the file, for messages.

    Raises:
        ValueError: with file and line: another number of fields, a class that is none of `classes`; no box at all.
    """
    lines = read_lines(file, key)
    reader = csv.reader((line + '\n' for line in lines), delimiter='\t' if file.lower().endswith('.tsv') else ',')
    columns = Columns([], [], [], [])
    broken: Dict[int, str] = {}
    images: Dict[str, int] = {}
    first: List[str] = []
    names: List[str] = []
    places: List[str] = []
    try:
        for row in reader:
            where, fields = f'{file}, line {reader.line_num}', [field.strip() for field in row]
            if not any(fields):
                continue
            found = one_line(','.join(row)[:100])
            if not fields[0] or len(fields) not in (1, 6):
                raise ValueError(f'{where}: {len(fields)} fields, not {FORM}: found {found}')
            if not images and not first and len(fields) == 6 and not any(map(_is_number, fields[1:5])) and any(
                    fields[1:5]):
                continue  # a heading
            image = images.setdefault(os.path.normpath(fields[0]), len(images))
            first += [where] if image == len(first) else []
            if not any(fields[1:]):
                continue
            if not all(map(_is_number, fields[1:5])) or not fields[5]:
                broken.setdefault(image, f'{where}: not {FORM} with numbers in pixels: found {found}')
                continue
            places.append(where)
            names.append(fields[5])
            columns.image.append(image)
            columns.box.append([float(field) for field in fields[1:5]])
            columns.crowd.append(False)
    except csv.Error as error:
        raise ValueError(f'{file}, line {reader.line_num}: {error}: write {FORM} a line') from None
    if not names:
        raise ValueError(f'{next(iter(broken.values()), file + " has no box")}; write {FORM} a line')
    numbers, known = class_numbers(names, classes, places.__getitem__, 'data.classes')
    columns.kind.extend(numbers)
    table = ObjectTable(known, np.zeros((len(images), 2), np.int32), columns, broken, places.__getitem__)
    return list(images), first, table


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < LARGEST
    except ValueError:
        return False
