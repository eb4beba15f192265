"""Opens images with boxes: COCO's JSON, Pascal VOC's XML, a table of boxes, the digit scenes."""
import functools
import os
from typing import Callable, Dict, List, Optional, Sequence, Set, Tuple

from ..config import DataConfig
from ..system.text import one_line
from .annotated import open_parts
from .box_table import read_table
from .coco import read_coco
from .labels import read_classes
from .objects import SceneObjects, WithObjects
from .scenes import is_scenes, open_scenes
from .segmentation import paired
from .sources import ImageFiles, image_files
from .voc import read_voc, xml_files

KINDS = ("COCO's instances (.json), a folder of Pascal VOC's .xml files or a list in its ImageSets/Main, or a table of "
         'lines path,x0,y0,x1,y1,class (.csv)')


def open_objects(data: DataConfig, seed: int = 0) -> Tuple[WithObjects, Optional[WithObjects]]:
    """(training, held-out images or None) with their objects; see `open_parts`.

    Raises:
        ValueError: files that are not there or not what they should be, classes that differ, too few images.
    """
    return open_parts(data, 'boxes', functools.partial(_opened, data), seed)


def _opened(data: DataConfig, path: str, labels: str, key: str, classes: Sequence[str]) -> WithObjects:
    if is_scenes(path):
        for setting, value in ((key, labels), ('data.classes', data.classes)):
            if value:
                raise ValueError(f'{setting}={value}, but {path} has its own boxes and classes: leave it out')
        scenes = open_scenes(path)
        return WithObjects(scenes, SceneObjects(scenes))
    if not labels or not os.path.exists(labels):
        raise ValueError(f'{key}={labels} {"does not exist" if labels else "is not set"}: name {KINDS}')
    if not os.path.isdir(path):
        raise ValueError(f'{path} is not a folder of images, whose boxes {key}={labels} could have')
    notes: List[str] = []
    classes = classes or read_classes(data.classes)
    kind = os.path.splitext(labels)[1].lower()
    if os.path.isdir(labels):
        images, files, notes = _beside(path, labels)
        lists = read_voc(files, classes, 'data.classes')
    elif kind == '.json':
        names, lists = read_coco(labels, classes)
        images = existing(path, names, lambda _: labels)
    elif kind in ('.csv', '.tsv'):
        names, places, lists = read_table(labels, classes, key)
        images = existing(path, names, places.__getitem__)
    else:
        images, files = _of_list(path, labels, key)
        lists = read_voc(files, classes, 'data.classes')
    if not len(lists):
        why = [f'{key}={labels} has no box that can be used', *lists.notes, *list(lists.broken.values())[:1]]
        raise ValueError('; '.join(why))
    return WithObjects(ImageFiles(images, [*notes, *lists.notes]), lists)


def existing(path: str, names: Sequence[str], where: Callable[[int], str]) -> List[str]:
    """The files of these relative names in the folder `path`.

    Args:
        where: says where name number i stands.

    Raises:
        ValueError: some are not there.
    """
    folders: Dict[str, Set[str]] = {}  # one listing for all files of a folder: a look at each takes minutes over NFS

    def is_there(file: str) -> bool:
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in folders[folder]

    files = [os.path.join(path, name) for name in names]
    files = [file if is_there(file) or '\\' not in file else file.replace('\\', '/') for file in files]  # of Windows
    missing = [number for number, file in enumerate(files) if not is_there(file)]
    if missing:
        raise ValueError(f'{where(missing[0])}: there is no image {one_line(names[missing[0]])} in {path}, below which '
                         f'paths are, nor {len(missing) - 1:,} others of {len(names):,}: add them, or leave them out')
    return files


def _beside(path: str, labels: str) -> Tuple[List[str], List[str], List[str]]:
    """Images of `path` with an XML file of the same name in `labels`, these files, and notes about others."""
    notes: List[str] = []
    files = xml_files(labels)
    images: Dict[str, str] = {}
    every = image_files([path], notes)
    for image in every:
        name = os.path.splitext(os.path.basename(image))[0]
        if images.setdefault(name, image) != image and name in files:
            raise ValueError(f'{image} and {images[name]}: {files[name]} is of one of them: rename the other')
    missing = sorted(set(files) - set(images))
    if missing:
        raise ValueError(f'{files[missing[0]]}: {path} has no image of that name, nor of {len(missing) - 1:,} others '
                         f'of the {len(files):,} .xml files: add the images, or name a list in ImageSets/Main')
    if len(every) > len(files):
        notes.append(f'{path}: {len(every) - len(files):,} images left out that have no .xml file in {labels}')
    return [images[name] for name in files], list(files.values()), notes


def _of_list(path: str, labels: str, key: str) -> Tuple[List[str], List[str]]:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(labels))))
    pictures, boxes = os.path.join(path, 'JPEGImages'), os.path.join(root, 'Annotations')
    pictures = pictures if os.path.isdir(pictures) else path
    if not os.path.isdir(boxes):
        raise ValueError(f'{key}={labels} is none of {KINDS} ({boxes} is not there)')
    return paired(labels, key, pictures, boxes)
