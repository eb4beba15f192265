"""The reference implementation's weights: its names, its layouts.

Our structural names are its names; only two layouts differ, because we write two convolutions as linear maps.
"""
import math
from typing import Dict, Mapping, Tuple

import numpy as np
from mxnet.gluon import HybridBlock

from ..models import named_parameters

BUFFERS = ('relative_position_index', 'attn_mask')  # in its checkpoints, but computed here


def official_shape(name: str, shape: Tuple[int, ...]) -> Tuple[int, ...]:
    """The reference's shape of our parameter: convolutions are 4-D there, (outputs, inputs, height, width)."""
    if name.endswith('patch_embed.proj.weight'):
        side = math.isqrt(shape[1] // 3)
        return (shape[0], 3, side, side)
    return shape + (1, 1) if name == 'decoder.0.weight' else shape


def assign(net: HybridBlock, arrays: Mapping[str, np.ndarray]) -> None:
    """Sets every parameter of the network from arrays under the reference's names and in its layouts.

    Raises:
        ValueError: a missing, unknown or wrongly shaped array, each named.
    """
    parameters = named_parameters(net)
    given = {name: np.asarray(value) for name, value in arrays.items() if not name.endswith(BUFFERS)}
    problems = [f'missing: {name}' for name in parameters if name not in given]
    problems += [f'unknown: {name}' for name in given if name not in parameters]
    for name, value in given.items():
        expected = official_shape(name, parameters[name].shape) if name in parameters else value.shape
        if value.shape != expected:
            problems.append(f'{name} has shape {value.shape}, the network needs {expected}')
    if problems:
        raise ValueError('these weights do not fit the network; check the model keys of the configuration:\n  '
                         + '\n  '.join(problems))
    for name, parameter in parameters.items():
        parameter.set_data(given[name].reshape(parameter.shape))


def extract(net: HybridBlock, grad: bool = False) -> Dict[str, np.ndarray]:
    """Every parameter, or its gradient on the first device, under the reference's name and in its layout.

    A parameter that the last backward pass did not reach has a gradient of zeros.
    """
    return {name: (p.list_grad()[0] if grad else p.list_data()[0]).asnumpy().reshape(official_shape(name, p.shape))
            for name, p in named_parameters(net).items()}
