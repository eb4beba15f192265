"""Swin transformer V2: cosine attention, positions from a small network, normalisation at the end of each branch.

Liu et al. 2022 (arXiv:2111.09883), with the published code's parameter names. What it shares with V1 is V1's.
"""
import math
from typing import Any, Optional, Tuple, Union

import numpy as np
from mxnet.gluon import HybridBlock, nn

from ..config import ModelConfig
from ..ops import REFERENCE, OpBackend, Windows
from .layers import (
    Divisible,
    LayerNorm,
    Linear,
    Mlp,
    column,
    gather_bias,
    operands,
    pair,
    relative_index,
    values,
)
from .segments import Half, Segment, own
from .shards import WHOLE, Shard
from .swin import EPS, Block, PatchMerging, Stage, SwinTransformer, neighbours

HIDDEN = 512  # units between the two layers of the network of positions
MOST = math.log(100.0)  # of the logarithm of what cosines are multiplied with
STEEPEST = 16.0  # bias of a position


def log_coordinates(window: int, reach: int) -> np.ndarray:
    """Return the offsets (dy, dx) between a window's tokens, log-spaced: ((2 * window - 1)^2, 2), float32.

    In the order of `relative_index`, and relative to the farthest one in a window of `reach` tokens a side.
    """
    steps = np.arange(1 - window, window, dtype='float32') / np.float32(reach - 1) * np.float32(8)
    steps = np.sign(steps) * np.log2(np.abs(steps) + 1) / np.float32(3)
    return np.stack(np.meshgrid(steps, steps, indexing='ij'), -1).reshape(-1, 2)


class CosineAttention(Divisible):
    """The parameters of attention by cosines within windows, whose keys have no bias; see `OpBackend.cosine_attention`.

    Its bias of positions is what a network of two layers makes of offsets. Those of a part of the heads, where `shard`
    is one; the first of these layers is then the whole's, which all parts use.
    """

    def __init__(self, width: int, heads: int, windows: Windows, reach: int, backend: OpBackend,
                 shard: Shard = WHOLE, first: Optional[Linear] = None):
        super().__init__()
        self._whole = width, heads, windows, reach, backend
        self._size, heads = width // heads, heads // shard.count
        self._width, self._heads, self._windows, self.backend = width, heads, windows, backend
        columns = heads * self._size
        with self.name_scope():
            self.logit_scale = self.params.get('logit_scale', shape=(heads, 1, 1))
            self.relative_coords_table = self.params.get_constant('relative_coords_table',
                                                                  log_coordinates(windows.window, reach))
            self.relative_position_index = self.params.get_constant(
                'relative_position_index', relative_index(windows.window, windows.window).reshape(-1).astype('int32'))
            self.cpb_mlp = nn.HybridSequential()
            self.cpb_mlp.add(first or Linear(2, HIDDEN, REFERENCE), nn.Activation('relu'),  # never in bf16
                             Linear(HIDDEN, heads, REFERENCE, bias=False))
            self.q_bias = self.params.get('q_bias', shape=(columns,))
            self.v_bias = self.params.get('v_bias', shape=(columns,))
            self.qkv = Linear(width, 3 * columns, backend, bias=False)
            self.proj = Linear(columns, width, backend, bias=shard.index == 0)

    def part(self, shard: Shard) -> 'CosineAttention':
        """See `Divisible`."""
        width, heads, windows, reach, backend = self._whole
        return CosineAttention(width, heads, windows, reach, backend, shard, self.cpb_mlp[0])

    def branch(self, F: Any, x: Any, mask: Any) -> Any:
        """This of x, (B, L, C) to the same; parts add up to the whole."""
        weight, = operands(self.backend, F, x, self.qkv.weight)
        q_bias, v_bias, scale = values(F, x, self.q_bias, self.v_bias, self.logit_scale)
        qkv = weight, F.concat(q_bias, F.zeros_like(q_bias), v_bias, dim=0)
        return self.backend.cosine_attention(F, x, qkv, pair(F, x, self.proj), F.exp(F.minimum(scale, MOST)),
                                             self._bias(F, x), mask, width=self._width, heads=self._heads,
                                             size=self._size, windows=self._windows)

    def _bias(self, F: Any, x: Any) -> Any:
        """What each position adds to the scores, (1, H, N, N)."""
        offsets, index = values(F, x, self.relative_coords_table, self.relative_position_index)
        table = F.sigmoid(self.cpb_mlp(offsets)) * STEEPEST
        return gather_bias(F, table, index, self._windows.window ** 2, self._heads)


class BlockV2(Block):
    """A block whose branches are normalised at their end: x + keep * norm(branch(x)), (B, L, C) to the same."""

    def _attention(self, config: ModelConfig, stage: int, windows: Windows, backend: OpBackend) -> Divisible:
        return CosineAttention(config.embed_dim * 2 ** stage, config.heads[stage], windows,
                               config.position_windows[stage], backend)

    def halves(self) -> Tuple[Union[Half, Segment], ...]:
        """Return attention and MLP, each followed by what normalises the sum of its parts and adds it."""
        return (Half(lambda F, x, _, attn: self._branch(F, x, attn), [self.attn], [], (), (self.attn_mask,)),
                Segment(lambda F, y, given: self._add(F, given['residual'], y, self.norm1, given.get('keep'), 0),
                        [self.norm1], ('residual', *self.inputs)),
                Half(lambda F, x, _, mlp: mlp.branch(F, x), [self.mlp], []),
                Segment(lambda F, y, given: self._add(F, given['residual'], y, self.norm2, given.get('keep'), 1),
                        [self.norm2], ('residual', *self.inputs)))

    def _attend(self, F: Any, x: Any, attn: Any, keep: Any) -> Any:
        return self._add(F, x, self._branch(F, x, attn), self.norm1, keep, 0)

    def _mix(self, F: Any, x: Any, mlp: Mlp, keep: Any, rows: Any) -> Any:
        return self._add(F, x, mlp.branch(F, x), self.norm2, keep, 1)

    def _branch(self, F: Any, x: Any, attn: CosineAttention) -> Any:
        mask, = own(F, x, self.attn_mask)
        return attn.branch(F, x, mask)

    def _add(self, F: Any, x: Any, branch: Any, norm: LayerNorm, keep: Any, half: int) -> Any:
        y, factors = norm(branch), column(F, keep, 2 * self._draw + half)
        return x + (y if factors is None else F.broadcast_mul(y, F.expand_dims(factors, axis=2)))


class PatchMergingV2(PatchMerging):
    """Four neighbours to one token of twice the width, then normalised: (B, h*w, C) to (B, h/2 * w/2, 2C)."""

    def __init__(self, size: Tuple[int, int], width: int, backend: OpBackend):
        HybridBlock.__init__(self)
        self._size, self._width = size, width
        with self.name_scope():
            self.reduction = Linear(4 * width, 2 * width, backend, bias=False)
            self.norm = LayerNorm(2 * width, EPS, backend)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.norm(self.reduction(neighbours(F, x, self._size, self._width)))


class StageV2(Stage):
    """A stage of such blocks."""
    block = BlockV2
    merging = PatchMergingV2


class SwinTransformerV2(SwinTransformer):
    """As `SwinTransformer`; `rows` spares nothing."""
    stage = StageV2
