"""Encoders of dense tasks on images of any shape, against NumPy; and the weights that they start from."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from support import machine, plain

from mxsimmim.config import ModelConfig
from mxsimmim.interop import names, official
from mxsimmim.models import build_classifier, build_simmim, named_parameters
from mxsimmim.models.feature_maps import FeatureMaps, thirds
from mxsimmim.models.pixels import MEAN, STD, PixelInput
from mxsimmim.models.swin import PatchMerging, windows_of
from mxsimmim.ops import REFERENCE, OpBackend

SWIN = dict(type='swin', patch_size=2, embed_dim=8, depths=[2, 2, 2], num_heads=[2, 2, 4], window_size=3)
VIT = dict(patch_size=4, embed_dim=12, depth=4, num_heads=3, window_size=2, use_shared_rpb=False, use_rpb=True,
           use_ape=True)
NETWORKS = {'swin': dict(SWIN, img_size=[26, 14]), 'swin, positions': dict(SWIN, img_size=[10, 36], use_ape=True),
            'vit': dict(VIT, img_size=[20, 12], global_blocks=[1, 3]),
            'vit, all see all': dict(VIT, img_size=[8, 24], init_values=None),
            'vit, shared table': dict(VIT, img_size=[24, 16], use_shared_rpb=True, use_rpb=False, use_ape=False)}


class Owner(mx.gluon.HybridBlock):
    """A network that owns feature maps, and puts them one after another: (B, all of them)."""

    def __init__(self, config, backend):
        super().__init__()
        with self.name_scope():
            self.maps = FeatureMaps(config, PixelInput(MEAN, STD, backend))

    def hybrid_forward(self, F, image, keep=None):
        return F.concat(*(F.reshape(found, shape=(0, -1)) for found in self.maps(F, image, keep)), dim=1)


def built(config, backend=REFERENCE, seed=2):
    """An owner with normal random weights, whose norms are not the identity."""
    net, rng = Owner(config, backend), np.random.default_rng(seed)
    net.initialize()
    for name, parameter in named_parameters(net.maps).items():
        parameter.set_data(rng.normal(float(name.endswith('norm1.weight')), 0.4, parameter.shape))
    return net


def weights_of(net):
    values = {name: p.data().asnumpy().astype('float64') for name, p in named_parameters(net.maps).items()}
    return values, lambda name: (values[f'{name}.weight'], values[f'{name}.bias'])


def image_of(config, images=2, seed=4):
    return np.random.default_rng(seed).standard_normal((images, 3, *config.size)).astype('float32')


def swin_maps(config, net, image):
    """[(B, C, h, w)] of each stage in NumPy."""
    values, pair = weights_of(net)
    found, (height, width) = [], (side // config.patch_size for side in config.size)
    x = plain.cells(image, config.patch_size) @ values['patch_embed.proj.weight'].T + values['patch_embed.proj.bias']
    x = plain.normed(x, *pair('patch_embed.norm'), 1e-5) + values.get('absolute_pos_embed', 0)
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            at = f'layers.{stage}.blocks.{block}.'
            windows = windows_of(height, width, config.window_size, block % 2 == 1)
            bias = plain.offset_bias(values[at + 'attn.relative_position_bias_table'], height, width,
                                     (windows.window,) * 2)
            x = plain.attention(x, pair(at + 'norm1'), pair(at + 'attn.qkv'), pair(at + 'attn.proj'), bias,
                                plain.together(windows), config.heads[stage], 1e-5)
            x = plain.mlp(x, pair(at + 'norm2'), pair(at + 'mlp.fc1'), pair(at + 'mlp.fc2'), 1e-5)
        grid = x.reshape(len(x), height, width, -1)
        found.append(plain.normed(grid, *pair(f'norm{stage}'), 1e-5).transpose(0, 3, 1, 2))
        if stage < config.stages - 1:
            grid = np.pad(grid, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
            grid = np.concatenate([grid[:, y::2, x::2] for y, x in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
            height, width, at = grid.shape[1], grid.shape[2], f'layers.{stage}.downsample.'
            x = plain.normed(grid, *pair(at + 'norm'), 1e-5) @ values[at + 'reduction.weight'].T
            x = x.reshape(len(x), height * width, -1)
    return found


def vit_maps(config, net, image):
    """[(B, C, h, w)] of the blocks in `thirds` in NumPy."""
    values, pair = weights_of(net)
    outputs, (height, width) = [], config.patches
    x = plain.cells(image, config.patch_size) @ values['patch_embed.proj.weight'].T + values['patch_embed.proj.bias']
    x = x + values.get('pos_embed', 0)
    for block in range(config.depth):
        at, everything = f'blocks.{block}.', config.sees_all(block)
        windows = windows_of(height, width, config.window_size, False)
        own = at + 'attn.' if config.use_rpb else 'rel_pos_bias.'
        bias = plain.offset_bias(values[own + 'relative_position_bias_table'], height, width,
                                 (height, width) if everything else (windows.window,) * 2)
        zeros = np.zeros(config.embed_dim)
        qkv = values[at + 'attn.qkv.weight'], np.concatenate([values[at + 'attn.q_bias'], zeros,
                                                              values[at + 'attn.v_bias']])
        x = plain.attention(x, pair(at + 'norm1'), qkv, pair(at + 'attn.proj'), bias,
                            everything or plain.together(windows), config.heads[0], 1e-6, values.get(at + 'gamma_1', 1))
        x = plain.mlp(x, pair(at + 'norm2'), pair(at + 'mlp.fc1'), pair(at + 'mlp.fc2'), 1e-6,
                      values.get(at + 'gamma_2', 1))
        outputs.append(x.reshape(len(x), height, width, -1).transpose(0, 3, 1, 2))
    return [outputs[block] for block in thirds(config.depth)]


@pytest.mark.parametrize('form', machine.FORMS)
@pytest.mark.parametrize('keys', NETWORKS.values(), ids=NETWORKS)
def test_maps_of_images_of_any_shape(keys, form):
    config = ModelConfig(**keys)
    net, image = built(config, OpBackend(form)), image_of(config)
    expected = {'swin': swin_maps, 'vit': vit_maps}[config.type](config, net, image.astype('float64'))
    maps = net.maps
    found = maps(mx.nd, mx.nd.array(image))
    assert [m.shape[1] for m in found] == maps.channels
    for each, stride, truth in zip(found, maps.strides, expected):
        assert each.shape[2:] == tuple(-(-side // stride) for side in config.size)
        np.testing.assert_allclose(each.asnumpy(), truth, rtol=1e-4, atol=1e-4 * np.abs(truth).max())
    net.hybridize(static_alloc=True)
    flat = np.concatenate([truth.reshape(2, -1) for truth in expected], 1)
    np.testing.assert_allclose(net(mx.nd.array(image)).asnumpy(), flat, rtol=1e-4, atol=1e-4 * np.abs(flat).max())


def gradients(net, image):
    for parameter in named_parameters(net.maps).values():
        parameter.zero_grad()
    with autograd.record():
        y = net(mx.nd.array(image))
    y.backward(mx.nd.array(np.random.default_rng(8).standard_normal(y.shape)))
    return {name: p.grad().asnumpy() for name, p in named_parameters(net.maps).items()}


@machine.natively
@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('keys', NETWORKS.values(), ids=NETWORKS)
def test_gradients_of_both_forms_are_equal(keys, recompute):
    config = ModelConfig(**keys)
    image, plainly = image_of(config), gradients(built(config), image_of(config))
    net = built(ModelConfig(**keys, recompute=recompute), OpBackend('native'))
    net.hybridize(static_alloc=True)
    size = max(np.abs(value).max() for value in plainly.values())
    for name, found in gradients(net, image).items():
        error = np.linalg.norm(found - plainly[name])
        assert error < 1e-5 * max(np.linalg.norm(plainly[name]), 1e-3 * size * found.size ** 0.5), (name, error)
        assert np.abs(plainly[name]).max() > 0, name  # nothing is without use


@pytest.mark.parametrize('depth, blocks', [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (4, [0, 1, 1, 3]),
                                           (1, [0, 0, 0, 0])])
def test_which_blocks(depth, blocks):
    assert thirds(depth) == blocks


def test_a_squares_last_map_is_what_the_classifier_sees():
    keys = dict(SWIN, img_size=24)
    config = ModelConfig(**keys)
    net, image = built(config), mx.nd.array(image_of(config))
    *_, last = net.maps(mx.nd, image)
    whole = build_classifier(config, 3, 0)
    arrays = {name.replace('norm2.', 'norm.') if name.startswith('norm') else name: value
              for name, value in official.export_weights(net.maps).items() if not name.startswith(('norm0', 'norm1'))}
    assert official.load_encoder_weights(whole, arrays) == ['head.weight', 'head.bias']
    tokens = whole.encoder(image).asnumpy()
    np.testing.assert_array_equal(last.asnumpy().reshape(2, 32, 9).transpose(0, 2, 1), tokens)


def test_some_blocks_only():
    """As a detector's pyramid takes the last of a ViT, and keep drops branches of an image."""
    config = ModelConfig(**dict(NETWORKS['vit'], drop_path=0.5))
    net, image = built(config), mx.nd.array(image_of(config))
    maps = FeatureMaps(config, PixelInput(MEAN, STD, REFERENCE), [config.depth - 1])
    maps.initialize()
    for name, parameter in named_parameters(maps).items():
        parameter.set_data(named_parameters(net.maps)[name].data())
    *_, last = net.maps(mx.nd, image)
    alone, = maps(mx.nd, image)
    assert maps.channels == [12] and maps.strides == [4] and np.array_equal(alone.asnumpy(), last.asnumpy())
    nothing = maps(mx.nd, image, mx.nd.zeros((2, 8)))[0].asnumpy()
    embedding = maps.encoder.patch_embed(image) + maps.encoder.pos_embed.data()
    np.testing.assert_array_equal(nothing.reshape(2, 12, 15).transpose(0, 2, 1), embedding.asnumpy())


def test_a_square_encoder_starts_another_shape():
    """Positions by cv2's bicubic; tables of windows as they are, that of the map resized; all without a cls token."""
    kept = dict(VIT, img_size=32, use_rpb=False, use_shared_rpb=True)
    pretrained = official.export_weights(build_simmim(ModelConfig(**kept), 7))
    table = 'encoder.rel_pos_bias.relative_position_bias_table'
    rng = np.random.default_rng(3)
    pretrained[table] = rng.standard_normal(pretrained[table].shape).astype('float32')
    assert pretrained[table].shape == (15 * 15 + 3, 3)
    maps = FeatureMaps(ModelConfig(**dict(VIT, img_size=[48, 32], window_size=8, global_blocks=[1, 3])),
                       PixelInput(MEAN, STD, REFERENCE))
    maps.initialize()
    assert official.load_encoder_weights(maps, pretrained) == []
    found = official.export_weights(maps)
    assert found['pos_embed'].shape == (1, 12 * 8, 12) and 'cls_token' not in found
    import cv2
    plane = pretrained['encoder.pos_embed'][0, 1:].reshape(8, 8, 12)
    expected = cv2.resize(plane, (8, 12), interpolation=cv2.INTER_CUBIC).reshape(96, 12)
    np.testing.assert_allclose(found['pos_embed'][0], expected, rtol=1e-5, atol=1e-6)
    windowed, whole = (found[f'blocks.{block}.attn.relative_position_bias_table'] for block in (0, 1))
    np.testing.assert_array_equal(windowed, pretrained[table][:225])  # a window of as many tokens as the old image
    assert whole.shape == (23 * 15, 3)
    old, new = pretrained[table][:225].reshape(15, 15, 3), whole.reshape(23, 15, 3)
    np.testing.assert_allclose(new[11], old[7], atol=1e-5)  # no offset down: the width is the same
    np.testing.assert_allclose(new[[0, -1]], old[[0, -1]], atol=2e-3)  # the edges come to lie on the edges


def openmmlab_swin(config, values, rng):
    """A backbone's file as mmdetection writes it, and the merging's weights as it lays them out."""
    found = {'decode_head.conv_seg.weight': np.zeros((2, 8, 1, 1), 'float32')}
    for name, value in values.items():
        name = name.replace('patch_embed.proj.', 'patch_embed.projection.').replace('attn.', 'attn.w_msa.')
        name = name.replace('mlp.fc1.', 'ffn.layers.0.0.').replace('mlp.fc2.', 'ffn.layers.1.')
        found['backbone.' + name.replace('layers.', 'stages.', 1) if name.startswith('layers.')
              else 'backbone.' + name] = value
    found['backbone.stages.0.blocks.1.attn.w_msa.relative_position_index'] = np.zeros((9, 9), 'int64')
    for name in list(found):
        if '.downsample.' in name:
            found[name] = rng.standard_normal(found[name].shape).astype('float32')
    return found


def test_weights_of_mmdetection_swin():
    config, rng, said = ModelConfig(**dict(SWIN, img_size=[20, 28])), np.random.default_rng(9), []
    values = {name: rng.standard_normal(value.shape).astype('float32')
              for name, value in official.export_weights(built(config).maps).items()}
    file = openmmlab_swin(config, values, rng)
    arrays, kind = names.to_official(file, said.append)
    assert kind == 'encoder' and said == ['left out: 1 tensors of heads (decode_head.conv_seg.weight, …)']
    net = built(config)
    assert official.load_encoder_weights(net.maps, arrays) == []
    found = official.export_weights(net.maps)
    for name, value in values.items():
        if '.downsample.' not in name:
            np.testing.assert_array_equal(found[name], value)
    # The merging as mmdetection computes it: PyTorch's unfold orders (channel, y, x).
    x = rng.standard_normal((2, 4, 6, 8)).astype('float32')
    unfolded = x.reshape(2, 2, 2, 3, 2, 8).transpose(0, 1, 3, 5, 2, 4).reshape(2, 6, 32)
    at = 'backbone.stages.0.downsample.'
    expected = plain.normed(unfolded, file[at + 'norm.weight'], file[at + 'norm.bias'], 1e-5)
    expected = expected @ file[at + 'reduction.weight'].T
    merging = PatchMerging((4, 6), 8, REFERENCE)
    merging.initialize()
    for ending, parameter in (('norm.weight', merging.norm.weight), ('norm.bias', merging.norm.bias),
                              ('reduction.weight', merging.reduction.weight)):
        parameter.set_data(found['layers.0.downsample.' + ending])
    np.testing.assert_allclose(merging(mx.nd.array(x.reshape(2, 24, 8))).asnumpy(), expected, rtol=1e-4, atol=1e-4)


def test_weights_of_mmsegmentation_vit():
    config, rng = ModelConfig(**dict(VIT, img_size=[20, 12], use_rpb=False, init_values=None)), np.random.default_rng(5)
    file, width = {}, config.embed_dim

    def put(name, *shape):
        file['backbone.' + name] = rng.standard_normal(shape).astype('float32')
    put('cls_token', 1, 1, width)
    put('pos_embed', 1, 1 + 16, width)
    put('patch_embed.projection.weight', width, 3, 4, 4)
    put('patch_embed.projection.bias', width)
    for block in range(config.depth):
        at = f'layers.{block}.'
        for norm in ('ln1', 'ln2'):
            put(f'{at}{norm}.weight', width), put(f'{at}{norm}.bias', width)
        put(at + 'attn.attn.in_proj_weight', 3 * width, width), put(at + 'attn.attn.in_proj_bias', 3 * width)
        put(at + 'attn.attn.out_proj.weight', width, width), put(at + 'attn.attn.out_proj.bias', width)
        put(at + 'ffn.layers.0.0.weight', 4 * width, width), put(at + 'ffn.layers.0.0.bias', 4 * width)
        put(at + 'ffn.layers.1.weight', width, 4 * width), put(at + 'ffn.layers.1.bias', width)
    put('ln1.weight', width), put('ln1.bias', width)
    arrays, kind = names.to_official(file)
    net = built(config)
    assert kind == 'encoder' and official.load_encoder_weights(net.maps, arrays) == []
    found = official.export_weights(net.maps)
    at = 'backbone.layers.2.'
    for ours, theirs in (('norm1.weight', 'ln1.weight'), ('attn.qkv.weight', 'attn.attn.in_proj_weight'),
                         ('attn.proj.bias', 'attn.attn.out_proj.bias'), ('mlp.fc2.weight', 'ffn.layers.1.weight')):
        np.testing.assert_array_equal(found['blocks.2.' + ours], file[at + theirs])
    bias = file[at + 'attn.attn.in_proj_bias']
    np.testing.assert_array_equal(found['blocks.2.attn.q_bias'], bias[:width])
    np.testing.assert_array_equal(found['blocks.2.attn.v_bias'], bias[2 * width:])


def test_what_a_network_cannot_take_is_named():
    config = ModelConfig(**dict(VIT, img_size=[20, 12], global_blocks=[1]))
    maps = FeatureMaps(config, PixelInput(MEAN, STD, REFERENCE))
    arrays = official.export_weights(built(config).maps)
    arrays['blocks.1.attn.relative_position_bias_table'] = np.zeros((10, 3), 'float32')
    with pytest.raises(ValueError, match='10 rows cannot be resized to 45: neither with nor without a cls token are '
                                         'both tables of a map of 5 x 3'):
        official.fitted_encoder(config, {name: p.shape for name, p in named_parameters(maps).items()}, arrays)
