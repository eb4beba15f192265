"""What ViT and Swin share: linear maps on tokens, normalisation, attention, MLP, patches as rows.

Attributes carry the reference implementation's names, so structural parameter names are its checkpoint's names.
Shapes: B images, L tokens, C width, H heads of D channels, p the side of a patch in pixels.
"""
from typing import Any, Callable, List, Optional, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet.gluon import Constant, HybridBlock, Parameter, ParameterDict, nn

from ..ops import OpBackend
from ..ops.native import Added
from ..ops.reference import AUTO, outer
from .pixels import PixelInput
from .shards import WHOLE, Shard


def values(F: Any, x: Any, *parameters: Parameter) -> List[Any]:
    """Parameters of any block as hybrid_forward is given its own: arrays on x's context, or variables."""
    return [p.data(x.context) if F is mx.nd else p.var() for p in parameters]


def operands(backend: OpBackend, F: Any, x: Any, *parameters: Parameter) -> List[Any]:
    """`values` for the backend's own operators, of which native ones are told to which gradients they add."""
    return [Added(value) if p.grad_req == 'add' and backend.is_native else value
            for p, value in zip(parameters, values(F, x, *parameters))]


def position_table(backend: OpBackend, F: Any, x: Any, table: Parameter, index: Parameter) -> List[Any]:
    """`values` of a table and its index.

    Where the gradients of native networks add up, it is that of a copy: the terms of a row are then added to each other
    first, as without accumulation, and not one by one to what is there.
    """
    value, rows = values(F, x, table, index)
    return [F.identity(value) if table.grad_req == 'add' and backend.is_native else value, rows]


def pair(F: Any, x: Any, block: Union['Linear', 'LayerNorm']) -> Tuple[Any, Any]:
    """Weight and bias of a linear map or a normalisation, the bias None where it has none."""
    weight, *bias = operands(block.backend, F, x, *filter(None, (block.weight, block.bias)))
    return weight, bias[0] if bias else None


class Linear(nn.Dense):
    """A linear map of the last axis: (..., inputs) to (..., outputs)."""

    def __init__(self, inputs: int, outputs: int, backend: OpBackend, bias: bool = True):
        super().__init__(outputs, in_units=inputs, use_bias=bias, flatten=False)
        self.backend = backend

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        return self.backend.linear(F, x, *pair(F, x, self), units=self._units)


class LayerNorm(HybridBlock):
    """Layer normalisation of the last axis, with the reference's parameter names."""

    def __init__(self, width: int, eps: float, backend: OpBackend):
        super().__init__()
        self.eps, self._width, self.backend = eps, width, backend
        with self.name_scope():
            self.weight = self.params.get('weight', shape=(width,))
            self.bias = self.params.get('bias', shape=(width,))

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any) -> Any:
        return self.backend.layer_norm(F, x, *pair(F, x, self), self.eps, width=self._width)


class PatchEmbed(HybridBlock):
    """(B, 3, height, width) to (B, L, C): a convolution whose stride is its kernel, written as a linear map of patches.

    MXNet 1.9.1's oneDNN cannot reorder a convolution's layout inside a hybridized transformer (docs/LOG.md).
    Images are as `pixels` prepares them: normalised, or with native operators also uint8 (B, height, width, 3).
    """

    def __init__(self, size: Tuple[int, int], patch: int, width: int, pixels: PixelInput, eps: Optional[float] = None):
        super().__init__()
        self._size, self._patch, self._pixels = size, patch, pixels
        with self.name_scope():
            self.proj = Linear(3 * patch * patch, width, pixels.backend)
            self.norm = LayerNorm(width, eps, pixels.backend) if eps is not None else None

    def hybrid_forward(self, F: Any, image: Any) -> Any:
        tokens = self.proj(self._pixels.cells(F, image, self._size, self._patch))
        return self.norm(tokens) if self.norm else tokens


class Divisible(HybridBlock):
    """Heads or hidden channels, which can be cut. The last argument of its constructor is a shard of them."""
    _whole: Tuple[Any, ...]  # the arguments before it

    def part(self, shard: Shard) -> 'Divisible':
        """Build the same for a shard of these heads or channels, without weights."""
        build: Callable[..., 'Divisible'] = type(self)
        return build(*self._whole, shard)


class Mlp(Divisible):
    """The parameters of two linear maps with exact (erf) GELU between; half a block, see `OpBackend.mlp`.

    Those of a part of the hidden channels, where `shard` is one.
    """

    def __init__(self, width: int, hidden: int, backend: OpBackend, shard: Shard = WHOLE):
        super().__init__()
        self._whole = width, hidden, backend
        self._width, self._hidden, self._partial, self.backend = width, hidden // shard.count, shard.index > 0, backend
        with self.name_scope():
            self.fc1 = Linear(width, self._hidden, backend)
            self.fc2 = Linear(self._hidden, width, backend, bias=not self._partial)

    def branch(self, F: Any, x: Any) -> Any:
        """This of x, (B, L, C) to the same; parts add up to the whole."""
        hidden = self.backend.linear(F, x, *pair(F, x, self.fc1), gelu=True, units=self._hidden)
        return self.backend.linear(F, hidden, *pair(F, x, self.fc2), units=self._width)

    def add_to(self, F: Any, x: Any, norm: LayerNorm, gamma: Any, keep: Any, rows: Any, recompute: bool) -> Any:
        """x + this of norm(x), (B, L, C); x left out in shards other than the first."""
        return self.backend.mlp(F, x, pair(F, x, norm), pair(F, x, self.fc1), pair(F, x, self.fc2), gamma, keep, rows,
                                width=self._width, hidden=self._hidden, eps=norm.eps, partial=self._partial,
                                recompute=recompute)


def relative_index(height: int, width: int) -> np.ndarray:
    """Row of the bias table for each pair of N = height * width tokens: (N, N), int.

    Row (dy + height-1) * (2*width-1) + (dx + width-1), with (dy, dx) from key to query.
    """
    y, x = np.divmod(np.arange(height * width), width)
    return (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)


def table_rows(height: int, width: int) -> int:
    """Rows of the bias table of a map, or window, of height x width tokens: one for each offset."""
    return (2 * height - 1) * (2 * width - 1)


def relative_table(params: ParameterDict, index: np.ndarray, rows: int, heads: int) -> Tuple[Parameter, Constant]:
    """A block's bias table (rows, H) and the constant index of each pair of tokens into it, new among `params`."""
    return (params.get('relative_position_bias_table', shape=(rows, heads)),
            params.get_constant('relative_position_index', index.reshape(-1).astype('int32')))


def gather_bias(F: Any, table: Any, index: Any, tokens: int, heads: int) -> Any:
    """Table (rows, H) spread by index (N*N,) to an attention bias (1, H, N, N)."""
    pairs = F.take(table, index)                                                               # (N*N, H)
    return F.reshape(F.transpose(pairs), shape=(1, heads, tokens, tokens))


def replace_masked(F: Any, x: Any, mask: Any, mask_token: Any, width: int) -> Any:
    """x (B, L, C) with the rows whose mask (B, h, w) is 1 replaced by the mask token (1, 1, C)."""
    hidden = F.cast(F.reshape(mask, shape=(0, AUTO, 1)), dtype='float32')                       # (B, L, 1)
    return x * outer(F, 1 - hidden, F.ones_like(mask_token), width) + outer(F, hidden, mask_token, width)


def column(F: Any, keep: Any, draw: int) -> Any:
    """The factors (B, 1) of one branch in keep, see `keep_factors`; None if there are none."""
    return None if keep is None else F.slice_axis(keep, axis=1, begin=draw, end=draw + 1)


def keep_factors(uniform: np.ndarray, rate: float) -> np.ndarray:
    """What stochastic depth multiplies each branch with: 0 to drop it, else 1 / (1 - its rate).

    uniform (B, 2 * blocks), in [0, 1), two columns a block. They come with the batch, so what is dropped depends on
    the sample and not on the device. Rates grow linearly from 0 in the first block to `rate` in the last.
    """
    keep = 1 - np.repeat(np.linspace(0, rate, uniform.shape[1] // 2), 2)
    return ((uniform < keep) / keep).astype('float32')
