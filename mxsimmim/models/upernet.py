"""UperNet: the class of each pixel, from an encoder's maps of four resolutions.

Xiao et al. 2018 (arXiv:1807.10221), with mmsegmentation's parameter names and figures. There, statistics over a batch
normalise what convolutions compute; here each image's own do (group normalisation, Wu and He 2018, arXiv:1803.08494),
so that the gradient of a batch does not depend on how devices, workers and micro-batches divide it.
"""
from typing import Any, Iterable, List, Sequence

import numpy as np
from mxnet.gluon import HybridBlock, nn

from ..data.geometry import Size, linear_weights
from ..ops import OpBackend
from .layers import operands

POOLS = 1, 2, 3, 6  # cells a side that the last map is averaged over
GROUP = 16  # channels that are normalised together, as 32 groups of 512
EPS = 1e-5


class Convolution(HybridBlock):
    """A convolution that keeps height and width: (B, inputs, h, w) to (B, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = False):
        super().__init__()
        self._options = dict(kernel=(kernel, kernel), pad=(kernel // 2, kernel // 2), num_filter=outputs)
        with self.name_scope():
            self.weight = self.params.get('weight', shape=(outputs, inputs, kernel, kernel))
            self.bias = self.params.get('bias', shape=(outputs,)) if bias else None

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        given = (x, weight) if bias is None else (x, weight, bias)
        return F.Convolution(*given, no_bias=bias is None, **self._options)


class GroupNorm(HybridBlock):
    """Each image's groups of channels with zero mean and unit variance, then each channel scaled and shifted."""

    def __init__(self, channels: int, backend: OpBackend):
        super().__init__()
        self._channels, self._groups, self.backend = channels, 1 if channels % GROUP else channels // GROUP, backend
        with self.name_scope():
            self.weight = self.params.get('weight', shape=(channels,))
            self.bias = self.params.get('bias', shape=(channels,))

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any) -> Any:
        scale, shift = operands(self.backend, F, x, self.weight, self.bias)
        return self.backend.group_norm(F, x, scale, shift, EPS, groups=self._groups, channels=self._channels)


class ConvModule(HybridBlock):
    """Convolution, normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, backend: OpBackend):
        super().__init__()
        with self.name_scope():
            self.conv = Convolution(inputs, outputs, kernel)
            self.gn = GroupNorm(outputs, backend)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return F.relu(self.gn(self.conv(x)))


class UperHead(HybridBlock):
    """Maps (B, C_i, h_i, w_i), the finest first, to logits (B, classes, h_0, w_0).

    The coarsest is averaged over grids of several sizes and sees all of them; what it makes of them is added to the
    finer maps, one after the other.
    """

    def __init__(self, inputs: Sequence[int], sizes: Sequence[Size], width: int, classes: int, backend: OpBackend):
        super().__init__()
        *finer, coarsest = inputs
        with self.name_scope():
            self.psp_modules = nn.HybridSequential()
            self.lateral_convs, self.fpn_convs = nn.HybridSequential(), nn.HybridSequential()
            for cells in POOLS:
                pooled = nn.HybridSequential()
                pooled.add(Pool(cells), ConvModule(coarsest, width, 1, backend))
                self.psp_modules.add(pooled)
            self.bottleneck = ConvModule(coarsest + len(POOLS) * width, width, 3, backend)
            for channels in finer:
                self.lateral_convs.add(ConvModule(channels, width, 1, backend))
                self.fpn_convs.add(ConvModule(width, width, 3, backend))
            self.fpn_bottleneck = ConvModule(len(inputs) * width, width, 3, backend)
            self.conv_seg = Convolution(width, classes, 1, bias=True)
            self.from_pools = _several(Resize((cells, cells), sizes[-1]) for cells in POOLS)
            self.to_finer = _several(Resize(*pair) for pair in zip(sizes[1:], sizes))
            self.to_finest = _several(Resize(size, sizes[0]) for size in sizes[1:])

    def hybrid_forward(self, F: Any, *maps: Any) -> Any:
        *finer, x = maps
        pools = (resize(pool(x)) for resize, pool in zip(self.from_pools, self.psp_modules))
        x = self.bottleneck(F.concat(x, *pools, dim=1))
        fused = [x]
        for lateral, convolve, resize, given in reversed(list(zip(self.lateral_convs, self.fpn_convs, self.to_finer,
                                                                  finer))):
            x = lateral(given) + resize(x)
            fused.insert(0, convolve(x))
        first, *others = fused
        together = F.concat(first, *(resize(each) for resize, each in zip(self.to_finest, others)), dim=1)
        return self.conv_seg(self.fpn_bottleneck(together))


class FCNHead(HybridBlock):
    """One map (B, C, h, w) to logits (B, classes, h, w): a shorter way for the gradient, in training alone."""

    def __init__(self, inputs: int, width: int, classes: int, backend: OpBackend):
        super().__init__()
        with self.name_scope():
            self.convs = nn.HybridSequential()
            self.convs.add(ConvModule(inputs, width, 3, backend))
            self.conv_seg = Convolution(width, classes, 1, bias=True)

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return self.conv_seg(self.convs(x))


class Pyramid(HybridBlock):
    """Four maps (B, C, h, w) of a ViT's depths to four resolutions, 4, 2, 1 and half times theirs, as of BEiT's.

    Attributes:
        sizes: height and width of each.
    """

    def __init__(self, channels: int, size: Size, backend: OpBackend):
        super().__init__()
        self.sizes = [(int(size[0] * scale), int(size[1] * scale)) for scale in (4, 2, 1, 0.5)]
        with self.name_scope():
            self.fpn1, self.fpn2 = nn.HybridSequential(), nn.HybridSequential()
            self.fpn1.add(Doubled(channels, channels), GroupNorm(channels, backend), nn.GELU(),
                          Doubled(channels, channels))
            self.fpn2.add(Doubled(channels, channels))

    def hybrid_forward(self, F: Any, *maps: Any) -> List[Any]:
        first, second, third, fourth = maps
        halved = F.Pooling(fourth, kernel=(2, 2), stride=(2, 2), pool_type='max')
        return [self.fpn1(first), self.fpn2(second), third, halved]


class Doubled(HybridBlock):
    """A transposed convolution: (B, inputs, h, w) to (B, outputs, 2h, 2w), each place to four of its own.

    Computed as a product at each place. MXNet's Deconvolution writes the gradient of its weight with inputs and outputs
    exchanged where that is part of a larger array, as gradients are that workers or devices exchange (docs/LOG.md).
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self._inputs, self._outputs = inputs, outputs
        with self.name_scope():
            self.weight = self.params.get('weight', shape=(inputs, outputs, 2, 2))
            self.bias = self.params.get('bias', shape=(outputs,))

    def hybrid_forward(self, F: Any, x: Any, weight: Any, bias: Any) -> Any:
        kernel = F.reshape(F.transpose(weight, axes=(2, 3, 1, 0)), shape=(4 * self._outputs, self._inputs, 1, 1))
        x = F.Convolution(x, kernel, kernel=(1, 1), num_filter=4 * self._outputs, no_bias=True)
        return F.broadcast_add(F.depth_to_space(x, block_size=2), F.reshape(bias, shape=(1, self._outputs, 1, 1)))


class Pool(HybridBlock):
    """(B, C, h, w) to its means (B, C, cells, cells)."""

    def __init__(self, cells: int):
        super().__init__()
        self._cells = cells

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        return F.contrib.AdaptiveAvgPooling2D(x, output_size=self._cells)


class Resize(HybridBlock):
    """(B, C, h, w) to (B, C, H, W), bilinearly, with pixels as areas (PyTorch's align_corners=False).

    Two products with constant matrices: MXNet's own operator takes 6 to 18 times as long with the gradient
    (docs/LOG.md).
    """

    def __init__(self, given: Size, wanted: Size):
        super().__init__()
        self._wanted = wanted
        with self.name_scope():
            for name, old, new in zip(('rows', 'columns'), given, wanted):
                middles = (np.arange(new) + 0.5) * old / new - 0.5
                setattr(self, name, self.params.get_constant(name, linear_weights(middles, old)))

    def hybrid_forward(self, F: Any, x: Any, rows: Any, columns: Any) -> Any:
        for matrix, length in zip((rows, columns), self._wanted):
            x = F.transpose(x, axes=(0, 1, 3, 2))
            x = F.FullyConnected(x, matrix, num_hidden=length, no_bias=True, flatten=False)
        return x


def _several(blocks: Iterable[HybridBlock]) -> nn.HybridSequential:
    """Blocks in a list."""
    found = nn.HybridSequential()
    found.add(*blocks)
    return found


def head_costs(inputs: Sequence[int], sizes: Sequence[Size], width: int, classes: int) -> int:
    """Count the multiply-adds of an image's forward pass through `UperHead`."""
    pixels: List[int] = [height * wide for height, wide in sizes]
    *finer, coarsest = inputs
    pooled = sum(cells ** 2 for cells in POOLS) * coarsest * width
    bottleneck = pixels[-1] * 9 * (coarsest + len(POOLS) * width) * width
    pyramid = sum(area * (channels + 9 * width) * width for area, channels in zip(pixels, finer))
    return pooled + bottleneck + pyramid + pixels[0] * (9 * len(inputs) * width + classes) * width
