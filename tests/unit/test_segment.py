"""The segmentation task: how pixels are counted, evaluation by any number of workers, and what a run answers."""
import base64
import io
import json
import tracemalloc

import mxnet as mx
import numpy as np
import pytest
from PIL import Image
from support.workers import each

from mxsimmim.config import Config, ModelConfig
from mxsimmim.data.geometry import View
from mxsimmim.data.sampling import generator
from mxsimmim.data.segmentation import open_segmented
from mxsimmim.models import build_segmenter
from mxsimmim.ops import REFERENCE
from mxsimmim.tasks import overlap, segment
from mxsimmim.tasks.segment import (
    MapPredictor,
    PixelEvaluator,
    Segmentation,
    class_map,
    class_shares,
    cross_entropy,
)

MODEL = ModelConfig(type='swin', img_size=(48, 64), patch_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 2),
                    window_size=4, head_channels=16)
CONFIG = Config(task='segment', model=MODEL, data=dict(path='digit-scenes-60x70', val_path='digit-scenes-val-60x70',
                                                       threads=1), train=dict(batch_size=8))


def test_counts_and_scores():
    truth = np.array([[0, 0, 1, 1], [2, 255, 1, 0]], 'uint8')
    predicted = np.array([[0, 1, 1, 4], [2, 2, 1, 0]])  # 4: no class
    counts = overlap.count_pixels(truth, predicted, 4)
    np.testing.assert_array_equal(counts, [[2, 1, 0, 0, 0], [0, 2, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(overlap.intersection_over_union(counts), [2 / 3, 2 / 4, 1, np.nan])
    assert overlap.values(counts) == {'miou': pytest.approx((2 / 3 + 1 / 2 + 1) / 3), 'pixel_accuracy': 5 / 7}
    lines = overlap.class_table(counts, ['a', 'b', 'c', 'd']).splitlines()
    assert lines[2].split() == ['b', '42.9', '%', '50.0', '%', '66.7', '%']
    assert lines[4].split() == ['d', '0.0', '%', '-', '-']
    assert [line.split()[0] for line in overlap.class_table(counts, ['a', 'b', 'c', 'd'], 2).splitlines()[1:]] == [
        'b', 'a']
    nothing = overlap.count_pixels(np.full((2, 2), 255), np.zeros((2, 2), int), 2)
    assert np.isnan(overlap.values(nothing)['miou'])


def seen(logits, size, shape, corner=(0, 0), flip=False):
    """An answer to the part of `shape` at `corner` of an image resized to `size`."""
    return View(size, corner, shape, flip), logits


def test_class_map():
    """Of logits for a canvas, of which the image has the upper left corner."""
    logits = np.zeros((2, 4, 4), 'float32')
    logits[1, :, 2:] = 1
    logits[0, :, :2] = 1
    found = class_map([seen(logits, (8, 12), (8, 12))], (16, 24), (16, 16))  # at half its size: 12 of the 16 columns
    assert found.shape == (16, 24)
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(24) >= 16, (16, 24)))
    whole = (16, 16), (16, 16)
    both = class_map([seen(logits, *whole), seen(logits * 3, *whole, flip=True)], (16, 16), (16, 16))
    np.testing.assert_array_equal(both[0], np.arange(16) < 8)
    logits[0, 0, 0] = np.nan
    assert class_map([seen(logits, *whole)], (16, 16), (16, 16))[0, 0] == 2


def test_class_map_of_parts():
    """Three parts of an image twice as wide as the canvas: each pixel by those that show it, on average."""
    left, right = np.zeros((2, 2, 4, 4), 'float32')
    left[0], right[1] = 1, 2
    parts = [seen(logits, (16, 32), (16, 16), (0, corner)) for logits, corner in ((left, 0), (right, 4), (left, 16))]
    found = class_map(parts, (8, 16), (16, 16))  # columns 2 to 9 are in the second, 0 to 7 and 8 to 15 in the others
    np.testing.assert_array_equal(found, np.broadcast_to((np.arange(16) >= 2) & (np.arange(16) < 10), (8, 16)))


def test_class_map_of_large_images(monkeypatch):
    """Row by row it is the same, and takes no memory for the logits of all pixels: 32 MB here."""
    rng, size, canvas = generator(5), (400, 1000), (16, 40)
    views = [(View(whole, (0, 0), whole), rng.standard_normal((20, 8, 20)).astype('float32'))
             for whole in (canvas, (9, 22))]
    whole = [class_map(answers, size, canvas) for answers in (views[:1], views)]
    monkeypatch.setattr(segment, 'STRIP', 20 * 1000 * 7)
    tracemalloc.start()
    parts = [class_map(answers, size, canvas) for answers in (views[:1], views)]
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    np.testing.assert_array_equal(parts, whole)


def test_cross_entropy():
    logits = np.array([[[0.0, 1.0]], [[0.0, 0.0]]])
    total, count = cross_entropy(logits, np.array([[0, 0, 1, 0], [1, 0, 1, 255]]))  # looks at columns 1 and 3 of row 1
    assert count == 1 and total == pytest.approx(np.log(2))


class Colours:
    """A placement that takes what is bright for digits, of several classes."""
    inputs = 'image', 'label_map'

    def outputs(self, batch):
        grey = batch.fields['image'].astype('float32').mean(axis=3).reshape(-1, 12, 4, 16, 4).mean(axis=(2, 4))
        return np.stack([np.full_like(grey, 110)] + [grey * (1 - (number / 30 - grey / 800) ** 2)
                                                      for number in range(10)], axis=1) / 10


def evaluated(size, method=PixelEvaluator.evaluate, config=CONFIG):
    source = open_segmented(config.data)[1].part(np.arange(7))
    return each(size, lambda control: method(PixelEvaluator(config, source, control), Colours()))


@pytest.mark.parametrize('size', [2, 3, 9])
def test_evaluation_is_exact_for_any_number_of_workers(size):
    first, = evaluated(1)
    assert 0 < first['val_miou'] < 1 and 0 < first['val_pixel_accuracy'] < 1
    for values in evaluated(size):
        for name in ('val_miou', 'val_pixel_accuracy'):
            assert values[name] == first[name], name
        assert values['val_loss'] == pytest.approx(first['val_loss'], rel=1e-12)


def test_mirrored_images_count_too():
    flipped = Config(**{**CONFIG.model_dump(), 'validation': dict(flip=True)})
    (one,), (both,) = evaluated(1), evaluated(1, config=flipped)
    # A grey is the same in the mirror, but for how 4 x 4 pixels are cut from what is not a multiple of 4.
    assert both['val_miou'] == pytest.approx(one['val_miou'], abs=1e-3)


def test_larger_images_are_seen_better():
    """Four parts of twice the size and the whole: the same evaluation by any number of workers, and a finer grid."""
    config = Config(**{**CONFIG.model_dump(), 'validation': dict(scales=[1, 2])})
    (one,), (more,) = evaluated(1), evaluated(1, config=config)
    assert more['val_pixel_accuracy'] > one['val_pixel_accuracy'] + 0.01
    assert more['val_miou'] > one['val_miou'] + 0.003
    for values in evaluated(3, config=config):
        assert values['val_miou'] == more['val_miou'] and values['val_loss'] == pytest.approx(more['val_loss'])


def test_report(tmp_path):
    told, _ = evaluated(2, lambda evaluator, placement: evaluator.report(placement, tmp_path))
    values = json.loads((tmp_path / 'evaluation.json').read_text())
    assert told.startswith(f'mIoU {values["miou"]:.4f}, pixel accuracy {values["pixel_accuracy"]:.4f} of 7 images')
    assert set(values['iou']) == {'background', *'0123456789'}
    assert len((tmp_path / 'evaluation.txt').read_text().splitlines()) == 12


def test_the_best_weights_are_named_where_there_are_any(tmp_path):
    """Records have null for an evaluation of images without a labelled pixel."""
    rows = [dict(step=1, val_miou=None), dict(step=2, val_miou=0.5), dict(step=3, val_miou=0.25)]
    told, = evaluated(1, lambda evaluator, placement: evaluator.conclude(rows, 3, placement, tmp_path))
    assert told.endswith(f'\nbest: mIoU 0.5000 at step 2, kept in {tmp_path}/best')
    told, = evaluated(1, lambda evaluator, placement: evaluator.conclude(rows[:1], 3, placement, tmp_path))
    assert '\nbest:' not in told and told.startswith('mIoU ')


def test_picture():
    picture, = evaluated(1, PixelEvaluator.picture)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.std() > 10


@pytest.fixture(scope='module')
def predictor():
    net = build_segmenter(MODEL, 11, 3)
    return MapPredictor(CONFIG, net, {'classes': ['background', *'0123456789']})


@pytest.fixture(scope='module')
def asked(predictor):
    """(image, fields, answer) of one image."""
    image = open_segmented(CONFIG.data)[1].read(0)
    fields = predictor.transform(CONFIG.data)(image, generator(0))
    return image, fields, predictor.answer(mx.nd.random.normal(shape=(1, *predictor.inputs['image'])))[0]


def test_answers(predictor, asked):
    image, fields, answer = asked
    record = predictor.record(fields, answer)
    assert (record['height'], record['width']) == (60, 70) == image.shape[:2]
    shares = [each['share'] for each in record['classes']]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    assert predictor.line(fields, answer, 1) == f'{record["classes"][0]["name"]} {100 * shares[0]:.1f} %'
    drawn = predictor.drawing(image, fields, answer)
    np.testing.assert_array_equal(drawn[:, :70], image)
    assert drawn.shape == (60, 140, 3)


def test_answers_over_http(predictor, asked):
    """A map whose values are class numbers: alone as PNG, or in JSON beside the shares."""
    _, fields, answer = asked
    media, body = predictor.body(fields, answer, 'image/png')
    found = np.asarray(Image.open(io.BytesIO(body)))
    assert media == 'image/png' and found.shape == (60, 70)
    media, body = predictor.body(fields, answer, '*/*')
    content = json.loads(body)
    assert media.startswith('application/json') and base64.b64decode(content.pop('map')) == predictor.body(
        fields, answer, 'image/png')[1]
    assert content == predictor.record(fields, answer)
    largest = ['background', *'0123456789'].index(content['classes'][0]['name'])
    assert (found == largest).mean() == pytest.approx(content['classes'][0]['share'])


def test_task():
    task = Segmentation(CONFIG)
    assert len(task.source) == 5000 and len(task.held_out) == 500 and task.facts() == ['11 classes of pixels']
    assert task.shapes()['decode_head.conv_seg.weight'] == (11, 16, 1, 1)
    with pytest.raises(ValueError, match='and class 0 is missing there|11'):
        task.check_state({'classes': []}, 'there', 'remedy')
    with pytest.raises(ValueError, match='other label maps for rank 1 than for rank 0'):
        task.check_annotations([1, 2], 1)


def test_a_network_begins_with_the_classes_shares():
    """Of 64 label maps: whatever the image, the answer is these shares, but for what small weights add."""
    task = Segmentation(CONFIG)
    counts = sum(np.bincount(task.source.label_map(index).ravel(), minlength=11) for index in range(0, 5000, 79))
    shares = class_shares(task.source)
    assert shares[0] > 0.85 and shares == pytest.approx((counts + 1) / (counts + 1).sum())
    net = task.build_network(True, REFERENCE)
    for head in (net.decode_head, net.auxiliary_head):
        assert head.conv_seg.bias.data().asnumpy() == pytest.approx(np.log(shares), abs=1e-5)
    found = mx.nd.softmax(net(mx.nd.random.normal(shape=(1, 3, 48, 64))), axis=1).asnumpy()
    assert np.abs(found - shares[:, None, None]).max() < 0.1
