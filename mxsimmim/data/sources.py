"""Where encoded images come from: files, RecordIO, scikit-learn's digits. Reading one is safe in any thread."""
import os
from typing import Iterator, List, Sequence, Tuple, Union

import numpy as np
from typing_extensions import Protocol

from .recordio import Records, RecordWriter  # noqa: F401
from .sampling import generator

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff')

SEED = 0  # of which images are held out: the same for every run, whatever its own seed


class Source(Protocol):
    """A numbered set of images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a message calls the image."""

    def read(self, index: int) -> Union[bytes, np.ndarray]:
        """The encoded file, or uint8 pixels (H, W) or (H, W, 3); ValueError or OSError if it cannot be read."""


def open_source(path: str) -> Source:
    """The images at `path`: a folder, with class folders or flat; a RecordIO file (.rec); or the word digits.

    Raises:
        ValueError: nothing there, no image in the folder, a file of another kind, a damaged RecordIO file.
    """
    if path == 'digits':
        return Digits()
    if not path:
        raise ValueError('no images: set data.path to a folder of images, a RecordIO file (.rec), or digits')
    if path.lower().endswith('.rec') and os.path.isfile(path):
        return Records(path)
    if os.path.isfile(path):
        raise ValueError(f'{path} is a file, but not a RecordIO file (.rec): give its folder, or a .rec file made by '
                         'tools/pack_records.py')
    return ImageFiles(image_files([path]))


class ImageFiles:
    """Image files by path."""

    def __init__(self, paths: Sequence[str]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return self._paths[index]

    def read(self, index: int) -> bytes:
        with open(self._paths[index], 'rb') as file:
            return file.read()


def image_files(paths: Sequence[str]) -> List[str]:
    """The files among `paths`, and the images below its folders at any depth, each folder's sorted by path.

    Images are known by their extension, in any case. Hidden files and folders are left out; links are followed, but
    not back into a folder that contains them.

    Raises:
        ValueError: a missing path, a folder without images or one that cannot be listed.
    """
    files: List[str] = []
    for path in paths:
        if os.path.isdir(path):
            below = sorted(_walk(path))
            if not below:
                raise ValueError(f'{path} has no images: no file in or below it ends in {", ".join(EXTENSIONS)}')
            files += below
        elif os.path.exists(path):
            files.append(path)
        else:
            raise ValueError(f'{path} does not exist: give a folder of images, a RecordIO file (.rec), or digits')
    return files


def _walk(folder: str) -> Iterator[str]:
    stack: List[Tuple[str, Tuple[str, ...]]] = [(folder, ())]  # a folder, and the real paths of those it is in
    while stack:
        current, parents = stack.pop()
        real = os.path.realpath(current)
        if real in parents:
            continue
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.name.startswith('.'):
                        continue
                    if entry.is_dir():
                        stack.append((entry.path, parents + (real,)))
                    elif entry.name.lower().endswith(EXTENSIONS):
                        yield entry.path
        except OSError as error:
            raise ValueError(f'{current}: cannot list the folder: {error.strerror}') from None


class Digits:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels, grey."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        digits = load_digits()
        self._images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
        self._labels = digits.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f'digits#{index}'

    def read(self, index: int) -> np.ndarray:
        return self._images[index]

    def labels(self) -> np.ndarray:
        """The digit of each image, int64 (1797,)."""
        return self._labels


class Subset:
    """Some images of a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self.indices = source, indices

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
