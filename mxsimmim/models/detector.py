"""An encoder with GluonCV's Faster or Mask R-CNN: boxes of objects, their classes and masks."""
from typing import Any, Callable, List, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import HybridBlock, nn

from ..config import ModelConfig
from ..ops import REFERENCE, OpBackend
from ..runtime.mxnet_private import children
from . import boxes as on_boxes, rcnn
from .cost import multiply_adds
from .feature_maps import FeatureMaps
from .from_gluoncv import build_heads, mask_layers
from .initial import begin
from .layers import AUTO, Linear
from .network import TaskNetwork
from .pixels import MEAN, STD
from .pyramid import FeaturePyramid, SimplePyramid
from .rcnn import Samples, Truth
from .specs import names_without

RATIOS = 0.5, 1.0, 2.0  # height over width of the anchors at a place
BOX_SIDE, MASK_POOLED = 7, 14  # cells a side of what is pooled for the heads of boxes, and of masks
STEP = 16  # boxes that the mask head computes are a multiple, on CPUs


class Detector(TaskNetwork):
    """Boxes, classes and masks of objects: Faster and Mask R-CNN (arXiv:1506.01497, 1703.06870) on a feature pyramid.

    ``net(image (B, 3, H, W)) -> (B, 100, 6)``: x0, y0, x1, y1 in pixels of the input, score, and class number, -1 after
    the last; with masks ``(B, 100, 6 + 28 * 28)``: and the probability in each cell of the box that it is the object.
    ``net(image, boxes, classes, crowd[, masks], priority[, keep (B, 2 * blocks)]) -> loss (1,)``, the mean of the
    images' losses, with the fields of `ObjectsTransform`. Image and keep are as in the encoders.

    Attributes:
        inputs: fields of a batch that it is called with; uniform becomes keep.
    """

    def __init__(self, config: ModelConfig, classes: int, backend: OpBackend = REFERENCE,
                 mean: Tuple[float, ...] = MEAN, std: Tuple[float, ...] = STD):
        super().__init__(config, backend, mean, std)
        self.classes = classes
        self.inputs = ('image', 'boxes', 'classes', 'crowd', *(('masks',) if config.masks else ()), 'priority',
                       'uniform')
        width = config.head_channels
        with self.name_scope():
            if config.type == 'vit':
                self.backbone = FeatureMaps(config, self.pixels, [config.depth - 1])
                self.neck: HybridBlock = SimplePyramid(config.embed_dim, width, backend)
                finest = config.patch_size / 4
            else:
                self.backbone = FeatureMaps(config, self.pixels)
                self.neck = FeaturePyramid(self.backbone.channels, config.pyramid[:-1], width)
                finest = config.patch_size
            self.strides = [finest * 2 ** level for level in range(len(config.pyramid))]
            heads = build_heads(classes, width, self.strides, RATIOS, config.masks)
            self.decode, self.decode_anchors = heads.decode, heads.decode_anchors
            self.anchors = Anchors(on_boxes.anchors(config.pyramid, self.strides, config.anchor_scale, RATIOS))
            self.rpn_head, self.fc_cls, self.fc_reg, self.mask_head = heads.rpn, heads.classes, heads.boxes, heads.mask
            self.shared_fcs = nn.HybridSequential()
            self.shared_fcs.add(Linear(width * BOX_SIDE ** 2, 4 * width, backend), nn.Activation('relu'),
                                Linear(4 * width, 4 * width, backend), nn.Activation('relu'))
        self.counts = [len(RATIOS) * height * wide for height, wide in config.pyramid]
        layers = 'backbone', 'neck', 'anchors', 'rpn_head', 'shared_fcs', 'fc_cls', 'fc_reg'
        self.training = Graph(self, self.losses, layers)
        self.masking = Graph(self, self.mask_loss, ['mask_head'])
        self.answering = Graph(self, self.answered, [*layers, 'mask_head'])

    def forward(self, image: Any, *given: Any) -> Any:
        if not isinstance(image, mx.nd.NDArray):
            return self.answered(mx.sym, image)
        # As in `Segmenter.forward`: out of training mode oneDNN would bring weights into layouts of its own.
        with autograd.train_mode():
            if not given:
                return self.answering(image)
            boxes, classes, crowd, *others = given
            masks = others.pop(0) if self.config.masks else None
            priority, *keep = others
            keep = self.kept(image, *keep)
            if masks is None:
                return self.training(image, boxes, classes, crowd, priority, *keep)
            loss, *found = self.training(image, boxes, classes, crowd, priority, *keep)
            count = self._count(found[0])
            return loss + self.masking(masks, boxes, *(each[:, :count] for each in found[:4]), *found[4:])

    def _count(self, positive: mx.nd.NDArray) -> int:
        """How many of each image's samples, the positive ones first, the mask head must compute.

        On a CPU not many more than there are positive ones, which costs a look at what is computed; on a GPU, which
        would wait for that, all that there may be.
        """
        most = positive.shape[1]
        if positive.context.device_type != 'cpu':
            return most
        count = int(positive.sum(axis=1).max().asscalar())
        return min(most, max(1, -(-count // STEP)) * STEP)

    def maps(self, F: Any, image: Any, keep: Any = None) -> List[Any]:
        """The pyramid's maps (B, C, h, w), the finest first."""
        return self.neck(*self.backbone(F, image, keep))

    def proposed(self, F: Any, maps: Sequence[Any], priority: Any = None) -> Tuple[Any, ...]:
        """Boxes (B, P, 4) that may be objects and, of those of their anchors (B, N), their priorities (B, P), if any.

        And what they come from: scores (B, N), codes (B, N, 4), and anchors (1, N, 4).
        """
        anchors = self.anchors(maps[0])
        scores, codes, own, priorities, first = [], [], [], [], 0
        for each, count in zip(maps, self.counts):
            _, _, score, code = self.rpn_head(each)
            scores.append(F.reshape(score, shape=(0, AUTO)))
            codes.append(code)
            own.append(F.slice_axis(anchors, axis=1, begin=first, end=first + count))
            if priority is not None:
                priorities.append(F.slice_axis(priority, axis=1, begin=first, end=first + count))
            first += count
        found = rcnn.propose(F, [F.BlockGrad(each) for each in scores], [F.BlockGrad(each) for each in codes], own,
                             self.decode_anchors, self.config.size, self.counts, self.config.candidates[1], priorities)
        return (*found, F.concat(*scores, dim=1), F.concat(*codes, dim=1), anchors)

    def hidden(self, F: Any, maps: Sequence[Any], boxes: Any) -> Any:
        """What the heads of boxes see of each of boxes (B, k, 4): (B * k, 4 * width)."""
        pooled = self.backend.pyramid_pool(F, maps[:-1], boxes, strides=self.strides[:-1], side=BOX_SIDE)
        return self.shared_fcs(F.reshape(pooled, shape=(-3, AUTO)))

    def masks(self, F: Any, maps: Sequence[Any], boxes: Any, classes: Any) -> Any:
        """The logits (B, k, MASK * MASK) of the masks of boxes (B, k, 4), each of its class (B, k)."""
        pooled = self.backend.pyramid_pool(F, maps, boxes, strides=self.strides[:-1], side=MASK_POOLED)
        logits = self.mask_head(F.reshape(pooled, shape=(-3, 0, 0, 0)))                       # (1, B*k, K, 28, 28)
        logits = F.reshape(logits, shape=(-3, 0, AUTO))                                       # (B*k, K, 28*28)
        return rcnn.of_class(F, logits, classes)

    def losses(self, F: Any, image: Any, boxes: Any, classes: Any, crowd: Any, priority: Any, keep: Any = None
               ) -> Any:
        """The loss (1,); with masks that without theirs, and then what theirs is computed of: samples and maps."""
        count, positive = self.config.samples
        truth, maps = Truth.of(F, boxes, classes, crowd), self.maps(F, image, keep)
        of_anchors, of_objects = (F.slice_axis(priority, axis=1, begin=begin, end=end)
                                  for begin, end in ((0, self.config.candidates[0]), (self.config.candidates[0], None)))
        proposals, of_proposals, score, code, anchors = self.proposed(F, maps, of_anchors)
        loss = rcnn.proposal_loss(F, self.backend, score, code, anchors, truth, of_anchors)
        samples = rcnn.sample(F, self.backend, F.BlockGrad(proposals), truth,
                              F.concat(F.BlockGrad(of_proposals), of_objects, dim=1), count, positive)
        first = Samples(*(F.slice_axis(each, axis=1, begin=0, end=positive) for each in samples))
        hidden = self.hidden(F, maps, samples.boxes)                                          # (B*k, D)
        logits = F.reshape(self.fc_cls(hidden), shape=(AUTO, count, self.classes + 1))
        hidden = F.reshape(hidden, shape=(-4, AUTO, count, 0))
        hidden = F.reshape(F.slice_axis(hidden, axis=1, begin=0, end=positive), shape=(-3, 0))
        code = F.reshape(self.fc_reg(hidden), shape=(AUTO, positive, self.classes, 4))
        loss = (loss + rcnn.class_loss(F, logits, samples, self.classes)
                + rcnn.box_loss(F, code, first, truth, F.sum(samples.used, axis=1)))
        loss = F.reshape(F.mean(loss), shape=(1,))
        if not self.config.masks:
            return loss
        return (loss, first.positive, first.boxes, first.matched, first.classes, *maps[:-1])

    def mask_loss(self, F: Any, masks: Any, truth: Any, positive: Any, boxes: Any, matched: Any, classes: Any,
                  *maps: Any) -> Any:
        """The loss (1,) of masks, of k samples of each image, those of `losses` or the first of them."""
        samples = Samples(boxes, matched, classes, positive, positive)
        logits = self.masks(F, maps, boxes, classes)
        return F.reshape(F.mean(rcnn.mask_loss(F, logits, samples, masks, truth)), shape=(1,))

    def answered(self, F: Any, image: Any) -> Any:
        """The answers (B, 100, 6), or with masks (B, 100, 6 + MASK * MASK)."""
        maps, proposals = self.maps(F, image), self.config.candidates[1]
        boxes = self.proposed(F, maps)[0]
        hidden = self.hidden(F, maps, boxes)
        scores = F.softmax(F.reshape(self.fc_cls(hidden), shape=(AUTO, proposals, self.classes + 1)), axis=2)
        code = F.reshape(self.fc_reg(hidden), shape=(AUTO, proposals * self.classes, 4))
        found = rcnn.detect(F, scores, code, boxes, self.decode, self.config.size, (proposals, self.classes))
        if not self.config.masks:
            return found
        numbers = F.slice_axis(found, axis=2, begin=5, end=6)
        logits = self.masks(F, maps[:-1], F.slice_axis(found, axis=2, begin=0, end=4),
                            F.reshape(numbers, shape=(0, AUTO)))
        return F.concat(found, F.broadcast_mul(F.sigmoid(logits), numbers >= 0), dim=2)

    def _collect_params_with_prefix(self, prefix: str = '') -> dict:
        """The encoder's names as the classifier's; those of the rest as mmdetection's, without its `backbone.`."""
        head = self.rpn_head
        parts = {'backbone': self.backbone, 'neck': self.neck, 'anchors': self.anchors,
                 'rpn_head.rpn_conv': head.conv1[0], 'rpn_head.rpn_cls': head.score, 'rpn_head.rpn_reg': head.loc}
        box, mask = 'roi_head.bbox_head', 'roi_head.mask_head'
        parts.update({f'{box}.shared_fcs.{number}': self.shared_fcs[2 * number] for number in (0, 1)})
        parts.update({f'{box}.fc_cls': self.fc_cls, f'{box}.fc_reg': self.fc_reg})
        if self.mask_head:
            *convolutions, upsample = mask_layers(self.mask_head)
            parts.update({f'{mask}.convs.{number}.conv': each for number, each in enumerate(convolutions)})
            parts.update({f'{mask}.upsample': upsample, f'{mask}.conv_logits': self.mask_head.mask})
        return names_without(('backbone',), parts, prefix)


class Anchors(HybridBlock):
    """The anchors (1, N, 4) of all maps, on the device of what it is called with."""

    def __init__(self, anchors: np.ndarray):
        super().__init__()
        with self.name_scope():
            self.boxes = self.params.get_constant('boxes', anchors[None])

    def hybrid_forward(self, F: Any, x: Any, boxes: Any) -> Any:
        return boxes


class Graph(HybridBlock):
    """A part of a detector as a graph of its own, on the detector's own layers."""

    def __init__(self, net: Detector, compute: Callable[..., Any], layers: Sequence[str]):
        super().__init__(prefix='')
        self._compute = compute
        for name, child in children(net).items():
            if name in layers:
                self.register_child(child, name)

    def hybrid_forward(self, F: Any, x: Any, *others: Any) -> Any:
        return self._compute(F, x, *others)


def detector_cost(config: ModelConfig, classes: int) -> int:
    """Count the multiply-adds of an image's forward pass in training, with masks of a quarter of the boxes."""
    width, places = config.head_channels, [height * wide for height, wide in config.pyramid]
    cost = multiply_adds(config, decoder=False) + sum(places) * (9 * width + 15) * width
    if config.type == 'vit':
        inner = config.embed_dim
        cost += places[2] * inner * inner * 4 + places[1] * inner * inner // 2
        inputs = [inner // 4, inner // 2, inner, inner]
    else:
        inputs = [config.embed_dim << stage for stage in range(config.stages)]
    cost += sum(area * (channels + 9 * width) * width for area, channels in zip(places, inputs))
    count, positive = config.samples
    cost += count * 4 * width * (width * BOX_SIDE ** 2 + 4 * width + 5 * classes + 1)
    if config.masks:
        cost += positive * MASK_POOLED ** 2 * width * (36 * width + 4 * width + 4 * classes)
    return cost


def build_detector(config: ModelConfig, classes: int, seed: Optional[int] = 0, backend: OpBackend = REFERENCE,
                   mean: Tuple[float, ...] = MEAN, std: Tuple[float, ...] = STD) -> Detector:
    """Build a detector on cpu(0), with random initial weights, or zeros where `seed` is None.

    backend, mean and std as in `build_simmim`.

    Raises:
        ValueError: GluonCV is not there; says what to type.
    """
    net = Detector(config, classes, backend, mean, std)
    begin(net, seed)
    return net
