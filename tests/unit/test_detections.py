"""What is made of a detector's answers: boxes and masks of an image, those of its mirror image, their precision."""
import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mxsimmim.data.geometry import View, whole_view
from mxsimmim.data.objects import Objects, box_of
from mxsimmim.data.regions import Polygons, RunLengths
from mxsimmim.tasks import detections
from mxsimmim.tasks.detections import (
    CELLS,
    Found,
    decoded,
    encoded,
    found_in,
    pasted,
    region_lengths,
    returned,
    united,
)
from mxsimmim.tasks.precision import Comparison, mean, voc_precisions

SEED = 3
SIZE = 40, 60


def rows_of(*rows, mask=None):
    """An answer of rows (x0, y0, x1, y1, score, class), padded as the network does."""
    answer = np.zeros((max(4, len(rows)), 6 + CELLS ** 2 * (mask is not None)), 'float32')
    answer[:, 5] = -1
    for place, row in enumerate(rows):
        answer[place, :6] = row
        if mask is not None:
            answer[place, 6:] = mask.ravel()
    return answer


WHOLE = View(SIZE, (0, 0), SIZE)


def found_of(*rows):
    return found_in([(WHOLE, rows_of(*rows))], SIZE)


def objects_of(*rows, crowd=()):
    """Objects (x0, y0, x1, y1, class); those whose numbers `crowd` has do not count."""
    boxes = np.array([row[:4] for row in rows], 'float32').reshape(-1, 4)
    return Objects(boxes, np.array([row[4] for row in rows], int), np.isin(np.arange(len(rows)), crowd),
                   (None,) * len(rows), SIZE)


def scores(*images, classes=2):
    comparison = Comparison(masks=False)
    for found, objects in images:
        comparison.add(found, objects, SIZE)
    return comparison.precisions([comparison.state()], classes)


def test_boxes_come_to_the_image():
    """Of an image of 80 x 120 that the input shows in 40 x 60: twice as large, cut, without those outside."""
    rows = rows_of((0, 0, 10, 10, 0.5, 1), (50, 30, 70, 50, 0.9, 0), (61, 5, 70, 9, 0.8, 0), (np.nan, 0, 1, 1, 0.7, 0))
    found = found_in([(WHOLE, rows)], (80, 120))
    np.testing.assert_array_equal(found.boxes, [[100, 60, 120, 80], [0, 0, 20, 20]])
    np.testing.assert_array_equal(found.classes, [0, 1])
    np.testing.assert_allclose(found.scores, [0.9, 0.5])
    assert found.masks == () and len(found_in([(WHOLE, rows_of())], (80, 120)).boxes) == 0


def test_masks_are_pasted():
    """Whole cells in a box of as many pixels; half a cell's place, and what lies outside of the image."""
    grid = np.zeros((CELLS, CELLS))
    grid[:14, :7] = 1
    mask = pasted(grid, np.array([2, 3, 2 + CELLS, 3 + CELLS]), SIZE)
    assert mask.shape == SIZE and box_of(mask) == (2, 3, 9, 17) and mask.sum() == 7 * 14
    np.testing.assert_array_equal(pasted(grid, np.array([-4, -4, CELLS - 4, CELLS - 4]), SIZE)[:10, :3], True)
    assert pasted(np.ones((CELLS, CELLS)), np.array([-9, -9, -1, -1]), SIZE).sum() == 0
    assert pasted(np.ones((CELLS, CELLS)), np.array([10.2, 10, 10.4, 40]), SIZE).sum() == 0  # no centre is inside
    np.testing.assert_array_equal(pasted(np.full((CELLS, CELLS), 0.49), np.array([0, 0, 28, 28]), SIZE), False)
    found = found_in([(WHOLE, rows_of((2, 3, 2 + CELLS, 3 + CELLS, 0.9, 0), mask=grid))], SIZE)
    np.testing.assert_array_equal(decoded(found.masks[0]), mask)


def test_pasting_interpolates(monkeypatch):
    """As bilinear sampling at the centres of pixels does, written out."""
    rng, box = np.random.default_rng(SEED), np.array([3.3, 2.1, 44.9, 37.4])
    grid = rng.random((CELLS, CELLS))
    padded = np.pad(grid, 1)
    expected = np.zeros(SIZE, bool)
    for y in range(2, 38):
        for x in range(3, 45):
            u, v = (np.array([x + 0.5, y + 0.5]) - box[:2]) / (box[2:] - box[:2]) * CELLS + 0.5
            if 0 <= v < CELLS + 1 and 0 <= u < CELLS + 1:
                i, j = int(v), int(u)
                near = padded[i:i + 2, j:j + 2]
                expected[y, x] = np.array([i + 1 - v, v - i]) @ near @ np.array([j + 1 - u, u - j]) >= 0.5
    np.testing.assert_array_equal(pasted(grid, box, SIZE), expected)
    monkeypatch.setattr(detections, 'STRIP', 300)  # as of a large image
    np.testing.assert_array_equal(pasted(grid, box, SIZE), expected)
    assert 100 < expected.sum() < expected.size - 100


def test_masks_are_encoded_as_coco_does():
    rng = np.random.default_rng(SEED)
    bitmap = rng.random(SIZE) < 0.3
    np.testing.assert_array_equal(decoded(encoded(bitmap)), bitmap)
    outline = np.array([[5.0, 5], [20, 5], [20, 15], [5, 15]])
    polygons = region_lengths(Polygons((outline, outline + 20)), SIZE)
    assert coco_masks.area(polygons) == 2 * 15 * 10
    lengths = np.diff(np.flatnonzero(np.diff(np.r_[-1, bitmap.T.ravel(), -1])))
    lengths = np.r_[[0] * bitmap.T.ravel()[0], lengths].astype(int)
    assert region_lengths(RunLengths(lengths), SIZE) == region_lengths(bitmap, SIZE) == encoded(bitmap)


def test_polygons_that_lead_far_away():
    """A number too many in a file, on which COCO's own tools end the process."""
    mask = decoded(region_lengths(Polygons((np.array([[0, 0], [1e9, 0], [1e9, 1e9]]),)), SIZE))
    np.testing.assert_array_equal(mask, np.arange(SIZE[1]) >= np.arange(SIZE[0])[:, None])


def test_an_answer_about_the_mirror_image():
    mask = np.arange(CELLS ** 2, dtype='float32').reshape(CELLS, CELLS)
    answer = rows_of((10, 5, 20, 15, 0.75, 1), mask=mask)
    turned = returned((whole_view((80, 120), SIZE)._replace(flip=True), answer), (80, 120))
    np.testing.assert_array_equal(turned[:, :6], [[80, 10, 100, 30, 0.75, 1]])
    np.testing.assert_array_equal(turned[0, 6:].reshape(CELLS, CELLS), mask[:, ::-1])


@pytest.mark.parametrize('flip', [False, True])
def test_an_answer_about_a_part(flip):
    """Of 40 x 60 pixels from row 10 and column 30 of 50 x 90: what ends at an inner border may go on."""
    rows = [(0.5, 5, 20, 15, 0.9, 1), (3, 0, 9, 9, 0.8, 1), (50, 20, 60, 40, 0.75, 1)]
    if flip:
        rows = [(60 - x1, y0, 60 - x0, y1, *rest) for x0, y0, x1, y1, *rest in rows]
    found = returned((View((50, 90), (10, 30), SIZE, flip), rows_of(*rows)), (100, 180))
    np.testing.assert_allclose(found, [[160, 60, 180, 100, 0.75, 1]])


def test_two_answers_are_united():
    """Of boxes of one class that share more than half the better one stays; others, also of another class, all do."""
    one = rows_of((0, 0, 10, 10, 0.6, 0), (30, 30, 40, 40, 0.5, 1))
    other = rows_of((0, 0, 10, 11, 0.7, 0), (0, 0, 10, 10, 0.4, 1), (0, 0, 10, 5, 0.3, 0))
    rows = united([one[:2], other[:3]])
    np.testing.assert_allclose(rows[:, 4], [0.7, 0.5, 0.4, 0.3])
    np.testing.assert_array_equal(rows[0, :4], [0, 0, 10, 11])
    np.testing.assert_array_equal(united([one[:2]]), one[:2])
    many = rows_of(*((index, 0, index + 1, 1, 0.9, 0) for index in range(70)))
    assert len(united([many, many + np.array([0, 5, 0, 5, 0, 0], 'float32')])) == 100


def test_precision_by_hand():
    """Class 0: three objects, found first and third, at IoU of 1 and 0.8; class 1: one, missed; class 2: none."""
    found = found_of((0, 0, 10, 10, 0.9, 0), (40, 20, 50, 30, 0.8, 0), (20, 0, 30, 8, 0.7, 0))
    objects = objects_of((0, 0, 10, 10, 0), (20, 0, 30, 10, 0), (0, 20, 9, 30, 0), (50, 30, 60, 40, 1))
    result = scores((found, objects), classes=3)
    # Precision 1 up to a recall of 1/3, then 2/3 up to 2/3, at 101 recalls; at IoU above 0.8 the first alone.
    both, first = (34 + 33 * 2 / 3) / 101, 34 / 101
    np.testing.assert_allclose(result.box[:, 0], [(7 * both + 3 * first) / 10, both], rtol=1e-12)
    np.testing.assert_allclose(result.voc, [1 / 3 + 2 / 3 / 3, 0, np.nan])
    np.testing.assert_array_equal(result.box[:, 1:], [[0, np.nan]] * 2)
    np.testing.assert_array_equal(result.objects, [3, 1, 0])
    values = result.values()
    assert values == pytest.approx({'box_ap': result.box[0, 0] / 2, 'box_ap50': both / 2, 'voc_map': 5 / 18})
    lines = result.table(['a', 'b', 'c']).splitlines()
    assert lines[1].split() == ['a', '3', f'{result.box[0, 0]:.4f}', f'{both:.4f}'] and lines[3].split()[2] == '-'
    assert [line.split()[0] for line in result.table(['a', 'b', 'c'], 2).splitlines()[1:]] == ['b', 'a']


def test_nothing_to_find():
    result = scores((found_of((0, 0, 9, 9, 0.9, 0)), objects_of()), (found_of(), objects_of()))
    assert np.isnan(result.values()['box_ap']) and np.isnan(mean(result.voc)) and result.objects.sum() == 0


def test_crowds_and_difficult_objects_do_not_count():
    """Neither missed where they are not found, nor wrong where they are, nor found twice."""
    objects = objects_of((0, 0, 10, 10, 0), (20, 0, 40, 20, 0), crowd=[1])
    found = found_of((20, 0, 40, 19, 0.95, 0), (20, 0, 40, 18, 0.9, 0), (0, 0, 10, 10, 0.8, 0))
    result = scores((found, objects))
    assert result.values() == pytest.approx({'box_ap': 1, 'box_ap50': 1, 'voc_map': 1})
    twice = found_of((0, 0, 10, 10, 0.95, 0), (0, 0, 10, 9, 0.9, 0))
    result = scores((twice, objects), (found_of(), objects_of((0, 0, 9, 9, 0))))
    assert result.voc[0] == 0.5  # the second is wrong


def test_voc_takes_the_best_precision_at_a_recall_or_more():
    matches = np.zeros(4, [('class', int), ('score', float), ('voc', int)])
    matches['score'], matches['voc'] = [0.9, 0.8, 0.7, 0.6], [0, 1, 1, 1]
    there = np.zeros(4, [('class', int), ('ignored', int)])
    assert voc_precisions(matches, there, 1)[0] == pytest.approx(3 / 4 * 3 / 4)


@pytest.fixture(scope='module')
def noisy():
    """20 images of some objects of 4 classes, with masks and crowds, and boxes more or less near them."""
    print('seed', SEED)
    rng, images = np.random.default_rng(SEED), []
    for _ in range(20):
        count = int(rng.integers(6))
        corner, side = rng.random((count, 2)) * [40, 25], 3 + rng.random((count, 2)) * [17, 12]
        boxes, classes = np.concatenate([corner, corner + side], axis=1).astype('float32'), rng.integers(4, size=count)
        masks = [pasted((rng.random((4, 4)) < 0.9).repeat(7, 0).repeat(7, 1).astype(float), box, SIZE) for box in boxes]
        objects = Objects(boxes, classes, rng.random(count) < 0.2, tuple(masks), SIZE)
        near = np.concatenate([boxes + rng.normal(0, 0.5, boxes.shape), rng.random((2, 4)) * [10, 10, 10, 10]
                               + [0, 0, 12, 12]])
        score = (np.r_[[0.4] * count, 0, 0] + 0.6 * rng.random(len(near))).round(1)
        number = np.r_[np.where(rng.random(count) < 0.9, classes, 0), 0, 3]
        answer = np.concatenate([near, score[:, None], number[:, None]], axis=1)
        grids = (rng.random((len(near), 4, 4)) < 0.95).repeat(7, 1).repeat(7, 2).reshape(len(near), -1)
        found = found_in([(WHOLE, np.concatenate([answer, grids], axis=1).astype('float32'))], SIZE)
        images.append((found, objects))
    return images


def whole_evaluation(images, kind):
    """pycocotools on all images at once, its twelve numbers as it prints them; the first two."""
    truth, claims = [], []
    for number, (found, objects) in enumerate(images):
        for box, category, crowd, region in zip(objects.boxes.astype(float), objects.classes, objects.crowd,
                                                objects.regions):
            (x, y), (w, h) = box[:2], box[2:] - box[:2]
            truth.append({'id': len(truth) + 1, 'image_id': number, 'category_id': int(category), 'area': w * h,
                          'bbox': [x, y, w, h], 'iscrowd': int(crowd), 'segmentation': encoded(region)})
        for place, (box, score, category) in enumerate(zip(found.boxes, found.scores, found.classes)):
            shape = {'bbox': [*box[:2], *(box[2:] - box[:2])]} if kind == 'bbox' else {
                'segmentation': found.masks[place]}
            claims.append({'image_id': number, 'category_id': int(category), 'score': float(score), **shape})
    ours = COCO()
    ours.dataset = {'images': [{'id': number, 'height': SIZE[0], 'width': SIZE[1]} for number in range(len(images))],
                    'categories': [{'id': number} for number in range(4)], 'annotations': truth, 'info': {}}
    with contextlib.redirect_stdout(io.StringIO()):
        ours.createIndex()
        evaluation = COCOeval(ours, ours.loadRes(claims), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:2]


def test_precision_is_that_of_pycocotools(noisy):
    """Equal to the last digit, though images are compared one by one and equal scores abound."""
    comparison = Comparison(masks=True)
    for found, objects in noisy:
        comparison.add(found, objects, SIZE)
    values = comparison.precisions([comparison.state()], 4).values()
    for kind, name in (('bbox', 'box'), ('segm', 'mask')):
        ap, ap50 = whole_evaluation(noisy, kind)
        assert 0.1 < ap < ap50 < 0.95
        assert (values[f'{name}_ap'], values[f'{name}_ap50']) == pytest.approx((ap, ap50), rel=1e-12)


def test_parts_are_the_whole(noisy):
    states = []
    for part in (noisy[:20], noisy[:3], noisy[3:11], noisy[11:11], noisy[11:]):
        comparison = Comparison(masks=True)
        for found, objects in part:
            comparison.add(found, objects, SIZE)
        states.append(comparison.state())
    first = comparison.precisions(states[:1], 4)
    for ours, expected in zip(comparison.precisions(states[1:], 4), first):
        np.testing.assert_array_equal(ours, expected)


def test_a_state_is_small():
    """Of a hundred boxes in each of 20 images: less than 16 bytes a box."""
    rng, comparison = np.random.default_rng(SEED), Comparison(masks=False)
    boxes = np.array([0, 0, 5, 5]) + rng.random((100, 1)) * 30
    for _ in range(20):
        comparison.add(Found(boxes, np.sort(rng.random(100).astype('float32'))[::-1], rng.integers(80, size=100), ()),
                       objects_of((0, 0, 10, 10, 3)), SIZE)
    assert sum(map(len, comparison.state().values())) < 20 * 100 * 16


def test_where_pycocotools_is_missing(monkeypatch):
    from mxsimmim.tasks.detections import needed
    monkeypatch.setitem(__import__('sys').modules, 'pycocotools', None)
    with pytest.raises(ValueError, match=r"=detect needs the package pycocotools.*: pip install 'mxsimmim\[detect\]'"):
        needed()
