"""Every recipe of conf/ at its own options, narrow: through every export and back, and what else uses a run.

At its own depth, too, but for SwinV2, whose operators are those of a few blocks.

Also what depends on the number of blocks: operators that MXNet adds or merges, and gradients of arrays with many users.
"""
import json
import platform
from pathlib import Path

import mxnet as mx
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support.running import rounds

from mxsimmim.config import Config, ModelConfig, configfile
from mxsimmim.data.loader import Batch
from mxsimmim.inference import exchange, export as deployed, graph, quantise
from mxsimmim.inference.export import export
from mxsimmim.inference.features import extract, open_images
from mxsimmim.inference.probe import probe
from mxsimmim.inference.reconstruct import reconstruct
from mxsimmim.inference.trained import Trained, load_for_inference, load_run
from mxsimmim.interop import names, official, pth
from mxsimmim.models import build_classifier, build_simmim, named_parameters
from mxsimmim.ops import FORMS, REFERENCE, OpBackend
from mxsimmim.parallel.placement import Replicated
from mxsimmim.training import checkpoint

pytestmark = [pytest.mark.unmeasured, pytest.mark.soak]
SEED = 5
CONF = Path(__file__).parents[2] / 'conf'
NARROW = {'vit': ['model.embed_dim=12', 'model.num_heads=3'],
          'swin': ['model.embed_dim=4'], 'swinv2': ['model.embed_dim=4', 'model.depths=[1, 2, 1, 1]']}
HEADS = [1, 2, 2, 4]  # of a Swin's stages
# Both tasks of both networks, and the deepest of each; `make soak` has all.
CHOSEN = ('digits', 'finetune_digits', 'finetune_swin_base_100ep', 'finetune_vit_base', 'swin_tiny', 'vit_large')
CLASSES = tuple(f'class {number}' for number in range(4))
natively = pytest.mark.skipif((platform.system(), platform.machine()) != ('Linux', 'x86_64'),
                              reason='native operators are for Linux on x86-64')


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """Class folders of three noisy images each."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(SEED)
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(3):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), 'uint8')).save(folder / name / f'{number}.png')
    return folder


def trained_net(config, backend=REFERENCE, seed=SEED):
    """A network without a part that has no effect: of weights larger than initial ones."""
    print('seed', seed)
    classify = config.task == 'classify'
    if classify:
        net = build_classifier(config.model, len(CLASSES), seed, backend)
    else:
        net = build_simmim(config.model, seed, backend)
    rng = np.random.default_rng(seed)
    for p in named_parameters(net).values():
        p.set_data(p.data() + mx.nd.array(0.1 * rng.standard_normal(p.shape)))
    return Trained(config, net, {'classes': CLASSES} if classify else {}, 7)


def make_run(folder, config):
    trained = trained_net(config)
    folder.mkdir(parents=True)
    (folder / 'config.yaml').write_text(configfile.to_yaml(config))
    state = {'config': configfile.to_dict(config), **trained.state, 'samples': 0}
    checkpoint.save(folder / 'checkpoints', 7, {'weights': official.export_weights(trained.net)}, state, keep=1)
    return folder


def recipe(name, *overrides):
    path = CONF / f'{name}.yaml'
    model = configfile.load(path).model
    narrow = NARROW[model.type] + [f'model.num_heads={HEADS[:model.stages]}'] * (model.type != 'vit')
    return configfile.load(path, [*narrow, 'data.val_fraction=0.34', 'data.labels_per_class=0', 'data.threads=1',
                                  *overrides])


def recipes():
    """One of those that have the same network when narrow, like ViT-S and ViT-Ti.

    What is done with segmenters and detectors is in test_segment_use and test_detect_use.
    """
    found = {}
    for name in sorted(path.stem for path in CONF.glob('*.yaml') if path.stem != 'base'):
        config = recipe(name)
        if config.task in ('pretrain', 'classify'):
            found.setdefault((config.task, config.model), name)
    return [name for name in found.values() if name in rounds(CHOSEN, found.values())]


@pytest.fixture(scope='module', params=recipes())
def run(request, images, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp('runs') / request.param, recipe(request.param, f'data.path={images}'))


def test_exports_compute_the_same(run, tmp_path):
    """With another batch than the one that the export itself compares on."""
    trained = load_run(run)
    x = [np.concatenate([array, array[:1] / 2]) for array in graph.random_inputs(trained)]
    expected = graph.answer(trained, x)
    assert np.abs(expected).max() > 0.1
    export(run, tmp_path / 'net', 'symbol')
    files = [tmp_path / 'net-symbol.json', tmp_path / 'net-0000.params']
    found = graph.load_symbol(files, graph.trace(trained))(*map(mx.nd.array, x)).asnumpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    export(run, tmp_path / 'net.onnx', 'onnx')
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'), providers=['CPUExecutionProvider'])
    found, = session.run(None, dict(zip(('image', 'mask'), x)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def bare(arrays, left_out=()):
    """By names without `encoder.`, which a classifier and a bare encoder have not."""
    return {name[8 * name.startswith('encoder.'):]: value for name, value in arrays.items()
            if name[8 * name.startswith('encoder.'):] not in left_out}


def told(model):
    """What weights tell of a model."""
    others = {'drop_path', 'loss', 'norm_targets', 'norm_window', 'recompute', 'pretrained'}
    others |= {'depths', 'window_size'} if model.type == 'vit' else {'init_values', 'depth', 'use_shared_rpb'}
    known = {key: value for key, value in model.model_dump().items() if key not in others}
    return {**known, 'init_values': known.get('init_values') is None}  # the weights were scaled by it, or were not


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize('style', names.STYLES)
def test_names_go_out_and_come_back(run, tmp_path, style):
    """The same weights from both kinds of file, and the same run from them where they are a whole run."""
    trained = load_run(run)
    weights, model = official.export_weights(trained.net), trained.config.model
    for ending in ('pth', 'safetensors'):
        exchange.export_weights(run, tmp_path / f'w.{ending}', style)
    raw = pth.read_pth(tmp_path / 'w.pth')
    same(load_file(tmp_path / 'w.safetensors'), raw)
    arrays, kind = names.to_official(raw)
    left_out = names.from_official(weights, style, model)[1]
    same(bare(arrays), bare(weights, left_out))
    if kind == 'encoder':
        with pytest.raises(ValueError, match='is an encoder without SimMIM decoder or classification head'):
            exchange.import_weights(tmp_path / 'w.pth', tmp_path / 'back')
        return
    keys = ['model.num_heads=3'] if model.type == 'vit' else [f'model.img_size={model.img_size}']
    if model.type == 'swinv2' and style != 'official':  # buffers tell
        keys += [f'model.{key}={list(value) if isinstance(value, tuple) else value}' for key, value in (
            ('window_size', model.window_size), ('pretrained_window_sizes', model.pretrained_window_sizes))]
    exchange.import_weights(tmp_path / 'w.pth', tmp_path / 'back', overrides=keys)
    again = load_run(tmp_path / 'back')
    assert told(again.config.model) == told(model)
    same(official.export_weights(again.net), weights)


def test_reconstruct_features_and_probe(run, images, tmp_path):
    trained = load_for_inference(run)
    model, data = trained.config.model, trained.config.data
    if not trained.predictor.classes:
        reconstruct(run, [str(images / CLASSES[0])], tmp_path / 'grid.png')
        picture = Image.open(tmp_path / 'grid.png')
        assert picture.width >= 3 * model.img_size and picture.height >= 3 * model.img_size
    source, labels, classes = open_images([str(images)])
    assert (len(source), classes) == (12, CLASSES)
    last = extract(trained, data, source, [model.blocks])[model.blocks]
    assert last.shape == (12, model.embed_dim * 2 ** (model.stages - 1)) and last.std(0).min() > 1e-4
    rows = probe(run, trained.config, 'all', 1).splitlines()[2:]
    assert [int(row.split()[0]) for row in rows] == list(range(1, model.blocks + 1))


def test_int8(run, images, tmp_path, monkeypatch):
    """Every linear map is in 8 bits: 4 a block, patch embedding, patch merging, head."""
    trained = load_run(run)
    if not trained.predictor.classes:
        pytest.skip('of classifiers')
    monkeypatch.setattr(quantise, 'LATENCY_BATCHES', (1,))
    monkeypatch.setattr(quantise, 'REPEATS', 1)
    said = export(run, tmp_path / 'net', 'symbol', int8=True, images=str(images), max_drop=100)
    assert '4 held-out images, 8 for calibration' in said
    check_int8(trained, [tmp_path / 'net-symbol.json', tmp_path / 'net-0000.params'])


def check_int8(trained, files):
    model, whole = trained.config.model, graph.trace(trained)
    nodes = json.loads(files[0].read_text())['nodes']
    assert sum(node.get('attrs', {}).get('quantized') in ('True', '1') for node in nodes
               if node['op'] == '_sg_mkldnn_fully_connected') == 4 * model.blocks + 2 + model.stages - 1
    x, = graph.random_inputs(trained)
    expected = graph.answer(trained, [x])
    found = graph.load_symbol(files, whole)(mx.nd.array(x)).asnumpy()
    assert 1e-4 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.3


@natively
def test_both_forms_of_the_operators_give_the_same_gradient(run):
    """Hybridized: there MXNet sums gradients of arrays with many users in another way."""
    config = load_run(run).config
    model, rng = config.model, np.random.default_rng(SEED)
    image = rng.integers(0, 256, (2, model.img_size, model.img_size, 3), 'uint8')
    mask = (rng.random((2, model.grid, model.grid)) < 0.5).astype('uint8')
    fields = {'image': image, 'mask': mask}
    if model.drop_path:
        fields['uniform'] = rng.random((2, 2 * model.blocks), 'float32')
    if config.task == 'classify':
        fields['label'] = rng.random((2, len(CLASSES)), 'float32')
    batch = Batch(fields, 0, np.arange(2))
    found = []
    for form in FORMS:
        net = trained_net(config, OpBackend(form)).net
        placement = Replicated(net, [mx.cpu(0)])
        loss = placement.forward_backward(batch, 2).asscalar()
        found.append((loss, {name: p.grad().asnumpy() for name, p in named_parameters(net).items()}))
    (loss, expected), (ours, gradients) = found
    assert ours == pytest.approx(loss, rel=1e-4)
    for name, gradient in expected.items():
        assert np.linalg.norm(gradients[name] - gradient) <= 1e-3 * np.linalg.norm(gradient) + 1e-7, name


VIT = dict(img_size=16, patch_size=4, embed_dim=12, num_heads=3, drop_path=0.1)
SWIN = dict(type='swin', img_size=32, patch_size=2, embed_dim=4, drop_path=0.1)
OPTIONS = {
    'vit, 1 block, no positions': dict(VIT, depth=1, use_shared_rpb=False, init_values=None),
    'vit, 7 blocks, all positions': dict(VIT, depth=7, use_rpb=True, use_ape=True, norm_targets=True),
    'vit, 18 blocks, shared': dict(VIT, depth=18, use_mean_pooling=True),
    'vit, 25 blocks, all positions': dict(VIT, depth=25, use_rpb=True, use_ape=True, init_values=None),
    'vit, 13 blocks, absolute': dict(VIT, depth=13, use_shared_rpb=False, use_ape=True, mlp_ratio=3),
    'vit, four patches': dict(VIT, patch_size=8, depth=6),
    'swin, one stage, one window': dict(SWIN, depths=[1], num_heads=[1], window_size=16, use_ape=True),
    'swin, 24 blocks a stage': dict(SWIN, depths=[1, 24], num_heads=[1, 2], window_size=4, norm_targets=True),
    'swin, windows larger than stages': dict(SWIN, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=8),
}


DEEPEST = ['vit, 25 blocks, all positions', 'swin, 24 blocks a stage']


@pytest.mark.parametrize('options, task', [*((options, 'classify') for options in OPTIONS),
                                           *((options, 'pretrain') for options in rounds(DEEPEST, OPTIONS))])
def test_options_and_depths(options, task, tmp_path):
    """The exports compare what they write with the network."""
    model = ModelConfig(**OPTIONS[options])
    trained = trained_net(Config(name='run', task=task, model=model, mask=dict(patch_size=model.patch_size, ratio=0.4)))
    whole = graph.trace(trained)
    files = deployed._symbol(trained, whole, tmp_path / 'net')
    assert '"_copy"' not in files[0].read_text()
    deployed._onnx(trained, whole, tmp_path / 'net.onnx')
    if trained.predictor.classes:
        x, = graph.random_inputs(trained)
        check_int8(trained, graph.save_symbol(quantise.quantise(whole, x), tmp_path / 'int8'))
