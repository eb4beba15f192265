"""What one does with the run of a segmenter: ONNX, predictions printed and drawn; and what it does not do."""
import json

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from support.runs import awake

from mxsimmim.config import Config, DataConfig, ModelConfig, configfile
from mxsimmim.data.segmentation import open_segmented
from mxsimmim.inference import graph
from mxsimmim.inference.export import export
from mxsimmim.inference.features import save_features
from mxsimmim.inference.predict import predict
from mxsimmim.inference.reconstruct import reconstruct
from mxsimmim.inference.trained import load_run
from mxsimmim.interop import official
from mxsimmim.models import build_segmenter
from mxsimmim.training import checkpoint

SEED = 11
CLASSES = ['sky', 'sea', 'land']
MODELS = {
    'vit': ModelConfig(img_size=(32, 48), patch_size=8, embed_dim=16, depth=4, num_heads=2, head_channels=16),
    'swin': ModelConfig(type='swin', img_size=(56, 72), patch_size=4, embed_dim=8, depths=(1, 2, 1, 1),
                        num_heads=(1, 1, 2, 2), window_size=4, drop_path=0.2, head_channels=32)}


def make_run(folder, model):
    print('seed', SEED)
    config = Config(name='run', task='segment', model=model, data=DataConfig(threads=1))
    weights = official.export_weights(awake(build_segmenter(model, len(CLASSES), SEED), SEED))
    (folder / 'run').mkdir()
    (folder / 'run' / 'config.yaml').write_text(configfile.to_yaml(config))
    state = {'config': configfile.to_dict(config), 'classes': CLASSES}
    checkpoint.save(folder / 'run' / 'checkpoints', 7, {'weights': weights}, state, keep=1)
    return folder / 'run'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('segmenter'), MODELS['swin'])


@pytest.mark.parametrize('kind', MODELS)
def test_onnx(kind, tmp_path):
    run, rng = make_run(tmp_path, MODELS[kind]), np.random.default_rng(SEED)
    export(run, tmp_path / 'net.onnx', 'onnx')
    trained = load_run(run)
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'), providers=['CPUExecutionProvider'])
    image = rng.standard_normal((2, *trained.predictor.inputs['image'])).astype('float32')
    expected = graph.answer(trained, [image])
    found, = session.run(None, {'image': image})
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / 'net.json').read_text())['classes'] == CLASSES


def test_symbol(run, tmp_path):
    export(run, tmp_path / 'net', 'symbol')  # which compares by itself
    assert (tmp_path / 'net-symbol.json').exists()


@pytest.fixture
def images(tmp_path):
    """Two images of the same name in two folders."""
    source = open_segmented(DataConfig(path='digit-scenes-60x90'))[0]
    for number, folder in enumerate('ab'):
        (tmp_path / folder).mkdir()
        Image.fromarray(source.read(number)).save(tmp_path / folder / 'x.png')
    return [str(tmp_path / folder) for folder in 'ab']


def test_predict(run, images, tmp_path, capsys):
    predict(run, images, 2, str(tmp_path / 'maps'))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f'{images[0]}/x.png   ') and lines[0].count(' %') in (1, 2)
    assert sorted(path.name for path in (tmp_path / 'maps').iterdir()) == ['x-2.png', 'x.png']
    assert Image.open(tmp_path / 'maps' / 'x.png').size == (180, 60)
    predict(run, images, 2, as_json=True)
    for line, folder in zip(capsys.readouterr().out.splitlines(), images):
        record = json.loads(line)
        assert record['file'] == f'{folder}/x.png' and (record['height'], record['width']) == (60, 90)
        assert sum(each['share'] for each in record['classes']) == pytest.approx(1)


def test_what_a_segmenter_does_not(run, images, tmp_path):
    for call, told in ((lambda: export(run, tmp_path / 'net', 'symbol', int8=True), 'int8 is for classifiers'),
                       (lambda: save_features(run, images, '', tmp_path / 'f.npz', None), 'this run is a segmenter'),
                       (lambda: reconstruct(run, images, tmp_path / 'grid.png'), 'is a segmenter, which reconstructs')):
        with pytest.raises(ValueError, match=told):
            call()
