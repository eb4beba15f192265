"""The reference form of the operators: MXNet's own, for every device, and what the native form is tested against.

Written for speed on a CPU where that costs nothing elsewhere. See `OpBackend`; `recompute` and `precision` are for the
native form.

Shapes: B images, L tokens, C channels, H heads of D channels, N tokens that attend to each other.
"""
import math
from typing import Any, Callable, Optional, Tuple

from .boxes import match_boxes, pyramid_pool
from .layout import Windows
from .pixels import AUTO, masked_loss, patchify, swap

__all__ = ['attention', 'cosine_attention', 'group_norm', 'layer_norm', 'linear', 'masked_loss', 'match_boxes', 'mlp',
           'patchify', 'pyramid_pool']

Pair = Tuple[Any, Any]


def row_sums(F: Any, x: Any, weights: Any) -> Any:
    """(..., C) times weights (1, C), summed over the last axis: (..., 1)."""
    return F.FullyConnected(x, weights, num_hidden=1, no_bias=True, flatten=False)


def outer(F: Any, column: Any, row: Any, size: int, bias: Any = None) -> Any:
    """column (..., 1) times row (of `size` values) plus bias (size,): (..., size).

    With a column of ones this is broadcasting, whose gradient, a sum over rows, MXNet computes ten times slower on a
    CPU than this matrix product's.
    """
    inputs = [column, F.reshape(row, shape=(AUTO, 1))] + ([] if bias is None else [bias])
    return F.FullyConnected(*inputs, num_hidden=size, no_bias=bias is None, flatten=False)


def spread(F: Any, row: Any, like: Any, size: int) -> Any:
    """row (of `size` values) repeated to the shape of `like` (..., size)."""
    return outer(F, F.ones_like(F.slice_axis(like, axis=-1, begin=0, end=1)), row, size)


def layer_norm(F: Any, x: Any, weight: Any, bias: Any, eps: float, *, width: int) -> Any:
    """Compute `OpBackend.layer_norm`."""
    # F.LayerNorm with its backward three times as fast on a CPU (docs/benchmarks.md): row sums and outer products are
    # matrix products. The gradient through the mean inside the variance is zero, hence BlockGrad.
    ones = F.ones_like(weight)
    average = F.reshape(ones / width, shape=(1, AUTO))
    mean = row_sums(F, x, average)                                                             # (..., 1)
    centred = x - F.BlockGrad(outer(F, mean, ones, width))
    scale = F.rsqrt(row_sums(F, F.square(centred), average) + eps)
    return x * outer(F, scale, weight, width) + outer(F, -mean * scale, weight, width, bias)


def group_norm(F: Any, x: Any, weight: Any, bias: Any, eps: float, *, groups: int, channels: int) -> Any:
    """Compute `OpBackend.group_norm`."""
    # MXNet's operator scales groups, not channels.
    one = F.slice_axis(weight, axis=0, begin=0, end=groups)
    plain = F.GroupNorm(x, F.ones_like(one), F.zeros_like(one), num_groups=groups, eps=eps)
    each = (1, channels, 1, 1)
    return F.broadcast_add(F.broadcast_mul(plain, F.reshape(weight, shape=each)), F.reshape(bias, shape=each))


def linear(F: Any, x: Any, weight: Any, bias: Any = None, gelu: bool = False, *, units: int,
           precision: str = 'float32') -> Any:
    """Compute `OpBackend.linear`."""
    inputs = [x, weight] + ([] if bias is None else [bias])
    y = F.FullyConnected(*inputs, num_hidden=units, no_bias=bias is None, flatten=False)
    return F.LeakyReLU(y, act_type='gelu') if gelu else y


def attention(F: Any, x: Any, norm: Pair, qkv: Pair, proj: Pair, bias: Any = None, gamma: Any = None, keep: Any = None,
              mask: Any = None, *, width: int, heads: int, tokens: int, eps: float, windows: Optional[Windows] = None,
              size: Optional[int] = None, partial: bool = False, recompute: bool = False, precision: str = 'float32'
              ) -> Any:
    """Compute `OpBackend.attention`."""
    y, count, size = layer_norm(F, x, *norm, eps, width=width), 1, size or width // heads
    if windows:
        y = partition(F, roll(F, pad(F, y, windows, width), windows, width), windows, width)
        tokens = windows.window ** 2
    if mask is not None:
        assert windows, 'only windows have a mask'
        count = math.prod(windows.counts)
        bias = F.broadcast_axis(mask, axis=1, size=heads) if bias is None else F.broadcast_add(bias, mask)
    y = attend(F, linear(F, y, *qkv, units=3 * heads * size), heads, size, tokens, bias, count)
    y = linear(F, y, *proj, units=width)
    if windows:
        y = roll(F, join(F, y, windows, width), windows._replace(shift=-windows.shift), width)
        y = crop(F, y, windows, width)
    return residual(F, None if partial else x, y, gamma, keep, width)


def cosine_attention(F: Any, x: Any, qkv: Pair, proj: Pair, scale: Any, bias: Any, mask: Any = None, *, width: int,
                     heads: int, size: int, windows: Windows, precision: str = 'float32',
                     product: Callable[..., Any] = linear) -> Any:
    """Compute `OpBackend.cosine_attention`, with this `product` of tokens and weights."""
    if mask is not None:
        bias = F.broadcast_add(bias, mask)
    tokens, count = windows.window ** 2, 1 if mask is None else math.prod(windows.counts)
    y = partition(F, roll(F, pad(F, x, windows, width), windows, width), windows, width)
    y = product(F, y, *qkv, units=3 * heads * size, precision=precision)
    y = attend(F, y, heads, size, tokens, bias, count, scale)
    y = join(F, product(F, y, *proj, units=width, precision=precision), windows, width)
    return crop(F, roll(F, y, windows._replace(shift=-windows.shift), width), windows, width)


def mlp(F: Any, x: Any, norm: Pair, fc1: Pair, fc2: Pair, gamma: Any = None, keep: Any = None, rows: Any = None, *,
        width: int, hidden: int, eps: float, partial: bool = False, recompute: bool = False,
        precision: str = 'float32') -> Any:
    """Compute `OpBackend.mlp`; all rows are computed."""
    y = linear(F, layer_norm(F, x, *norm, eps, width=width), *fc1, gelu=True, units=hidden)
    return residual(F, None if partial else x, linear(F, y, *fc2, units=width), gamma, keep, width)


def residual(F: Any, x: Any, branch: Any, gamma: Any, keep: Any, width: int) -> Any:
    """x + keep * gamma * branch, (B, L, C), the first left out where it is None; see `attention`."""
    if gamma is not None:
        branch = branch * spread(F, gamma, branch, width)
    if keep is not None:
        branch = F.broadcast_mul(branch, F.expand_dims(keep, axis=2))
    return branch if x is None else x + branch


def attend(F: Any, qkv: Any, heads: int, size: int, tokens: int, bias: Any, windows: int = 1, scale: Any = None) -> Any:
    """Softmax attention of H heads of D = `size` channels over N tokens: qkv (B, N, 3HD) to (B, N, HD).

    bias (windows, H, N, N) or None is added to the scores, B counting the windows of each image one after another.
    Scores are products of queries and keys over the root of D or, with scale (H, 1, 1), cosines times that.
    """
    pairs = windows * heads * tokens * tokens
    qkv = F.reshape(swap(F, qkv, AUTO, tokens, 3 * heads, size), shape=(AUTO, 3, heads * tokens * size))
    q, k, v = (F.reshape(x, shape=(AUTO, tokens, size)) for x in F.split(qkv, num_outputs=3, axis=1))  # (B*H, N, D)
    if scale is None:
        q = q * size ** -0.5
    else:
        q, k = unit(F, q, heads, size, tokens, scale), unit(F, k, heads, size, tokens)
    scores = F.batch_dot(q, k, transpose_b=True)                                               # (B*H, N, N)
    if bias is not None:
        scores = F.reshape(scores, shape=(AUTO, pairs))
        scores = F.reshape(scores + spread(F, bias, scores, pairs), shape=(AUTO, tokens, tokens))
    mixed = F.batch_dot(F.softmax(scores, axis=-1), v)                                         # (B*H, N, D)
    return F.reshape(swap(F, mixed, AUTO, heads, tokens, size), shape=(AUTO, tokens, heads * size))


def unit(F: Any, x: Any, heads: int, size: int, tokens: int, scale: Any = None) -> Any:
    """x (B*H, N, D) divided by the length of each row; then times scale (H, 1, 1), if there is one."""
    ones = F.ones_like(F.slice_axis(F.slice_axis(x, axis=0, begin=0, end=1), axis=1, begin=0, end=1))
    squares = row_sums(F, F.square(x), F.reshape(ones, shape=(1, size)))                       # (B*H, N, 1)
    factor = F.rsqrt(F.maximum(squares, 1e-24))
    if scale is not None:
        factor = F.reshape(F.broadcast_mul(F.reshape(factor, shape=(AUTO, heads, tokens)),
                                           F.reshape(scale, shape=(1, heads, 1))), shape=(AUTO, tokens, 1))
    return x * outer(F, factor, ones, size)


def pad(F: Any, x: Any, windows: Windows, width: int) -> Any:
    """(B, height * width, C) with zeros at the bottom and on the right, as the windows need them."""
    sides = windows.height, windows.width
    if windows.padded == sides:
        return x
    x = F.reshape(x, shape=(AUTO, *sides, width))
    for axis, side, padded in zip((1, 2), sides, windows.padded):
        zeros = F.zeros_like(F.slice_axis(x, axis=axis, begin=0, end=1))
        x = F.concat(x, *[zeros] * (padded - side), dim=axis) if padded > side else x
    return F.reshape(x, shape=(AUTO, windows.padded[0] * windows.padded[1], width))


def crop(F: Any, x: Any, windows: Windows, width: int) -> Any:
    """The inverse of `pad`."""
    sides = windows.height, windows.width
    if windows.padded == sides:
        return x
    x = F.reshape(x, shape=(AUTO, *windows.padded, width))
    for axis, side in zip((1, 2), sides):
        x = F.slice_axis(x, axis=axis, begin=0, end=side)
    return F.reshape(x, shape=(AUTO, sides[0] * sides[1], width))


def partition(F: Any, x: Any, windows: Windows, width: int) -> Any:
    """(B, padded height * width, C) to (B * windows, window^2, C)."""
    window, across = windows.window, windows.counts[1]
    x = swap(F, x, AUTO, window, across, window * width)                  # (B*down, across, window, window*C)
    return F.reshape(x, shape=(AUTO, window * window, width))


def join(F: Any, x: Any, windows: Windows, width: int) -> Any:
    """The inverse of `partition`."""
    window, across = windows.window, windows.counts[1]
    x = swap(F, x, AUTO, across, window, window * width)                  # (B*down, window, across, window*C)
    return F.reshape(x, shape=(AUTO, windows.padded[0] * windows.padded[1], width))


def roll(F: Any, x: Any, windows: Windows, width: int) -> Any:
    """(B, padded height * width, C) rolled by the windows' shifts towards the origin; negative ones roll back."""
    sides = windows.padded
    if windows.shifts == (0, 0):
        return x
    x = F.reshape(x, shape=(AUTO, *sides, width))
    for axis, side, by in zip((1, 2), sides, windows.shifts):
        if by:
            x = F.concat(F.slice_axis(x, axis=axis, begin=by % side, end=side),
                         F.slice_axis(x, axis=axis, begin=0, end=by % side), dim=axis)
    return F.reshape(x, shape=(AUTO, sides[0] * sides[1], width))
