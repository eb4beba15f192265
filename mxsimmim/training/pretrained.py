"""The encoder that a run starts from."""
from pathlib import Path
from typing import List

from ..interop import official
from ..models import Classifier, Network
from . import checkpoint


def load_encoder(net: Network, path: str) -> str:
    """Gives the network the encoder of a run or a file; returns a sentence about it.

    Raises:
        ValueError: there is none, or it does not fit.
    """
    assert isinstance(net, Classifier)
    notes: List[str] = []
    if Path(path).is_dir():
        saved = checkpoint.newest(Path(path) / 'checkpoints', print)
        if saved is None:
            raise ValueError(f'model.pretrained={path} is no run with a checkpoint: give the folder of a run, or a '
                             '.pth or .safetensors file')
        try:
            new = official.load_encoder_weights(net, saved.arrays.get('ema', saved.arrays['weights']), notes.append)
        except ValueError as error:
            raise ValueError(f'model.pretrained={saved.path}: {error}') from None
        path = str(saved.path)
    else:
        try:
            new = official.load_pretrained(net, path, notes.append)
        except ValueError as error:
            raise ValueError(f'model.pretrained={error}') from None
    return '; '.join([f'encoder from {path}', *notes, f'new: {", ".join(new) or "nothing"}'])
