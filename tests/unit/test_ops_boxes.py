"""Boxes pooled from a pyramid of maps, native and plain, against NumPy in float64 and what torchvision gave."""
import math
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from support import machine

from mxsimmim.ops import OpBackend

STRIDES = (4, 8, 16, 32)
DATA = Path(__file__).parents[1] / 'data' / 'regions.npz'
forms = pytest.mark.parametrize('form', machine.FORMS)


class Pool(mx.gluon.HybridBlock):
    """The operator alone."""

    def __init__(self, backend, strides, side, samples):
        super().__init__()
        self.backend, self._keys = backend, dict(strides=strides, side=side, samples=samples)

    def hybrid_forward(self, F, boxes, *maps):
        return self.backend.pyramid_pool(F, maps, boxes, **self._keys)


def level(box, levels):
    """The number of the map that a box is pooled from."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return min(max(math.floor(math.log2(math.sqrt(area) / 224) + 1e-6) + 2, 0), levels - 1)


def rows(start, length, bins, samples, n):
    """The weights (bins, n) of a map's rows in each bin of rows, for a box that begins at `start` of the map."""
    weights = np.zeros((bins, n))
    for bin_ in range(bins):
        for sample in range(samples):
            at = start + length / bins * (bin_ + (sample + 0.5) / samples)
            if -1 <= at <= n:
                at = min(max(at, 0), n - 1)
                low = min(int(at), max(n - 2, 0))
                weights[bin_, low] += (1 - (at - low)) / samples
                if n > 1:
                    weights[bin_, low + 1] += (at - low) / samples
    return weights


def weights_of(box, number, shape, side, samples, strides):
    """Those of the rows and of the columns of a box's own map."""
    x0, y0, x1, y1 = box / strides[number]
    return (rows(y0 - 0.5, y1 - y0, side, samples, shape[0]), rows(x0 - 0.5, x1 - x0, side, samples, shape[1]))


def expected(maps, boxes, head, side, samples, strides=STRIDES):
    """What is pooled (B, N, C, side, side), and the gradients of the maps of its product with `head`, in float64."""
    pooled, gradients = np.zeros(head.shape), [np.zeros(each.shape) for each in maps]
    for image, number in np.ndindex(boxes.shape[:2]):
        box = boxes[image, number].astype('float64')
        if min(box[2] - box[0], box[3] - box[1]) > 0:
            own = level(box, len(maps))
            y, x = weights_of(box, own, maps[own].shape[2:], side, samples, strides)
            pooled[image, number] = np.einsum('yh,chw,xw->cyx', y, maps[own][image], x)
            gradients[own][image] += np.einsum('yh,cyx,xw->chw', y, head[image, number], x)
    return [pooled, *gradients]


def random_case(seed, images, count, channels, height, width, strides=STRIDES):
    """Maps of images of height x width pixels, and boxes of all sizes, some beyond the edges, some of no area."""
    print('seed', seed)
    rng = np.random.default_rng(seed)
    maps = [rng.standard_normal((images, channels, height // stride, width // stride)).astype('float32')
            for stride in strides]
    corner = rng.uniform(-0.2, 0.9, (images, count, 2)) * (width, height)
    boxes = np.concatenate([corner, corner + np.exp(rng.uniform(1, 7, (images, count, 2)))], 2).astype('float32')
    boxes[:, ::5, 2] = boxes[:, ::5, 0]
    boxes[:, 1::5] = 0  # what fills a batch up
    return maps, boxes


def run(form, maps, boxes, head, side, samples, strides=STRIDES, hybridize=False):
    """What is pooled, and the gradients of the maps."""
    block = Pool(OpBackend(form), strides, side, samples)
    if hybridize:
        block.hybridize(static_alloc=True, static_shape=True)
    arrays = [mx.nd.array(each) for each in (boxes, *maps)]
    for array in arrays:
        array.attach_grad()
        array.grad[:] = 7  # must be overwritten
    with mx.autograd.record():
        pooled = block(*arrays)
    pooled.backward(mx.nd.array(head))
    assert not arrays[0].grad.asnumpy().any()
    return [pooled.asnumpy(), *(array.grad.asnumpy() for array in arrays[1:])]


@forms
@pytest.mark.parametrize('case', [
    (2, 23, 5, 128, 96, 7, 2), (1, 40, 33, 256, 320, 14, 2), (3, 11, 1, 64, 64, 1, 1), (1, 12, 70, 64, 160, 3, 3)],
    ids=str)
def test_what_is_pooled_and_its_gradient(form, case):
    images, count, channels, height, width, side, samples = case
    maps, boxes = random_case(sum(case), images, count, channels, height, width)
    head = np.random.default_rng(1).standard_normal((images, count, channels, side, side))
    for hybridize in (False, True):
        found = run(form, maps, boxes, head, side, samples, hybridize=hybridize)
        for name, ours, theirs in zip(('pooled', *STRIDES), found, expected(maps, boxes, head, side, samples)):
            assert np.abs(ours - theirs).max() < 2e-4 * max(1, np.abs(theirs).max()), name
        assert not found[0][:, ::5].any() and not found[0][:, 1::5].any()  # exact zeros


@forms
def test_what_torchvision_pools(form):
    """torchvision 0.28's roi_align(aligned=True, sampling_ratio=2) from the maps that its LevelMapper takes."""
    with np.load(DATA) as saved:
        maps = [saved[f'map{number}'] for number in range(4)]
        found = run(form, maps, saved['boxes'], saved['head'], 7, 2)
        for ours, name in zip(found, ('pooled', 'grad0', 'grad1', 'grad2', 'grad3')):
            assert np.abs(ours - saved[name]).max() < 2e-4 * max(1, np.abs(saved[name]).max()), name


def test_all_threads_give_the_same_bits():
    machine.need_native()
    maps, boxes = random_case(5, 2, 50, 70, 96, 96)
    head = np.random.default_rng(1).standard_normal((2, 50, 70, 7, 7))
    first = run('native', maps, boxes, head, 7, 2)
    for _ in range(3):
        for ours, theirs in zip(run('native', maps, boxes, head, 7, 2), first):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize('change, message', [
    (lambda maps, boxes: (maps, boxes[:1]), 'are not (B, N, 4), of the images of map'),
    (lambda maps, boxes: (maps, boxes[:, :, :3]), 'are not (B, N, 4), of the images of map'),
    (lambda maps, boxes: ([maps[0], maps[1][:, :2], *maps[2:]], boxes), 'has not the images and channels of map 0')])
def test_shapes_that_contradict_each_other(change, message):
    machine.need_native()
    maps, boxes = change(*random_case(5, 2, 4, 3, 64, 64))
    with pytest.raises(mx.base.MXNetError) as error:
        OpBackend('native').pyramid_pool(mx.nd, [mx.nd.array(each) for each in maps], mx.nd.array(boxes),
                                         strides=STRIDES, side=7).wait_to_read()
    assert message in str(error.value)
