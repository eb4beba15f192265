"""What a detector proposes, what it is told of that, and how wrong it was: losses of proposals, boxes and masks.

Every loss is an image's own, so that a batch has the same gradient however it is divided. Targets have no gradient.
"""
from typing import Any, NamedTuple, Sequence, Tuple

from ..config.model import MASK_SIDE, OBJECTS, PROPOSALS, SAMPLED_ANCHORS
from ..ops import OpBackend
from ..ops.boxes import CROWD, OBJECT
from ..ops.reference import AUTO
from .boxes import NOTHING, clipped, encode, has_area, highest, rows, sampled, sides

POSITIVE_ANCHORS = 128  # of those sampled of an image, at most
POSITIVE, NEGATIVE, SAME = 0.7, 0.3, 0.5  # overlap of anchors with an object, or less; of proposals
MASK = 28  # cells a side of a mask in its box
IN_CROWD = 0.5  # share of a box that a crowd covers: then it is not negative
SUPPRESSED, SUPPRESSED_ANSWERS = 0.7, 0.5  # overlap of proposals, and of answers, of which only the better is kept
SURE = 0.05  # score of an answer
PAIRS = 1000  # pairs of a box and a class, of an image, that may be answers
RPN_WEIGHTS, BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)  # of a box's coding; see `boxes.encode`


class Truth(NamedTuple):
    """What is known of the objects of images."""
    boxes: Any  # (B, M, 4)
    classes: Any  # (B, M), -1 where there is none
    kind: Any  # (B, M), as in `OpBackend.match_boxes`

    @classmethod
    def of(cls, F: Any, boxes: Any, classes: Any, crowd: Any) -> 'Truth':
        """Take the fields of a batch."""
        classes, crowd = F.cast(classes, dtype='float32'), F.cast(crowd, dtype='float32')
        return cls(boxes, classes, (classes >= 0) * (OBJECT + (CROWD - OBJECT) * crowd))


class Samples(NamedTuple):
    """Boxes that the heads are trained on, k of each image, those that are objects first."""
    boxes: Any  # (B, k, 4)
    matched: Any  # (B, k), the number of the object that each is compared with
    classes: Any  # (B, k), that object's
    positive: Any  # (B, k), 1 where it is that object
    used: Any  # (B, k), 1 where the box counts


def propose(F: Any, scores: Sequence[Any], coded: Sequence[Any], anchors: Sequence[Any], decode: Any,
            size: Tuple[int, int], counts: Sequence[int], most: int, priority: Sequence[Any] = ()) -> Tuple[Any, Any]:
    """Return the boxes (B, `most`, 4) that are likeliest to be objects, zeros after the last, and their priorities.

    A box has that of its anchor, (B, most), if there are any: which boxes are sampled does not depend on which of two
    almost equal scores is found to be the higher one.

    Args:
        scores: of the anchors on each map, (B, n).
        coded: (B, n, 4), see `boxes.encode`.
        anchors: (1, n, 4).
        decode: GluonCV's decoder: (1, N, 4) and anchors (1, N, 4) to boxes.
        size: of the input.
        counts: n of each map.
        most: boxes of an image.
        priority: (B, n) of each map.
    """
    found = []
    for score, code, boxes, count, *given in zip(scores, coded, anchors, counts, *([priority] if priority else [])):
        count = min(PROPOSALS, count)
        index = highest(F, score, count)
        own = F.take(F.reshape(boxes, shape=(AUTO, 4)), index)                                # (B, count, 4)
        placed = clipped(F, decoded(F, decode, rows(F, code, index), own, count), size)
        score = F.where(has_area(F, placed), rows(F, score, index), F.ones_like(index) * NOTHING)
        columns = [score, *(rows(F, each, index) for each in given)]                          # each (B, count)
        first, *last = (F.expand_dims(each, axis=2) for each in columns)
        found.append(F.contrib.box_nms(F.concat(first, placed, *last, dim=2), overlap_thresh=SUPPRESSED,
                                       valid_thresh=NOTHING / 2, coord_start=1, score_index=0, id_index=-1))
    every = F.concat(*found, dim=1)                              # (B, all, 5 or 6), -1 where there is none
    boxes = F.slice_axis(every, axis=2, begin=1, end=5)
    there = has_area(F, boxes)
    score = F.where(there, F.reshape(F.slice_axis(every, axis=2, begin=0, end=1), shape=(0, AUTO)),
                    F.ones_like(there) * NOTHING)
    index = highest(F, score, most)
    boxes = F.broadcast_mul(rows(F, boxes, index), F.expand_dims(rows(F, there, index), axis=2))
    if not priority:
        return boxes, None
    return boxes, rows(F, F.reshape(F.slice_axis(every, axis=2, begin=5, end=6), shape=(0, AUTO)), index)


def decoded(F: Any, decode: Any, code: Any, boxes: Any, count: int) -> Any:
    """Return the boxes (B, count, 4) that code (B, count, 4) makes of boxes (B, count, 4)."""
    flat = decode(F.reshape(code, shape=(1, AUTO, 4)), F.reshape(boxes, shape=(1, AUTO, 4)))
    return F.reshape(flat, shape=(AUTO, count, 4))


def proposal_loss(F: Any, backend: OpBackend, score: Any, code: Any, anchors: Any, truth: Truth, priority: Any) -> Any:
    """Return each image's loss (B,) of what anchors (1, N, 4) are told to be: score (B, N) and code (B, N, 4).

    Binary cross entropy and absolute difference, of 256 anchors, or fewer, over 256, as detectron2's.
    """
    overlap, matched, is_best, crowd = backend.match_boxes(F, anchors, truth.boxes, truth.kind)
    positive = F.broadcast_maximum(overlap >= POSITIVE, is_best)
    negative = (overlap < NEGATIVE) * (crowd < IN_CROWD)
    index, positive, used = sampled(F, positive, negative, priority, SAMPLED_ANCHORS, POSITIVE_ANCHORS)
    own = F.take(F.reshape(anchors, shape=(AUTO, 4)), index)                                   # (B, 256, 4)
    wanted = encode(F, own, rows(F, truth.boxes, rows(F, matched, index)), RPN_WEIGHTS)
    positive, used, wanted = (F.BlockGrad(each) for each in (positive, used, wanted))
    score, code = rows(F, score, index), rows(F, code, index)
    entropy = (softplus(F, score) - score * positive) * used
    distance = F.sum(F.abs(code - wanted), axis=2) * positive
    return F.sum(entropy + distance, axis=1) / SAMPLED_ANCHORS


def softplus(F: Any, x: Any) -> Any:
    """log(1 + exp(x))."""
    return F.Activation(x, act_type='softrelu')


def sample(F: Any, backend: OpBackend, proposals: Any, truth: Truth, priority: Any, count: int,
           most_positive: int) -> Samples:
    """Choose `count` boxes of each image, of which so many at most are an object, of those proposed and those known."""
    boxes = F.concat(proposals, truth.boxes, dim=1)
    overlap, matched, _, crowd = backend.match_boxes(F, boxes, truth.boxes, truth.kind)
    there = F.concat(has_area(F, proposals), truth.kind == OBJECT, dim=1)
    positive, negative = (overlap >= SAME) * there, (overlap < SAME) * (crowd < IN_CROWD) * there
    index, positive, used = sampled(F, positive, negative, priority, count, most_positive)
    matched = rows(F, matched, index)
    found = rows(F, boxes, index), matched, rows(F, truth.classes, matched), positive, used
    return Samples(*(F.BlockGrad(each) for each in found))


def class_loss(F: Any, logits: Any, samples: Samples, classes: int) -> Any:
    """Return each image's mean cross entropy (B,) of logits (B, k, classes + 1), the last for what is no object."""
    wanted = F.where(samples.positive, samples.classes, F.ones_like(samples.classes) * classes)
    entropy = -F.pick(F.log_softmax(logits, axis=2), wanted, axis=2) * samples.used
    return F.sum(entropy, axis=1) / F.maximum(F.sum(samples.used, axis=1), 1)


def box_loss(F: Any, code: Any, samples: Samples, truth: Truth, used: Any) -> Any:
    """Return each image's loss (B,) of code (B, k, classes, 4): the absolute difference for the own class.

    Args:
        samples: the first k of an image.
        used: (B,), how many boxes of each image were sampled: what the sum is divided by.
    """
    wanted = encode(F, samples.boxes, rows(F, truth.boxes, samples.matched), BOX_WEIGHTS)
    code = of_class(F, F.reshape(code, shape=(-3, 0, 0)), samples.classes)
    distance = F.sum(F.abs(code - F.BlockGrad(wanted)), axis=2) * samples.positive
    return F.sum(distance, axis=1) / F.maximum(used, 1)


def of_class(F: Any, array: Any, classes: Any) -> Any:
    """Take of array (B * k, classes, n) that of the class (B, k) of each, the first where there is none: (B, k, n)."""
    own = F.reshape(F.maximum(classes, 0), shape=(AUTO, 1))
    return F.reshape_like(rows(F, array, own), classes, lhs_begin=0, lhs_end=2, rhs_begin=0, rhs_end=2)


def mask_loss(F: Any, logits: Any, samples: Samples, masks: Any, truth: Any) -> Any:
    """Return each image's mean binary cross entropy (B,) of logits (B, k, MASK * MASK), those of the own classes.

    masks and truth as in `masks_in`. An image whose k
    samples are no objects has 0. detectron2 divides by the objects of all images together.
    """
    wanted = masks_in(F, masks, samples, truth)
    entropy = F.mean(softplus(F, logits) - logits * F.BlockGrad(wanted), axis=2) * samples.positive
    return F.sum(entropy, axis=1) / F.maximum(F.sum(samples.positive, axis=1), 1)


def masks_in(F: Any, masks: Any, samples: Samples, truth: Any) -> Any:
    """Return what of its object each sample's box holds, (B, k, MASK * MASK), 1 or 0.

    masks (B, M, S, S) are 1 in the cells of the objects' own boxes, `truth` (B, M, 4), that they cover. A cell of the
    result is 1 where the mean of four places in it is at least a half (detectron2: of as many as the image has pixels).
    """
    low, size = sides(F, rows(F, truth, samples.matched))                                     # (B, k, 2)
    scale = MASK_SIDE / F.maximum(size, 1e-3)
    corners = ((corner - low) * scale for corner in (F.slice_axis(samples.boxes, axis=2, begin=begin, end=begin + 2)
                                                     for begin in (0, 2)))
    image = F.reshape(F.contrib.arange_like(samples.matched, axis=0) * OBJECTS, shape=(AUTO, 1))
    own = F.expand_dims(F.broadcast_add(samples.matched, image), axis=2)
    whole = F.concat(own, F.zeros_like(low), F.ones_like(low), dim=2)  # in place of boxes that are no objects
    regions = F.concat(own, *corners, dim=2)
    regions = F.where(F.broadcast_like(F.expand_dims(samples.positive, axis=2), regions), regions, whole)
    flat = F.expand_dims(F.reshape(F.cast(masks, dtype='float32'), shape=(-3, 0, 0)), axis=1)  # (B*M, 1, S, S)
    found = F.contrib.ROIAlign(flat, F.reshape(regions, shape=(-3, 0)), pooled_size=(MASK, MASK), spatial_scale=1.0,
                               sample_ratio=2, aligned=True)                                  # (B*k, 1, MASK, MASK)
    found = F.reshape_like(found, samples.matched, lhs_begin=0, lhs_end=2, rhs_begin=0, rhs_end=2)
    return F.reshape(found >= 0.5, shape=(0, 0, AUTO))


def detect(F: Any, scores: Any, code: Any, boxes: Any, decode: Any, size: Tuple[int, int], count: Tuple[int, int]
           ) -> Any:
    """Return the answers (B, 100, 6): x0, y0, x1, y1, score, class, the best first; -1 for the class after the last.

    Of an image the best 1000 pairs of a box and a class are looked at, where detectron2 looks at all that are sure
    enough: 1000 boxes seldom have more.

    Args:
        scores: (B, P, K + 1) probabilities, the last that of no object.
        code: (B, P * K, 4), see `boxes.encode`.
        boxes: (B, P, 4); those of no area do not count.
        decode: as for `propose`.
        size: of the input.
        count: P and K.
    """
    proposals, classes = count
    pairs = min(PAIRS, proposals * classes)
    scores = F.broadcast_mul(F.slice_axis(scores, axis=2, begin=0, end=classes),
                             F.expand_dims(has_area(F, boxes), axis=2))
    scores = F.reshape(scores, shape=(0, AUTO))                                               # (B, P * K)
    index = highest(F, scores, pairs)
    number = F.floor((index + 0.5) / classes)
    placed = decoded(F, decode, rows(F, code, index), rows(F, boxes, number), pairs)
    placed = clipped(F, placed, size)
    score = rows(F, scores, index) * has_area(F, placed)
    found = F.concat(placed, F.expand_dims(score, axis=2), F.expand_dims(index - number * classes, axis=2), dim=2)
    found = F.contrib.box_nms(found, overlap_thresh=SUPPRESSED_ANSWERS, valid_thresh=SURE, coord_start=0, score_index=4,
                              id_index=5)
    found = F.slice_axis(found, axis=1, begin=0, end=min(OBJECTS, pairs))
    there = F.slice_axis(found, axis=2, begin=4, end=5) > 0
    return F.concat(F.broadcast_mul(F.slice_axis(found, axis=2, begin=0, end=5), there),
                    F.slice_axis(found, axis=2, begin=5, end=6), dim=2)
