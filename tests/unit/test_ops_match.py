"""Boxes compared with those that are known, native and plain, against NumPy in float64."""
import mxnet as mx
import numpy as np
import pytest
from support import machine

from mxsimmim.ops import OpBackend

SEED = 3
forms = pytest.mark.parametrize('form', machine.FORMS)


def random_boxes(rng, *shape):
    corner = rng.uniform(0, 80, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(2, 40, (*shape, 2))], -1).astype('float32')


def expected(boxes, truth, kind):
    """Of one image: largest overlap, number of the object, whether it is an object's best, share in a crowd."""
    boxes, truth = boxes.astype('float64'), truth.astype('float64')
    low, high = np.maximum(boxes[:, None, :2], truth[:, :2]), np.minimum(boxes[:, None, 2:], truth[:, 2:])
    common = np.maximum(high - low, 0).prod(2)
    own, others = ((each[:, 2:] - each[:, :2]).prod(1) for each in (boxes, truth))
    overlap = np.where(kind == 1, common / np.maximum(own[:, None] + others - common, 1e-9), 0)
    crowd = np.where(kind == 2, common / np.maximum(own[:, None], 1e-9), 0)
    best = ((overlap == overlap.max(0)) & (overlap > 0)).any(1)
    return overlap.max(1), overlap.argmax(1), best, crowd.max(1)


@forms
@pytest.mark.parametrize('images, own', [(1, 1), (3, 1), (3, 3)])
def test_match(form, images, own):
    """Boxes of each image, or of all of them; some of no area; objects, crowds and nothing in any order."""
    print('seed', SEED)
    rng = np.random.default_rng(SEED)
    boxes, truth = random_boxes(rng, own, 200), random_boxes(rng, images, 30)
    boxes[:, ::9, 2:] = boxes[:, ::9, :2]
    kind = rng.choice(3, (images, 30), p=(0.2, 0.6, 0.2)).astype('float32')
    kind[-1, :] *= images == 1  # nothing at all in the last of several
    truth[:, 5] = 0
    arrays = [mx.nd.array(each) for each in (boxes, truth, kind)]
    for array in arrays:
        array.attach_grad()
        array.grad[:] = 7  # must be overwritten
    with mx.autograd.record():
        found = OpBackend(form).match_boxes(mx.nd, *arrays)
        total = mx.nd.add_n(*found)
    total.backward()
    assert not any(array.grad.asnumpy().any() for array in arrays)
    for image in range(images):
        overlap, number, best, crowd = expected(boxes[image % own], truth[image], kind[image])
        for ours, theirs in zip(found, (overlap, number, best, crowd)):
            np.testing.assert_allclose(ours.asnumpy()[image], theirs, rtol=1e-5, atol=1e-6)
        assert image == images - 1 > 0 or best.sum() > 3 and (overlap > 0.3).sum() > 5


@pytest.mark.skipif('native' not in machine.FORMS, reason=machine.WHY)
def test_refuses():
    with pytest.raises(mx.MXNetError, match=r'boxes \(2, 5, 4\) are not'):
        OpBackend('native').match_boxes(mx.nd, mx.nd.zeros((2, 5, 4)), mx.nd.zeros((3, 6, 4)), mx.nd.zeros((3, 6)))
    with pytest.raises(mx.MXNetError, match=r'kind \(3, 5\) is not'):
        OpBackend('native').match_boxes(mx.nd, mx.nd.zeros((1, 5, 4)), mx.nd.zeros((3, 6, 4)), mx.nd.zeros((3, 5)))
