"""Swin transformer: attention within windows, shifted every second block; stages that halve the resolution.

Liu et al. 2021 (arXiv:2103.14030), with the reference's parameter names.
"""
import math
from functools import partial
from typing import Any, Dict, List, Tuple

from mxnet.gluon import HybridBlock, nn

from ..config import ModelConfig
from ..ops import OpBackend, Windows, shift_mask
from ..ops.reference import pad
from .layers import (
    AUTO,
    Divisible,
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbed,
    column,
    gather_bias,
    pair,
    position_table,
    relative_index,
    relative_table,
    replace_masked,
    table_rows,
)
from .pixels import PixelInput
from .segments import Half, Segment, drawn, own
from .shards import WHOLE, Shard

EPS = 1e-5


def windows_of(height: int, width: int, window: int, shifted: bool) -> Windows:
    """The windows of a map of height x width tokens, which is one window where neither side is longer than one."""
    longest = max(height, width)
    return Windows(height, width, min(window, longest), window // 2 if shifted and longest > window else 0)


class WindowAttention(Divisible):
    """The parameters of multi-head attention within windows; half a block, see `OpBackend.attention`.

    Each has a relative position table of its own. Those of a part of the heads, where `shard` is one.
    """

    def __init__(self, width: int, heads: int, windows: Windows, backend: OpBackend, shard: Shard = WHOLE):
        super().__init__()
        self._whole = width, heads, windows, backend
        self._size, heads, self._partial = width // heads, heads // shard.count, shard.index > 0
        self._width, self._heads, self._windows, self.backend = width, heads, windows, backend
        columns = heads * self._size
        with self.name_scope():
            sides = windows.window, windows.window
            self.relative_position_bias_table, self.relative_position_index = relative_table(
                self.params, relative_index(*sides), table_rows(*sides), heads)
            self.qkv = Linear(width, 3 * columns, backend)
            self.proj = Linear(columns, width, backend, bias=not self._partial)

    def add_to(self, F: Any, x: Any, norm: LayerNorm, mask: Any, keep: Any, recompute: bool) -> Any:
        """x + this of norm(x), (B, L, C); x left out in shards other than the first."""
        table, index = position_table(self.backend, F, x, self.relative_position_bias_table,
                                      self.relative_position_index)
        bias = gather_bias(F, table, index, self._windows.window ** 2, self._heads)
        return self.backend.attention(F, x, pair(F, x, norm), pair(F, x, self.qkv), pair(F, x, self.proj), bias, None,
                                      keep, mask, width=self._width, heads=self._heads,
                                      tokens=self._windows.height * self._windows.width, eps=norm.eps,
                                      windows=self._windows, size=self._size, partial=self._partial,
                                      recompute=recompute)


class Block(HybridBlock):
    """Window attention and MLP, each normalised before and randomly dropped after: (B, L, C) to the same."""

    def __init__(self, config: ModelConfig, stage: int, index: int, backend: OpBackend):
        super().__init__()
        width = config.embed_dim * 2 ** stage
        windows = windows_of(*config.tokens(stage), config.window_size, index % 2 == 1)
        self._draw, self._recompute = sum(config.depths[:stage]) + index, config.recompute
        self.inputs = drawn(config)
        with self.name_scope():
            self.attn_mask = None
            if windows.needs_mask:
                self.attn_mask = self.params.get_constant('attn_mask', shift_mask(*windows))
            self.norm1 = LayerNorm(width, EPS, backend)
            self.attn = WindowAttention(width, config.heads[stage], windows, backend)
            self.norm2 = LayerNorm(width, EPS, backend)
            self.mlp = Mlp(width, int(width * config.mlp_ratio), backend)

    def hybrid_forward(self, F: Any, x: Any, keep: Any, rows: Any = None, attn_mask: Any = None) -> Any:
        return self._mix(F, self._attend(F, x, self.attn, keep), self.mlp, keep, rows)

    def halves(self) -> Tuple[Half, Half]:
        """Return attention and MLP."""
        return (Half(lambda F, x, given, attn: self._attend(F, x, attn, given.get('keep')),
                     [self.attn], [self.norm1], self.inputs, (self.attn_mask,)),
                Half(lambda F, x, given, mlp: self._mix(F, x, mlp, given.get('keep'), given.get('rows')),
                     [self.mlp], [self.norm2], self.inputs))

    def _attend(self, F: Any, x: Any, attn: WindowAttention, keep: Any) -> Any:
        mask, = own(F, x, self.attn_mask)
        return attn.add_to(F, x, self.norm1, mask, column(F, keep, 2 * self._draw), self._recompute)

    def _mix(self, F: Any, x: Any, mlp: Mlp, keep: Any, rows: Any) -> Any:
        return mlp.add_to(F, x, self.norm2, None, column(F, keep, 2 * self._draw + 1), rows, self._recompute)


class PatchMerging(HybridBlock):
    """Four neighbours to one token of twice the width: (B, h*w, C) to (B, h/2 * w/2, 2C); odd sides get zeros."""

    def __init__(self, size: Tuple[int, int], width: int, backend: OpBackend):
        super().__init__()
        self._size, self._width = size, width
        with self.name_scope():
            self.reduction = Linear(4 * width, 2 * width, backend, bias=False)
            self.norm = LayerNorm(4 * width, EPS, backend)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.reduction(self.norm(neighbours(F, x, self._size, self._width)))


def neighbours(F: Any, x: Any, size: Tuple[int, int], width: int) -> Any:
    """(B, h*w, C) to (B, h/2 * w/2, 4C): four tokens of a square side by side; odd sides get zeros."""
    pairs = Windows(*size, 2)
    down, across = pairs.counts
    x = F.reshape(pad(F, x, pairs, width), shape=(AUTO, down, 2, across, 2, width))
    x = F.transpose(x, axes=(0, 1, 3, 4, 2, 5))             # (B, down, across, x, y, C): order (0,0),(1,0),(0,1),(1,1)
    return F.reshape(x, shape=(AUTO, down * across, 4 * width))


class Stage(HybridBlock):
    """Blocks at one resolution, then the merging into the next, except after the last."""

    def __init__(self, config: ModelConfig, stage: int, backend: OpBackend):
        super().__init__()
        last = stage == config.stages - 1
        with self.name_scope():
            self.blocks = nn.HybridSequential()
            for index in range(config.depths[stage]):
                self.blocks.add(Block(config, stage, index, backend))
            self.downsample = None
            if not last:
                self.downsample = PatchMerging(config.tokens(stage), config.embed_dim * 2 ** stage, backend)

    def hybrid_forward(self, F: Any, x: Any, keep: Any, rows: Any = None) -> Any:
        for index in range(len(self.blocks)):
            x = self._run_block(index, F, x, {'keep': keep, 'rows': rows})
        return x

    def segments(self) -> List[Segment]:
        """Return the blocks, the last with the merging after it."""
        *blocks, last = self.blocks
        after = [self.downsample] if self.downsample else []
        merging = [Segment(lambda F, x, _: after[0](x), after)] if after else []
        return [*(Segment(partial(self._run_block, index), [block], block.inputs, pieces=block.halves())
                  for index, block in enumerate(blocks)),
                Segment(partial(self._run_block, len(blocks)), [last, *after], last.inputs,
                        pieces=(*last.halves(), *merging))]

    def _run_block(self, index: int, F: Any, x: Any, given: Dict[str, Any]) -> Any:
        """One block; the last takes `rows`, and the merging follows it."""
        if index < len(self.blocks) - 1:
            return self.blocks[index](x, given.get('keep'))
        x = self.blocks[index](x, given.get('keep'), given.get('rows'))
        return self.downsample(x) if self.downsample else x


class SwinTransformer(HybridBlock):
    """Image (B, 3, H, W) to tokens (B, L, C) of the last stage, or with `dense` those of all, which `maps` returns.

    With `masked`, patches whose mask (B, h, w) is 1 are replaced by a learned token before position is added.
    keep (B, 2 * blocks) holds the factors of stochastic depth; without it nothing is dropped. rows (B, L), L those of
    the last stage, is 0 for tokens that nobody will use, see `OpBackend.mlp`.
    """
    prefix_tokens = 0

    def __init__(self, config: ModelConfig, masked: bool, pixels: PixelInput, dense: bool = False):
        super().__init__()
        width, tokens, backend = config.embed_dim, math.prod(config.patches), pixels.backend
        self._width = width
        with self.name_scope():
            self.absolute_pos_embed = self.mask_token = None
            if config.use_ape:
                self.absolute_pos_embed = self.params.get('absolute_pos_embed', shape=(1, tokens, width))
            if masked:
                self.mask_token = self.params.get('mask_token', shape=(1, 1, width))
            self.patch_embed = PatchEmbed(config.size, config.patch_size, width, pixels, EPS)
            self.layers = nn.HybridSequential()
            for stage in range(config.stages):
                self.layers.add(Stage(config, stage, backend))
            self.norm = None if dense else LayerNorm(width * 2 ** (config.stages - 1), EPS, backend)

    def hybrid_forward(self, F: Any, image: Any, mask: Any = None, keep: Any = None, rows: Any = None,
                       absolute_pos_embed: Any = None, mask_token: Any = None) -> Any:
        x = self._embed(F, image, mask, absolute_pos_embed, mask_token)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, keep)
        return self.finish(last(x, keep, rows))

    def segments(self) -> List[Segment]:
        """Return the embedding and the blocks, of which the last takes `rows`; `finish` is left to the head."""
        tokens = self.absolute_pos_embed, self.mask_token
        masked = ('mask',) if self.mask_token else ()
        embedding = Segment(lambda F, _, given: self._embed(F, given['image'], given.get('mask'),
                                                            *own(F, given['image'], *tokens)),
                            [self.patch_embed], ('image', *masked), tokens)
        return [embedding, *(segment for layer in self.layers for segment in layer.segments())]

    def finish(self, x: Any) -> Any:
        """What follows the last block, (B, L, C) to the same."""
        return self.norm(x) if self.norm else x

    def maps(self, F: Any, image: Any, keep: Any = None) -> List[Any]:
        """The tokens (B, L, C) of each stage, before their merging."""
        absolute_pos_embed, = own(F, image, self.absolute_pos_embed)
        found, x = [], self._embed(F, image, None, absolute_pos_embed, None)
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x, keep)
            found.append(x)
            x = layer.downsample(x) if layer.downsample else x
        return found

    def _embed(self, F: Any, image: Any, mask: Any, absolute_pos_embed: Any, mask_token: Any) -> Any:
        """The tokens (B, L, C) that the first block takes."""
        x = self.patch_embed(image)
        if mask is not None:
            x = replace_masked(F, x, mask, mask_token, self._width)
        return x if absolute_pos_embed is None else F.broadcast_add(x, absolute_pos_embed)
