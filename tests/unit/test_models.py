"""What the parity files do not show: initial weights, stochastic depth, normalised targets, export, cost."""
import mxnet as mx
import numpy as np
import pytest
from support import machine

from mxsimmim.config import ModelConfig
from mxsimmim.interop import official
from mxsimmim.models import build_simmim, named_parameters
from mxsimmim.models.cost import multiply_adds
from mxsimmim.models.initial import truncated_normal
from mxsimmim.models.layers import keep_factors
from mxsimmim.models.pixels import PixelInput
from mxsimmim.models.simmim import normalise_cells
from mxsimmim.ops import REFERENCE, OpBackend, Windows, shift_mask
from mxsimmim.ops.pixels import from_cells, to_cells
from mxsimmim.ops.reference import join, partition, roll

VIT = dict(img_size=32, patch_size=4, embed_dim=24, depth=3, num_heads=2)
SWIN = dict(type='swin', img_size=32, patch_size=2, embed_dim=12, depths=[2, 2, 1], num_heads=[1, 2, 4], window_size=4)
OTHERS = [dict(VIT, use_rpb=True, use_ape=True), dict(VIT, init_values=None, use_shared_rpb=False),
          dict(VIT, use_mean_pooling=True, loss='mse'), dict(SWIN, ape=True), dict(SWIN, norm_targets=True)]


def batch(config, seed=5, images=2):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((images, 3, config.img_size, config.img_size)).astype('float32')
    mask = (rng.random((images, config.grid, config.grid)) < 0.6).astype('uint8')
    return mx.nd.array(image), mx.nd.array(mask, dtype='uint8')


@pytest.mark.parametrize('keys', [VIT, SWIN] + OTHERS, ids=str)
def test_hybridized_exported_and_plain_networks_agree(keys, tmp_path):
    config = ModelConfig(**keys)
    image, mask = batch(config)
    plain, hybrid = build_simmim(config, seed=3), build_simmim(config, seed=3)
    hybrid.hybridize(static_alloc=True)
    with mx.autograd.record():
        losses = [net(image, mask) for net in (plain, hybrid)]
    mx.autograd.backward(losses)
    assert losses[0].asscalar() == pytest.approx(losses[1].asscalar(), rel=1e-6)
    ours, theirs = (official.export_weights(net, grad=True) for net in (plain, hybrid))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-7, err_msg=name)
    hybrid.export(str(tmp_path / 'net'))
    imported = mx.gluon.SymbolBlock.imports(str(tmp_path / 'net-symbol.json'), ['data0', 'data1'],
                                            str(tmp_path / 'net-0000.params'))
    for images in (2, 1):  # the graph does not know the batch size
        assert imported(image[:images], mask[:images]).asscalar() == \
            pytest.approx(plain(image[:images], mask[:images]).asscalar(), rel=1e-6)


@pytest.mark.parametrize('keys', [VIT, SWIN], ids=['vit', 'swin'])
def test_stochastic_depth(keys):
    config = ModelConfig(**keys, drop_path=0.5)
    image, mask = batch(config)
    hidden = mask.asnumpy().astype(int)
    net, without = build_simmim(config, seed=3), build_simmim(ModelConfig(**keys), seed=3)
    net.hybridize()
    blocks = config.blocks
    nothing = mx.nd.array(keep_factors(np.ones((2, 2 * blocks)) - 1e-9, 0.0))
    assert net(image, mask).asscalar() == without(image, mask).asscalar() == net(image, mask, nothing).asscalar()
    low, high = (keep_factors(np.full((2, 2 * blocks), value), 0.5) for value in (0.0, 0.9999))
    np.testing.assert_allclose(low[0], 1 / (1 - np.repeat(np.linspace(0, 0.5, blocks), 2)), rtol=1e-6)
    assert np.all(high[:, :2] == 1) and np.all(high[:, 2:] == 0)
    both = net(image, mask, mx.nd.array(np.concatenate([low[:1], high[1:]]))).asscalar()
    apart = [net(image[i:i + 1], mask[i:i + 1], mx.nd.array(keep)).asscalar() * hidden[i].sum()
             for i, keep in ((0, low[:1]), (1, high[1:]))]
    assert both == pytest.approx(sum(apart) / hidden.sum(), rel=1e-5)  # an image's fate is its own


def test_mse_is_the_mean_square_over_masked_pixels():
    config = ModelConfig(**VIT, loss='mse')
    image, mask = batch(config)
    net = build_simmim(config, seed=1)
    error = (net.reconstruct(image, mask) - image).asnumpy() ** 2
    hidden = mask.asnumpy().repeat(4, 1).repeat(4, 2)[:, None]
    assert net(image, mask).asscalar() == pytest.approx((error * hidden).sum() / hidden.sum() / 3, rel=1e-5)


def test_normalised_targets():
    cells = np.random.default_rng(0).standard_normal((2, 3, 50)).astype('float32') * 4 + 7
    target, mean, deviation = (x.asnumpy() for x in normalise_cells(mx.nd, mx.nd.array(cells)))
    np.testing.assert_allclose(target.mean(2), 0, atol=1e-6)
    np.testing.assert_allclose(target.std(2, ddof=1), 1, rtol=1e-5)
    np.testing.assert_allclose(target * deviation + mean, cells, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', ['cells', 'windows', 'roll'])
def test_what_is_taken_apart_is_put_together(shape):
    x = mx.nd.array(np.random.default_rng(1).standard_normal((2, 64, 5) if shape != 'cells' else (2, 3, 8, 8)))
    if shape == 'cells':
        cells = to_cells(mx.nd, x, (8, 8), 4)
        assert np.array_equal(cells.asnumpy()[1, 1], x.asnumpy()[1, :, 0:4, 4:8].reshape(-1))
        back = from_cells(mx.nd, cells, 8, 4)
    elif shape == 'windows':
        windows = partition(mx.nd, x, Windows(8, 8, 4), 5)
        assert np.array_equal(windows.asnumpy()[6], x.asnumpy().reshape(2, 8, 8, 5)[1, 4:, :4].reshape(16, 5))
        back = join(mx.nd, windows, Windows(8, 8, 4), 5)
    else:
        rolled = roll(mx.nd, x, Windows(8, 8, 4, 3), 5)
        expected = np.roll(x.asnumpy().reshape(2, 8, 8, 5), (-3, -3), (1, 2)).reshape(2, 64, 5)
        assert np.array_equal(rolled.asnumpy(), expected)
        back = roll(mx.nd, rolled, Windows(8, 8, 4, -3), 5)
    assert np.array_equal(back.asnumpy(), x.asnumpy())


def test_shift_mask_forbids_what_the_shift_brought_together():
    mask = shift_mask(8, 8, 4, 2)[:, 0]                           # (windows, 16, 16)
    assert np.all(mask[0] == 0)                                # the first window is untouched
    corner = (mask[3] == 0).reshape(4, 4, 4, 4)                # the last one holds four strangers
    assert corner[0, 0].tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2
    assert np.all((mask == 0).sum((1, 2)) == [256, 128, 128, 64])


def test_initial_weights():
    config = ModelConfig(embed_dim=192, depth=4, num_heads=3)
    print('seed 11')
    values, again = (official.export_weights(build_simmim(config, seed=11)) for _ in range(2))
    assert all(np.array_equal(value, again[name]) for name, value in values.items())
    qkv = values['encoder.blocks.0.attn.qkv.weight']
    assert np.abs(qkv).max() <= 0.02                                  # cut at one deviation
    assert qkv.std() == pytest.approx(0.02 * 0.5396, rel=0.01)       # deviation of a normal cut at 1
    assert values['encoder.blocks.3.mlp.fc2.weight'].std() == pytest.approx(0.02 * 0.5396 / np.sqrt(8), rel=0.01)
    bound = 1 / np.sqrt(192)
    assert np.abs(values['decoder.0.weight']).max() == pytest.approx(bound, rel=1e-3)
    assert values['decoder.0.bias'].std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert np.all(values['encoder.blocks.1.gamma_2'] == np.float32(0.1))
    assert not values['encoder.rel_pos_bias.relative_position_bias_table'].any()
    swin = official.export_weights(build_simmim(ModelConfig(**SWIN), seed=11))
    assert np.abs(swin['encoder.patch_embed.proj.weight']).max() == pytest.approx(1 / np.sqrt(12), rel=0.03)
    assert swin['encoder.layers.2.blocks.0.mlp.fc1.weight'].std() == pytest.approx(0.02, rel=0.03)
    assert swin['encoder.layers.0.blocks.1.attn.relative_position_bias_table'].std() == pytest.approx(0.02, rel=0.3)
    wider = official.export_weights(build_simmim(ModelConfig(**SWIN, init_std=0.1), seed=11))
    assert {name for name in swin if not np.array_equal(swin[name], wider[name])} == {
        name for name in swin if 'mask_token' in name or 'position_bias_table' in name
        or name.endswith('weight') and swin[name].ndim == 2}
    assert wider['encoder.layers.2.blocks.0.mlp.fc1.weight'].std() == pytest.approx(0.1, rel=0.03)


def test_truncated_normal_leaves_nothing_outside():
    value = truncated_normal(np.random.default_rng(2), (100, 1000), 1.0, 1.5)
    assert np.abs(value).max() <= 1.5 and np.abs(value).max() > 1.49
    assert value.mean() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize('keys, giga', [(dict(), 17.68), (dict(type='swin', img_size=192, patch_size=4, embed_dim=128,
                                        depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=6), 11.39)])
def test_cost(keys, giga):
    # ViT-B/16 is quoted at 17.5 (without decoder); Swin-B at 224 with window 7 at 15.4, of which (192/224)^2 is 11.3.
    assert multiply_adds(ModelConfig(**keys)) / 1e9 == pytest.approx(giga, abs=0.01)


def test_weights_that_do_not_fit_are_named():
    net = build_simmim(ModelConfig(**VIT))
    weights = official.export_weights(net)
    weights['encoder.cls_token'] = np.zeros((1, 1, 25), 'float32')
    weights['encoder.extra'] = weights.pop('encoder.norm.bias')
    with pytest.raises(ValueError) as error:
        official.load_weights(net, weights)
    for part in ('missing: encoder.norm.bias', 'unknown: encoder.extra',
                 'encoder.cls_token has shape (1, 1, 25), the network needs (1, 1, 24)'):
        assert part in str(error.value)


def test_constants_are_no_parameters():
    names = named_parameters(build_simmim(ModelConfig(**SWIN)))
    assert not any('index' in name or 'attn_mask' in name for name in names)


@pytest.mark.parametrize('form', machine.FORMS)
def test_bytes_are_normalised_before_the_network_or_in_it(form):
    """By NumPy in float64; floats are normalised already, and stay the same array."""
    mean, std, rng = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), np.random.default_rng(6)
    pixels, image = PixelInput(mean, std, OpBackend(form)), rng.integers(0, 256, (2, 8, 8, 3), 'uint8')
    expected = ((image / 255 - mean) / std).transpose(0, 3, 1, 2)
    prepared = pixels.prepare(mx.nd.array(image, dtype='uint8'))
    assert prepared.dtype == {'reference': np.float32, 'native': np.uint8}[form]
    cells = pixels.cells(mx.nd, prepared, (8, 8), 4)
    np.testing.assert_allclose(from_cells(mx.nd, cells, 8, 4).asnumpy(), expected, rtol=1e-5, atol=1e-6)
    floats = mx.nd.array(expected)
    assert pixels.prepare(floats) is floats


def test_what_a_network_is_built_with():
    assert build_simmim(ModelConfig(**VIT), None).backend == REFERENCE
    net = build_simmim(ModelConfig(**SWIN), None, OpBackend(machine.FORMS[-1]))
    blocks = []
    net.apply(blocks.append)
    held = [block.backend for block in blocks if hasattr(block, 'backend')]
    assert len(held) > 20 and set(held) == {OpBackend(machine.FORMS[-1])}
