"""Images with a label map each, the class of every pixel: folders, Pascal VOC's lists, and the digit scenes."""
import functools
import os
import zlib
from typing import Dict, List, Optional, Protocol, Sequence, Tuple

import numpy as np

from ..config import DataConfig
from ..system.text import one_line
from .annotated import Annotated, Annotations, open_parts
from .decode import BrokenImage
from .label_images import read_label_image
from .labels import read_classes, read_lines
from .scenes import CLASSES, DigitScenes, is_scenes, open_scenes
from .sources import ImageFiles, image_files

SHOWN = 1000  # files that a checksum looks at


class LabelMaps(Annotations, Protocol):
    """The label maps of some images, by number."""

    def read(self, index: int) -> np.ndarray:
        """The class of each pixel, uint8 or int32 (h, w), or `ignored_number`; BrokenImage if that is unknown."""


def ignored_number(classes: int) -> int:
    """What stands in label maps for pixels that do not count: 255, or 65535 of more than 255 classes."""
    return 255 if classes <= 255 else 65535


class Segmented(Annotated):
    """Some images of a source, each with its label map."""
    _annotations: LabelMaps

    def label_map(self, index: int) -> np.ndarray:
        """The class number of each pixel, uint8 or int32 (h, w), `ignored_number` where it does not count.

        Raises:
            BrokenImage: it cannot be read, or has a class that there is not.
        """
        return self._annotations.read(int(self.indices[index]))


def open_segmented(data: DataConfig, seed: int = 0) -> Tuple[Segmented, Optional[Segmented]]:
    """(training, held-out images or None) with their label maps; see `open_parts`.

    Raises:
        ValueError: images without a label image, no list of classes, fewer than two of them, too few images.
    """
    return open_parts(data, 'label images', functools.partial(_opened, data), seed)


def _opened(data: DataConfig, path: str, labels: str, key: str, classes: Sequence[str]) -> Segmented:
    if is_scenes(path):
        for setting, value in ((key, labels), ('data.classes', data.classes)):
            if value:
                raise ValueError(f'{setting}={value}, but {path} has its own label maps and classes: leave it out')
        scenes = open_scenes(path)
        return Segmented(scenes, SceneMaps(scenes))
    if not labels:
        raise ValueError(f'{key} is not set: name the folder of the label images of {path or "data.path"}, or a list '
                         "in Pascal VOC's ImageSets/Segmentation")
    classes = tuple(classes) or read_classes(data.classes)
    if len(classes) < 2:
        raise ValueError(f'data.classes={data.classes} names {len(classes)} classes, and two or more are needed: a '
                         'file of names, one a line, in the order of the numbers in label images'
                         + (', number 1 first (data.reduce_zero_label)' if data.reduce_zero_label else ''))
    images, files, notes = (_of_list if os.path.isfile(labels) else _of_folders)(path, labels, key)
    return Segmented(ImageFiles(images, notes), LabelImages(files, classes, data.ignore_index, data.reduce_zero_label))


class SceneMaps:
    """The label maps of the digit scenes."""
    classes = CLASSES

    def __init__(self, scenes: DigitScenes):
        self._scenes = scenes

    def read(self, index: int) -> np.ndarray:
        return self._scenes.scene(index).label_map

    def checksum(self) -> int:
        return 0


class LabelImages:
    """Label images in files."""

    def __init__(self, files: Sequence[str], classes: Tuple[str, ...], ignore_index: int, reduce_zero: bool):
        self._files, self.classes, self._reduce_zero = files, classes, reduce_zero
        first, ignored = int(reduce_zero), ignored_number(len(classes))
        self._meaning = np.full(65536, -1, np.int32)  # of each number in a file; -1: none
        self._meaning[first:first + len(classes)] = np.arange(len(classes))
        self._meaning[[ignore_index] + [0] * reduce_zero] = ignored
        self._kind = np.uint8 if ignored == 255 else np.int32

    def read(self, index: int) -> np.ndarray:
        file = self._files[index]
        try:
            with open(file, 'rb') as opened:
                numbers = read_label_image(opened.read(), one_line(file))
        except OSError as error:
            raise BrokenImage(f'{file}: cannot be read: {error.strerror}') from error
        meant = self._meaning[numbers]
        if meant.min() < 0:
            raise BrokenImage(f'{file}: {self._unknown(numbers, meant)}')
        return meant.astype(self._kind)

    def _unknown(self, numbers: np.ndarray, meant: np.ndarray) -> str:
        """Says which number in a label image is no class, and what may be wrong."""
        y, x = (int(place[0]) for place in np.nonzero(meant < 0))
        number, count = int(numbers[y, x]), len(self.classes)
        from_one = numbers.min() > 0 and number == count and not self._reduce_zero
        return (f'number {number} in row {y}, column {x}, but data.classes names {count}, numbered '
                + (f'1 to {count}' if self._reduce_zero else f'0 to {count - 1}')
                + (' (numbers seem to begin at 1: data.reduce_zero_label=true)' if from_one else '')
                + f': complete data.classes, or set data.ignore_index={number} if these pixels do not count')

    def checksum(self) -> int:
        chosen = [self._files[i * len(self._files) // SHOWN] for i in range(SHOWN)]
        text = '\n'.join(os.path.basename(file) for file in dict.fromkeys(chosen))
        return zlib.crc32(text.encode('utf-8', 'surrogatepass'), len(self._files))


Found = Tuple[List[str], List[str], List[str]]  # images, their label images, notes


def _of_folders(path: str, labels: str, key: str) -> Found:
    """Images in `path`, whose label images have the same path in `labels`, but for the extension."""
    notes: List[str] = []
    if not os.path.isdir(path):
        raise ValueError(f'{path} is not a folder of images, of which {key}={labels} could have the label images')
    images = image_files([path], notes)
    by_stem: Dict[str, str] = {}
    for file in image_files([labels]):
        other = by_stem.setdefault(_stem(labels, file), file)
        if other != file:
            raise ValueError(f'{other} and {file} are label images of the same image: remove one')
    stems = [_stem(path, file) for file in images]
    missing = [file for stem, file in zip(stems, images) if stem not in by_stem]
    if missing:
        raise ValueError(f'{len(missing):,} of the {len(images):,} images in {path} have no label image in {labels}, '
                         f'the first is {missing[0]}: add a {_stem(path, missing[0])}.png, or remove the image')
    unused = sorted(set(by_stem) - set(stems))
    if unused:
        notes.append(f'{labels}: {len(unused):,} label images left out, of which {path} has no image, the first is '
                     f'{one_line(by_stem[unused[0]])}')
    return images, [by_stem[stem] for stem in stems], notes


def _of_list(path: str, labels: str, key: str) -> Found:
    """The images that a list of Pascal VOC's ImageSets/Segmentation names, and their label images beside it."""
    folder = os.path.dirname(os.path.abspath(labels))
    root = os.path.dirname(os.path.dirname(folder))
    pictures, maps = os.path.join(path, 'JPEGImages'), os.path.join(root, 'SegmentationClass')
    pictures = pictures if os.path.isdir(pictures) else path
    if not os.path.isdir(maps) or not os.path.isdir(pictures):
        raise ValueError(f'{key}={labels} is a file: name the folder of the label images, or a list in a folder '
                         f'ImageSets/Segmentation, with label images in SegmentationClass ({maps} is not there)')
    return (*paired(labels, key, pictures, maps), [])


def paired(listing: str, key: str, pictures: str, others: str) -> Tuple[List[str], List[str]]:
    """The file in `pictures` and that in `others` for each name in the file `listing`, of Pascal VOC's ImageSets.

    Raises:
        ValueError: no name, one twice, or one of which a file is missing.
    """
    there = [{os.path.splitext(name)[0]: os.path.join(folder, name) for name in sorted(os.listdir(folder))}
             for folder in (pictures, others)]
    lines: Dict[str, int] = {}
    for number, line in enumerate(read_lines(listing, key), 1):
        if not line.strip():
            continue
        name = line.split()[0]  # a list of one class has a second column, -1, 0 or 1
        for folder, files in zip((pictures, others), there):
            if name not in files:
                raise ValueError(f"{listing}, line {number}: {folder} has no file of the name '{one_line(name)}': "
                                 'remove the line, or add the file')
        if lines.setdefault(name, number) != number:
            raise ValueError(f'{listing}, line {number}: {one_line(name)} is already in line {lines[name]}: remove one')
    if not lines:
        raise ValueError(f'{listing} names no image')
    return [there[0][name] for name in lines], [there[1][name] for name in lines]


def _stem(folder: str, file: str) -> str:
    return os.path.splitext(os.path.relpath(file, folder))[0]
