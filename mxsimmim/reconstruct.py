"""Pictures of what a trained network makes of masked images."""
from pathlib import Path
from typing import List

import numpy as np

from .checkpoint import newest
from .config import Config
from .data.loader import fixed_batches
from .data.sources import ImageFiles, image_files
from .data.transforms import EvalTransform
from .interop import official
from .models import build_simmim
from .parallel.placement import Replicated
from .pictures import grid, to_uint8
from .trained import contexts_for, data_in_use


def reconstruct(run: Path, config: Config, images: List[str], out: Path, seed: int = 0) -> Path:
    """Draws original, masked image and reconstruction of each file, or of each file in a folder, as one PNG.

    Raises:
        ValueError: no checkpoint, no such image, or a picture that cannot be written.
    """
    from PIL import Image
    saved = newest(run / 'checkpoints', print)
    if saved is None:
        raise ValueError(f'{run} has no checkpoint yet: train it first')
    net = build_simmim(config.model, seed=None)
    official.assign(net, saved.arrays['weights'])
    placement = Replicated(net, contexts_for(config)[:1], config.data.mean, config.data.std)
    source = ImageFiles(image_files(images))
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
    return out
