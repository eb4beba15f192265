"""Pictures of what a trained network makes of masked images."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Sequence, Tuple

import numpy as np

from ..training.checkpoint import newest
from ..config import Config
from ..data.loader import fixed_batches
from ..data.sources import ImageFiles, found
from ..data.transforms import MAX_PIXELS, BrokenImage, EvalTransform, decode
from ..interop import official
from ..runtime.memory import ran_out
from ..models import build_simmim
from ..parallel.placement import Replicated
from ..tasks.pictures import SIDE, grid, to_uint8
from .trained import data_in_use, devices_for


def reconstruct(run: Path, config: Config, images: List[str], out: Path, seed: int = 0) -> Path:
    """Draws original, masked image and reconstruction of each file, or of each file in a folder, as one PNG.

    Raises:
        ValueError: no checkpoint, more images than a picture can show, or a picture that cannot be written; or images
            that could not be read, each named, after the picture of all others is written.
    """
    from PIL import Image
    saved = newest(run / 'checkpoints', print)
    if saved is None:
        raise ValueError(f'{run} has no checkpoint yet: train it first')
    if saved.state.get('classes'):
        raise ValueError(f'{run} is a classifier, which reconstructs nothing: `mxsimmim predict` shows what it has '
                         'learned')
    contexts, backend = devices_for(config)
    net = build_simmim(config.model, None, backend, config.data.mean, config.data.std)
    official.load_weights(net, saved.arrays['weights'])
    placement = Replicated(net, contexts[:1])
    files, problems = found(images)
    most = MAX_PIXELS // (3 * max(config.model.img_size, SIDE) ** 2)
    if len(files) > most:
        raise ValueError(f'{len(files):,} images make a picture that no viewer opens: give at most {most:,}')
    files, broken = _readable(files, config.data.threads)
    problems += broken
    if not files:
        raise ValueError('\n'.join(problems))
    source = ImageFiles(files)
    transform = EvalTransform(data_in_use(config), config.mask, config.model)
    batches = list(fixed_batches(source, transform, min(len(source), 32), len(source), seed, config.data.threads,
                                  max_broken=0))
    predicted = [to_uint8(placement.reconstruct(batch), config.data.mean, config.data.std) for batch in batches]
    picture = grid(np.concatenate([b.image for b in batches]), np.concatenate([b.mask for b in batches]),
                   np.concatenate(predicted))
    try:
        Image.fromarray(picture).save(out)
    except (OSError, ValueError) as error:
        raise ValueError(f'{out}: cannot write the picture: {error}') from None
    if problems:
        raise ValueError('\n'.join(problems + [f'{out} was drawn without these, of {len(files):,} images']))
    return out


def _readable(files: Sequence[str], threads: int) -> Tuple[List[str], List[str]]:
    """(the files that can be decoded, what is wrong with the others), each read once before the picture is laid out."""
    def problem(file: str) -> str:
        try:
            decode(Path(file).read_bytes(), file)
        except BrokenImage as error:
            if ran_out(error):  # nothing is wrong with the image
                raise
            return str(error)
        except OSError as error:
            return f'{file}: cannot be read: {error.strerror}'
        return ''
    with ThreadPoolExecutor(threads or None) as pool:
        problems = list(pool.map(problem, files))
    return [file for file, wrong in zip(files, problems) if not wrong], list(filter(None, problems))
