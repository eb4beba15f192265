"""Pictures of what a trained network makes of masked images."""
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Sequence, Tuple, Union

import numpy as np

from ..config import Config
from ..data.loader import Batch
from ..data.sampling import generator
from ..data.sources import found
from ..data.transforms import MAX_PIXELS, BrokenImage, decode, draw_mask, middle_square
from ..parallel.placement import Replicated
from ..runtime.memory import ran_out
from ..tasks.pictures import SIDE, grid, to_uint8
from .trained import data_in_use, load_run_for

BATCH = 32  # images at a time


def reconstruct(run: Path, images: List[str], out: Path, seed: int = 0) -> Path:
    """Draws original, masked image and reconstruction of each file, or of each file in a folder, as one PNG.

    The masks are drawn from `seed` and the number of each image among those that can be read.

    Raises:
        ValueError: no checkpoint, more images than a picture can show, or a picture that cannot be written; or images
            that could not be read, each named, after the picture of all others is written.
    """
    from PIL import Image
    trained = load_run_for('reconstruct', run)
    config = trained.config
    placement = Replicated(trained.net, [trained.context])
    files, problems = found(images)
    most = MAX_PIXELS // (3 * max(config.model.side, SIDE) ** 2)
    if len(files) > most:
        raise ValueError(f'{len(files):,} images make a picture that no viewer opens: give at most {most:,}')
    squares, broken = _read(files, config)
    problems += broken
    if not squares:
        raise ValueError('\n'.join(problems))
    image = np.stack(squares)
    mask = np.stack([draw_mask(generator(seed, 0, number), config.mask, config.model) for number in range(len(image))])
    predicted = [to_uint8(placement.reconstruct(batch), config.data.mean, config.data.std)
                 for batch in _batches(image, mask)]
    picture = grid(image, mask, np.concatenate(predicted))
    try:
        Image.fromarray(picture).save(out)
    except (OSError, ValueError) as error:
        raise ValueError(f'{out}: cannot write the picture: {error}') from None
    if problems:
        raise ValueError('\n'.join(problems + [f'{out} was drawn without these, of {len(squares):,} images']))
    return out


def _read(files: Sequence[str], config: Config) -> Tuple[List[np.ndarray], List[str]]:
    """(the squares (S, S, 3) in the middle of the files that can be decoded, what is wrong with the others)."""
    upright, log = bool(data_in_use(config).exif_orientation), logging.getLogger(__name__)

    def square(file: str) -> Union[np.ndarray, str]:
        try:
            pixels = decode(Path(file).read_bytes(), file, upright, log.warning)
            return middle_square(pixels, config.model.side)
        except BrokenImage as error:
            if ran_out(error):  # nothing is wrong with the image
                raise
            return str(error)
        except OSError as error:
            return f'{file}: cannot be read: {error.strerror}'

    with ThreadPoolExecutor(config.data.threads or None) as pool:
        results = list(pool.map(square, files))
    return ([result for result in results if not isinstance(result, str)],
            [result for result in results if isinstance(result, str)])


def _batches(image: np.ndarray, mask: np.ndarray) -> List[Batch]:
    index = np.arange(len(image))
    parts = [slice(start, start + BATCH) for start in range(0, len(image), BATCH)]
    return [Batch({'image': image[part], 'mask': mask[part]}, 0, index[part]) for part in parts]
