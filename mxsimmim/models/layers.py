"""What ViT and Swin share: linear maps on tokens, normalisation, attention, MLP, patches as rows.

Attributes carry the reference implementation's names, so structural parameter names are its checkpoint's names.
Shapes: B images, L tokens, C width, H heads, D = C/H, p the side of a patch in pixels.
"""
from typing import Any, Dict, Optional

import numpy as np
from mxnet.gluon import HybridBlock, Parameter, nn

AUTO = -1  # in MXNet's reshape: infer this size


def named_parameters(net: HybridBlock) -> Dict[str, Parameter]:
    """Trained parameters by structural name, which is the reference's name; constants are left out."""
    return {name: p for name, p in net._collect_params_with_prefix().items() if p.grad_req != 'null'}


def swap(F: Any, x: Any, *shape: int) -> Any:
    """Views x as the 4-D `shape` and swaps its middle axes, the one transpose MXNet does at memory speed on a CPU."""
    return F.transpose(F.reshape(x, shape=shape), axes=(0, 2, 1, 3))


def to_cells(F: Any, image: Any, side: int, cell: int) -> Any:
    """(B, 3, side, side) to (B, cells, 3*cell*cell): a row a cell, ordered (channel, y, x) as in a convolution."""
    n = side // cell
    rows = swap(F, image, AUTO, 3, n, cell * side)            # (B, n, 3, cell*side)
    cells = swap(F, rows, AUTO, 3 * cell, n, cell)            # (B*n, n, 3*cell, cell)
    return F.reshape(cells, shape=(AUTO, n * n, 3 * cell * cell))


def from_cells(F: Any, cells: Any, side: int, cell: int) -> Any:
    """The inverse of `to_cells`; the order is that of PyTorch's pixel shuffle."""
    n = side // cell
    rows = swap(F, cells, AUTO, n, 3 * cell, cell)            # (B*n, 3*cell, n, cell)
    image = swap(F, rows, AUTO, n, 3, cell * side)            # (B, 3, n, cell*side)
    return F.reshape(image, shape=(AUTO, 3, side, side))


class Linear(nn.Dense):
    """`Dense` on the last axis: (..., inputs) to (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(outputs, in_units=inputs, use_bias=bias, flatten=False)


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


class LayerNorm(HybridBlock):
    """Layer normalisation of the last axis, with the reference's parameter names."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self._eps, self._width = eps, width
        with self.name_scope():
            self.weight = self.params.get('weight', shape=(width,))
            self.bias = self.params.get('bias', shape=(width,))

    def hybrid_forward(self, F, x, weight, bias):
        # F.LayerNorm with its backward three times as fast on a CPU (docs/benchmarks.md): row sums and outer products
        # are matrix products. The gradient through the mean inside the variance is zero, hence BlockGrad.
        ones = F.ones_like(weight)
        average = F.reshape(ones / self._width, shape=(1, AUTO))
        mean = row_sums(F, x, average)                                                          # (..., 1)
        centred = x - F.BlockGrad(outer(F, mean, ones, self._width))
        scale = F.rsqrt(row_sums(F, F.square(centred), average) + self._eps)
        return x * outer(F, scale, weight, self._width) + outer(F, -mean * scale, weight, self._width, bias)


class PatchEmbed(HybridBlock):
    """(B, 3, side, side) to (B, L, C). A convolution whose stride is its kernel, written as a linear map of patches:

    MXNet 1.9.1's oneDNN cannot reorder a convolution's layout inside a hybridized transformer (docs/LOG.md).
    """

    def __init__(self, side: int, patch: int, width: int, eps: Optional[float] = None):
        super().__init__()
        self._side, self._patch = side, patch
        with self.name_scope():
            self.proj = Linear(3 * patch * patch, width)
            self.norm = LayerNorm(width, eps) if eps is not None else None

    def hybrid_forward(self, F, image):
        tokens = self.proj(to_cells(F, image, self._side, self._patch))
        return self.norm(tokens) if self.norm else tokens


class Mlp(HybridBlock):
    """Two linear maps with exact (erf) GELU between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        with self.name_scope():
            self.fc1 = Linear(width, hidden)
            self.fc2 = Linear(hidden, width)

    def hybrid_forward(self, F, x):
        return self.fc2(F.LeakyReLU(self.fc1(x), act_type='gelu'))


def attend(F: Any, qkv: Any, heads: int, width: int, tokens: int, bias: Any, windows: int = 1) -> Any:
    """Softmax attention of H heads over N tokens: qkv (B, N, 3C) to (B, N, C).

    bias (windows, H, N, N) or None is added to the scores, B counting the windows of each image one after another.
    """
    size, pairs = width // heads, windows * heads * tokens * tokens
    qkv = F.reshape(swap(F, qkv, AUTO, tokens, 3 * heads, size), shape=(AUTO, 3, heads * tokens * size))
    q, k, v = (F.reshape(x, shape=(AUTO, tokens, size)) for x in F.split(qkv, num_outputs=3, axis=1))  # (B*H, N, D)
    scores = F.batch_dot(q * size ** -0.5, k, transpose_b=True)                                # (B*H, N, N)
    if bias is not None:
        scores = F.reshape(scores, shape=(AUTO, pairs))
        scores = F.reshape(scores + spread(F, bias, scores, pairs), shape=(AUTO, tokens, tokens))
    mixed = F.batch_dot(F.softmax(scores, axis=-1), v)                                         # (B*H, N, D)
    return F.reshape(swap(F, mixed, AUTO, heads, tokens, size), shape=(AUTO, tokens, width))


def relative_index(side: int) -> np.ndarray:
    """Row of the bias table for each pair of a window's side*side tokens: (side^2, side^2), int.

    Row (dy + side-1) * (2*side-1) + (dx + side-1), with (dy, dx) from key to query.
    """
    y, x = np.divmod(np.arange(side * side), side)
    return (y[:, None] - y + side - 1) * (2 * side - 1) + (x[:, None] - x + side - 1)


def add_relative_table(block: HybridBlock, index: np.ndarray, rows: int, heads: int) -> None:
    """Gives a block a bias table (rows, H) and the constant index of each pair of tokens into it."""
    block.relative_position_bias_table = block.params.get('relative_position_bias_table', shape=(rows, heads))
    block.relative_position_index = block.params.get_constant('relative_position_index',
                                                              index.reshape(-1).astype('int32'))


def gather_bias(F: Any, table: Any, index: Any, tokens: int, heads: int) -> Any:
    """Table (rows, H) spread by index (N*N,) to an attention bias (1, H, N, N)."""
    pairs = F.take(table, index)                                                               # (N*N, H)
    return F.reshape(F.transpose(pairs), shape=(1, heads, tokens, tokens))


def replace_masked(F: Any, x: Any, mask: Any, mask_token: Any, width: int) -> Any:
    """x (B, L, C) with the rows whose mask (B, h, w) is 1 replaced by the mask token (1, 1, C)."""
    hidden = F.cast(F.reshape(mask, shape=(0, AUTO, 1)), dtype='float32')                       # (B, L, 1)
    return x * outer(F, 1 - hidden, F.ones_like(mask_token), width) + outer(F, hidden, mask_token, width)


def drop_path(F: Any, branch: Any, keep: Any, draw: int) -> Any:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382): scales an image's branch by its column of keep, see
    `keep_factors`; None keeps all as it is."""
    if keep is None:
        return branch
    return F.broadcast_mul(branch, F.expand_dims(F.slice_axis(keep, axis=1, begin=draw, end=draw + 1), axis=2))


def keep_factors(uniform: np.ndarray, rate: float) -> np.ndarray:
    """What stochastic depth multiplies each branch with: 0 to drop it, else 1 / (1 - its rate).

    uniform (B, 2 * blocks), in [0, 1), two columns a block. They come with the batch, so what is dropped depends on
    the sample and not on the device. Rates grow linearly from 0 in the first block to `rate` in the last.
    """
    keep = 1 - np.repeat(np.linspace(0, rate, uniform.shape[1] // 2), 2)
    return ((uniform < keep) / keep).astype('float32')
