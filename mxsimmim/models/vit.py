"""Vision transformer as SimMIM trains it: BEiT's, with layer scale and relative position bias.

Dosovitskiy et al. 2021 (arXiv:2010.11929); Bao et al. 2022 (arXiv:2106.08254); Xie et al. 2022 (arXiv:2111.09886).
"""
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from mxnet.gluon import HybridBlock, nn

from ..config import ModelConfig
from ..ops import OpBackend, Windows, shift_mask
from .layers import (
    Divisible,
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbed,
    column,
    gather_bias,
    operands,
    pair,
    position_table,
    relative_index,
    relative_table,
    replace_masked,
    table_rows,
    values,
)
from .pixels import PixelInput
from .segments import Half, Segment, drawn, own
from .shards import WHOLE, Shard

EPS = 1e-6


class View(NamedTuple):
    """Which of height x width tokens, after a cls token if there is one, those of a block attend to: all, or a window.

    With windows, of `window` tokens a side but no longer than the image, there is no cls token.
    """
    height: int
    width: int
    cls: bool = True
    window: int = 0

    @property
    def seen(self) -> Tuple[int, int]:
        """Height and width of what a token attends to."""
        side = min(self.window, max(self.height, self.width))
        return (side, side) if side else (self.height, self.width)

    @property
    def windows(self) -> Optional[Windows]:
        """The windows; None where tokens attend to all."""
        return Windows(self.height, self.width, self.seen[0]) if self.window else None

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.cls + self.height * self.width

    @property
    def length(self) -> int:
        """Tokens that attend to each other."""
        return self.cls + self.seen[0] * self.seen[1]

    @property
    def table_rows(self) -> int:
        """Rows of a relative position table."""
        return table_rows(*self.seen) + 3 * self.cls

    def table_index(self) -> np.ndarray:
        """Return the table's row for each pair of tokens, (N, N), as `relative_index`.

        A cls token, row and column 0, has the last three of R rows: R-3 is cls to token, R-2 token to cls, R-1 cls to
        cls, as in Bao et al. 2022.
        """
        index = relative_index(*self.seen)
        if self.cls:
            index, rows = np.pad(index, ((1, 0), (1, 0))), self.table_rows
            index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
        return index


class RelativePositionBias(Divisible):
    """A learned bias (1, H, N, N) for each head, or those of a shard, and each offset between two tokens."""

    def __init__(self, view: View, heads: int, shard: Shard = WHOLE):
        super().__init__()
        self._whole, heads = (view, heads), heads // shard.count
        self._tokens, self._heads = view.length, heads
        with self.name_scope():
            self.relative_position_bias_table, self.relative_position_index = relative_table(
                self.params, view.table_index(), view.table_rows, heads)

    def hybrid_forward(self, F: Any, tokens: Any, relative_position_bias_table: Any,
                       relative_position_index: Any) -> Any:
        # A HybridBlock must have an input; the bias does not depend on the tokens.
        return gather_bias(F, relative_position_bias_table, relative_position_index, self._tokens, self._heads)


class QKV(HybridBlock):
    """The weight of queries, keys and values in one product; their bias is put together outside."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        with self.name_scope():
            self.weight = self.params.get('weight', shape=(3 * outputs, inputs))


class Attention(Divisible):
    """The parameters of multi-head attention whose keys have no bias; half a block, see `OpBackend.attention`.

    With a relative position table of its own where `table` says so. Those of a part of the heads, where `shard` is one.
    """

    def __init__(self, width: int, heads: int, view: View, table: bool, backend: OpBackend, shard: Shard = WHOLE):
        super().__init__()
        self._whole = width, heads, view, table, backend
        self._size, heads, self._partial = width // heads, heads // shard.count, shard.index > 0
        self._heads, self._width, self._view, self._table = heads, width, view, table
        self.backend, columns = backend, heads * self._size
        with self.name_scope():
            self.q_bias = self.params.get('q_bias', shape=(columns,))
            self.v_bias = self.params.get('v_bias', shape=(columns,))
            if table:
                self.relative_position_bias_table, self.relative_position_index = relative_table(
                    self.params, view.table_index(), view.table_rows, heads)
            self.attn_mask, windows = None, view.windows
            if windows and windows.needs_mask:
                self.attn_mask = self.params.get_constant('attn_mask', shift_mask(*windows))
            self.qkv = QKV(width, columns)
            self.proj = Linear(columns, width, backend, bias=not self._partial)

    def add_to(self, F: Any, x: Any, norm: LayerNorm, bias: Any, gamma: Any, keep: Any, recompute: bool) -> Any:
        """x + this of norm(x), (B, N, C); x left out in shards other than the first."""
        if self._table:
            table, index = position_table(self.backend, F, x, self.relative_position_bias_table,
                                          self.relative_position_index)
            own = gather_bias(F, table, index, self._view.length, self._heads)
            bias = own if bias is None else bias + own
        weight, = operands(self.backend, F, x, self.qkv.weight)
        q_bias, v_bias = values(F, x, self.q_bias, self.v_bias)
        mask, = values(F, x, self.attn_mask) if self.attn_mask else [None]
        qkv = weight, F.concat(q_bias, F.zeros_like(q_bias), v_bias, dim=0)
        return self.backend.attention(F, x, pair(F, x, norm), qkv, pair(F, x, self.proj), bias, gamma, keep,
                                      mask, width=self._width, heads=self._heads, tokens=self._view.tokens,
                                      eps=norm.eps, windows=self._view.windows, size=self._size,
                                      partial=self._partial, recompute=recompute)


class Block(HybridBlock):
    """Attention and MLP, each normalised before, scaled per channel and randomly dropped after."""

    def __init__(self, config: ModelConfig, index: int, view: View, backend: OpBackend):
        super().__init__()
        self.backend = backend
        width, self._index, self._recompute = config.embed_dim, index, config.recompute
        self.inputs = drawn(config)
        with self.name_scope():
            self.gamma_1 = self.gamma_2 = None
            if config.init_values is not None:
                self.gamma_1 = self.params.get('gamma_1', shape=(width,))
                self.gamma_2 = self.params.get('gamma_2', shape=(width,))
            self.norm1 = LayerNorm(width, EPS, backend)
            self.attn = Attention(width, config.heads[0], view, config.use_rpb, backend)
            self.norm2 = LayerNorm(width, EPS, backend)
            self.mlp = Mlp(width, int(width * config.mlp_ratio), backend)

    def hybrid_forward(self, F: Any, x: Any, bias: Any, keep: Any, rows: Any = None, gamma_1: Any = None,
                       gamma_2: Any = None) -> Any:
        return self._mix(F, self._attend(F, x, self.attn, bias, keep), self.mlp, keep, rows)

    def halves(self, shared: Optional[RelativePositionBias]) -> Tuple[Half, Half]:
        """Return attention, with the bias that all blocks share, if any, and MLP."""
        return (Half(lambda F, x, given, attn, *tables: self._attend(F, x, attn, tables[0](x) if tables else None,
                                                                     given.get('keep')),
                     [self.attn, *([shared] if shared else [])], [self.norm1], self.inputs, (self.gamma_1,)),
                Half(lambda F, x, given, mlp: self._mix(F, x, mlp, given.get('keep'), given.get('rows')),
                     [self.mlp], [self.norm2], self.inputs, (self.gamma_2,)))

    def _attend(self, F: Any, x: Any, attn: Attention, bias: Any, keep: Any) -> Any:
        gamma, = operands(self.backend, F, x, self.gamma_1) if self.gamma_1 else [None]
        return attn.add_to(F, x, self.norm1, bias, gamma, column(F, keep, 2 * self._index), self._recompute)

    def _mix(self, F: Any, x: Any, mlp: Mlp, keep: Any, rows: Any) -> Any:
        gamma, = operands(self.backend, F, x, self.gamma_2) if self.gamma_2 else [None]
        return mlp.add_to(F, x, self.norm2, gamma, column(F, keep, 2 * self._index + 1), rows, self._recompute)


class VisionTransformer(HybridBlock):
    """Image (B, 3, H, W) to tokens (B, 1 + L, C), the cls token first, or with `dense` to `maps`, without one.

    With `masked`, patches whose mask (B, h, w) is 1 are replaced by a learned token before position is added.
    keep (B, 2 * depth) holds the factors of stochastic depth; without it nothing is dropped. rows (B, 1 + L) is 0 for
    tokens that nobody will use, see `OpBackend.mlp`.
    """
    prefix_tokens = 1

    def __init__(self, config: ModelConfig, masked: bool, pixels: PixelInput, dense: bool = False):
        super().__init__()
        width, backend, view = config.embed_dim, pixels.backend, View(*config.patches, not dense)
        self._width = width
        with self.name_scope():
            self.cls_token = self.pos_embed = self.mask_token = None
            if view.cls:
                self.cls_token = self.params.get('cls_token', shape=(1, 1, width))
            if config.use_ape:
                self.pos_embed = self.params.get('pos_embed', shape=(1, view.tokens, width))
            if masked:
                self.mask_token = self.params.get('mask_token', shape=(1, 1, width))
            self.patch_embed = PatchEmbed(config.size, config.patch_size, width, pixels)
            self.rel_pos_bias = RelativePositionBias(view, config.heads[0]) if config.use_shared_rpb else None
            self.blocks = nn.HybridSequential()
            for index in range(config.depth):
                seen = view if config.sees_all(index) else view._replace(window=config.window_size)
                self.blocks.add(Block(config, index, seen, backend))
            self.norm = None if config.use_mean_pooling or dense else LayerNorm(width, EPS, backend)
            # The reference's pre-training has a classifier's norm, too, and does not use it.
            self.fc_norm = LayerNorm(width, EPS, backend) if config.use_mean_pooling and masked else None

    def hybrid_forward(self, F: Any, image: Any, mask: Any = None, keep: Any = None, rows: Any = None,
                       cls_token: Any = None, pos_embed: Any = None, mask_token: Any = None) -> Any:
        x = self._embed(F, image, mask, cls_token, pos_embed, mask_token)
        given = {'keep': keep, 'rows': rows}
        for index in range(len(self.blocks)):
            x = self._run_block(index, F, x, given)
        return self.finish(x)

    def segments(self) -> List[Segment]:
        """Return the embedding and the blocks, of which the last takes `rows`; `finish` is left to the head."""
        tokens = self.cls_token, self.pos_embed, self.mask_token
        shared = [self.rel_pos_bias] if self.rel_pos_bias else []
        masked = ('mask',) if self.mask_token else ()
        embedding = Segment(lambda F, _, given: self._embed(F, given['image'], given.get('mask'),
                                                            *own(F, given['image'], *tokens)),
                            [self.patch_embed], ('image', *masked), tokens)
        return [embedding, *(Segment(partial(self._run_block, index), [block, *shared], block.inputs,
                                     pieces=block.halves(self.rel_pos_bias))
                             for index, block in enumerate(self.blocks))]

    def finish(self, x: Any) -> Any:
        """What follows the last block, (B, 1 + L, C) to the same."""
        return self.norm(x) if self.norm else x

    def maps(self, F: Any, image: Any, blocks: Sequence[int], keep: Any = None) -> List[Any]:
        """The tokens (B, L, C) after each of these blocks, numbered from 0."""
        pos_embed, = own(F, image, self.pos_embed)
        found, given, x = {}, {'keep': keep}, self._embed(F, image, None, None, pos_embed, None)
        for index in range(max(blocks) + 1):
            found[index] = x = self._run_block(index, F, x, given)
        return [found[index] for index in blocks]

    def _embed(self, F: Any, image: Any, mask: Any, cls_token: Any, pos_embed: Any, mask_token: Any) -> Any:
        """The tokens, (B, 1 + L, C) or without a cls token (B, L, C), that the first block takes."""
        x = self.patch_embed(image)
        if mask is not None:
            x = replace_masked(F, x, mask, mask_token, self._width)
        if cls_token is not None:
            # A row of cls tokens for each image of a batch whose size the graph does not know.
            cls = F.broadcast_like(cls_token, F.slice_axis(x, axis=1, begin=0, end=1), lhs_axes=(0,), rhs_axes=(0,))
            x = F.concat(cls, x, dim=1)
        return x if pos_embed is None else F.broadcast_add(x, pos_embed)

    def _run_block(self, index: int, F: Any, x: Any, given: Dict[str, Any]) -> Any:
        """One block. The bias that all of them share is in `given` once the first of a stage has computed it."""
        if self.rel_pos_bias:
            bias, users = given.get('bias') or (self.rel_pos_bias(x), 0)
            # From 8 users of an array on, MXNet lets each add to its gradient, which native operators cannot do. A
            # chain of copies, because it merges equal copies of one array.
            if users % 6 == 5:
                bias = F.identity(bias)
            given['bias'] = bias, users + 1
        else:
            bias = None
        return self.blocks[index](x, bias, given.get('keep'),
                                  given.get('rows') if index == len(self.blocks) - 1 else None)
