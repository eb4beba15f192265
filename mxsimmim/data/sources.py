"""Where images come from: files, RecordIO, scikit-learn's digits and scenes of them. Reading is safe in any thread."""
import functools
import logging
import os
from collections import Counter
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image
from typing_extensions import Protocol

from .digits import Digits
from .recordio import Records, RecordWriter, open_records, record_files  # noqa: F401
from .sampling import generator
from .scenes import is_scenes, open_scenes

# Of what Pillow can read, the formats of photographs: no documents and programs (EPS, PDF, WMF), no maps and textures.
PHOTOGRAPHS = ('jpg', 'jpeg', 'png', 'bmp', 'webp', 'gif', 'tif', 'tiff', 'jpe', 'jfif', 'mpo', 'jp2', 'j2k', 'j2c',
               'jpc', 'jpf', 'jpx', 'ppm', 'pgm', 'pbm', 'pnm', 'apng', 'avif', 'dib', 'ico', 'tga', 'pcx', 'sgi',
               'qoi')
# What systems, not people, put among images: Linux, macOS, Windows, and the NAS of Synology (its @eaDir has a thumbnail
# of each image), QNAP and NetApp. Much else of the kind is hidden: .Trash-1000, .AppleDouble, ._IMG.jpg, .DS_Store.
SYSTEM = frozenset((
    'lost+found', '__macosx', '__pycache__', '$recycle.bin', 'system volume information',
    '@eadir', '@tmp', '@recycle', '@recently-snapshot', '#recycle', '#snapshot', '~snapshot',
    'thumbs.db', 'ehthumbs.db', 'ehthumbs_vista.db', 'desktop.ini', 'icon\r'))

SEED = 0  # of which images are held out: the same for every run, whatever its own seed


class NoImages(ValueError):
    """A folder without images."""


class Source(Protocol):
    """A numbered set of images."""
    @property
    def notes(self) -> Sequence[str]:
        """What whoever opened it should be told, once."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls the image."""

    def read(self, index: int) -> Union[bytes, np.ndarray]:
        """The encoded file, or uint8 pixels (H, W) or (H, W, 3); ValueError or OSError if it cannot be read."""


def open_source(path: str) -> Source:
    """Opens the images at `path`.

    That is a folder, with class folders or flat; a RecordIO file (.rec), several separated by semicolons, or a folder
    of them; the word digits; or digit-scenes as `scenes.open_scenes` reads it.

    Raises:
        ValueError: nothing there, no image in the folder, a file of another kind, a damaged RecordIO file.
    """
    if path == 'digits':
        return Digits()
    if is_scenes(path):
        return open_scenes(path)
    if not path:
        raise ValueError('no images: set data.path to a folder of images, a RecordIO file (.rec), or digits')
    parts = [part.strip() for part in path.split(';') if part.strip()]
    if ';' in path and parts and not os.path.exists(path):  # as MXNet's ImageRecordIter takes them
        for part in parts:
            if not (part.lower().endswith('.rec') and os.path.isfile(part)):
                raise ValueError(f'{part}, a part of {path}, is no RecordIO file (.rec): give '
                                 'files that exist, a folder of them, or a folder of images')
        return open_records(parts)
    if path.lower().endswith('.rec') and os.path.isfile(path):
        return Records(path)
    if not os.path.exists(path):
        raise ValueError(f'{path} does not exist: give a folder of images, a RecordIO file (.rec), or digits')
    if os.path.isfile(path):
        raise ValueError(f'{path} is a file, but not a RecordIO file (.rec): give its folder, or a .rec file made by '
                         'tools/pack_records.py')
    notes: List[str] = []
    try:
        return ImageFiles(image_files([path], notes), notes)
    except NoImages:
        records = record_files(path)
        if not records:
            raise
        return open_records(records)


class ImageFiles:
    """Image files by path."""

    def __init__(self, paths: Sequence[str], notes: Sequence[str] = ()):
        self._paths = paths
        self.notes = notes

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        with open(self._paths[index], 'rb') as file:
            return file.read()


@functools.lru_cache(maxsize=None)
def extensions() -> Dict[str, None]:
    """The `PHOTOGRAPHS` that the installed Pillow, with what is registered in it, can read, in their order."""
    Image.init()
    readable = {extension for extension, kind in Image.registered_extensions().items()
                if kind in Image.OPEN or kind == 'MPO'}  # which the reader of JPEG reads
    return {name: None for name in PHOTOGRAPHS if f'.{name}' in readable}


def image_files(paths: Sequence[str], notes: Optional[List[str]] = None) -> List[str]:
    """The files among `paths`, and the images below its folders at any depth, each folder's sorted by path.

    Images are known by their extension, in any case. Hidden files and folders, and those of systems, are left out;
    links are followed, but not back into a folder that contains them. `notes` gets a sentence about the other files of
    a folder.

    Raises:
        ValueError: a missing path, a folder without images or one that cannot be listed.
    """
    files: List[str] = []
    for path in paths:
        if os.path.isdir(path):
            others: Dict[str, int] = Counter()
            below = sorted(_walk(path, others))
            if not below:
                instead = f'; it has {listed(others)}: unpack archives, convert images to .jpg or .png'
                raise NoImages(f'{path} has no images: no file in or below it ends in '
                               + ', '.join(f'.{name}' for name in extensions()) + (instead if others else ''))
            if others and notes is not None:
                notes.append(f'{path}: {listed(others, " left out")}')
            files += below
        elif os.path.exists(path):
            files.append(path)
        else:
            raise ValueError(f'{path} does not exist: give image files, or folders of images')
    return files


def found(paths: Sequence[str]) -> Tuple[List[str], List[str]]:
    """(the images of all `paths` that have some, what is wrong with the others); tells what is left out of folders."""
    files: List[str] = []
    problems: List[str] = []
    notes: List[str] = []
    for path in paths:
        try:
            files += image_files([path], notes)
        except ValueError as error:
            problems.append(str(error))
    tell(notes)
    return files, problems


def notes_of(*sources: Optional[Source]) -> List[str]:
    """What whoever opened them should be told, each note once."""
    return list(dict.fromkeys(note for source in sources if source is not None for note in source.notes))


def tell(notes: Sequence[str]) -> None:
    """Writes notes to standard error, where there is no run log for them."""
    for note in notes:
        logging.getLogger(__name__).warning('%s', note)


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or a system's."""
    return name.startswith('.') or name.lower() in SYSTEM


def other_files(folder: str) -> str:
    """'4 other files: .heic (3), .txt (1)' of those in or below a folder that are no images; '' if there are none."""
    others: Dict[str, int] = Counter()
    for _ in _walk(folder, others):
        pass
    return listed(others) if others else ''


def listed(others: Dict[str, int], what: str = '') -> str:
    """Numbers of files by kind, the commonest first: '4 other files left out: .heic (3), .txt (1)'."""
    count, kinds = sum(others.values()), sorted(others.items(), key=lambda item: (-item[1], item[0]))
    return (f'{count:,} other file{"s"[:count > 1]}{what}: '
            + ', '.join(f'{kind} ({number:,})' for kind, number in kinds[:8]) + (', …' if len(kinds) > 8 else ''))


def _walk(folder: str, others: Dict[str, int]) -> Iterator[str]:
    """The images; `others` counts the files left out by extension."""
    images = extensions()
    stack: List[Tuple[str, Tuple[str, ...]]] = [(folder, ())]  # a folder, and the real paths of those it is in
    while stack:
        current, parents = stack.pop()
        real = os.path.realpath(current)
        if real in parents:
            continue
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if is_ignored(entry.name):
                        continue
                    _, dot, extension = entry.name.rpartition('.')
                    if entry.is_dir():
                        stack.append((entry.path, parents + (real,)))
                    elif dot and extension.lower() in images:
                        yield entry.path
                    else:
                        others[_kind(extension) if dot else NO_EXTENSION] += 1
        except OSError as error:
            raise ValueError(f'{current}: cannot list the folder: {error.strerror}') from None


NO_EXTENSION = 'without extension'


def _kind(extension: str) -> str:
    """What a list calls files with this extension; "Dr. Who" and "v1.2 of today" have none."""
    return f'.{extension.lower()}' if extension.isalnum() and len(extension) <= 10 else NO_EXTENSION


class Subset:
    """Some images of a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self.indices = source, indices
        self.notes = source.notes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self.indices[index]))

    def read(self, index: int) -> Union[bytes, np.ndarray]:
        return self._source.read(int(self.indices[index]))


def hold_out(source: Source, fraction: float, seed: int) -> Tuple[Subset, Subset]:
    """(training, validation): a random `fraction` of the images is held out, the same ones for the same seed.

    Raises:
        ValueError: either part would be empty.
    """
    count = len(source)
    held_out = round(count * fraction)
    if not 0 < held_out < count:
        raise ValueError(f'data.val_fraction={fraction} of {count} images holds out {held_out}, which leaves nothing '
                         f'to {"train on" if held_out else "validate with"}: change the fraction or set data.val_path')
    order = generator(seed).permutation(count)
    return Subset(source, np.sort(order[held_out:])), Subset(source, np.sort(order[:held_out]))
