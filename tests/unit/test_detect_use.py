"""What one does with the run of a detector: a symbol, predictions printed, drawn and served; what it does not do."""
import asyncio
import io
import json

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from mxsimmim.config import Config, DataConfig, ModelConfig, configfile
from mxsimmim.data.detection import open_objects
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
MODEL = ModelConfig(type='swin', img_size=(48, 64), patch_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 2),
                    window_size=4, drop_path=0.2, head_channels=16, anchor_scale=2)
CONFIG = Config(name='run', task='detect', model=MODEL, data=DataConfig(threads=1))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    print('seed', SEED)
    folder = tmp_path_factory.mktemp('detector') / 'run'
    rng, weights = np.random.default_rng(SEED), official.export_weights(build_detector(MODEL, len(CLASSES), SEED))
    weights = {name: value + 0.05 * rng.standard_normal(value.shape).astype('float32')
               for name, value in weights.items()}  # so that something is found
    folder.mkdir()
    (folder / 'config.yaml').write_text(configfile.to_yaml(CONFIG))
    state = {'config': configfile.to_dict(CONFIG), 'classes': CLASSES}
    checkpoint.save(folder / 'checkpoints', 7, {'weights': weights}, state, keep=1)
    return folder


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
            (lambda: export(run, tmp_path / 'net.onnx', 'onnx'), r'no translation to ONNX here: write --format symbol'),
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
