"""SimMIM pre-training in plain PyTorch: what `train.py` measures the project against.

The same networks, from the same formulas and under the same weight names, so that a weight file fits both; the tests
hold both to the same recorded numbers. Written for speed within PyTorch's own operators. Shapes: B images, N tokens,
C channels, H heads.
"""
import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def build_simmim(type: str = 'vit', **keys: Any) -> 'SimMIM':
    """The network of a configuration's `model` section; the keys it does not know must have their default there."""
    return SimMIM(VisionTransformer(**keys) if type == 'vit' else SwinTransformer(**keys))


class SimMIM(nn.Module):
    """``net(image (B, 3, S, S), mask (B, s, s)) -> loss``: the mean absolute error of the masked pixels."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(nn.Conv2d(encoder.out_dim, encoder.stride ** 2 * 3, 1))

    def reconstruct(self, image: Tensor, mask: Tensor) -> Tensor:
        tokens = self.encoder(image, mask.flatten(1).to(image.dtype))  # (B, N, C)
        weight, bias = self.decoder[0].weight, self.decoder[0].bias
        cells = F.linear(tokens, weight.flatten(1), bias)  # a 1x1 convolution of the (C, s, s) map
        side = int(math.sqrt(cells.shape[1]))
        return F.pixel_shuffle(cells.transpose(1, 2).unflatten(2, (side, side)), self.encoder.stride)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        scale = image.shape[-1] // mask.shape[-1]
        hidden = mask.to(image.dtype).repeat_interleave(scale, 1).repeat_interleave(scale, 2).unsqueeze(1)
        error = (image - self.reconstruct(image, mask)).abs() * hidden
        return error.sum() / (hidden.sum() + 1e-5) / image.shape[1]


class PatchEmbed(nn.Module):
    """Patches of `size` pixels a side to tokens: (B, 3, S, S) -> (B, N, C)."""

    def __init__(self, size: int, dim: int, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, size, size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def replace_masked(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """x (1 - w) + mask_token w, with the mask w of shape (B, N)."""
    return torch.lerp(tokens, mask_token.to(tokens.dtype), mask.unsqueeze(-1).to(tokens.dtype))


def attend(qkv: Tensor, heads: int, bias: Tensor) -> Tensor:
    """Softmax attention of (..., N, 3C), with `bias` (H, N, N) or wider added to the scores. Returns (..., N, C)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).transpose(-4, -2).unbind(-3)  # (..., H, N, d)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def relative_index(side: int) -> Tensor:
    """(N, N) rows of the table of offsets of a square of `side` tokens: (dy + side - 1)(2 side - 1) + dx + side - 1."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij')
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1


# ViT

class RelativePositionBias(nn.Module):
    """One table for all blocks, with three more rows: cls to token, token to cls, cls to cls."""

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        rows = (2 * side - 1) ** 2 + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        index = F.pad(relative_index(side), (1, 0, 1, 0))
        index[0, :], index[:, 0], index[0, 0] = rows - 3, rows - 2, rows - 1
        self.register_buffer('index', index, persistent=False)

    def forward(self) -> Tensor:  # (H, N, N)
        return self.relative_position_bias_table[self.index].permute(2, 0, 1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return self.proj(attend(F.linear(x, self.qkv.weight, qkv_bias), self.heads, bias))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, init_values: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values))
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = torch.addcmul(x, self.gamma_1, self.attn(self.norm1(x), bias))
        return torch.addcmul(x, self.gamma_2, self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Patch tokens of the masked image, (B, N, C); layer scale, and one relative position table for all blocks."""
    no_decay = ('cls_token',)

    def __init__(self, img_size: int = 224, patch_size: int = 16, embed_dim: int = 768, depth: int = 12,
                 num_heads: int = 12, mlp_ratio: float = 4.0, init_values: float = 0.1) -> None:
        super().__init__()
        self.out_dim, self.stride = embed_dim, patch_size
        self.patch_embed = PatchEmbed(patch_size, embed_dim, norm=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.rel_pos_bias = RelativePositionBias(img_size // patch_size, num_heads)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, init_values) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        x = replace_masked(self.patch_embed(image), mask, self.mask_token)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        bias = self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)[:, 1:]


# Swin

class WindowAttention(nn.Module):
    """Attention inside each window of `window` tokens a side, with a relative position table of its own."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer('index', relative_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, hidden: Optional[Tensor]) -> Tensor:
        """x (B, W, n, C), W windows of n tokens; `hidden` (W, 1, n, n) is added to the scores."""
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        return self.proj(attend(self.qkv(x), self.heads, bias if hidden is None else bias + hidden))


class SwinBlock(nn.Module):
    """A block on side x side tokens; every second one of a stage has its windows shifted by half."""

    def __init__(self, dim: int, heads: int, side: int, window: int, shifted: bool, mlp_ratio: float) -> None:
        super().__init__()
        self.side, self.window = side, min(window, side)
        self.shift = window // 2 if shifted and side > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, self.window)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        hidden = shift_mask(side, window, self.shift) if self.shift else None
        self.register_buffer('hidden', hidden, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, side^2, C)
        y = self.norm1(x).unflatten(1, (self.side, self.side))
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.attn(to_windows(y, self.window), self.hidden)
        y = from_windows(y, self.side)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.flatten(1, 2)
        return x + self.mlp(self.norm2(x))


def to_windows(x: Tensor, window: int) -> Tensor:
    """(B, s, s, C) -> (B, W, n, C)."""
    batch, side, _, dim = x.shape
    grid = side // window
    x = x.view(batch, grid, window, grid, window, dim).transpose(2, 3)
    return x.reshape(batch, grid * grid, window * window, dim)


def from_windows(x: Tensor, side: int) -> Tensor:
    """(B, W, n, C) -> (B, s, s, C)."""
    batch, windows, length, dim = x.shape
    grid, window = int(math.sqrt(windows)), int(math.sqrt(length))
    return x.view(batch, grid, grid, window, window, dim).transpose(2, 3).reshape(batch, side, side, dim)


def shift_mask(side: int, window: int, shift: int) -> Tensor:
    """(W, 1, n, n): -100 between tokens that only the cyclic shift made neighbours, else 0."""
    strip = (torch.arange(side) >= side - window).int() + (torch.arange(side) >= side - shift).int()
    region = 3 * strip[:, None] + strip
    region = to_windows(region.view(1, side, side, 1), window)[0]  # (W, n, 1)
    return -100.0 * (region != region.transpose(1, 2)).float().unsqueeze(1)


class PatchMerging(nn.Module):
    """Four neighbouring tokens to one of twice the width: (B, side^2, C) -> (B, side^2 / 4, 2C)."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        half = self.side // 2
        x = x.view(len(x), half, 2, half, 2, -1).permute(0, 1, 3, 4, 2, 5)  # columns outermost: (0,0) (1,0) (0,1) (1,1)
        return self.reduction(self.norm(x.reshape(len(x), half * half, -1)))


class Stage(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, side: int, window: int, mlp_ratio: float, last: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(SwinBlock(dim, heads, side, window, i % 2 == 1, mlp_ratio) for i in range(depth)))
        self.downsample = nn.Identity() if last else PatchMerging(dim, side)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class SwinTransformer(nn.Module):
    """Tokens of the masked image at the last stage's resolution, (B, N, C)."""
    no_decay = ('mask_token',)

    def __init__(self, img_size: int, patch_size: int, embed_dim: int, depths: Sequence[int], num_heads: Sequence[int],
                 window_size: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        last = len(depths) - 1
        self.out_dim, self.stride = embed_dim * 2 ** last, patch_size * 2 ** last
        self.patch_embed = PatchEmbed(patch_size, embed_dim, norm=True)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.layers = nn.Sequential(*(
            Stage(embed_dim * 2 ** i, depth, heads, img_size // patch_size >> i, window_size, mlp_ratio, i == last)
            for i, (depth, heads) in enumerate(zip(depths, num_heads))))
        self.norm = nn.LayerNorm(self.out_dim)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.layers(replace_masked(self.patch_embed(image), mask, self.mask_token)))


def parameter_groups(net: SimMIM, decay: float) -> List[Dict[str, Any]]:
    """For an optimizer: matrices, tokens and tables decayed; vectors, biases and the encoder's `no_decay` not."""
    exempt = tuple(f'encoder.{name}' for name in net.encoder.no_decay)
    groups: Tuple[List[Tensor], List[Tensor]] = ([], [])
    for name, parameter in net.named_parameters():
        groups[parameter.ndim > 1 and name not in exempt].append(parameter)
    return [{'params': groups[0], 'weight_decay': 0.0}, {'params': groups[1], 'weight_decay': decay}]
