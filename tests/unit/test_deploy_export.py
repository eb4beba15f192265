"""Exported files against the network they come from: symbol, ONNX, 8 bits."""
import json
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
import onnxruntime
import pytest
from mxnet.gluon import SymbolBlock
from support import tiny

from mxsimmim.config import Config, DataConfig, MaskConfig, ModelConfig, configfile
from mxsimmim.inference import graph, onnx_graph, quantise
from mxsimmim.inference.export import export
from mxsimmim.inference.trained import Trained, load_run
from mxsimmim.interop import official
from mxsimmim.models import build_classifier, build_simmim
from mxsimmim.training import checkpoint

SEED = 11
CLASSES = [str(digit) for digit in range(10)]
VIT = dict(tiny.VIT, drop_path=0.1)
MODELS = {
    'vit': ModelConfig(**VIT, use_rpb=True, use_shared_rpb=False, use_mean_pooling=True),
    'vit_positions': ModelConfig(**VIT, use_ape=True, init_values=None, norm_targets=True),
    'swin': ModelConfig(type='swin', img_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2],
                        window_size=4, drop_path=0.1),
}


def make_run(folder, model, task):
    """A run with random weights, larger than initial ones, so that no part of the network is without effect."""
    print('seed', SEED)
    config = Config(name='run', task=task, model=model, mask=MaskConfig(patch_size=4),
                    data=DataConfig(path='digits', val_fraction=0.1))
    net = build_classifier(model, 10, SEED) if task == 'classify' else build_simmim(model, SEED)
    rng = np.random.default_rng(SEED)
    weights = {name: (value + 0.2 * rng.standard_normal(value.shape)).astype('float32')
               for name, value in official.export_weights(net).items()}
    folder.mkdir()
    (folder / 'config.yaml').write_text(configfile.to_yaml(config))
    state = {'config': configfile.to_dict(config), 'classes': CLASSES if task == 'classify' else []}
    checkpoint.save(folder / 'checkpoints', 7, {'weights': weights}, state, keep=1)
    return folder


@pytest.fixture(params=[(name, task) for name in MODELS for task in ('classify', 'pretrain')], ids='-'.join)
def run(request, tmp_path):
    name, task = request.param
    return make_run(tmp_path / 'run', MODELS[name], task)


def inputs(trained, count):
    rng, model = np.random.default_rng(SEED), trained.config.model
    image = rng.standard_normal((count, 3, model.img_size, model.img_size)).astype('float32')
    mask = (rng.random((count, model.grid, model.grid)) < 0.6).astype('float32')
    return [image] if trained.predictor.classes else [image, mask]


@pytest.mark.parametrize('count', [1, 5])
def test_symbol(run, tmp_path, count):
    text = export(run, tmp_path / 'out' / 'net', 'symbol')
    assert text.split() == [str(tmp_path / 'out' / name) for name in ('net-symbol.json', 'net-0000.params', 'net.json')]
    trained = load_run(run)
    names = ['image'] if trained.predictor.classes else ['image', 'mask']
    net = SymbolBlock.imports(str(tmp_path / 'out/net-symbol.json'), names, str(tmp_path / 'out/net-0000.params'))
    x = inputs(trained, count)
    expected = graph.answer(trained, x)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(net(*map(mx.nd.array, x)).asnumpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('count', [1, 5])
def test_onnx(run, tmp_path, count):
    export(str(run), str(tmp_path / 'net.onnx'), 'onnx')
    trained = load_run(run)
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'), providers=['CPUExecutionProvider'])
    assert [value.shape[0] for value in session.get_inputs() + session.get_outputs()] == ['batch'] * len(
        session.get_inputs()) + ['batch']
    x = inputs(trained, count)
    found, = session.run(None, dict(zip(('image', 'mask'), x)))
    np.testing.assert_allclose(found, graph.answer(trained, x), rtol=1e-4, atol=1e-4)


def test_description(tmp_path):
    run = make_run(tmp_path / 'run', MODELS['vit'], 'classify')
    export(run, tmp_path / 'net', 'symbol')
    text = json.loads((tmp_path / 'net.json').read_text())
    assert (text['classes'], text['size'], text['step'], text['output']) == (CLASSES, 16, 7, 'logits')
    assert text['mean'] == [0.485, 0.456, 0.406] and text['std'] == [0.229, 0.224, 0.225]
    assert text['inputs'] == {'image': ['batch', 3, 16, 16]}
    names = set(mx.nd.load(str(tmp_path / 'net-0000.params')))
    assert {'arg:blocks.0.attn.qkv.weight', 'arg:head.bias'} <= names


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch):
    run = make_run(tmp_path / 'run', MODELS['vit'], 'classify')
    real = graph.answer
    monkeypatch.setattr('mxsimmim.inference.export.answer', lambda *args: real(*args) + 3e-4)
    for format, tolerance in (('symbol', '1e-05'), ('onnx', '0.0001')):
        with pytest.raises(ValueError, match='differs from the network by 0.0003.*nothing was written'):
            export(run, tmp_path / 'out' / 'net', format)
        assert list((tmp_path / 'out').iterdir()) == [], tolerance


def test_an_unknown_operator_is_named():
    symbol = mx.sym.tanh(mx.sym.var('image'), name='odd')
    with pytest.raises(ValueError, match='odd.*tanh'):
        onnx_graph.to_onnx(graph.Graph(symbol, {}, {'image': (3, 4, 4)}, 'odd'))


@pytest.mark.parametrize('model, products', [('vit', 4 * 2 + 2), ('swin', 4 * 4 + 1 + 2)])
def test_int8_quantises_the_linear_maps(tmp_path, model, products):
    """And nothing else: 4 a block, patch embedding, merging and head; the answer moves by a few per cent."""
    trained = load_run(make_run(tmp_path / 'run', MODELS[model], 'classify'))
    whole = graph.trace(trained)
    x, = inputs(trained, 32)
    int8 = quantise.quantise(whole, x)
    nodes = json.loads(int8.symbol.tojson())['nodes']
    assert sum(node.get('attrs', {}).get('quantized') in ('True', '1') for node in nodes
               if node['op'] == '_sg_mkldnn_fully_connected') == products
    net = graph.load_symbol(graph.save_symbol(int8, tmp_path / 'int8'), int8)
    expected, found = graph.answer(trained, [x]), net(mx.nd.array(x)).asnumpy()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1


def products_in_int8(weight, activations):
    """activations (N, K) times weight (M, K) transposed, as an exported graph computes them in 8 bits."""
    given = mx.sym.FullyConnected(mx.sym.var('image'), mx.sym.var('weight'), mx.sym.var('bias'), num_hidden=len(weight),
                                  flatten=False)
    arrays = {'weight': mx.nd.array(weight), 'bias': mx.nd.zeros(len(weight))}
    plain = graph.Graph(mx.sym.identity(given, name='logits'), arrays, {'image': activations.shape[1:]}, 'logits')
    int8 = quantise.quantise(plain, activations)
    net = mx.gluon.SymbolBlock(int8.symbol, [mx.sym.var('image')])
    for name, parameter in net.collect_params().items():
        parameter.initialize()
        parameter.set_data(int8.arrays[name])
    net.hybridize(static_alloc=True, static_shape=True)
    return net(mx.nd.array(activations)).asnumpy()


def test_sums_of_int8_products_do_not_saturate():
    """The largest there are: without VNNI two of them do not fit into the 16 bits that a CPU adds them in."""
    print('seed', SEED)
    rng, width = np.random.default_rng(SEED), 64
    weight = np.stack([np.ones(width), -np.ones(width), np.resize([1.0, -1.0], width), rng.uniform(-1, 1, width),
                       np.zeros(width)])
    activations = np.concatenate([weight, np.full((1, width), 0.5)])
    found, expected = products_in_int8(weight, activations), activations @ weight.T
    assert expected.max() == width
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01 * width)


def test_int8_is_measured_and_refused(tmp_path, monkeypatch):
    run = make_run(tmp_path / 'run', MODELS['vit'], 'classify')
    monkeypatch.setattr(quantise, 'REPEATS', 3)
    text = export(run, tmp_path / 'out' / 'net', 'symbol', int8=True, max_drop=100).splitlines()
    assert '180 held-out images, 256 for calibration' in text[0]
    assert [line.split()[0] for line in text[1:4]] == ['float32', 'int8', 'change']
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'net-symbol.json', 'net-0000.params', 'net.json'}
    for name in 'symbol.json', '0000.params':
        assert (tmp_path / 'out' / f'net-{name}').stat().st_size > 1000

    real = quantise._accuracy
    monkeypatch.setattr(quantise, '_accuracy', lambda *args: {**real(*args), 'float32': 91.5, 'int8': 90.25})
    with pytest.raises(ValueError, match=r'1\.25 points.*91\.50 to 90\.25 %.*--max-drop=1:'):
        export(run, tmp_path / 'refused' / 'net', 'symbol', int8=True)
    assert list((tmp_path / 'refused').iterdir()) == []


def test_int8_on_given_images(tmp_path):
    """Half of few images calibrates, the other half measures, and no image does both."""
    trained = load_run(make_run(tmp_path / 'run', MODELS['vit'], 'classify'))
    other = trained.config.model_copy(update={'data': DataConfig(path='/elsewhere')})
    calibration, held_out, labels = quantise._images(trained._replace(config=other), 'digits')
    assert (len(calibration), len(held_out), len(labels)) == (256, 1797 - 256, 1797 - 256)
    names = {s.name(i) for s in (calibration, held_out) for i in range(len(s))}
    assert len(names) == 1797


def test_int8_on_the_flat_validation_images_of_the_run(tmp_path):
    trained = load_run(make_run(tmp_path / 'run', MODELS['vit'], 'classify'))
    (tmp_path / 'val').mkdir()
    for number in range(8):
        (tmp_path / 'val' / f'{number}.png').write_bytes(b'broken')
    (tmp_path / 'map.txt').write_text(''.join(f'{number}.png\t{number % 3}\n' for number in range(8)))
    data = DataConfig(path='/elsewhere', val_path=str(tmp_path / 'val'), val_labels=str(tmp_path / 'map.txt'))
    trained = trained._replace(config=trained.config.model_copy(update={'data': data}))
    _, held_out, labels = quantise._images(trained, data.val_path)
    assert len(labels) == 4 and all(int(Path(held_out.name(i)).stem) % 3 == labels[i] for i in range(4))
    with pytest.raises(ValueError, match='each must be readable: remove or repair .*png: not an image'):
        next(quantise._batches(trained, held_out))


@pytest.mark.parametrize('task, keys, match', [
    ('pretrain', dict(format='symbol', int8=True), 'pre-training'),
    ('classify', dict(format='onnx', int8=True), '--format symbol'),
    ('classify', dict(format='torch'), "'torch'.*symbol or onnx"),
    ('classify', dict(format='onnx', file='net.json'), 'net.json: a description .* goes there: .* net.onnx'),
])
def test_what_cannot_be(tmp_path, task, keys, match):
    file = tmp_path / keys.get('file', 'net')
    with pytest.raises(ValueError, match=match):
        export(make_run(tmp_path / 'run', MODELS['vit_positions'], task), **{**keys, 'file': file})


def test_a_place_that_cannot_be_written(tmp_path):
    run = make_run(tmp_path / 'run', MODELS['vit'], 'classify')
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='file/net: cannot be written'):
        export(run, tmp_path / 'file' / 'net', 'symbol')


def test_traced_constants_are_those_the_graph_uses(tmp_path):
    trained = load_run(make_run(tmp_path / 'run', MODELS['swin'], 'classify'))
    assert isinstance(trained, Trained)
    whole = graph.trace(trained)
    assert set(whole.symbol.list_inputs()) == {'image', *whole.arrays}


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'mxsimmim\[deploy\]'"):
        export(make_run(tmp_path / 'run', MODELS['vit'], 'classify'), tmp_path / 'out' / 'net.onnx', 'onnx')
    assert list((tmp_path / 'out').iterdir()) == []


def test_weights_beyond_a_protobuf_go_into_a_file_of_their_own(tmp_path, monkeypatch):
    """2 GiB are the limit; at a lower one the same happens."""
    run = make_run(tmp_path / 'run', MODELS['vit'], 'classify')
    export(run, tmp_path / 'whole.onnx', 'onnx')
    monkeypatch.setattr('mxsimmim.inference.export.ONE_FILE', 1000)
    text = export(run, tmp_path / 'out' / 'net.onnx', 'onnx')
    assert text.split() == [str(tmp_path / 'out' / name) for name in ('net.onnx', 'net.onnx.data', 'net.json')]
    assert (tmp_path / 'out' / 'net.onnx').stat().st_size < (tmp_path / 'whole.onnx').stat().st_size - 10_000
    x, = inputs(load_run(run), 2)
    found = [onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider']).run(None, {'image': x})[0]
             for file in (tmp_path / 'whole.onnx', tmp_path / 'out' / 'net.onnx')]
    np.testing.assert_array_equal(*found)
