"""Feature pyramids of detectors: maps of one width, each of half the resolution of the one before.

With mmdetection's parameter names.
"""
from typing import Any, List, Optional, Sequence, Tuple

from mxnet.gluon import HybridBlock, nn

from ..ops import OpBackend
from .upernet import Convolution, Doubled, GroupNorm

Size = Tuple[int, int]  # height and width


class Projection(HybridBlock):
    """A convolution with a bias, or followed by a normalisation: (B, inputs, h, w) to (B, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: Optional[OpBackend] = None):
        super().__init__()
        with self.name_scope():
            self.conv = Convolution(inputs, outputs, kernel, bias=norm is None)
            self.gn = GroupNorm(outputs, norm) if norm else None

    def hybrid_forward(self, F: Any, x: Any) -> Any:
        x = self.conv(x)
        return self.gn(x) if self.gn else x


class FeaturePyramid(HybridBlock):
    """Maps of a Swin's stages to as many, and a coarser one, of `width` channels (Lin et al. 2017, arXiv:1612.03144).

    Each adds to the finer ones what it knows. The last is every other place of the one before.
    """

    def __init__(self, inputs: Sequence[int], sizes: Sequence[Size], width: int):
        super().__init__()
        self._sizes = list(sizes)
        with self.name_scope():
            self.lateral_convs, self.fpn_convs = nn.HybridSequential(), nn.HybridSequential()
            for channels in inputs:
                self.lateral_convs.add(Projection(channels, width, 1))
                self.fpn_convs.add(Projection(width, width, 3))

    def hybrid_forward(self, F: Any, *maps: Any) -> List[Any]:
        found: List[Any] = []
        x = None
        for lateral, convolve, given, size in reversed(list(zip(self.lateral_convs, self.fpn_convs, maps,
                                                                self._sizes))):
            own = lateral(given)
            x = own if x is None else own + doubled(F, x, size)
            found.insert(0, convolve(x))
        return [*found, halved(F, found[-1])]


class SimplePyramid(HybridBlock):
    """A ViT's last map (B, C, h, w) to maps of 4, 2, 1, half and a quarter of its resolution, of `width` channels.

    ViTDet's (Li et al. 2022, arXiv:2203.16527), but with groups of channels normalised over an image, where ViTDet
    normalises all channels of a place.
    """

    def __init__(self, channels: int, width: int, backend: OpBackend):
        super().__init__()
        half, quarter = channels // 2, channels // 4
        with self.name_scope():
            self.fpn1, self.fpn2 = nn.HybridSequential(), nn.HybridSequential()
            self.fpn1.add(Doubled(channels, half), GroupNorm(half, backend), nn.GELU(), Doubled(half, quarter))
            self.fpn2.add(Doubled(channels, half))
            self.lateral_convs, self.fpn_convs = nn.HybridSequential(), nn.HybridSequential()
            for inputs in (quarter, half, channels, channels):
                self.lateral_convs.add(Projection(inputs, width, 1, backend))
                self.fpn_convs.add(Projection(width, width, 3, backend))

    def hybrid_forward(self, F: Any, x: Any) -> List[Any]:
        maps = [self.fpn1(x), self.fpn2(x), x, F.Pooling(x, kernel=(2, 2), stride=(2, 2), pool_type='max')]
        found = [convolve(lateral(each)) for lateral, convolve, each in zip(self.lateral_convs, self.fpn_convs, maps)]
        return [*found, halved(F, found[-1])]


def doubled(F: Any, x: Any, size: Size) -> Any:
    """(B, C, h, w) to (B, C, *size), of about twice the height and width: each place to four."""
    large = F.UpSampling(x, scale=2, sample_type='nearest')
    return F.slice(large, begin=(None, None, 0, 0), end=(None, None, *size))


def halved(F: Any, x: Any) -> Any:
    """Every other place of (B, C, h, w), from the first."""
    return F.Pooling(x, kernel=(1, 1), stride=(2, 2), pool_type='max')
