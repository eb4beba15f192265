"""The reference's random initial weights, drawn for each parameter from its own generator."""
import math
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional, Sequence

import mxnet as mx
import numpy as np

from ..config import ModelConfig
from .division import divide
from .segments import users
from .shards import WHOLE, Shard
from .specs import ParameterSpec, parameter_specs

DEVIATIONS = {'rpn_conv': 0.01, 'rpn_cls': 0.01, 'rpn_reg': 0.01, 'fc_cls': 0.01, 'fc_reg': 0.001, 'conv_logits': 0.001}
"""Of a detector's last layers, which begin with small answers."""


def begin(net: Any, seed: Optional[int], parts: Sequence[slice] = (), own: int = 0, shard: Shard = WHOLE) -> None:
    """Give a network's parameters their initial values on cpu(0), or zeros where `seed` is None.

    Of a network whose segments are divided into `parts`, only the parameters that part number `own` uses: the others
    have no memory here, and `parameter_specs` leaves them out. Likewise of each module that can be cut only the `shard`
    of it is there: see `division.divide`.
    """
    if shard.count > 1:
        divide(net, [shard], weights=False)
    parameters = net.collect_params()
    if parts:
        net.elsewhere = {name for name, numbers in users(net, parts).items() if own not in numbers}
    for name, parameter in parameters.items():
        if name not in net.elsewhere:
            parameter.initialize(None, mx.cpu(), mx.init.Zero())
    if seed is not None:
        initialise([spec for spec in parameter_specs(net) if spec.trainable], net.config, seed)


def initialise(specs: Sequence[ParameterSpec], config: ModelConfig, seed: int) -> None:
    """Draws all weights in place: a function of (seed, name) alone, whatever the number of threads.

    Of a part the whole is drawn, and then cut.
    """
    def draw(spec: ParameterSpec) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(spec.name.encode())]))
        return spec.part_of(initial_value(spec.name, spec.whole_shape, config, rng))

    with ThreadPoolExecutor() as pool:  # NumPy draws outside the interpreter's lock
        for spec, value in zip(specs, pool.map(draw, specs)):
            spec.parameter.set_data(value)


def initial_value(name: str, shape: tuple, config: ModelConfig,
                  rng: np.random.Generator) -> np.ndarray:
    """One parameter's initial value, float32.

    Truncated normal of `model.init_std`, the reference's 0.02, for linear maps, tokens and positions (ViT's
    pre-training cuts at one deviation, everything else at +-2, that is hardly ever), a thousandth of it for ViT's
    classification head; PyTorch's default, uniform, for the decoder and Swin's patch convolution; He et al. 2015
    (arXiv:1502.01852) by outputs for a segmenter's heads, and a normal of 0.01 for their last maps; a detector's as
    `_of_detector` says. SwinV2's blocks begin as identity: their last norms with a weight of 0.
    """
    leaf = name.rsplit('.', 1)[-1]
    vit = config.type == 'vit'
    if leaf == 'logit_scale':
        return np.full(shape, math.log(10), 'float32')
    if config.type == 'swinv2' and re.search(r'blocks\.\d+\.norm[12]\.weight$', name):
        return np.zeros(shape, 'float32')
    if name.startswith('decoder.') or (not vit and 'patch_embed.proj' in name):
        inputs = 3 * config.patch_size ** 2 if 'patch_embed' in name else config.embed_dim * 2 ** (config.stages - 1)
        bound = 1 / math.sqrt(inputs)
        return rng.uniform(-bound, bound, shape).astype('float32')
    if leaf.startswith('gamma'):
        return np.full(shape, config.init_values, 'float32')
    if leaf == 'weight' and len(shape) == 1:
        return np.ones(shape, 'float32')
    if leaf in ('bias', 'q_bias', 'v_bias') or (vit and leaf == 'relative_position_bias_table'):
        return np.zeros(shape, 'float32')
    if name.startswith(('neck.', 'rpn_head.', 'roi_head.')):
        return _of_detector(name, shape, rng)
    if len(shape) == 4:  # convolutions of a segmenter's heads; transposed ones, each place to four
        std = (1 / math.sqrt(shape[0]) if name.startswith('fpn') else 0.01 if 'conv_seg' in name else
               math.sqrt(2 / (shape[0] * shape[2] * shape[3])))
        return rng.standard_normal(shape, dtype='float32') * np.float32(std)
    pretraining = name.startswith('encoder.')
    std = config.init_std
    value = truncated_normal(rng, shape, std, std if vit and pretraining else 2.0)
    block = re.search(r'blocks\.(\d+)\.(attn\.proj|mlp\.fc2)\.weight$', name)
    if vit and block:
        value /= math.sqrt(2 * (int(block[1]) + 1))
    return value * np.float32(1e-3) if vit and name == 'head.weight' else value


def _of_detector(name: str, shape: tuple, rng: np.random.Generator) -> np.ndarray:
    """A weight of a detector's pyramid or heads, as detectron2 draws it."""
    leaf = name.split('.')[-2]
    if leaf in DEVIATIONS:
        std = DEVIATIONS[leaf]
    elif name.startswith('roi_head.mask_head'):  # He et al. 2015, by outputs
        std = math.sqrt(2 / (shape[1 if leaf == 'upsample' else 0] * shape[2] * shape[3]))
    elif name.startswith('neck.fpn1') or name.startswith('neck.fpn2'):  # each place to four
        std = 1 / math.sqrt(shape[0])
    else:  # uniform, of unit gain by inputs (He et al. 2015 with a slope of 1)
        bound = math.sqrt(3 / math.prod(shape[1:]))
        return rng.uniform(-bound, bound, shape).astype('float32')
    return rng.standard_normal(shape, dtype='float32') * np.float32(std)


def truncated_normal(rng: np.random.Generator, shape: tuple, std: float, cut: float) -> np.ndarray:
    """Normal of mean 0, redrawn outside [-cut, cut]."""
    value = rng.standard_normal(shape, dtype='float32').reshape(-1)
    value *= std
    outside = np.flatnonzero(np.abs(value) > cut)
    while outside.size:
        value[outside] = rng.standard_normal(outside.size, dtype='float32') * std
        outside = outside[np.abs(value[outside]) > cut]
    return value.reshape(shape)
