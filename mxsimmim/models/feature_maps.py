"""An encoder for dense tasks: maps of features at several resolutions, or depths, in place of one row of tokens."""
from typing import Any, List, Optional, Sequence

from mxnet.gluon import HybridBlock

from ..config import ModelConfig
from ..ops.reference import AUTO
from ..runtime.mxnet_private import children
from . import swin
from .layers import LayerNorm
from .pixels import PixelInput
from .simmim import ENCODERS
from .specs import names_without
from .vit import VisionTransformer


def thirds(depth: int) -> List[int]:
    """Return the blocks at 1/3, 1/2, 2/3 and the end: 3, 5, 7 and 11 of 12, 7, 11, 15 and 23 of 24.

    These are the ones that UperNet takes of BEiT (Bao et al. 2022, arXiv:2106.08254).
    """
    return [max(0, end - 1) for end in (depth // 3, depth // 2, 2 * depth // 3, depth)]


class FeatureMaps(HybridBlock):
    """Feature maps of images, for the decoders of dense tasks.

    ``maps(F, image (B, 3, H, W)[, keep (B, 2 * blocks)]) -> [(B, C_i, h_i, w_i), …]``, with mx.nd or mx.sym for F, from
    within the hybrid_forward of the network that owns it. Image and keep are as in the encoders. Of a Swin the maps are
    its stages' ends, each with a norm of its own; of a ViT what `blocks` give, numbered from 0, by default `thirds`.

    Attributes:
        config: as given.
        channels: C_i of each map.
        strides: pixels of the input a side that one of its places stands for.
    """

    def __init__(self, config: ModelConfig, pixels: PixelInput, blocks: Optional[Sequence[int]] = None):
        super().__init__()
        self.config = config
        self._norms: List[LayerNorm] = []
        with self.name_scope():
            self.encoder = ENCODERS[config.type](config, False, pixels, dense=True)
            if config.type == 'vit':
                self._blocks = list(thirds(config.depth) if blocks is None else blocks)
                self._sizes = [config.patches] * len(self._blocks)
                self.channels = [config.embed_dim] * len(self._blocks)
                self.strides = [config.patch_size] * len(self._blocks)
            else:
                stages = range(config.stages)
                self._sizes = [config.tokens(stage) for stage in stages]
                self.channels = [config.embed_dim << stage for stage in stages]
                self.strides = [config.patch_size << stage for stage in stages]
                for stage in stages:  # norm0, norm1, … as mmdetection and mmsegmentation name them
                    self._norms.append(LayerNorm(self.channels[stage], swin.EPS, pixels.backend))
                    setattr(self, f'norm{stage}', self._norms[stage])

    def forward(self, F: Any, image: Any, keep: Any = None) -> List[Any]:
        encoder = self.encoder
        if isinstance(encoder, VisionTransformer):
            tokens = encoder.maps(F, image, self._blocks, keep)
        else:
            tokens = [norm(x) for norm, x in zip(self._norms, encoder.maps(F, image, keep))]
        return [_as_map(F, x, size, channels) for x, size, channels in zip(tokens, self._sizes, self.channels)]

    def _collect_params_with_prefix(self, prefix: str = '') -> dict:
        """Names without `encoder.`, as a classifier's and a published backbone's: blocks.0.…, norm0.weight."""
        return names_without(('encoder',), children(self), prefix)


def _as_map(F: Any, tokens: Any, size: Sequence[int], channels: int) -> Any:
    """Tokens (B, h*w, C) as (B, C, h, w)."""
    # A transpose of three axes before the reshape kills the backward pass of convolutions in a graph (docs/LOG.md).
    return F.transpose(F.reshape(tokens, shape=(AUTO, *size, channels)), axes=(0, 3, 1, 2))
