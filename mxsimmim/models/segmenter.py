"""An encoder with heads that tell the class of each pixel."""
from typing import Any, List, Optional, Tuple

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import HybridBlock

from ..config import ModelConfig
from ..ops import REFERENCE, OpBackend
from ..runtime.mxnet_private import children
from .cost import multiply_adds
from .feature_maps import FeatureMaps
from .initial import begin
from .layers import AUTO
from .network import TaskNetwork
from .pixels import MEAN, STD
from .specs import names_without
from .upernet import FCNHead, Pyramid, Resize, UperHead, head_costs


def pixel_loss(F: Any, logits: Any, auxiliary: Any, label_map: Any, classes: int, weight: float) -> Any:
    """Return the loss (1,) of logits (B, classes, H, W) and, as far as `weight` says, of others, in nats.

    Pixels of the label map (B, H, W) that are no class, 0 to classes-1, add 0 to a sum that is divided by B * H * W, as
    mmsegmentation's with avg_non_ignore=False.
    """
    number = F.reshape(F.cast(label_map, dtype='float32'), shape=(0, AUTO))
    known = number < classes

    def entropy(given: Any) -> Any:
        # A pixel's logits side by side: MXNet's softmax takes twice as long over another axis.
        rows = F.transpose(F.reshape(given, shape=(0, 0, AUTO)), axes=(0, 2, 1))
        return -F.mean(F.pick(F.log_softmax(rows, axis=-1), number, axis=-1) * known)
    return F.reshape(entropy(logits) + weight * entropy(auxiliary), shape=(1,))


class Segmenter(TaskNetwork):
    """Classes of pixels: UperNet on a Swin's stages, or on four depths of a ViT brought to four resolutions.

    ``net(image (B, 3, H, W)) -> logits (B, classes, h, w)`` on the grid of the finest map; ``net(image, label_map
    (B, H, W)[, keep (B, 2 * blocks)]) -> loss (1,)``, see `pixel_loss`. Image and keep are as in the encoders.
    """
    inputs = ('image', 'label_map', 'uniform')  # fields of a batch that it is called with; uniform becomes keep

    def __init__(self, config: ModelConfig, classes: int, backend: OpBackend = REFERENCE,
                 mean: Tuple[float, ...] = MEAN, std: Tuple[float, ...] = STD):
        super().__init__(config, backend, mean, std)
        self.classes = classes
        with self.name_scope():
            self.backbone = FeatureMaps(config, self.pixels)
            channels = self.backbone.channels
            self.neck = Pyramid(config.embed_dim, config.patches, backend) if config.type == 'vit' else None
            self.sizes = self.neck.sizes if self.neck else [config.tokens(stage) for stage in range(config.stages)]
            self.decode_head = UperHead(channels, self.sizes, config.head_channels, classes, backend)
            self.auxiliary_head = FCNHead(channels[-2], config.head_channels // 2, classes, backend)
            self.to_pixels = Resize(self.sizes[0], config.size)
            self.auxiliary_to_pixels = Resize(self.sizes[-2], config.size)
        self.answering = Answering(self)

    def forward(self, image: Any, label_map: Any = None, keep: Any = None) -> Any:
        if not isinstance(image, mx.nd.NDArray):
            return self.decoded(mx.sym, image)[0]
        # Out of training mode, oneDNN would bring the weights of convolutions into layouts of its own, and a native
        # optimiser that comes then would update a copy (docs/LOG.md). Nothing else here depends on the mode.
        with autograd.train_mode():
            if label_map is None:
                return self.answering(image)
            return super().forward(image, label_map, *self.kept(image, keep))

    def hybrid_forward(self, F: Any, image: Any, label_map: Any, keep: Any = None) -> Any:
        logits, maps = self.decoded(F, image, keep)
        auxiliary = self.auxiliary_to_pixels(self.auxiliary_head(maps[-2]))
        return pixel_loss(F, self.to_pixels(logits), auxiliary, label_map, self.classes, self.config.auxiliary)

    def begin_with(self, shares: np.ndarray) -> None:
        """Have both heads begin with the classes' shares (K,) of the pixels as their biases, as logarithms.

        Zeros would have the first hundreds of updates learn these, by all that the heads have (Lin et al. 2017,
        arXiv:1708.02002, of rare classes).
        """
        for head in (self.decode_head, self.auxiliary_head):
            assert head.conv_seg.bias is not None
            head.conv_seg.bias.set_data(mx.nd.array(np.log(shares)))

    def decoded(self, F: Any, image: Any, keep: Any = None) -> Tuple[Any, List[Any]]:
        """Return the logits (B, classes, h, w), and the maps that they come from."""
        maps = self.backbone(F, image, keep)
        maps = self.neck(*maps) if self.neck else maps
        return self.decode_head(*maps), maps

    def _collect_params_with_prefix(self, prefix: str = '') -> dict:
        """The encoder's names as the classifier's; those of the rest as mmsegmentation's, without its `backbone.`."""
        parts = {name: child for name, child in children(self).items() if child is not self.answering}
        return names_without(('backbone', 'neck'), parts, prefix)


class Answering(HybridBlock):
    """A segmenter's images to logits, as a graph of its own beside that of the loss."""

    def __init__(self, net: Segmenter):
        super().__init__(prefix='')
        self._decoded = net.decoded
        for name in ('backbone', 'neck', 'decode_head'):
            if getattr(net, name):
                self.register_child(getattr(net, name), name)

    def hybrid_forward(self, F: Any, image: Any) -> Any:
        return self._decoded(F, image)[0]


def segmenter_cost(config: ModelConfig, classes: int) -> int:
    """Count the multiply-adds of an image's forward pass, without the auxiliary head's."""
    net = Segmenter(config, classes)
    return multiply_adds(config, decoder=False) + head_costs(net.backbone.channels, net.sizes, config.head_channels,
                                                             classes)


def build_segmenter(config: ModelConfig, classes: int, seed: Optional[int] = 0, backend: OpBackend = REFERENCE,
                    mean: Tuple[float, ...] = MEAN, std: Tuple[float, ...] = STD) -> Segmenter:
    """Build a segmenter on cpu(0), with random initial weights, or zeros where `seed` is None.

    backend, mean and std as in `build_simmim`.
    """
    net = Segmenter(config, classes, backend, mean, std)
    begin(net, seed)
    return net
