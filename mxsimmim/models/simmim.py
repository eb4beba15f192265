"""SimMIM: a masked encoder, a one-layer decoder, and the loss on what was hidden.

Xie et al. 2022 (arXiv:2111.09886).
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type, Union

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock, nn

from ..config import ModelConfig
from ..ops import REFERENCE, OpBackend
from ..ops.pixels import AUTO, from_cells, to_cells
from .initial import begin
from .layers import Linear, pair
from .network import TaskNetwork
from .pixels import MEAN, STD
from .segments import Segment, own
from .shards import WHOLE, Shard
from .swin import SwinTransformer
from .swin_v2 import SwinTransformerV2
from .vit import VisionTransformer

Encoder = Union[VisionTransformer, SwinTransformer]
ENCODERS: Dict[str, Type[Encoder]] = {'vit': VisionTransformer, 'swin': SwinTransformer,
                                     'swinv2': SwinTransformerV2}


class SimMIM(TaskNetwork):
    """Predicts the pixels of masked patches.

    ``net(image (B, 3, H, W), mask (B, h, w)[, keep (B, 2 * blocks)]) -> loss (1,)``, the mean over masked pixels;
    image is as `pixels` prepares it: normalised or, with native operators, also uint8 (B, H, W, 3); mask is on the grid
    of patches with 1 for masked, of any type; keep as in the encoders. A cell is what one final token decodes to:
    stride x stride pixels.
    """
    inputs = ('image', 'mask', 'uniform')  # fields of a batch that it is called with; uniform becomes keep

    def __init__(self, config: ModelConfig, backend: OpBackend = REFERENCE, mean: Tuple[float, ...] = MEAN,
                 std: Tuple[float, ...] = STD):
        super().__init__(config, backend, mean, std)
        self._side, self._cell, self._norm_targets = config.side, config.stride, config.norm_targets
        self._spares = backend.is_native and config.type != 'swinv2'  # the last block what the loss does not need
        with self.name_scope():
            self.encoder = ENCODERS[config.type](config, True, self.pixels)
            self.norm_band = self.norm_unbiased = None
            if config.norm_window:
                band = band_of(config.side, config.norm_window)
                self.norm_band = self.params.get_constant('norm_band', band)
                self.norm_unbiased = self.params.get_constant('norm_unbiased', unbiased_of(band))
            self.decoder = nn.HybridSequential()
            self.decoder.add(Linear(config.embed_dim * 2 ** (config.stages - 1), 3 * config.stride ** 2, backend))

    def forward(self, image: Any, mask: Any, keep: Any = None) -> Any:
        return super().forward(image, mask, *self.kept(image, keep))

    def hybrid_forward(self, F: Any, image: Any, mask: Any, keep: Any = None, norm_band: Any = None,
                       norm_unbiased: Any = None) -> Any:
        return self._loss(F, self.encoder(image, mask, keep, self._needed(F, mask)), image, mask)

    def segments(self) -> List[Segment]:
        """Return those of the encoder, and the head, which computes the loss (1,)."""
        *segments, last = self.encoder.segments()
        if self._spares:
            *pieces, mlp = last.pieces
            last = last._replace(run=partial(self._run_last, last.run), inputs=(*last.inputs, 'mask'), pieces=(
                *pieces, mlp._replace(run=partial(self._run_last, mlp.run), inputs=(*mlp.inputs, 'mask'))))
        head = Segment(lambda F, x, given: self._loss(F, self.encoder.finish(x), given['image'], given['mask']),
                       [self.decoder, *filter(None, [self.encoder.norm])], ('image', 'mask'),
                       (self.norm_band, self.norm_unbiased))
        return [*segments, last, head]

    def _run_last(self, run: Callable[..., Any], F: Any, x: Any, given: Dict[str, Any], *modules: HybridBlock) -> Any:
        return run(F, x, {**given, 'rows': self._needed(F, given['mask'])}, *modules)

    def answer(self, x: mx.nd.NDArray, image: mx.nd.NDArray) -> mx.nd.NDArray:
        """The predicted image (B, 3, H, W) of `image`, normalised, from what the last block has computed."""
        return self._restored(mx.nd, self.encoder.finish(x), image)

    def _loss(self, F: Any, tokens: Any, image: Any, mask: Any) -> Any:
        """The loss (1,) of the encoder's tokens."""
        target = self._normalised(F, image)[0] if self._norm_targets else self._cells(F, image)
        return self.backend.masked_loss(F, tokens, pair(F, tokens, self.decoder[0]), target, mask, cell=self._cell,
                                        patch=self.config.patch_size, prefix=self.encoder.prefix_tokens,
                                        kind=self.config.loss)

    def _cells(self, F: Any, image: Any) -> Any:
        """The image's cells (B, cells, 3*cell*cell)."""
        return self.pixels.cells(F, image, self.config.size, self._cell)

    def _normalised(self, F: Any, image: Any) -> Tuple[Any, Any, Any]:
        """The image's cells normalised, and what was taken from them: mean, deviation."""
        cells = self._cells(F, image)
        if self.norm_band is None:
            return normalise_cells(F, cells)
        image = from_cells(F, cells, self._side, self._cell)
        band, unbiased = own(F, cells, self.norm_band, self.norm_unbiased)
        found = normalise_around(F, image, band, unbiased, self._side)
        normalised, mean, deviation = (to_cells(F, x, self.config.size, self._cell) for x in found)
        return normalised, mean, deviation

    def _needed(self, F: Any, mask: Any) -> Any:
        """1 for the tokens (B, prefix + cells) that the loss depends on, those of cells with masked patches, else 0.

        None where operators could not make use of it.
        """
        if not self._spares:
            return None
        cells, patches = self._side // self._cell, self._cell // self.config.patch_size
        mask = F.reshape(F.cast(mask, dtype='float32'), shape=(AUTO, cells, patches, cells, patches))
        needed = F.reshape(F.max(mask, axis=(2, 4)), shape=(AUTO, cells * cells))
        prefix = F.slice_axis(F.zeros_like(needed), axis=1, begin=0, end=1)
        return F.concat(*[prefix] * self.encoder.prefix_tokens, needed, dim=1)

    def reconstruct(self, image: Any, mask: Any) -> Any:
        """The predicted image (B, 3, H, W), normalised as the input is; also where nothing was masked."""
        F = mx.nd if isinstance(image, mx.nd.NDArray) else mx.sym
        return self._restored(F, self.encoder(image, mask), image)

    def _restored(self, F: Any, tokens: Any, image: Any) -> Any:
        """The image (B, 3, H, W) that the decoder makes of the encoder's tokens."""
        cells = self.decoder(F.slice_axis(tokens, axis=1, begin=self.encoder.prefix_tokens, end=None))
        if self._norm_targets:
            _, mean, deviation = self._normalised(F, image)
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


def band_of(side: int, window: int) -> np.ndarray:
    """(side, side): row i averages those of `side` numbers that are in a window around number i."""
    near = np.abs(np.subtract.outer(np.arange(side), np.arange(side))) <= window // 2
    return (near / near.sum(1, keepdims=True)).astype('float32')


def unbiased_of(band: np.ndarray) -> np.ndarray:
    """(1, 1, side, side): n / (n - 1) of the n pixels in the square around each, of `band_of` both axes."""
    count = np.multiply.outer((band > 0).sum(1), (band > 0).sum(1))
    return (count / (count - 1)).astype('float32')[None, None]


def normalise_around(F: Any, image: Any, band: Any, unbiased: Any, side: int) -> Tuple[Any, Any, Any]:
    """Each pixel of (B, 3, H, W) less the mean, over the deviation, of the square around it; and these two.

    As in the pre-training of Liu et al. 2022 (arXiv:2111.09883): of a square at the edge, what is in the image counts.
    """
    def average(x: Any) -> Any:
        for _ in range(2):  # along both axes
            x = F.FullyConnected(x, band, num_hidden=side, no_bias=True, flatten=False)
            x = F.transpose(x, axes=(0, 1, 3, 2))
        return x
    mean = average(image)
    variance = F.broadcast_mul(average(F.square(image)) - F.square(mean), unbiased)
    deviation = F.sqrt(F.maximum(variance, 0) + 1e-6)
    return (image - mean) / deviation, mean, deviation


def build_simmim(config: ModelConfig, seed: Optional[int] = 0, backend: OpBackend = REFERENCE,
                 mean: Tuple[float, ...] = MEAN, std: Tuple[float, ...] = STD,
                 parts: Sequence[slice] = (), own: int = 0, shard: Shard = WHOLE) -> SimMIM:
    """Build a SimMIM network on cpu(0), with the reference's random initial weights, or zeros where `seed` is None.

    It computes with `backend`; mean and std of each channel, of values in [0, 1], normalise uint8 images. Of `parts` of
    its segments, only the parameters of part number `own` are given values, and of these only the `shard`, see
    `initial.begin`.
    """
    net = SimMIM(config, backend, mean, std)
    begin(net, seed, parts, own, shard)
    return net
