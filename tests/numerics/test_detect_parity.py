"""Anchors, coding of boxes, assignment, proposals, losses and answers against numbers recorded from detectron2.

detector.npz has what its classes compute (float32) of two images of 64 x 96 pixels, with five objects and with
three, 1,536 anchors, 16 sampled boxes of each image, and 150 boxes that become answers, with three classes.
"""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from support import machine
from support.running import DATA

from mxsimmim.models import boxes, from_gluoncv, rcnn
from mxsimmim.models.rcnn import Samples, Truth
from mxsimmim.ops import OpBackend

FILE = np.load(DATA / 'detector.npz')
SIZES, STRIDES, SIZE = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)], [4, 8, 16, 32, 64], (64, 96)
COUNTS = [3 * height * width for height, width in SIZES]
CLASSES, MOST = 3, 100
HEADS = from_gluoncv.build_heads(CLASSES, 4, STRIDES, (0.5, 1.0, 2.0), True)
forms = pytest.mark.parametrize('form', machine.FORMS)


def array(name):
    return mx.nd.array(FILE[name])


def close(found, expected, tolerance=1e-5):
    found = found.asnumpy() if isinstance(found, mx.nd.NDArray) else found
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance * max(1, np.abs(expected).max())


def truth():
    """Both images' objects as a batch has them."""
    placed, classes = np.zeros((2, MOST, 4), 'float32'), np.full((2, MOST), -1, 'float32')
    for image in (0, 1):
        count = len(FILE[f'truth{image}'])
        placed[image, :count], classes[image, :count] = FILE[f'truth{image}'], FILE[f'classes{image}']
    return Truth.of(mx.nd, mx.nd.array(placed), mx.nd.array(classes), mx.nd.zeros((2, MOST), dtype='uint8'))


def samples(first=16):
    """What the heads are trained on."""
    both = [np.stack([FILE[f'sample{name}{image}'][:first] for image in (0, 1)]) for name in ('', '_matched', '_label')]
    placed, matched, positive = (mx.nd.array(each) for each in both)
    classes = boxes.rows(mx.nd, truth().classes, matched)
    return Samples(placed, matched, classes, positive, mx.nd.ones_like(positive))


def test_anchors():
    close(boxes.anchors(SIZES, STRIDES, 4, (0.5, 1, 2)), FILE['anchors'], 1e-7)


@pytest.mark.parametrize('kind, weights, decode', [('rpn', rcnn.RPN_WEIGHTS, HEADS.decode_anchors),
                                                   ('box', rcnn.BOX_WEIGHTS, HEADS.decode)])
def test_coding(kind, weights, decode):
    close(boxes.encode(mx.nd, array(f'{kind}:from'), array(f'{kind}:to'), weights), FILE[f'{kind}:code'])
    given, placed = (array(f'{kind}:{name}').expand_dims(0) for name in ('given', 'from'))
    close(rcnn.decoded(mx.nd, decode, given, placed, 20)[0], FILE[f'{kind}:decoded'])


@forms
def test_assignment(form):
    """Which anchors are an object, which are none, and which object it is."""
    known, anchors = truth(), array('anchors').expand_dims(0)
    overlap, matched, is_best, crowd = (each.asnumpy() for each in OpBackend(form).match_boxes(
        mx.nd, anchors, known.boxes, known.kind))
    label = np.where((overlap >= rcnn.POSITIVE) | (is_best > 0), 1, np.where(overlap < rcnn.NEGATIVE, 0, -1))
    for image in (0, 1):
        expected = FILE[f'rpn_label{image}']
        np.testing.assert_array_equal(label[image], expected)
        np.testing.assert_array_equal(matched[image][expected == 1], FILE[f'rpn_matched{image}'][expected == 1])
    assert not crowd.any()
    chosen = samples()
    overlap, matched = (each.asnumpy() for each in OpBackend(form).match_boxes(mx.nd, chosen.boxes, known.boxes,
                                                                               known.kind)[:2])
    np.testing.assert_array_equal(overlap >= rcnn.SAME, chosen.positive.asnumpy() > 0)
    positive = chosen.positive.asnumpy() > 0
    np.testing.assert_array_equal(matched[positive], chosen.matched.asnumpy()[positive])


def by_map(name):
    """Parts of an array (2, N, ...), one a map."""
    return np.split(FILE[name], np.cumsum(COUNTS)[:-1], axis=1)


def test_proposals():
    anchors = np.split(FILE['anchors'], np.cumsum(COUNTS)[:-1])
    found = rcnn.propose(mx.nd, [mx.nd.array(each) for each in by_map('logits')],
                            [mx.nd.array(each) for each in by_map('codes')],
                            [mx.nd.array(each[None]) for each in anchors], HEADS.decode_anchors, SIZE, COUNTS, 200,
                            [mx.nd.array(each) for each in by_map('priority')])
    priority = FILE['priority'].astype('float32')
    for image in (0, 1):
        close(found[0][image], FILE[f'proposals{image}'])
        assert np.isin(found[1][image].asnumpy(), priority[image]).all()


@forms
def test_loss_of_anchors(form):
    """Of those that the same priorities choose; the mean of the images' losses."""
    score, code = array('logits'), array('codes')
    score.attach_grad()
    code.attach_grad()
    with autograd.record():
        loss = rcnn.proposal_loss(mx.nd, OpBackend(form), score, code, array('anchors').expand_dims(0), truth(),
                                     array('priority')).mean()
    loss.backward()
    assert abs(loss.asscalar() - FILE['rpn_losses'].sum()) < 1e-5
    close(score.grad, FILE['rpn_logits_grad'])
    close(code.grad, FILE['rpn_codes_grad'])


def test_losses_of_boxes():
    """As many are sampled of each image, so the mean of the images' losses is that over all boxes."""
    score, code = array('head_score').reshape((2, 16, 4)), array('head_code').reshape((2, 16, CLASSES, 4))
    chosen, known = samples(), truth()
    score.attach_grad()
    code.attach_grad()
    with autograd.record():
        of_classes = rcnn.class_loss(mx.nd, score, chosen, CLASSES).mean()
        of_boxes = rcnn.box_loss(mx.nd, code, chosen, known, mx.nd.full((2,), 16)).mean()
    autograd.backward([of_classes, of_boxes])
    close(mx.nd.concat(of_classes, of_boxes, dim=0), FILE['head_losses'])
    close(score.grad.reshape((32, 4)), FILE['head_score_grad'])
    close(code.grad.reshape((32, 12)), FILE['head_code_grad'])


def test_loss_of_masks():
    """Of objects that fill their boxes, and boxes inside of them."""
    chosen, known = samples(8), truth()
    chosen = Samples(*(each[:1] for each in chosen))._replace(boxes=array('mask_boxes').expand_dims(0))
    logits = mx.nd.array(FILE['mask_logits'].astype('float32')).reshape((8, CLASSES, -1))
    logits.attach_grad()
    with autograd.record():
        own = rcnn.of_class(mx.nd, logits, chosen.classes)
        loss = rcnn.mask_loss(mx.nd, own, chosen, mx.nd.ones((1, MOST, 56, 56), dtype='uint8'), known.boxes[:1])
    loss.backward()
    assert abs(loss.asscalar() - FILE['mask_loss']) < 1e-5
    close(logits.grad.reshape((8, CLASSES, 28, 28)), FILE['mask_grad'])


def test_targets_of_masks():
    """Ellipses: of 28 x 28 cells at most 2 % are others than from a bitmap of four times the pixels; 1 % are."""
    chosen, known = samples(8), truth()
    y, x = (np.mgrid[:56, :56] + 0.5) / 28 - 1
    masks = mx.nd.array(np.tile(x * x + y * y <= 1, (1, MOST, 1, 1)).astype('uint8'))
    found = rcnn.masks_in(mx.nd, masks, Samples(*(each[:1] for each in chosen)), known.boxes[:1]).asnumpy()
    other = (found.reshape(8, 28, 28) > 0) != FILE['mask_targets']
    print(other.mean())
    assert other.mean() < 0.02


def test_answers():
    """Boxes, scores and classes, the best first."""
    count = 150
    found = rcnn.detect(mx.nd, array('answer_scores').expand_dims(0), array('answer_codes').reshape((1, -1, 4)),
                           array('answer_proposals').expand_dims(0), HEADS.decode, SIZE, (count, CLASSES))
    close(found[0], FILE['answers'])
