"""Runs made of files and files made of runs: the same numbers, the right configuration, errors with a way out."""
import json
import os
import subprocess
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from mxsimmim.config import ConfigError, ModelConfig
from mxsimmim.inference import exchange
from mxsimmim.inference.trained import load_run
from mxsimmim.interop import official, pth, told
from mxsimmim.models import build_classifier, build_simmim
from mxsimmim.training.run_folder import read_config

DATA = Path(__file__).parents[1] / 'data'
PROGRAM = Path(__file__).parents[1] / 'support' / 'torch_files.py'
PYTHON = os.environ.get('TORCH_PYTHON', sys.executable)  # may be another one that has PyTorch
CELL = {'vit': 'mask.patch_size=16', 'swin': 'mask.patch_size=32'}
BENCH_KEYS = ('type', 'img_size', 'patch_size', 'embed_dim', 'depth', 'depths', 'num_heads', 'window_size')


def batch(config, seed=3):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((2, 3, config.img_size, config.img_size)).astype('float32'),
            (rng.random((2, config.grid, config.grid)) < 0.6).astype('uint8'))


@pytest.fixture(params=['vit', 'swin'])
def imported(request, tmp_path):
    run = tmp_path / 'runs' / request.param
    file = DATA / f'finetune_{request.param}.pth'
    exchange.import_weights(file, run, overrides=[CELL[request.param]])
    return request.param, file, run


def test_an_official_checkpoint_tells_its_whole_model(imported):
    kind, _, run = imported
    recorded = json.loads(np.load(DATA / f'finetune_{kind}.npz')['meta'].tobytes().decode())['pretrain']
    config = read_config(run)
    assert config.task == 'pretrain' and (config.name, config.output) == (kind, str(run.parent))
    expected = ModelConfig(**recorded)
    for key in ModelConfig(**recorded).model_fields_set:
        assert getattr(config.model, key) == getattr(expected, key), key
    assert config.model.mlp_ratio == 4


def test_out_again_it_is_the_same_file_for_pytorch(imported, tmp_path):
    _, file, run = imported
    report = exchange.export_weights(run, tmp_path / 'out.pth', 'official')
    before, after = pth.read_pth(file), pth.read_pth(tmp_path / 'out.pth')
    assert report == f'{tmp_path}/out.pth: {len(before)} arrays under the names of official'
    assert set(after) == set(before)  # with the buffers, without which PyTorch does not load strictly
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    exchange.export_weights(run, tmp_path / 'out.safetensors', 'official')
    written = load_file(tmp_path / 'out.safetensors')
    assert set(written) == set(before)
    assert all(np.array_equal(written[name], before[name]) for name in before)


def test_pytorch_loads_it_strictly_and_computes_the_same_loss(imported, tmp_path):
    if subprocess.run([PYTHON, '-c', 'import torch'], capture_output=True).returncode:
        pytest.skip(f'{PYTHON} has no PyTorch; TORCH_PYTHON=/path/to/python names one that has')
    _, _, run = imported
    trained = load_run(run)
    image, mask = batch(trained.config.model)
    exchange.export_weights(run, tmp_path / 'out.pth', 'official')
    keys = {key: value for key, value in trained.config.model.model_dump().items()
            if key in BENCH_KEYS and key not in {'vit': ('depths', 'window_size'), 'swin': ('depth',)}[imported[0]]}
    np.savez(tmp_path / 'batch.npz', image=image, mask=mask, config=json.dumps(keys))
    found = subprocess.run([PYTHON, PROGRAM, 'loss', tmp_path / 'out.pth', tmp_path / 'batch.npz'],
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) == pytest.approx(trained.net(mx.nd.array(image), mx.nd.array(mask)).asscalar(), rel=1e-5)


def classifier(path, keys, classes=4, dtype='float32'):
    config = ModelConfig(**keys)
    net = build_classifier(config, classes, 1)
    pth.write_pth(path, {name: value.astype(dtype) for name, value in official.export_weights(net).items()})
    return config, net


VIT = dict(img_size=24, patch_size=8, embed_dim=12, depth=2, num_heads=3, use_rpb=True, use_shared_rpb=False,
           use_mean_pooling=True, mlp_ratio=3)
SWIN = dict(type='swin', img_size=32, patch_size=2, embed_dim=6, depths=[2, 1, 1], num_heads=[1, 2, 3], window_size=8,
            init_values=None)


@pytest.mark.parametrize('keys', [
    VIT, dict(VIT, use_rpb=False, use_ape=True, num_heads=1, init_values=None, use_mean_pooling=False), SWIN,
    dict(SWIN, ape=True), dict(SWIN, img_size=16)], ids=str)
def test_a_classifier_comes_in_with_its_classes(keys, tmp_path):
    config, net = classifier(tmp_path / 'a.pth', keys)
    (tmp_path / 'classes.txt').write_text('cat\ndog\nhen\ngrebe crêté\n', encoding='utf-8')
    exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'run', classes=str(tmp_path / 'classes.txt'))
    trained = load_run(tmp_path / 'run')
    assert trained.predictor.classes == ('cat', 'dog', 'hen', 'grebe crêté') and trained.step == 0
    assert trained.config.task == 'classify'
    if config.type == 'swin':
        config = config.model_copy(update={'init_values': trained.config.model.init_values})  # of ViT alone
    assert trained.config.model == config
    image = mx.nd.array(batch(config)[0])
    np.testing.assert_array_equal(trained.net(image).asnumpy(), net(image).asnumpy())
    exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'numbered')
    assert load_run(tmp_path / 'numbered').predictor.classes == ('0', '1', '2', '3')


def test_every_hidden_width_comes_back():
    for width in (12, 49, 96, 1152):
        for hidden in range(1, 6 * width, 7):
            assert int(width * told.ratio(np.empty((hidden, width)))) == hidden, (hidden, width)


def test_half_precision_comes_in_as_single(tmp_path):
    _, net = classifier(tmp_path / 'a.pth', VIT, dtype='float16')
    exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'run')
    arrays = official.export_weights(load_run(tmp_path / 'run').net)
    for name, value in official.export_weights(net).items():
        assert arrays[name].dtype == 'float32'
        np.testing.assert_array_equal(arrays[name], value.astype('float16').astype('float32'))


def test_what_the_weights_do_not_tell_is_reported_or_given(tmp_path):
    keys = dict(VIT, use_rpb=False, embed_dim=128, num_heads=4, img_size=24)
    config, net = classifier(tmp_path / 'a.pth', keys)
    report = exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'one')
    for key, value in (('num_heads', 2), ('img_size', 224)):
        assert f'assumed model.{key}={value}, which the weights do not tell' in report
    assert load_run(tmp_path / 'one').config.model.num_heads == 2
    report = exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'two', overrides=['model.num_heads=4',
                                                                                     'model.img_size=24'])
    assert 'assumed' not in report and load_run(tmp_path / 'two').config.model == config
    (tmp_path / 'c.yaml').write_text('model: {num_heads: 4, img_size: 24, embed_dim: 7}\ndata: {mean: [0.5, 0.5, 0.5]}')
    report = exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'three', config=str(tmp_path / 'c.yaml'))
    trained = load_run(tmp_path / 'three')
    assert 'assumed' not in report and trained.config.model == config and trained.config.data.mean == (0.5,) * 3
    image = mx.nd.array(batch(config)[0])
    np.testing.assert_array_equal(trained.net(image).asnumpy(), net(image).asnumpy())


def test_swin_without_masks_is_taken_to_end_in_one_window(tmp_path):
    config = ModelConfig(**dict(SWIN, img_size=128, depths=[1, 1, 1], window_size=4))
    pth.write_pth(tmp_path / 'a.pth', official.export_weights(build_simmim(config, 0)))
    report = exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'one', overrides=['mask.patch_size=8'])
    assert 'assumed model.img_size=32, ' in report and 'mask.patch_size' not in report
    assert load_run(tmp_path / 'one').config.model.img_size == 32
    exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'two', overrides=['model.img_size=128'])
    assert load_run(tmp_path / 'two').config.model.img_size == 128


@pytest.mark.parametrize('keys, cell', [
    (dict(img_size=32, patch_size=4, embed_dim=12, depth=1, num_heads=3), 4),
    (dict(img_size=64, patch_size=4, embed_dim=12, depth=1, num_heads=3), 32),
    (dict(img_size=48, patch_size=8, embed_dim=12, depth=1, num_heads=3), 8),
    (dict(SWIN, img_size=32, depths=[1, 1, 1, 1, 1], num_heads=[1] * 5, window_size=16), 2)], ids=str)
def test_masked_cells_of_small_images_leave_some_visible(keys, cell, tmp_path):
    pth.write_pth(tmp_path / 'a.pth', official.export_weights(build_simmim(ModelConfig(**keys), 0)))
    said = exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'run')
    assert read_config(tmp_path / 'run').mask.patch_size == cell
    assert (f'assumed mask.patch_size={cell}, ' in said) == (cell != 32)


@pytest.mark.parametrize('count, text', [(3, 'a\nb\nc\n'), (5, 'a\nb\nc\nd\ne')])
def test_class_names_that_do_not_match(count, text, tmp_path):
    classifier(tmp_path / 'a.pth', VIT)
    (tmp_path / 'c.txt').write_text(text)
    with pytest.raises(ValueError, match=f'c.txt names {count} classes, .*a.pth has 4: name each'):
        exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'run', classes=str(tmp_path / 'c.txt'))
    with pytest.raises(ValueError, match='none.txt'):
        exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'run', classes=str(tmp_path / 'none.txt'))
    assert not (tmp_path / 'run').exists()


def test_errors_of_the_import_leave_nothing_behind(tmp_path):
    _, net = classifier(tmp_path / 'a.pth', VIT)
    arrays = official.export_weights(net)
    file, run = tmp_path / 'b.pth', tmp_path / 'run'
    for changed, words in [
            ({name: value for name, value in arrays.items() if not name.startswith('head.')},
             'b.pth is an encoder without SimMIM decoder or classification head.*model.pretrained=.*b.pth'),
            ({**arrays, 'extra': np.zeros(2)}, "b.pth: these are not weights.*no place for 'extra'"),
            ({name: value for name, value in arrays.items() if 'mlp' not in name}, 'not those of a whole ViT or Swin'),
            ({name: value for name, value in arrays.items() if 'fc_norm' not in name}, 'missing: fc_norm.weight'),
            ({**arrays, 'blocks.1.norm1.weight': np.zeros(5)}, r'norm1.weight has shape \(5,\), the network needs')]:
        pth.write_pth(file, changed)
        with pytest.raises(ValueError, match=f'(?s){words}'):
            exchange.import_weights(file, run)
    with pytest.raises(ConfigError, match="unknown key 'model.heads'"):
        exchange.import_weights(tmp_path / 'a.pth', run, overrides=['model.heads=3'])
    with pytest.raises(ValueError, match='the network needs'):
        exchange.import_weights(tmp_path / 'a.pth', run, overrides=['model.embed_dim=24'])
    assert not run.exists()


def test_errors_of_the_export(tmp_path):
    classifier(tmp_path / 'a.pth', VIT)
    exchange.import_weights(tmp_path / 'a.pth', tmp_path / 'run')
    with pytest.raises(ValueError, match=r"out.h5: its ending names no format of weights: use .pth or .safetensors"):
        exchange.export_weights(tmp_path / 'run', tmp_path / 'out.h5', 'official')
    for ending in ('pth', 'safetensors'):
        with pytest.raises(ValueError, match=f'out.{ending}: cannot be written: .*No such file'):
            exchange.export_weights(tmp_path / 'run', tmp_path / 'none' / f'out.{ending}', 'official')
    with pytest.raises(ValueError, match='none'):
        exchange.export_weights(tmp_path / 'none', tmp_path / 'out.pth', 'official')
