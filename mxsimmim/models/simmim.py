"""SimMIM: a masked encoder, a one-layer decoder, and the loss on what was hidden.

Xie et al. 2022 (arXiv:2111.09886).
"""
from typing import Any, Optional, Tuple

import mxnet as mx
from mxnet.gluon import HybridBlock, nn

from ..config import ModelConfig
from .initial import initialise
from .layers import AUTO, Linear, from_cells, named_parameters, to_cells
from .swin import SwinTransformer
from .vit import VisionTransformer

ENCODERS = {'vit': VisionTransformer, 'swin': SwinTransformer}


class SimMIM(HybridBlock):
    """Predicts the pixels of masked patches.

    ``net(image (B, 3, H, W), mask (B, h, w)[, keep (B, 2 * blocks)]) -> loss (1,)``, the mean over masked pixels;
    image is normalised, mask is on the grid of patches with 1 for masked, of any type; keep as in the encoders.
    A cell is what one final token decodes to: stride x stride pixels.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self._side, self._cell, self._norm_targets = config.img_size, config.stride, config.norm_targets
        with self.name_scope():
            self.encoder = ENCODERS[config.type](config, masked=True)
            self.decoder = nn.HybridSequential()
            self.decoder.add(Linear(config.embed_dim * 2 ** (config.stages - 1), 3 * config.stride ** 2))

    def forward(self, image, mask, keep=None):
        if keep is None and self.config.drop_path and isinstance(image, mx.nd.NDArray):
            # A cached graph always takes the arguments it was built with, in training and out of it.
            keep = mx.nd.ones((image.shape[0], 2 * self.config.blocks), ctx=image.context)
        return super().forward(image, mask, *([] if keep is None else [keep]))

    def hybrid_forward(self, F, image, mask, keep=None):
        predicted = self._predict(F, image, mask, keep)
        target = to_cells(F, image, self._side, self._cell)
        if self._norm_targets:
            target, _, _ = normalise_cells(F, target)
        hidden = self._masked_pixels(F, mask)                                       # (B, cells, 1, cell^2)
        error = F.reshape(predicted - target, shape=(0, 0, 3, AUTO))                # (B, cells, 3, cell^2)
        error = F.abs(error) if self.config.loss == 'l1' else F.square(error)
        weights = F.concat(hidden, hidden, hidden, dim=2)
        return F.sum(error * weights) / (F.sum(hidden) + 1e-5) / 3

    def _predict(self, F: Any, image: Any, mask: Any, keep: Any = None) -> Any:
        """Decoded cells (B, cells, 3*cell*cell)."""
        tokens = self.encoder(image, mask) if keep is None else self.encoder(image, mask, keep)
        return self.decoder(F.slice_axis(tokens, axis=1, begin=self.encoder.prefix_tokens, end=None))

    def _masked_pixels(self, F: Any, mask: Any) -> Any:
        """The mask of patches (B, h, w) as one of pixels, a row a cell: (B, cells, 1, cell^2)."""
        cells, patches = self._side // self._cell, self._cell // self.config.patch_size
        mask = F.reshape(F.cast(mask, dtype='float32'), shape=(AUTO, cells, patches, cells, patches))
        mask = F.transpose(mask, axes=(0, 1, 3, 2, 4))                              # (B, cells, cells, y, x)
        mask = F.reshape(mask, shape=(AUTO, cells * cells, patches, 1, patches, 1))
        size = self.config.patch_size
        mask = F.broadcast_axis(mask, axis=(3, 5), size=(size, size))               # (B, cells^2, y, size, x, size)
        return F.reshape(mask, shape=(AUTO, cells * cells, 1, self._cell * self._cell))

    def reconstruct(self, image: Any, mask: Any) -> Any:
        """The predicted image (B, 3, H, W), normalised as the input is; also where nothing was masked."""
        F = mx.nd if isinstance(image, mx.nd.NDArray) else mx.sym
        cells = self._predict(F, image, mask)
        if self._norm_targets:
            _, mean, deviation = normalise_cells(F, to_cells(F, image, self._side, self._cell))
            cells = F.broadcast_add(F.broadcast_mul(cells, deviation), mean)
        return from_cells(F, cells, self._side, self._cell)


def normalise_cells(F: Any, cells: Any) -> Tuple[Any, Any, Any]:
    """(B, cells, n) with zero mean and unit variance each, and what was taken: mean, deviation (B, cells, 1).

    As the normalised pixels of He et al. 2022 (arXiv:2111.06377): unbiased variance, 1e-6 inside the root.
    """
    mean = F.mean(cells, axis=2, keepdims=True)
    centred = F.broadcast_sub(cells, mean)
    # A sum over n-1; n is known to the operator, not to a symbol, hence the correction by the sum of ones.
    count = F.sum(F.ones_like(cells), axis=2, keepdims=True)
    deviation = F.sqrt(F.sum(F.square(centred), axis=2, keepdims=True) / (count - 1) + 1e-6)
    return F.broadcast_div(centred, deviation), mean, deviation


def build_simmim(config: ModelConfig, seed: Optional[int] = 0) -> SimMIM:
    """A SimMIM network on cpu(0), with the reference's random initial weights, or zeros where `seed` is None."""
    net = SimMIM(config)
    net.initialize(mx.init.Zero(), ctx=mx.cpu())
    if seed is not None:
        initialise(named_parameters(net), config, seed)
    return net
