"""The reference implementation's weights: its names, its layouts.

Our structural names are its names; only two layouts differ, because we write two convolutions as linear maps.
"""
import logging
import math
import re
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np
from mxnet.gluon import HybridBlock

from ..config import ModelConfig
from ..models import Classifier, joined, named_parameters, parameter_specs
from ..system.arrays import Arrays, WhenAsked
from .files import read_weights
from .names import BUFFERS as COMPUTED, to_official
from .resize import absolute_table, relative_table
from .told import changes

SHOWN = 3  # of what is wrong with a file, in one line


def official_shape(name: str, shape: Tuple[int, ...]) -> Tuple[int, ...]:
    """The reference's shape of our parameter: convolutions are 4-D there, (outputs, inputs, height, width)."""
    if name.endswith('patch_embed.proj.weight'):
        side = math.isqrt(shape[1] // 3)
        return (shape[0], 3, side, side)
    return shape + (1, 1) if name == 'decoder.0.weight' else shape


def load_weights(net: HybridBlock, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets every weight and buffer of the network from arrays under the reference's names and in its layouts.

    They are read one by one, first to see their shapes.

    Raises:
        ValueError: a missing, unknown or wrongly shaped array, each named.
    """
    specs = parameter_specs(net)
    given = {name: np.shape(value) for name, value in arrays.items() if not name.endswith(COMPUTED)}
    problems = misfits({spec.name: spec.whole_shape for spec in specs}, given)
    if problems:
        raise ValueError(f'these weights do not fit the network: {problems}: check the model keys of the configuration')
    for spec in specs:
        spec.parameter.set_data(spec.part_of(np.asarray(arrays[spec.name]).reshape(spec.whole_shape)))


def misfits(needed: Mapping[str, Tuple[int, ...]], given: Mapping[str, Tuple[int, ...]]) -> str:
    """Say in what arrays under the reference's names differ from what a network needs; '' where they fit.

    Shapes are the reference's in `given`, and ours in `needed`.
    """
    problems = [f'missing: {name}' for name in needed if name not in given]
    problems += [f'unknown: {name}' for name in given if name not in needed and not name.endswith(COMPUTED)]
    for name in needed:
        expected = official_shape(name, needed[name])
        if given.get(name, expected) != expected:
            problems.append(f'{name} has shape {given[name]}, the network needs {expected}')
    return _first(problems)


def _first(problems: List[str]) -> str:
    more = f'; and {len(problems) - SHOWN} more' if len(problems) > SHOWN else ''
    return '; '.join(problems[:SHOWN]) + more


def export_weights(net: HybridBlock, grad: bool = False) -> Dict[str, np.ndarray]:
    """Returns every weight and buffer, or every weight's gradient, under the reference's name and in its layout.

    Of several copies the first is taken. A weight that the last backward pass did not reach has a gradient of zeros.
    """
    specs = [spec for spec in parameter_specs(net) if spec.trainable or not grad]
    copies = (spec.parameter.list_grad() if grad else spec.parameter.list_data() for spec in specs)
    return {name: value.reshape(official_shape(name, value.shape))
            for name, value in joined(specs, [first.asnumpy() for first, *_ in copies]).items()}


# What an encoder may be without; from norm0 on, what a segmenter or a detector has besides.
NEW = ('cls_token', 'head.', 'fc_norm.', *(f'norm{stage}.' for stage in range(4)), 'fpn1.', 'fpn2.', 'decode_head.',
       'auxiliary_head.', 'neck.', 'rpn_head.', 'roi_head.')
SHARED = 'rel_pos_bias.relative_position_bias_table'  # of all blocks of a ViT in pre-training


Log = Callable[[str], None]
LOG: Log = logging.getLogger(__name__).warning


def load_pretrained(net: Classifier, path: Union[str, Path], log: Log = LOG) -> List[str]:
    """Gives a classifier the encoder that is in a .pth or .safetensors file of the reference, timm or Hugging Face.

    Returns the parameters that keep their initial values because the file has none for them. `path` may be FILE:KEY, as
    for `read_weights`; `log` is told what else the file holds and what of it is left out.

    Raises:
        ValueError: a file that cannot be read, or weights that do not fit the network, each named.
    """
    arrays = read_official(path, log)
    try:
        return load_encoder_weights(net, arrays, log)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def read_official(path: Union[str, Path], log: Log = LOG) -> Arrays:
    """Returns the arrays of a file under the reference's names; `path` and `log` as for `load_pretrained`.

    Raises:
        ValueError: the file cannot be read, or has what no network here has; it is named.
    """
    raw = read_weights(path, log)
    try:
        return to_official(raw, log)[0]
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def load_encoder_weights(net: Classifier, arrays: Arrays, log: Log = LOG) -> List[str]:
    """`load_pretrained` for arrays, as `fitted_encoder` takes them."""
    parameters = named_parameters(net)
    values, new = fitted_encoder(net.config, {name: p.shape for name, p in parameters.items()}, arrays, log)
    for name, value in values.items():
        parameters[name].set_data(value.reshape(parameters[name].shape))
    return new


def fitted_encoder(config: ModelConfig, shapes: Mapping[str, Tuple[int, ...]], arrays: Arrays, log: Log = LOG
                   ) -> Tuple[Arrays, List[str]]:
    """Fits pre-training's arrays (`encoder.…`, its decoder left out), or a classifier's, to a classifier of `config`.

    Position tables of another resolution are resized, a table shared by all blocks is given to each, and a head for
    another number of classes is left out. Arrays are read one by one, here to see their shapes, and again when they are
    asked for: a whole model's need not fit into memory.

    Args:
        shapes: of the classifier's parameters, by name.

    Returns:
        The values of parameters, float32, and the names of those that there are none for.

    Raises:
        ValueError: weights that do not fit, each named.
    """
    sources = {name[len('encoder.'):]: name for name in arrays if name.startswith('encoder.')}
    sources = {name: source for name, source in (sources or {name: name for name in arrays}).items()
               if not name.endswith(COMPUTED)}
    # Arrays of these shapes, each in the memory of one number.
    there = {source: np.broadcast_to(np.float32(0), np.shape(arrays[source])) for source in sources.values()}
    needed = changes(config, {name: there[source] for name, source in sources.items()})
    shared = sources.pop(SHARED, None)
    for name in shapes:
        if shared is not None and name.endswith('attn.relative_position_bias_table'):
            sources.setdefault(name, shared)
    if shared is not None and SHARED in shapes:
        sources[SHARED] = shared
    elif shared is not None and not any(name.endswith('relative_position_bias_table') for name in shapes):
        log('left out: the position table of all blocks; model.use_shared_rpb=true or model.use_rpb=true keeps it')
    head = there.get(sources.get('head.weight', ''))
    if head is not None and head.shape != shapes.get('head.weight'):
        log(f'left out: a head of {len(head)} classes')
        sources = {name: source for name, source in sources.items() if not name.startswith('head.')}

    def fitted(name: str, value: np.ndarray) -> np.ndarray:
        return _resized(name, value, official_shape(name, shapes[name]), config)
    problems = []
    for name in filter(sources.__contains__, shapes):
        try:
            found, shape = fitted(name, there[sources[name]]).shape, official_shape(name, shapes[name])
        except ValueError as error:
            problems.append(f'{name}: {error}')
        else:
            if found != shape:
                problems.append(f'{name} has shape {found}, the network needs {shape}')
    missing = [name for name in shapes if name not in sources]
    problems += [f'missing: {name}' for name in missing if not name.startswith(NEW)]
    # A masked encoder's token and final norm have no place in a classifier that averages its patches, nor have a cls
    # token and final norms in feature maps, or the norms of these in a classifier.
    problems += [f'unknown: {name}' for name in sources if name not in shapes
                 and not re.match(r'mask_token|cls_token|(fc_)?norm\d*\.|decoder\.', name)]
    if problems:
        remedy = f'set {" ".join(needed)}' if needed else 'check the model keys of the configuration'
        raise ValueError(f'these weights do not fit the network: {_first(problems)}: {remedy}')
    values = WhenAsked([name for name in shapes if name in sources],
                       lambda name: fitted(name, np.asarray(arrays[sources[name]], 'float32')))
    return values, missing


def _resized(name: str, value: np.ndarray, shape: Tuple[int, ...], config: ModelConfig) -> np.ndarray:
    """A table of positions in this shape, as far as it can be brought there; anything else as it is."""
    if name.endswith('relative_position_bias_table') and value.ndim == 2 and value.shape[1] == shape[1]:
        return relative_table(value, shape[0], _map_of(name, shape[0], config))
    if name.endswith('pos_embed') and value.ndim == 3 and value.shape[2] == shape[2]:
        return absolute_table(value, shape[1], shape[1] - math.prod(config.patches), config.patches)
    return value


def _map_of(name: str, rows: int, config: ModelConfig) -> Optional[Tuple[int, int]]:
    """Height and width that a relative position table of a ViT is for; None for a square window, as Swin's are."""
    block = re.match(r'blocks\.(\d+)\.', name)
    if config.type == 'vit' and block and not config.sees_all(int(block[1])):
        side = (math.isqrt(rows) + 1) // 2
        return side, side
    return config.patches if config.type == 'vit' else None


# The names of earlier versions.
assign, extract, adopt = load_weights, export_weights, load_encoder_weights
