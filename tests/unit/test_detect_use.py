"""What one does with the run of a detector: exports, predictions printed, drawn and served; what it does not do."""
import asyncio
import io
import json

import mxnet as mx
import numpy as np
import onnxruntime
import pytest
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from mxsimmim.config import Config, DataConfig, ModelConfig, configfile
from mxsimmim.data.detection import open_objects
from mxsimmim.inference import graph, onnx_graph
from mxsimmim.inference.engine import Engine
from mxsimmim.inference.export import export
from mxsimmim.inference.features import save_features
from mxsimmim.inference.predict import predict
from mxsimmim.inference.reconstruct import reconstruct
from mxsimmim.inference.serve import Service
from mxsimmim.inference.trained import load_for_inference, load_run
from mxsimmim.interop import official
from mxsimmim.models import build_detector
from mxsimmim.tasks.detect import Detection
from mxsimmim.tasks.detections import decoded
from mxsimmim.training import checkpoint

SEED = 11
CLASSES = ['cat', 'dog', 'cow']
SWIN = dict(type='swin', img_size=(48, 64), patch_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 2),
            window_size=4, drop_path=0.2, head_channels=16, anchor_scale=2)
VIT = dict(img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2, head_channels=16)
MODEL = ModelConfig(**SWIN)
CONFIG = Config(name='run', task='detect', model=MODEL, data=DataConfig(threads=1))


def make_run(folder, model, background=0.0):
    """A run with random weights, larger than initial ones so that something is found, or nothing by `background`."""
    print('seed', SEED)
    config = CONFIG.model_copy(update={'model': model})
    rng, weights = np.random.default_rng(SEED), official.export_weights(build_detector(model, len(CLASSES), SEED))
    weights = {name: value + 0.05 * rng.standard_normal(value.shape).astype('float32')
               for name, value in weights.items()}
    weights['roi_head.bbox_head.fc_cls.bias'][-1] += background
    folder.mkdir()
    (folder / 'config.yaml').write_text(configfile.to_yaml(config))
    state = {'config': configfile.to_dict(config), 'classes': CLASSES}
    checkpoint.save(folder / 'checkpoints', 7, {'weights': weights}, state, keep=1)
    return folder


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('detector') / 'run', MODEL)


@pytest.fixture
def images(tmp_path):
    """Two images of the same name in two folders."""
    source = open_objects(DataConfig(path='digit-scenes-60x90'))[0]
    for number, folder in enumerate('ab'):
        (tmp_path / folder).mkdir()
        Image.fromarray(source.read(number)).save(tmp_path / folder / 'x.png')
    return [str(tmp_path / folder) for folder in 'ab']


def test_symbol(run, tmp_path):
    export(run, tmp_path / 'net', 'symbol')  # which compares by itself
    assert (tmp_path / 'net-symbol.json').exists()
    assert json.loads((tmp_path / 'net.json').read_text())['classes'] == CLASSES


@pytest.mark.parametrize('model', [SWIN, {**SWIN, 'img_size': 64, 'masks': False}, VIT,
                                   {**VIT, 'img_size': (64, 96), 'masks': False}],
                         ids=['swin', 'swin square boxes', 'vit square', 'vit boxes'])
def test_onnx(tmp_path, model):
    """One image and several, of noise and of one colour in its parts: row by row, what the network finds."""
    run = make_run(tmp_path / 'run', ModelConfig(**model))
    text = export(run, tmp_path / 'net.onnx', 'onnx')
    assert text.split() == [str(tmp_path / 'net.onnx'), str(tmp_path / 'net.json')]
    trained, rng = load_run(run), np.random.default_rng(SEED)
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'), providers=['CPUExecutionProvider'])
    columns = 6 if 'masks' in model else 6 + 28 * 28
    assert [(value.name, value.shape) for value in session.get_inputs() + session.get_outputs()] == [
        ('image', ['batch', 3, *trained.config.model.size]), ('detections', ['batch', 100, columns])]
    for images in 1, 3:
        image = rng.standard_normal((images, 3, *trained.config.model.size)).astype('float32')
        image[..., -16:] = 0.5  # as where an image of other proportions is filled up
        expected = graph.answer(trained, [image])
        found, = session.run(None, {'image': image})
        assert expected.shape == (images, 100, columns) and (expected[:, 10:, 5] >= 0).any()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_onnx_of_a_network_that_finds_nothing(tmp_path):
    run = make_run(tmp_path / 'run', ModelConfig(**{**SWIN, 'masks': False}), background=50)
    text = export(run, tmp_path / 'net.onnx', 'onnx')
    assert text.startswith('note: the network finds nothing in the random images')
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'), providers=['CPUExecutionProvider'])
    found, = session.run(None, {'image': np.ones((2, 3, 48, 64), 'float32')})
    np.testing.assert_array_equal(found, np.tile(np.float32([0, 0, 0, 0, 0, -1]), (2, 100, 1)))


def test_what_an_export_is_compared_with():
    """Rows in any order, a column to 1e-4 of its largest value; two of a hundred may be others."""
    print('seed', SEED)
    rng = np.random.default_rng(SEED)
    rows = rng.uniform(0.1, 1, (2, 30, 6)) * [500, 500, 500, 500, 1, 1]
    rows[1, 20:] = 0
    there = rows[..., 4:5] > 0
    found = rng.permutation(rows, axis=1)
    assert graph.compare_chosen(rows, found + 4e-5 * (found[..., 4:5] > 0), 4, 1e-4, 'it') == 2 * there.sum() == 100
    found = rows.copy()
    found[0, 7] *= 0.5
    graph.compare_chosen(rows, found, 4, 1e-4, 'it')
    for column, much in (0, 0.2), (4, 3e-4):
        changed = rows.copy()
        changed[0, :4, column] += much
        with pytest.raises(ValueError, match='it differs from the network in 8% of what both find'):
            graph.compare_chosen(rows, changed, 4, 1e-4, 'it')
    for ours, theirs in (rows, 0 * rows), (0 * rows, rows):
        with pytest.raises(ValueError, match='in 100% of what both find'):
            graph.compare_chosen(ours, theirs, 4, 1e-4, 'it')


@pytest.mark.parametrize('op, keys, told', [
    ('topk', dict(ret_typ='mask', k=2), 'odd.*: topk of type mask'),
    ('UpSampling', dict(scale=2, sample_type='bilinear', num_filter=3), 'odd.*: UpSampling of type bilinear')])
def test_an_operator_in_another_form_is_named(op, keys, told):
    symbol = getattr(mx.sym, op)(mx.sym.var('image'), name='odd', **keys)
    with pytest.raises(ValueError, match=told):
        onnx_graph.to_onnx(graph.Graph(symbol, {}, {'image': (3, 4, 4)}, 'odd'))


def test_predict(run, images, tmp_path, capsys):
    predict(run, images, 2, str(tmp_path / 'found'))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f'{images[0]}/x.png   ') and lines[0].count('[') == 2
    assert sorted(path.name for path in (tmp_path / 'found').iterdir()) == ['x-2.png', 'x.png']
    assert Image.open(tmp_path / 'found' / 'x.png').size == (90, 60)
    predict(run, images, 2, as_json=True)
    for line, folder in zip(capsys.readouterr().out.splitlines(), images):
        record = json.loads(line)
        assert record['file'] == f'{folder}/x.png' and (record['height'], record['width']) == (60, 90)
        assert 2 < len(record['objects']) <= 100
        scores = [each['score'] for each in record['objects']]
        assert scores == sorted(scores, reverse=True) and 0.05 < scores[-1] <= scores[0] <= 1
        for each in record['objects']:
            x0, y0, x1, y1 = each['box']
            assert each['name'] in CLASSES and 0 <= x0 <= x1 <= 90 and 0 <= y0 <= y1 <= 60
            mask = decoded(each['mask'])
            assert mask.shape == (60, 90)
            inside = np.zeros_like(mask)
            inside[int(y0):int(np.ceil(y1)), int(x0):int(np.ceil(x1))] = True
            assert not (mask & ~inside).any()


def test_service(run, images):
    """Boxes and masks in JSON, those of a batch as those of one."""
    engine, file = Engine(load_for_inference(run)), io.BytesIO()
    Image.open(f'{images[0]}/x.png').save(file, 'PNG')

    async def ask():
        async with TestClient(TestServer(Service(engine, 4, 10 ** 6).app())) as client:
            answer = await client.post('/predict', data=file.getvalue())
            return answer.status, await answer.json(), (await client.post('/reconstruct', data=b'')).status
    status, found, refused = asyncio.run(asyncio.wait_for(ask(), 60))
    item = engine.prepare(file.getvalue(), 'x')
    assert status == 200 and refused == 409
    assert found == json.loads(engine.body(item, engine.answer([item])[0], '*/*')[1])
    assert len(found['objects']) > 2 and set(found['objects'][0]) == {'name', 'score', 'box', 'mask'}


def test_what_a_detector_does_not(run, images, tmp_path):
    for call, told in (
            (lambda: export(run, tmp_path / 'net', 'symbol', int8=True), 'int8 is for classifiers'),
            (lambda: export(run, tmp_path / 'net.onnx', 'onnx', int8=True), r'--format symbol only'),
            (lambda: save_features(run, images, '', tmp_path / 'f.npz', None), 'this run is a detector'),
            (lambda: reconstruct(run, images, tmp_path / 'grid.png'), 'is a detector, which reconstructs')):
        with pytest.raises(ValueError, match=told):
            call()


def test_where_the_extra_is_missing(run, images, monkeypatch):
    """One line, before anything is computed."""
    monkeypatch.setitem(__import__('sys').modules, 'pycocotools', None)
    told = r"^task=detect needs the package pycocotools: pip install 'mxsimmim\[detect\]'$"
    for call in (lambda: predict(run, images, 2), lambda: load_run(run), lambda: Detection(CONFIG)):
        with pytest.raises(ValueError, match=told):
            call()
