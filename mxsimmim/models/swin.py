"""Swin transformer: attention within windows, shifted every second block; stages that halve the resolution.

Liu et al. 2021 (arXiv:2103.14030), with the reference's parameter names.
"""
from typing import Any

import numpy as np
from mxnet.gluon import HybridBlock, nn

from ..config import ModelConfig
from .layers import (AUTO, LayerNorm, Linear, Mlp, PatchEmbed, add_relative_table, attend, drop_path, gather_bias,
                     relative_index, replace_masked, swap)

EPS = 1e-5
FORBIDDEN = -100.0  # added to the scores of pairs that only the shift brought into one window


def window_partition(F: Any, x: Any, side: int, window: int, width: int) -> Any:
    """(B, side*side, C) to (B * windows, window*window, C)."""
    n = side // window
    x = swap(F, x, AUTO, window, n, window * width)           # (B*n, n, window, window*C)
    return F.reshape(x, shape=(AUTO, window * window, width))


def window_reverse(F: Any, x: Any, side: int, window: int, width: int) -> Any:
    """The inverse of `window_partition`."""
    n = side // window
    x = swap(F, x, AUTO, n, window, window * width)           # (B*n, window, n, window*C)
    return F.reshape(x, shape=(AUTO, side * side, width))


def roll(F: Any, x: Any, side: int, width: int, shift: int) -> Any:
    """(B, side*side, C) rolled by `shift` rows and columns towards the origin; a negative shift rolls back."""
    shift %= side
    x = F.reshape(x, shape=(AUTO, side, side, width))
    for axis in (1, 2):
        x = F.concat(F.slice_axis(x, axis=axis, begin=shift, end=side),
                     F.slice_axis(x, axis=axis, begin=0, end=shift), dim=axis)
    return F.reshape(x, shape=(AUTO, side * side, width))


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
    """(windows, 1, N, N): 0 for pairs that belong together before the shift, FORBIDDEN for the others."""
    band = np.digitize(np.arange(side), (side - window, side - shift))  # which of the three strips a row falls in
    region = (band[:, None] * 3 + band).reshape(side // window, window, side // window, window)
    region = region.transpose(0, 2, 1, 3).reshape(-1, window * window)  # (windows, N)
    apart = region[:, :, None] != region[:, None, :]
    return np.where(apart, FORBIDDEN, 0.0).astype('float32')[:, None]


class WindowAttention(HybridBlock):
    """Multi-head attention with relative position bias within each window: (B * windows, N, C) to the same."""

    def __init__(self, width: int, heads: int, window: int, windows: int):
        super().__init__()
        self._width, self._heads, self._tokens, self._windows = width, heads, window * window, windows
        with self.name_scope():
            add_relative_table(self, relative_index(window), (2 * window - 1) ** 2, heads)
            self.qkv = Linear(width, 3 * width)
            self.proj = Linear(width, width)

    def hybrid_forward(self, F, x, mask, relative_position_bias_table, relative_position_index):
        bias = gather_bias(F, relative_position_bias_table, relative_position_index, self._tokens, self._heads)
        if mask is not None:
            bias = F.broadcast_add(bias, mask)                                                 # (windows, H, N, N)
        return self.proj(attend(F, self.qkv(x), self._heads, self._width, self._tokens, bias,
                                1 if mask is None else self._windows))


class Block(HybridBlock):
    """Window attention and MLP, each normalised before and randomly dropped after: (B, side*side, C) to the same."""

    def __init__(self, config: ModelConfig, stage: int, index: int):
        super().__init__()
        self._width = config.embed_dim * 2 ** stage
        self._side = config.grid >> stage
        self._window = min(config.window_size, self._side)
        shifted = index % 2 == 1 and self._side > config.window_size
        self._shift = config.window_size // 2 if shifted else 0
        self._draw = sum(config.depths[:stage]) + index
        with self.name_scope():
            self.attn_mask = None
            if self._shift:
                self.attn_mask = self.params.get_constant('attn_mask',
                                                          shift_mask(self._side, self._window, self._shift))
            self.norm1 = LayerNorm(self._width, EPS)
            self.attn = WindowAttention(self._width, config.num_heads[stage], self._window,
                                        (self._side // self._window) ** 2)
            self.norm2 = LayerNorm(self._width, EPS)
            self.mlp = Mlp(self._width, int(self._width * config.mlp_ratio))

    def hybrid_forward(self, F, x, keep, attn_mask=None):
        size = (self._side, self._window, self._width)
        y = self.norm1(x)
        if self._shift:
            y = roll(F, y, self._side, self._width, self._shift)
        y = window_reverse(F, self.attn(window_partition(F, y, *size), attn_mask), *size)
        if self._shift:
            y = roll(F, y, self._side, self._width, -self._shift)
        x = x + drop_path(F, y, keep, 2 * self._draw)
        return x + drop_path(F, self.mlp(self.norm2(x)), keep, 2 * self._draw + 1)


class PatchMerging(HybridBlock):
    """Four neighbours to one token of twice the width: (B, side*side, C) to (B, side*side/4, 2C)."""

    def __init__(self, side: int, width: int):
        super().__init__()
        self._side, self._width = side, width
        with self.name_scope():
            self.reduction = Linear(4 * width, 2 * width, bias=False)
            self.norm = LayerNorm(4 * width, EPS)

    def hybrid_forward(self, F, x):
        half, width = self._side // 2, self._width
        x = F.reshape(x, shape=(AUTO, half, 2, half, 2, width))
        x = F.transpose(x, axes=(0, 1, 3, 4, 2, 5))           # (B, half, half, x, y, C): order (0,0),(1,0),(0,1),(1,1)
        return self.reduction(self.norm(F.reshape(x, shape=(AUTO, half * half, 4 * width))))


class Stage(HybridBlock):
    """Blocks at one resolution, then the merging into the next, except after the last."""

    def __init__(self, config: ModelConfig, stage: int):
        super().__init__()
        last = stage == config.stages - 1
        with self.name_scope():
            self.blocks = nn.HybridSequential()
            for index in range(config.depths[stage]):
                self.blocks.add(Block(config, stage, index))
            self.downsample = None if last else PatchMerging(config.grid >> stage, config.embed_dim * 2 ** stage)

    def hybrid_forward(self, F, x, keep):
        for block in self.blocks:
            x = block(x, keep)
        return self.downsample(x) if self.downsample else x


class SwinTransformer(HybridBlock):
    """Image (B, 3, H, W) to tokens (B, L, C) of the last stage.

    With `masked`, patches whose mask (B, h, w) is 1 are replaced by a learned token before position is added.
    keep (B, 2 * blocks) holds the factors of stochastic depth; without it nothing is dropped.
    """
    prefix_tokens = 0

    def __init__(self, config: ModelConfig, masked: bool):
        super().__init__()
        width, side = config.embed_dim, config.grid
        self._width = width
        with self.name_scope():
            self.absolute_pos_embed = self.mask_token = None
            if config.use_ape:
                self.absolute_pos_embed = self.params.get('absolute_pos_embed', shape=(1, side * side, width))
            if masked:
                self.mask_token = self.params.get('mask_token', shape=(1, 1, width))
            self.patch_embed = PatchEmbed(config.img_size, config.patch_size, width, EPS)
            self.layers = nn.HybridSequential()
            for stage in range(config.stages):
                self.layers.add(Stage(config, stage))
            self.norm = LayerNorm(width * 2 ** (config.stages - 1), EPS)

    def hybrid_forward(self, F, image, mask=None, keep=None, absolute_pos_embed=None, mask_token=None):
        x = self.patch_embed(image)
        if mask is not None:
            x = replace_masked(F, x, mask, mask_token, self._width)
        if absolute_pos_embed is not None:
            x = F.broadcast_add(x, absolute_pos_embed)
        for layer in self.layers:
            x = layer(x, keep)
        return self.norm(x)
