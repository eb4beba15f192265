"""timm's and Hugging Face's models compute the same here, and ours the same there."""
import json
import os
import subprocess
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from mxsimmim.config import ModelConfig
from mxsimmim.interop import names, official, pth
from mxsimmim.interop.told import model_keys
from mxsimmim.models import build_classifier, build_simmim, named_parameters

RECORDED = np.load(Path(__file__).parents[1] / 'data' / 'names.npz')
MODELS = sorted({key.split('/')[0] for key in RECORDED.files})
PROGRAM = Path(__file__).parents[1] / 'support' / 'libraries.py'
PYTHON = os.environ.get('TORCH_PYTHON', sys.executable)  # may be another one that has PyTorch
HEADS = {'timm_vit': 2, 'timm_vit_mean': 2, 'hf_vit': 2, 'hf_vit_simmim': 2}  # which these weights do not tell


def weights(model):
    return {key.split('/', 2)[2]: RECORDED[key] for key in RECORDED.files if key.startswith(f'{model}/weights/')}


def config_of(model, raw, arrays):
    told, assumed = model_keys(raw, arrays)
    keys = {key[6:]: value for key, value in {**assumed, **told}.items() if key.startswith('model.')}
    return ModelConfig(**{**keys, **({'num_heads': HEADS[model]} if model in HEADS else {})})


def build(config, arrays, kind):
    net = build_simmim(config, None) if kind == 'pretrain' else build_classifier(config, 3, None)
    if arrays is not None:
        official.load_weights(net, arrays)
    return net


def output(net, image, mask):
    """Logits (B, classes), or the loss (1,) of pre-training."""
    image = mx.nd.array(image)
    return net(image).asnumpy() if hasattr(net, 'head') else net(image, mx.nd.array(mask, dtype='uint8')).asnumpy()


@pytest.mark.parametrize('model', MODELS)
def test_their_weights_give_their_output_here(model):
    raw = weights(model)
    arrays, kind = names.to_official(raw)
    assert kind == ('pretrain' if 'simmim' in model else 'classify')
    net = build(config_of(model, raw, arrays), arrays, kind)
    expected = RECORDED[f'{model}/output']
    assert np.abs(expected).max() > 0.4
    np.testing.assert_allclose(output(net, RECORDED[f'{model}/image'], RECORDED[f'{model}/mask']), expected, atol=2e-6)


@pytest.mark.parametrize('model', MODELS)
def test_there_and_back_gives_their_names_and_values(model):
    raw = weights(model)
    arrays, kind = names.to_official(raw)
    back, left_out = names.from_official(arrays, model.split('_')[0], config_of(model, raw, arrays))
    assert left_out == []
    if model == 'timm_vit_mean':  # positions of the patches alone come back with one of zero for the cls token
        assert not back['pos_embed'][:, 0].any()
        back['pos_embed'] = back['pos_embed'][:, 1:]
    assert set(back) == set(raw)
    for name, value in back.items():
        if ('vit' in model and name.endswith('key.bias')):
            assert not value.any()  # a bias of the keys changes nothing: see names._split_bias
        elif 'vit' in model and name.endswith('qkv.bias'):
            expected = raw[name].copy()
            expected[12:24] = 0
            np.testing.assert_array_equal(value, expected, err_msg=name)
        else:
            np.testing.assert_array_equal(value, raw[name], err_msg=name)


@pytest.mark.parametrize('model', [model for model in MODELS if model.startswith('hf_')])
def test_the_names_inside_hugging_faces_classes_are_known_too(model):
    raw = weights(model)
    inside = {name: raw[file] for name, file in json.loads(str(RECORDED[f'{model}/renamed'])).items()}
    assert set(inside) != set(raw)
    arrays, kind = names.to_official(raw)
    again, again_kind = names.to_official(inside)
    assert kind == again_kind and set(again) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def random_weights(net, seed):
    rng = np.random.default_rng(seed)
    for parameter in named_parameters(net).values():
        parameter.set_data(rng.normal(0, 0.3, parameter.shape).astype('float32'))


def test_our_weights_give_our_output_there(tmp_path):
    """Strictly loaded: PyTorch's own test of names and shapes. seed 11"""
    if subprocess.run([PYTHON, '-c', 'import torch, timm, transformers'], capture_output=True).returncode:
        pytest.skip(f'{PYTHON} has no PyTorch, timm and transformers; TORCH_PYTHON=/path/to/python names one that has')
    for model in MODELS:
        raw = weights(model)
        arrays, kind = names.to_official(raw)
        config = config_of(model, raw, arrays)
        net = build(config, None, kind)
        random_weights(net, 11)
        image, mask = RECORDED[f'{model}/image'], RECORDED[f'{model}/mask']
        np.savez(tmp_path / f'{model}.npz', image=image, mask=mask, output=output(net, image, mask))
        named, _ = names.from_official(official.export_weights(net), model.split('_')[0], config)
        if model == 'timm_vit_mean':
            continue  # timm can leave the class position out; we cannot
        if model.startswith('hf_'):
            (tmp_path / model).mkdir()
            save_file(named, tmp_path / model / 'model.safetensors', {'format': 'pt'})
        else:
            pth.write_pth(tmp_path / f'{model}.pth', named)
    (tmp_path / 'timm_vit_mean.npz').unlink()
    found = subprocess.run([PYTHON, PROGRAM, 'check', tmp_path], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    differences = json.loads(found.stdout.splitlines()[-1])
    assert set(differences) == set(MODELS) - {'timm_vit_mean'}
    assert max(differences.values()) < 5e-6, differences


def test_older_timm_counts_patch_merging_as_the_reference_does():
    raw = weights('timm_swin')
    old = {name.replace('layers.1.downsample', 'layers.0.downsample').replace('head.fc', 'head'): value
           for name, value in raw.items()}
    new_names, old_names = names.to_official(raw)[0], names.to_official(old)[0]
    assert set(new_names) == set(old_names) and 'layers.0.downsample.norm.weight' in new_names
    for name in new_names:
        np.testing.assert_array_equal(new_names[name], old_names[name])


@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_official_names_stay_as_they_are(kind):
    raw = pth.read_pth(Path(__file__).parents[1] / 'data' / f'finetune_{kind}.pth')
    arrays, what = names.to_official(raw)
    assert what == 'pretrain'
    assert set(raw) - set(arrays) == {name for name in raw if name.endswith(('relative_position_index', 'attn_mask'))}
    assert all(arrays[name] is raw[name] for name in arrays)
    encoder = {name: value for name, value in raw.items() if not name.startswith('decoder.')}
    bare, what = names.to_official(encoder)
    assert what == 'encoder' and 'patch_embed.proj.weight' in bare


def test_of_pre_training_only_what_the_other_can_hold_is_written():
    keys = dict(img_size=16, patch_size=4, embed_dim=12, depth=1, num_heads=2)
    for config, style, left_out, some in [
            (ModelConfig(**keys), 'timm', ['decoder.0.bias', 'decoder.0.weight', 'mask_token'], 'blocks.0.attn.q_bias'),
            (ModelConfig(**keys), 'hf', ['decoder.0.bias', 'decoder.0.weight'], 'encoder.layer.0.lambda_1'),
            (ModelConfig(**keys, use_ape=True, use_shared_rpb=False), 'timm',
             ['decoder.0.bias', 'decoder.0.weight', 'mask_token'], 'blocks.0.ls1.gamma'),
            (ModelConfig(**keys, use_ape=True, use_shared_rpb=False, init_values=None), 'hf', [],
             'vit.encoder.layer.0.attention.attention.key.bias')]:
        arrays, missing = names.from_official(official.export_weights(build_simmim(config, 0)), style, config)
        assert missing == left_out and some in arrays


def test_what_has_no_place_is_named():
    raw = weights('timm_vit')
    for extra in ('reg_token', 'blocks.0.attn.q_norm.weight', 'pre_logits.fc.weight', 'norm_pre.weight'):
        with pytest.raises(ValueError, match=f"there is no place for '{extra}'"):
            names.to_official({**raw, extra: np.ones(3)})
    cut = {name: value for name, value in weights('hf_vit').items() if not name.endswith('layer.1.attention.attention.'
                                                                                        'query.weight')}
    with pytest.raises(ValueError, match='queries, keys and values of blocks.1.attn.qkv.weight, some are missing'):
        names.to_official(cut)
    with pytest.raises(ValueError, match="'patch_embed.proj.weight' is missing"):
        names.to_official({'head.weight': np.ones((3, 4))})
    config = ModelConfig(type='swin', img_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                         window_size=4, ape=True)
    for style in ('timm', 'hf'):
        with pytest.raises(ValueError, match="'absolute_pos_embed' has no counterpart in the Swin of " + style):
            names.from_official(official.export_weights(build_simmim(config, 0)), style, config)
