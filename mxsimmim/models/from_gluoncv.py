"""GluonCV's Faster and Mask R-CNN, of which a detector takes the heads and the coding of boxes.

GluonCV's own forward passes pool wrongly on CPUs, sample from global generators and normalise losses by the device
(docs/detection.md), so `detector` has its own.
"""
import contextlib
import math
import sys
from typing import Any, Iterator, List, NamedTuple, Sequence

from PIL import ImageFile

from ..runtime.mxnet_private import replace_child
from ..system.guards import unusable
from .upernet import Doubled

LARGEST = math.log(1000 / 16)
"""Of a box's width or height over its anchor's, the largest logarithm that is believed: detectron2's and
torchvision's."""


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Hide PyTorch from imports, also where it is loaded: beside version 2, GluonCV 0.10 does not load."""
    missing = object()
    kept = sys.modules.get('torch', missing)
    sys.modules['torch'] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if kept is missing:
            del sys.modules['torch']
        else:
            sys.modules['torch'] = kept  # type: ignore[assignment]


@contextlib.contextmanager
def refusing_truncated_images() -> Iterator[None]:
    """Undo what GluonCV's import does to Pillow: images that end too early would be grey below, and nobody told."""
    kept = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = kept


def model_zoo() -> Any:
    """Return GluonCV's module of networks.

    Raises:
        ValueError: it is not installed, or does not load; says what to type.
    """
    try:
        with without_torch(), refusing_truncated_images():
            from gluoncv import model_zoo
    except (ImportError, RuntimeError) as error:
        raise unusable('task=detect', error, 'detect') from None
    return model_zoo


class Heads(NamedTuple):
    """Blocks of GluonCV's networks."""
    rpn: Any  # a map (B, C, h, w) to what its anchors (B, h*w*A, …) are
    boxes: Any  # what the head of boxes sees (N, 4C) to a box for each class (N, 4 * classes)
    classes: Any  # the same to logits (N, classes + 1)
    mask: Any  # what is pooled (N, C, S, S) to logits (1, N, classes, 2S, 2S); None where there are no masks
    decode: Any  # codes (1, N, 4) and boxes (1, N, 4) to boxes
    decode_anchors: Any  # the same for anchors


def build_heads(classes: int, width: int, strides: Sequence[float], ratios: Sequence[float], masks: bool) -> Heads:
    """Take from GluonCV's MaskRCNN or FasterRCNN its heads, without weights.

    Args:
        classes: how many, without the background.
        width: C, channels of the maps and of the hidden layers.
        strides: pixels of the input a side that a place of each map stands for.
        ratios: height over width of the anchors at each place.
        masks: whether there is a head for them.

    Raises:
        ValueError: as `model_zoo`.
    """
    zoo, levels, anchors = model_zoo(), len(strides), len(ratios)
    keys: Any = dict(features=None, top_features=None, classes=[str(number) for number in range(classes)],
                     strides=tuple(strides), scales=(1,) * levels, min_stage=2, max_stage=1 + levels,
                     ratios=tuple(ratios), alloc_size=(1, 1), clip=LARGEST, rpn_channel=width)
    rcnn = zoo.MaskRCNN(mask_channels=width, num_fcn_convs=4, **keys) if masks else zoo.FasterRCNN(**keys)
    rpn = rcnn.rpn.rpn_head
    sizes = {rpn.conv1[0]: (width, width, 3, 3), rpn.score: (anchors, width, 1, 1),
             rpn.loc: (4 * anchors, width, 1, 1), rcnn.class_predictor: (classes + 1, 4 * width),
             rcnn.box_predictor: (4 * classes, 4 * width)}
    if masks:
        replace_child(rcnn.mask.deconv, mask_layers(rcnn.mask)[-1], Doubled(width, width))
        *convolutions, _ = mask_layers(rcnn.mask)
        sizes.update(dict.fromkeys(convolutions, (width, width, 3, 3)))
        sizes[rcnn.mask.mask] = (classes, width, 1, 1)
    for layer, shape in sizes.items():
        layer.weight.shape = shape  # which GluonCV leaves open until the first image
        layer.weight.init = layer.bias.init = None  # `initial.begin` draws weights, or makes zeros
    decoder = type(rcnn.box_decoder)(stds=(1.0, 1.0, 1.0, 1.0), clip=LARGEST, convert_anchor=True)
    return Heads(rpn, rcnn.box_predictor, rcnn.class_predictor, rcnn.mask if masks else None, rcnn.box_decoder, decoder)


def mask_layers(head: Any) -> List[Any]:
    """Return the convolutions of GluonCV's mask head, the transposed one last."""
    return list(head.deconv)[::2]
