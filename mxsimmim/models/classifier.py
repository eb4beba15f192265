"""An encoder with a classification head: what pre-training is for."""
from typing import Any, List, Optional, Sequence, Tuple

import mxnet as mx

from ..config import ModelConfig
from ..ops import REFERENCE, OpBackend
from ..runtime.mxnet_private import children
from . import vit
from .initial import begin
from .layers import LayerNorm, Linear
from .network import TaskNetwork
from .pixels import MEAN, STD
from .segments import Segment
from .shards import WHOLE, Shard
from .simmim import ENCODERS
from .specs import names_without


class Classifier(TaskNetwork):
    """Classes of whole images.

    ``net(image (B, 3, H, W)) -> logits (B, classes)``; ``net(image, target (B, classes)[, keep (B, 2 * blocks)]) ->
    loss (1,)``, the mean cross entropy with the distribution `target`. Image as in SimMIM; keep as in the encoders.
    """
    inputs = ('image', 'label', 'uniform')  # fields of a batch that it is called with; uniform becomes keep

    def __init__(self, config: ModelConfig, classes: int, backend: OpBackend = REFERENCE,
                 mean: Tuple[float, ...] = MEAN, std: Tuple[float, ...] = STD):
        super().__init__(config, backend, mean, std)
        self.classes = classes
        with self.name_scope():
            self.encoder = ENCODERS[config.type](config, False, self.pixels)
            pooling = config.type == 'vit' and config.use_mean_pooling
            self.fc_norm = LayerNorm(config.embed_dim, vit.EPS, backend) if pooling else None
            self.head = Linear(config.embed_dim * 2 ** (config.stages - 1), classes, backend)

    def forward(self, image: Any, target: Any = None, keep: Any = None) -> Any:
        if target is None:
            return self.head(self.pooled(mx.nd if isinstance(image, mx.nd.NDArray) else mx.sym, image))
        return super().forward(image, target, *self.kept(image, keep))

    def hybrid_forward(self, F: Any, image: Any, target: Any, keep: Any = None) -> Any:
        return self._entropy(F, self.head(self.pooled(F, image, keep)), target)

    def segments(self) -> List[Segment]:
        """Return those of the encoder, and the head, which computes the loss (1,)."""
        head = Segment(lambda F, x, given: self._entropy(F, self._logits(F, x), given['label']),
                       list(filter(None, [self.encoder.norm, self.fc_norm, self.head])), ('label',))
        return [*self.encoder.segments(), head]

    def answer(self, x: mx.nd.NDArray, image: Optional[mx.nd.NDArray] = None) -> mx.nd.NDArray:
        """The logits (B, classes) from what the last block has computed of `image`, which is not needed."""
        return self._logits(mx.nd, x)

    def _logits(self, F: Any, x: Any) -> Any:
        return self.head(self._pooled(F, self.encoder.finish(x)))

    def _entropy(self, F: Any, logits: Any, target: Any) -> Any:
        """The mean cross entropy (1,) with a distribution (B, classes)."""
        entropy = F.sum(-F.log_softmax(logits, axis=-1) * target, axis=1)          # (B,)
        return F.reshape(F.mean(entropy), shape=(1,))

    def pooled(self, F: Any, image: Any, keep: Any = None) -> Any:
        """What the head sees of each image (B, C): the mean of its patch tokens, or ViT's cls token."""
        # The second argument of an encoder is a mask, which there is none of.
        return self._pooled(F, self.encoder(image) if keep is None else self.encoder(image, None, keep))

    def _pooled(self, F: Any, tokens: Any) -> Any:
        if self.config.type == 'vit' and not self.config.use_mean_pooling:
            return F.reshape(F.slice_axis(tokens, axis=1, begin=0, end=1), shape=(0, -1))
        mean = F.mean(F.slice_axis(tokens, axis=1, begin=self.encoder.prefix_tokens, end=None), axis=1)
        return self.fc_norm(mean) if self.fc_norm else mean

    def _collect_params_with_prefix(self, prefix: str = '') -> dict:
        """Names without `encoder.`: the reference's classifier is its encoder, with a head."""
        return names_without(('encoder',), children(self), prefix)


def build_classifier(config: ModelConfig, classes: int, seed: Optional[int] = 0, backend: OpBackend = REFERENCE,
                     mean: Tuple[float, ...] = MEAN, std: Tuple[float, ...] = STD,
                     parts: Sequence[slice] = (), own: int = 0, shard: Shard = WHOLE) -> Classifier:
    """Build a classifier on cpu(0), with the reference's random initial weights, or zeros where `seed` is None.

    backend, mean, std, parts, own and shard as in `build_simmim`.
    """
    net = Classifier(config, classes, backend, mean, std)
    begin(net, seed, parts, own, shard)
    return net
