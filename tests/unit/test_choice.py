"""Checkpoints of other tools: what they wrap names in, what they keep beside each other, what of it is taken."""
import functools
import json
import os
import re
import sys
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.torch_saves import save, stand_in

from mxsimmim.config import ModelConfig, configfile
from mxsimmim.inference import exchange
from mxsimmim.inference.trained import load_run
from mxsimmim.interop import choice, files, names, official, pth
from mxsimmim.models import build_classifier, build_simmim, named_parameters
from mxsimmim.ops import REFERENCE
from mxsimmim.tasks.classify import Classification
from mxsimmim.training.pretrained import load_encoder

KEYS = dict(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3)
PLAIN = ModelConfig(**KEYS, use_shared_rpb=False, use_ape=True, init_values=None)
SWIN = ModelConfig(type='swin', img_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4)


@functools.lru_cache(maxsize=None)
def vit(style='timm', seed=1, config=PLAIN, classes=5):
    """Weights of a plain ViT, as timm, DINO and MAE name them, or as Hugging Face does."""
    net = build_classifier(config, classes, seed)
    rng = np.random.default_rng(seed)
    for p in named_parameters(net).values():
        p.set_data(rng.normal(0, 0.3, p.shape).astype('float32'))
    return names.from_official(official.export_weights(net), style, config)[0]


def encoder(seed=1):
    return {name: value for name, value in vit(seed=seed).items() if not name.startswith('head.')}


def same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def under(prefix, arrays):
    return OrderedDict((prefix + name, value) for name, value in arrays.items())


WRAPPERS = ['', 'module.', '_orig_mod.', 'model.', 'backbone.', 'encoder.encoder.', 'module.base_encoder.', 'net.',
            'module._orig_mod.', '_orig_mod.module.', 'student.backbone.', 'trunk.', 'visual.trunk.',
            'momentum_encoder.', 'model.module.backbone.', 'something.new.']


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('style', ['timm', 'hf'])
def test_what_wrappers_add_to_all_names_is_taken_off(wrapper, style, tmp_path, monkeypatch):
    expected, said = vit(style), []
    for file in (save(tmp_path / 'a.pth', under(wrapper, expected), monkeypatch),
                 save(tmp_path / 'b.pth', {'state_dict': under(wrapper, expected), 'epoch': 3}, monkeypatch)):
        same(files.read_weights(file, said.append), expected)
    save_file(dict(under(wrapper, expected)), tmp_path / 'c.safetensors')
    found = files.read_weights(tmp_path / 'c.safetensors', said.append)
    same({name: found[name] for name in expected}, expected)
    assert set(found) == set(expected) and said == []
    assert names.to_official(found)[1] == 'classify'


@pytest.mark.parametrize('config', [ModelConfig(**KEYS), SWIN], ids=['vit', 'swin'])
@pytest.mark.parametrize('wrapper', ['module.', 'model.', '_orig_mod.module.'])
def test_a_wrapped_pre_training_is_one(config, wrapper, tmp_path, monkeypatch):
    expected = official.export_weights(build_simmim(config, 1))
    file = save(tmp_path / 'a.pth', {'model': under(wrapper, expected)}, monkeypatch)
    exchange.import_weights(file, tmp_path / 'run', overrides=['mask.patch_size=4'])
    same(official.export_weights(load_run(tmp_path / 'run').net), expected)


@pytest.mark.parametrize('place', ['model', 'state_dict', 'model_ema', 'state_dict_ema', 'teacher', 'student', 'ema',
                                   'module', 'network', 'encoder', 'ema.model', 'checkpoint.model.weights', 'anything'])
def test_one_network_is_found_wherever_it_is(place, tmp_path, monkeypatch):
    expected, said = vit(), []
    tree = {'epoch': 7, 'optimizer': {'state': {0: {'exp_avg': np.ones(3)}}, 'param_groups': [{'lr': 0.1}]}}
    node = tree
    *parents, last = place.split('.')
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = under('module.', expected)
    file = save(tmp_path / 'a.pth', tree, monkeypatch)
    same(files.read_weights(file, said.append), expected)
    same(files.read_weights(f'{file}:{place}', said.append), expected)
    assert said == []
    with pytest.raises(ValueError, match=rf"a.pth has no network under 'tea': it holds \w+ \({len(expected)} "):
        files.read_weights(f'{file}:tea')


def several(tool):
    """What tools write, and the names of its two networks, of seeds 1 and 2."""
    a, b, head = encoder(1), encoder(2), {'mlp.0.weight': np.ones((3, 12), 'float32')}
    return {
        'DINO': ({'student': {**under('module.backbone.', a), **under('module.head.', head)},
                  'teacher': {**under('backbone.', b), **under('head.', head)},
                  'optimizer': {'state': {0: {'exp_avg': np.ones(3)}}}, 'dino_loss': {'center': np.ones((1, 4))}},
                 'student', 'teacher'),
        'DINOv2': ({'model': {**under('student.backbone.', a), **under('teacher.backbone.', b),
                              **under('teacher.dino_head.', head)}, 'iteration': 5}, 'student', 'teacher'),
        'MoCo': ({'state_dict': {**under('module.base_encoder.', a), **under('module.momentum_encoder.', b)}},
                 'base_encoder', 'momentum_encoder'),
        'flat': ({**under('encoder.', a), **under('momentum_encoder.', b)}, 'encoder', 'momentum_encoder'),
        'EMA': ({'ema': {'model': b}, 'network': a}, 'network', 'ema'),
    }[tool]


@pytest.mark.parametrize('tool', ['DINO', 'DINOv2', 'MoCo', 'flat', 'EMA'])
def test_several_networks_are_listed_and_chosen_from(tool, tmp_path, monkeypatch):
    """facebookresearch/dino#217, #30."""
    tree, first, second = several(tool)
    file = save(tmp_path / 'a.pth', tree, monkeypatch)
    count = len(encoder())
    with pytest.raises(ValueError) as caught:
        files.read_weights(file)
    assert str(caught.value) == (f'{file} holds 2 networks: {first} ({count} tensors), {second} ({count} tensors): '
                                 f'choose one, for instance {file}:{second}')
    for key, seed in ((first, 1), (second, 2)):
        said = []
        same(files.read_weights(f'{file}:{key}', said.append), encoder(seed))
        assert len(said) == ('DINO' in tool)  # heads are beside the networks
    net = build_classifier(PLAIN, 3, 0)
    new = official.load_pretrained(net, f'{file}:{second}')
    assert new == ['head.weight', 'head.bias']
    np.testing.assert_array_equal(official.export_weights(net)['pos_embed'], encoder(2)['pos_embed'])


@pytest.mark.parametrize('usual, average', [('model', 'model_ema'), ('state_dict', 'state_dict_ema'),
                                            ('state_dict', 'ema_state_dict'), ('model', 'ema')])
def test_the_usual_one_is_taken_and_the_average_is_named(usual, average, tmp_path, monkeypatch):
    """open-mmlab/mmengine#1655 keeps the company of objects of its own."""
    buffer = type('HistoryBuffer', (), {})
    module = stand_in('mmengine.logging.history_buffer', HistoryBuffer=buffer)
    for name in ('mmengine', 'mmengine.logging'):
        monkeypatch.setitem(sys.modules, name, stand_in(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    held = buffer()
    held._log_history, held.max_length = [1.0, 2.0], 10
    count, said = len(vit()), []
    file = save(tmp_path / 'a.pth', {average: {**under('module.', vit(seed=2)), 'steps': np.array(3)},
                                     usual: vit(seed=1), 'message_hub': {'log_scalars': {'train/loss': held}}},
                monkeypatch)
    same(files.read_weights(file, said.append), vit(seed=1))
    assert said[0] == (f'{file} holds 2 networks: {average} ({count} tensors), {usual} ({count} tensors): taken is '
                       f'{usual}; {file}:{average} takes another')
    same(files.read_weights(f'{file}:{average}'), vit(seed=2))


def test_files_and_keys(tmp_path, monkeypatch):
    for name in ('a.pth', 'b:teacher', 'run 12:30:00.pth'):
        save(tmp_path / name, {'teacher': vit()}, monkeypatch)
    for text, file, key in [('a.pth', 'a.pth', ''), ('a.pth:teacher', 'a.pth', 'teacher'), ('a.pth:', 'a.pth', ''),
                            ('b:teacher', 'b:teacher', ''), ('b:teacher:teacher', 'b:teacher', 'teacher'),
                            ('run 12:30:00.pth', 'run 12:30:00.pth', ''), ('none.pth:teacher', 'none.pth', 'teacher'),
                            ('run 12:30:00.pth:teacher', 'run 12:30:00.pth', 'teacher')]:
        assert choice.split_key(tmp_path / text) == (tmp_path / file, key)
        if 'none' not in text:
            assert len(files.read_weights(tmp_path / text)) == len(vit())
    with pytest.raises(ValueError, match='none.pth: cannot be read: No such file'):
        files.read_weights(tmp_path / 'none.pth:teacher')
    exchange.import_weights(tmp_path / 'a.pth:teacher', tmp_path / 'run', overrides=['model.num_heads=3'])
    assert load_run(tmp_path / 'run').config.model.use_ape


class Unknown:
    pass


@pytest.mark.parametrize('tree, words', [
    ([np.ones(3), np.ones(4)], r'holds 2 tensors, but none by name \(in a list, or of an optimizer\): write it with'),
    ({'optimizer': {'state': {0: {'exp_avg': np.ones(3)}}}}, 'holds 1 tensors, but none by name'),
    ({'epoch': 3, 'model': {}}, 'holds no tensors: write it with torch.save'),
    (np.ones(3), 'holds 1 tensors, but none by name'),
    ({'model': {'conv1.weight': np.ones(3)}}, None)])
def test_what_is_said_of_files_without_networks_is_true(tree, words, tmp_path, monkeypatch):
    file = save(tmp_path / 'a.pth', tree, monkeypatch)
    if words is None:  # some other network
        with pytest.raises(ValueError, match="there is no place for 'conv1.weight'"):
            names.to_official(files.read_weights(file))
        return
    with pytest.raises(ValueError, match=f'a.pth {words}'):
        files.read_weights(file)


@pytest.mark.parametrize('name, words', [
    ('torch float8_e4m3fn', r'holds a tensor of a kind that is not read here \(torch.float8_e4m3fn\): make it a plain'),
    ('torch ComplexFloatStorage', r'kind that is not read here \(torch.ComplexFloatStorage\)'),
    ('torch._utils _rebuild_qtensor', r'kind that is not read here \(torch._utils._rebuild_qtensor\)'),
    ('torch._tensor _rebuild_from_type_v2', r'kind that is not read here \(torch._tensor._rebuild_from_type_v2\)'),
    ('torch load', "would run 'torch.load', which weights do not need"),
    ('models.vit ViT', "would run 'models.vit.ViT', which weights do not need; if you trust it")])
def test_what_is_refused_is_called_what_it_is(name, words, tmp_path):
    (tmp_path / 'a.pth').write_bytes(b'\x80\x02c' + name.replace(' ', '\n').encode() + b'\n.')
    with pytest.raises(ValueError, match=words):
        pth.read_pth(tmp_path / 'a.pth')


def test_dicts_within_each_other_take_no_time(tmp_path):
    """Forty levels of twice the same dict; a thousand names of a thousand parts."""
    file, twice = tmp_path / 'a.pth', b'0}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00uq\x00'
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02}q\x00' + 40 * twice + b'.')
    began = time.monotonic()
    with pytest.raises(ValueError, match='is damaged: its dicts contain each other over and over'):
        pth.read_pth(file)
    many = [('x.' * 1000) + str(number) for number in range(1000)] + ['patch_embed.proj.weight']
    assert len(choice.network(file, many, '', lambda _: None)) == 1
    assert time.monotonic() - began < 20


def advised(error, keys):
    """The configuration that the error's advice leads to."""
    overrides = ['task=classify'] + [f'model.{key}={json.dumps(value)}' for key, value in keys.items()]
    return configfile.load(os.devnull, overrides + re.search(r': set (.*)$', str(error)).group(1).split()).model


def mae():
    decoder = {'mask_token': np.zeros((1, 1, 8)), 'decoder_pos_embed': np.zeros((1, 17, 8)),
               'decoder_embed.weight': np.zeros((8, 12)), 'decoder_blocks.0.norm1.weight': np.zeros(8),
               'decoder_norm.weight': np.zeros(8), 'decoder_pred.weight': np.zeros((48, 8))}
    return {**encoder(), **{name: value.astype('float32') for name, value in decoder.items()}}


@pytest.mark.parametrize('keys', [
    {}, dict(use_rpb=True, use_shared_rpb=False, use_mean_pooling=True), dict(use_rpb=True, embed_dim=24, depth=3)])
def test_a_plain_vit_names_all_keys_that_differ_and_loads_with_them(keys, tmp_path, monkeypatch):
    keys = {**KEYS, **keys}
    file = save(tmp_path / 'mae.pth', {'model': mae(), 'epoch': 3}, monkeypatch)
    with pytest.raises(ValueError, match='mae.pth: these weights do not fit the network: .*: set ') as caught:
        official.load_pretrained(build_classifier(ModelConfig(**keys), 3, 0), file)
    assert '\n' not in str(caught.value)
    for key in ('use_ape=true', 'init_values=null', f'use_{"" if "use_rpb" in keys else "shared_"}rpb=false'):
        assert f'model.{key}' in str(caught.value)
    for key in ('embed_dim', 'depth'):
        assert (f'model.{key}={KEYS[key]}' in str(caught.value)) == (keys[key] != KEYS[key])
    config, said = advised(caught.value, keys), []
    net = build_classifier(config, 3, 0)
    new = official.load_pretrained(net, file, said.append)
    assert new == [*(['fc_norm.weight', 'fc_norm.bias'] if config.use_mean_pooling else []), 'head.weight', 'head.bias']
    assert said == ["left out: 5 tensors of MAE's decoder (decoder_pos_embed, …)"]
    found, expected = official.export_weights(net), names.to_official(encoder())[0]
    for name in expected:
        if name in found:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert set(found) - set(new) == set(expected) - ({'norm.weight', 'norm.bias'} if config.use_mean_pooling else set())


@pytest.mark.parametrize('given, keys, named', [
    (ModelConfig(**KEYS, use_rpb=True, use_shared_rpb=False, use_mean_pooling=True), KEYS,
     {'use_rpb=true', 'use_shared_rpb=false', 'use_mean_pooling=true'}),
    (ModelConfig(**{**KEYS, 'num_heads': 2}), dict(KEYS, use_rpb=True, use_shared_rpb=False), {'num_heads=2'}),
    (ModelConfig(**KEYS), dict(KEYS, use_shared_rpb=False, use_ape=True), {'use_shared_rpb=true', 'use_ape=false'}),
    (PLAIN.model_copy(update=dict(embed_dim=128, num_heads=2)), dict(PLAIN.model_dump()),
     {'num_heads=2', 'embed_dim=128'}),
    (ModelConfig(**KEYS, mlp_ratio=2), KEYS, {'mlp_ratio=2.0'}),
    (SWIN, KEYS, {'type=swin', 'depths=[2,1]', 'num_heads=[1,2]', 'patch_size=2', 'embed_dim=8'}),
    (SWIN, dict(SWIN.model_dump(), depths=[2, 2], use_ape=True), {'depths=[2,1]', 'use_ape=false'})], ids=range(7))
def test_keys_that_other_weights_need(given, keys, named, tmp_path):
    pth.write_pth(tmp_path / 'a.pth', official.export_weights(build_classifier(given, 3, 0)))
    net = build_classifier(ModelConfig(**keys), 3, 0)
    with pytest.raises(ValueError, match=': set ') as caught:
        official.load_pretrained(net, tmp_path / 'a.pth')
    assert {text.replace('model.', '') for text in str(caught.value).split(': set ')[1].split()} == named


def test_a_position_table_that_has_no_place_is_named():
    said, net = [], build_classifier(ModelConfig(**KEYS, use_shared_rpb=False), 3, 0)
    official.load_encoder_weights(net, official.export_weights(build_simmim(ModelConfig(**KEYS), 0)), said.append)
    assert said == [
        'left out: the position table of all blocks; model.use_shared_rpb=true or model.use_rpb=true keeps it']


def test_weights_of_every_kind_of_float_and_another_size_and_head(tmp_path, monkeypatch):
    """Converted to float32; positions are resized; a head of other classes is left out; a cls token may be missing."""
    weights = dict(vit())
    half = {name: value.astype('float16') for name, value in weights.items()}
    brain = {name: (value.view('uint32') >> 16).astype('uint16') for name, value in weights.items()}
    exact = {name: (value.astype('uint32') << 16).view('float32') for name, value in brain.items()}
    for arrays, expected in ((half, half), (brain, exact), ({name: v.astype('float64') for name, v in weights.items()},
                                                            weights)):
        file, said = save(tmp_path / 'a.pth', {'model_ema': under('module.', arrays)}, monkeypatch), []
        net = build_classifier(PLAIN.model_copy(update={'img_size': 24}), 3, 0)
        assert official.load_pretrained(net, file, said.append) == ['head.weight', 'head.bias']
        assert said == ['left out: a head of 5 classes']
        found = official.export_weights(net)
        assert found['pos_embed'].shape == (1, 37, 12) and found['pos_embed'].dtype == 'float32'
        np.testing.assert_array_equal(found['pos_embed'][0, 0], expected['pos_embed'][0, 0].astype('float32'))
        np.testing.assert_array_equal(found['blocks.1.mlp.fc1.weight'], expected['blocks.1.mlp.fc1.weight'])
    del weights['cls_token']
    weights['pos_embed'] = weights['pos_embed'][:, 1:]
    assert 'cls_token' in official.load_pretrained(build_classifier(PLAIN, 5, 0), save(tmp_path / 'b.pth', weights,
                                                                                       monkeypatch))


@pytest.mark.parametrize('extra', ['dist_token', 'reg_token', 'register_tokens'])
def test_tokens_that_no_network_here_has_are_named_first(extra):
    with pytest.raises(ValueError, match=f"there is no place for '{extra}'"):
        names.to_official({**vit(), 'head_dist.weight': np.ones((5, 12)), extra: np.ones((1, 1, 12))})


def test_heads_of_other_methods_are_left_out():
    """MoCo v3 keeps its projection inside the encoder, as head.0 and so on."""
    said = []
    head = {'head.0.weight': np.ones((4, 12)), 'head.1.running_mean': np.ones(4), 'head.last_layer.weight': np.ones(4)}
    arrays, kind = names.to_official({**encoder(), **head}, said.append)
    assert kind == 'encoder' and not any(name.startswith('head') for name in arrays)
    assert said == ['left out: 3 tensors of a projection head (head.0.weight, …)']


def test_the_run_says_what_it_took_and_what_it_left(tmp_path, monkeypatch):
    tree = {'model': vit(seed=1), 'model_ema': vit(seed=2)}
    file = save(tmp_path / 'a.pth', tree, monkeypatch)
    keys = [f'model.{key}={value}' for key, value in KEYS.items()] + [
        'model.use_shared_rpb=false', 'model.use_ape=true', 'model.init_values=null', 'data.path=digits',
        'data.val_fraction=0.1', 'task=classify']
    task = Classification(configfile.load(os.devnull, [*keys, f'model.pretrained={file}:model_ema']))
    net = task.build_network(True, REFERENCE)
    assert load_encoder(net, task.config.model.pretrained) == (
        f'encoder from {file}:model_ema; left out: a head of 5 classes; new: head.weight, head.bias')
    np.testing.assert_array_equal(official.export_weights(net)['cls_token'], tree['model_ema']['cls_token'])
    task = Classification(configfile.load(os.devnull, [*keys, f'model.pretrained={file}:teacher']))
    with pytest.raises(ValueError, match=f"^model.pretrained={file} has no network under 'teacher': it holds model "
                       r'\(32 tensors\), model_ema \(32 tensors\)$'):
        load_encoder(net, task.config.model.pretrained)
