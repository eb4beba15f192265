"""The encoder that a run starts from."""
import json
from pathlib import Path
from typing import List, Mapping, NamedTuple, Tuple

from ..config import ModelConfig
from ..interop import official
from ..models import Network, SimMIM, named_parameters
from ..system.arrays import Arrays
from . import checkpoint


class Encoder(NamedTuple):
    """What a classifier or a segmenter starts from."""
    arrays: Arrays  # by that network's names; those of a run are read when they are asked for
    told: str  # a sentence about it


def find_encoder(config: ModelConfig, shapes: Mapping[str, Tuple[int, ...]], path: str) -> Encoder:
    """Finds the encoder of a run or a file, for a network of `config` with parameters of these shapes.

    Raises:
        ValueError: there is none, or it does not fit.
    """
    notes: List[str] = []
    if Path(path).is_dir():
        saved = checkpoint.newest(Path(path) / 'checkpoints', print)
        if saved is None:
            raise ValueError(f'model.pretrained={path} is no run with a checkpoint: give the folder of a run, or a '
                             '.pth or .safetensors file')
        source = saved.state.get('config', {}).get('model', {})
        if source.get('type') == config.type == 'swinv2':
            notes += offsets_told(ModelConfig(**source), config)
        path, arrays = str(saved.path), saved.arrays.get('ema', saved.arrays['weights'])
    else:
        try:
            arrays = official.read_official(path, notes.append)
        except ValueError as error:
            raise ValueError(f'model.pretrained={error}') from None
    try:
        values, new = official.fitted_encoder(config, shapes, arrays, notes.append)
    except ValueError as error:
        raise ValueError(f'model.pretrained={path}: {error}') from None
    return Encoder(values, '; '.join([f'encoder from {path}', *notes, f'new: {", ".join(new) or "nothing"}']))


def offsets_told(source: ModelConfig, config: ModelConfig) -> List[str]:
    """Tell that a SwinV2 takes other offsets for the positions that `source` learnt; nothing where it does not."""
    if source.position_windows == config.position_windows:
        return []
    theirs, own = list(source.position_windows), list(config.position_windows)
    return [f'positions are relative to windows of {own} here and of {theirs} in pre-training: '
            f'model.pretrained_window_sizes={json.dumps(theirs, separators=(",", ":"))} keeps those']


def load_encoder(net: Network, path: str) -> str:
    """Gives the network the encoder of a run or a file; returns a sentence about it.

    Raises:
        ValueError: see `find_encoder`.
    """
    assert not isinstance(net, SimMIM)
    parameters = named_parameters(net)
    encoder = find_encoder(net.config, {name: p.shape for name, p in parameters.items()}, path)
    for name, value in encoder.arrays.items():
        parameters[name].set_data(value.reshape(parameters[name].shape))
    return encoder.told
