"""The detection task: evaluation by any number of workers, what a run answers and draws, and what it refuses."""
import json

import mxnet as mx
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from support.workers import each

from mxsimmim.config import Config, ConfigError, ModelConfig, configfile
from mxsimmim.data.detection import open_objects
from mxsimmim.data.sampling import generator
from mxsimmim.models import build_detector
from mxsimmim.tasks.detect import BoxEvaluator, BoxPredictor, Detection
from mxsimmim.tasks.detections import CELLS, decoded

MODEL = ModelConfig(type='swin', img_size=(48, 64), patch_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 2),
                    window_size=4, head_channels=16, anchor_scale=4)
DATA = dict(path='digit-scenes-60x70', val_path='digit-scenes-val-60x70', threads=1)
CONFIG = Config(task='detect', model=MODEL, data=DATA, train=dict(batch_size=8), validation=dict(pictures=3))


def with_keys(**sections):
    dumped = CONFIG.model_dump()
    return Config(**{**dumped, **{name: {**dumped[name], **keys} for name, keys in sections.items()}})


class Bright:
    """A placement that takes what is bright for an object, of each class in turn."""
    inputs = 'image', 'boxes', 'priority'

    def __init__(self):
        self.seen = []

    def outputs(self, batch):
        self.seen.append(batch.fields['image'])
        answers = np.zeros((len(batch.fields['image']), 100, 6 + CELLS ** 2), 'float32')
        answers[:, :, 5] = -1
        for answer, image in zip(answers, batch.fields['image']):
            parts, _ = ndimage.label(image.max(axis=2) >= 128)
            rows = [(region[1].start, region[0].start, region[1].stop, region[0].stop, score, number,
                     *np.array(Image.fromarray(parts[region] == place + 1).resize((CELLS, CELLS))).ravel())
                    for place, region in enumerate(ndimage.find_objects(parts)[:10])
                    for number, score in ((place % 10, 0.9), ((place + 3) % 10, 0.6))]
            if rows:
                answer[:len(rows)] = sorted(rows, key=lambda row: -row[4])
        return answers


def evaluated(size, method=BoxEvaluator.evaluate, config=CONFIG, placement=None, images=9):
    source = open_objects(config.data)[1].part(np.arange(images))
    return each(size, lambda control: method(BoxEvaluator(config, source, control), placement or Bright()))


@pytest.mark.parametrize('size', [2, 3, 12])
def test_evaluation_is_exact_for_any_number_of_workers(size):
    first, = evaluated(1)
    assert 0 < first['val_box_ap'] < first['val_box_ap50'] < 1 and 0 < first['val_mask_ap50'] < 1
    for values in evaluated(size):
        assert set(values) == set(first)
        for name in ('val_box_ap', 'val_box_ap50', 'val_mask_ap', 'val_mask_ap50'):
            assert values[name] == first[name], name


@pytest.mark.parametrize('looks, views', [(dict(flip=True), 2), (dict(scales=[0.75, 1, 2]), 6)])
def test_images_are_looked_at_again(looks, views):
    """In the mirror, and at other scales, here in four parts; what is found is united."""
    placement, data = Bright(), dict(val_path='digit-scenes-val-70x50')
    more, = evaluated(1, config=with_keys(validation=looks, data=data), placement=placement, images=5)
    assert sum(map(len, placement.seen)) == 5 * views
    one, = evaluated(1, config=with_keys(data=data), images=5)
    assert one['val_box_ap'] > 0 and (more['val_box_ap'] == one['val_box_ap']) == (views == 2)
    if views == 2:
        shown, (image, turned) = 34, placement.seen[0][:2]  # columns of 64: 70 x 50 pixels on 48 x 64
        np.testing.assert_array_equal(turned[:, :shown], image[:, :shown][:, ::-1])
        np.testing.assert_array_equal(turned[:, shown:], image[:, shown:])


def test_report(tmp_path):
    told, _ = evaluated(2, lambda evaluator, placement: evaluator.report(placement, tmp_path))
    values = json.loads((tmp_path / 'evaluation.json').read_text())
    assert values['images'] == 9 and values['box_ap'] == values['val_box_ap']
    assert {'box_ap50', 'mask_ap', 'mask_ap50', 'voc_map'} < set(values)
    assert told.startswith(f'box AP {values["box_ap"]:.4f}, box AP50 {values["box_ap50"]:.4f}, mask AP ')
    assert f'VOC mAP {values["voc_map"]:.4f} of 9 images' in told
    assert set(values['class_box_ap']) == set('0123456789')
    assert len((tmp_path / 'evaluation.txt').read_text().splitlines()) == 11


def test_without_masks():
    values, = evaluated(1, config=with_keys(model=dict(masks=False)))
    assert set(values) == {'val_box_ap', 'val_box_ap50', 'val_images_per_second'}


def test_picture():
    picture, = evaluated(1, BoxEvaluator.picture)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.std() > 10
    none, = evaluated(1, BoxEvaluator.picture, with_keys(validation=dict(pictures=0)))
    assert none is None


@pytest.fixture(scope='module')
def predictor():
    return BoxPredictor(CONFIG, build_detector(MODEL, 10, 3), {'classes': list('0123456789')})


def test_answers_of_a_network(predictor):
    answer = predictor.answer(mx.nd.random.normal(shape=(2, *predictor.inputs['image'])))
    assert answer.shape == (2, 100, 6 + CELLS ** 2)


@pytest.fixture
def asked():
    """(image, fields, answer) of an image of 60 x 70."""
    image = open_objects(CONFIG.data)[1].read(0)
    fields = BoxPredictor(CONFIG, None, {'classes': list('0123456789')}).transform(CONFIG.data)(image, generator(0))
    answer = np.zeros((100, 6 + CELLS ** 2), 'float32')
    answer[:, 5] = -1
    answer[0, :6], answer[1, :6] = (8, 4, 24, 20, 0.75, 3), (30, 0, 100, 40, 0.25, 7)
    answer[:2, 6:] = 1
    return image, fields, answer


def test_records_lines_and_drawings(asked):
    """Boxes in pixels of the image: the input shows its 60 rows in 48."""
    image, fields, answer = asked
    predictor = BoxPredictor(CONFIG, None, {'classes': list('0123456789')})
    record = predictor.record(fields, answer)
    assert (record['height'], record['width']) == (60, 70) == image.shape[:2]
    first, second = record['objects']
    assert (first['name'], first['score'], first['box']) == ('3', 0.75, [10, 5, 30, 25])
    assert second['box'] == [37.5, 0, 70, 50]
    np.testing.assert_array_equal(np.argwhere(decoded(first['mask'])).min(axis=0), [5, 10])
    assert decoded(first['mask']).sum() == 20 * 20
    assert predictor.line(fields, answer, 1) == '3 0.750 [10, 5, 30, 25]'
    assert predictor.line(fields, answer, 5) == '3 0.750 [10, 5, 30, 25]   7 0.250 [38, 0, 70, 50]'
    assert predictor.line(fields, answer[2:], 5) == 'nothing'
    drawing = predictor.drawing(image, fields, answer)
    assert drawing.shape == image.shape
    np.testing.assert_array_equal(drawing[30:, 32:], image[30:, 32:])  # that of 0.25 is not drawn
    assert (drawing[6:25, 11:30] != image[6:25, 11:30]).any(axis=2).all()
    media, body = predictor.body(fields, answer, '*/*')
    assert media.startswith('application/json') and json.loads(body) == record


def test_task():
    task = Detection(CONFIG)
    assert len(task.source) == 5000 and len(task.held_out) == 500 and task.facts() == ['10 classes of objects']
    assert task.shapes()['roi_head.bbox_head.fc_cls.weight'] == (11, 64)
    assert task.multiply_adds() > 1e6
    with pytest.raises(ValueError, match='and class 0 is missing there'):
        task.check_state({'classes': []}, 'there', 'remedy')
    with pytest.raises(ValueError, match='other boxes for rank 1 than for rank 0'):
        task.check_annotations([1, 2], 1)


@pytest.mark.parametrize('words, told', [
    (['parallel.pipeline=2'], 'parallel.pipeline=2: detect trains whole models: leave it out'),
    (['parallel.tensor=2'], 'parallel.tensor=2: detect trains whole models'),
    (['parallel=auto'], 'parallel.auto=true: detect trains whole models'),
    (['model.type=swin', 'model.depths=[2]', 'model.num_heads=[2]'], 'detect needs a Swin of two stages or more'),
    (['model.img_size=16'], 'detect halves the map of patches'),
    (['model.type=swin', 'model.depths=[2,2]', 'model.num_heads=[2,4]', 'model.img_size=16', 'model.patch_size=4'],
     'model.img_size=16 has 63 anchors, and a detector learns from 256 of an image: raise it')])
def test_what_does_not_go_together(words, told):
    with pytest.raises(ConfigError) as error:
        configfile.load('conf/base.yaml', ['task=detect', *words])
    assert told in str(error.value)


def test_boxes_without_masks_are_refused(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images' / 'a.png').write_bytes(b'')
    (tmp_path / 'a.csv').write_text('a.png,0,0,9,9,cat\n')
    config = with_keys(data=dict(path=str(tmp_path / 'images'), labels=str(tmp_path / 'a.csv'), val_path=''))
    with pytest.raises(ValueError, match='a.csv has boxes alone, and model.masks=true asks for masks'):
        Detection(config)
    keys = config.model_dump()
    assert Detection(Config(**{**keys, 'model': {**keys['model'], 'masks': False}})).classes == ('cat',)


@pytest.mark.parametrize('known, told', [
    (dict(segmentation=[]), "a.png: object 0 of class 'cat' has no mask, which the task needs: complete"),
    (dict(segmentation=[[1, 2, 3]]), 'line 1: the segmentation of annotation 5 of image 1: a polygon has'),
    (dict(image=dict(height=9)), 'a.png has 8 x 8 pixels, but its boxes are of one of 9 x 8')])
def test_every_held_out_image_counts(tmp_path, known, told):
    """What is wrong with one of them is named with file and line."""
    for name in ('a.png', 'b.png'):
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    annotation = {'image_id': 1, 'category_id': 1, 'bbox': [1, 1, 4, 4], 'segmentation': [[1, 1, 5, 1, 5, 5]]}
    (tmp_path / 'a.json').write_text(json.dumps({
        'images': [{'id': 1, 'file_name': 'a.png', 'height': 8, 'width': 8, **known.pop('image', {})},
                   {'id': 2, 'file_name': 'b.png', 'height': 8, 'width': 8}],
        'categories': [{'id': 1, 'name': 'cat'}],
        'annotations': [{**annotation, 'id': 5, **known}, {**annotation, 'id': 6, 'image_id': 2}]}))
    config = with_keys(data=dict(path='digit-scenes', val_path=str(tmp_path), val_labels=str(tmp_path / 'a.json')))
    source = open_objects(config.data.model_copy(update={
        'path': config.data.val_path, 'labels': config.data.val_labels, 'val_path': '', 'val_labels': ''}))[0]
    error, = each(1, lambda control: BoxEvaluator(config, source, control).evaluate(Bright()))
    assert isinstance(error, ValueError) and told in str(error) and str(error).startswith('every image counts here')


def test_found_is_sorted(asked):
    _, fields, answer = asked
    predictor = BoxPredictor(CONFIG, None, {'classes': list('0123456789')})
    assert [each['score'] for each in predictor.record(fields, answer[::-1])['objects']] == [0.75, 0.25]
