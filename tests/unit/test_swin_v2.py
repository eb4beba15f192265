"""SwinV2: what its configuration refuses, how it begins, and that every layout computes the same."""
import mxnet as mx
import numpy as np
import pytest
from support import machine
from support.trainer import build_tiny_trainer, random_batches, relative_difference, train_randomly

from mxsimmim.config import ModelConfig
from mxsimmim.interop import names, official
from mxsimmim.interop.told import model_keys
from mxsimmim.models import build_classifier, build_simmim, named_parameters
from mxsimmim.models.simmim import band_of, normalise_around, unbiased_of
from mxsimmim.models.swin_v2 import log_coordinates
from mxsimmim.ops import OpBackend
from mxsimmim.optim import weight_decays
from mxsimmim.training.pretrained import offsets_told

KEYS = dict(type='swinv2', img_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4)
SEED = 6


@pytest.mark.parametrize('keys, message', [
    (dict(KEYS, recompute=True), 'recompute=true: the half blocks of type=swinv2 cannot be computed again: write '
                                 'recompute=false'),
    (dict(KEYS, type='swin', pretrained_window_sizes=[4, 4]), 'pretrained_window_sizes=[4, 4] is for type=swinv2, not '
                                                              'swin'),
    (dict(KEYS, pretrained_window_sizes=[4]), 'pretrained_window_sizes=[4] must list one number for each of the 2 '
                                              'stages'),
    (dict(KEYS, img_size=8), 'stage 1 has windows of 1 token a side, and so no relative positions: raise img_size=8'),
    (dict(KEYS, pretrained_window_sizes=[4, 1]), 'stage 1 has windows of 1 token a side'),
    (dict(KEYS, norm_window=47), 'norm_window=47 is for norm_targets=true'),
    (dict(KEYS, norm_targets=True, norm_window=46), 'norm_window=46 must be odd')])
def test_what_cannot_be(keys, message):
    with pytest.raises(ValueError) as error:
        ModelConfig(**keys)
    assert message in str(error.value)


def test_windows_that_positions_are_relative_to():
    model = ModelConfig(**dict(KEYS, depths=[1] * 3, num_heads=[1] * 3))
    assert model.position_windows == (4, 4, 2)  # the last stage has 2x2 tokens
    assert model.model_copy(update={'pretrained_window_sizes': (0, 7, 3)}).position_windows == (4, 7, 3)


def test_log_coordinates():
    """Offsets of the window in pre-training lie in [-log2(9) / 3, log2(9) / 3], those beyond it hardly further."""
    own, wider = log_coordinates(4, 4), log_coordinates(8, 4)
    assert own.shape == (49, 2) and own.dtype == np.float32
    assert own.max() == -own.min() == pytest.approx(np.log2(9) / 3)
    assert not own[24].any()  # no offset
    np.testing.assert_allclose(own[[0, 6, 42]], np.log2(9) / 3 * np.array([[-1, -1], [-1, 1], [1, -1]]), rtol=1e-6)
    assert wider.max() == pytest.approx(np.log2(8 * 7 / 3 + 1) / 3)


def test_blocks_begin_as_identity():
    values = official.export_weights(build_simmim(ModelConfig(**KEYS), SEED))
    zero = {name for name, value in values.items() if name.endswith('weight') and not value.any()}
    assert zero == {f'encoder.layers.{stage}.blocks.{block}.norm{half}.weight'
                    for stage in range(2) for block in range(2) for half in (1, 2)}
    assert np.all(values['encoder.layers.0.blocks.1.attn.logit_scale'] == np.float32(np.log(10)))
    assert np.all(values['encoder.layers.0.downsample.norm.weight'] == 1)
    assert values['encoder.layers.1.blocks.0.attn.cpb_mlp.0.weight'].std() == pytest.approx(0.02, rel=0.1)


def test_decay():
    """`fixed` spares what `reference` decays because of the prefix."""
    parameters = named_parameters(build_simmim(ModelConfig(**KEYS), None))
    both = [{name for name, decay in weight_decays(parameters, recipe, 'swinv2', 0.05).items() if decay}
            for recipe in ('reference', 'fixed')]
    assert {name.split('attn.')[1] for name in both[0] - both[1]} == {'logit_scale', 'cpb_mlp.0.weight',
                                                                      'cpb_mlp.2.weight'}
    assert both[1] < both[0]


def awake(net, seed=SEED):
    """The network with branches that count."""
    rng = np.random.default_rng(seed)
    official.load_weights(net, {name: value + (0.3 * rng.standard_normal(value.shape)).astype('float32')
                                for name, value in official.export_weights(net).items()})
    return net


def test_cosines_do_not_depend_on_the_length_of_queries():
    """Twice the weights of queries, or of keys, are the same attention; twice those of values are not."""
    config = ModelConfig(**KEYS)
    net = awake(build_simmim(config, SEED))
    batch, = random_batches(config, 1, 2, SEED)
    inputs = [mx.nd.array(batch.fields[name], dtype='uint8') for name in ('image', 'mask')]
    inputs[0] = net.pixels.prepare(inputs[0])
    before = net.encoder(*inputs).asnumpy()
    weights = official.export_weights(net)
    for rows, same in ((slice(0, 8), True), (slice(8, 16), True), (slice(16, 24), False)):
        changed = {name: value.copy() for name, value in weights.items()}
        for block in range(2):
            changed[f'encoder.layers.0.blocks.{block}.attn.qkv.weight'][rows] *= 2
            if rows.start == 0:
                changed[f'encoder.layers.0.blocks.{block}.attn.q_bias'] *= 2
        official.load_weights(net, changed)
        difference = np.abs(net.encoder(*inputs).asnumpy() - before).max()
        assert difference < 1e-4 if same else difference > 1e-2, (rows, difference)


def build(form, devices=1, **parallel):
    keys = dict(KEYS, depths=[2, 1], drop_path=0.2, norm_targets=True, norm_window=5)
    trainer = build_tiny_trainer(model=keys, seed=SEED,
                                 devices=[f'cpu({i})' for i in range(devices)], backend=OpBackend(form),
                                 parallel=parallel,
                                 optim=dict(clip_grad=0.5, recipe='fixed'),
                                 train=dict(batch_size=7, store='local', check_replicas=1))
    awake(trainer.placement.net)
    return trainer


@pytest.mark.parametrize('form', machine.FORMS)
def test_every_layout_trains_to_the_same_weights(form):
    """Three steps of 7 images: two devices, a pipeline of two, half blocks in two parts, and both of these."""
    print('seed', SEED)
    expected, expected_rows = train_randomly(build(form), 3, SEED)
    for devices, parallel in [(2, {}), (2, dict(pipeline=2, micro_batches=3)), (2, dict(tensor=2)),
                              (4, dict(pipeline=2, tensor=2, micro_batches=2))]:
        weights, rows = train_randomly(build(form, devices=devices, **parallel), 3, SEED)
        assert relative_difference(weights, expected) < 1e-5, parallel
        np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


@pytest.mark.parametrize('style', ['timm', 'hf'])
@pytest.mark.parametrize('kind', ['pretrain', 'classify'])
def test_names_of_others(style, kind):
    config = ModelConfig(**KEYS)
    net = build_simmim(config, SEED) if kind == 'pretrain' else build_classifier(config, 3, SEED)
    weights = official.export_weights(net)
    there, left_out = names.from_official(weights, style, config)
    some = {'timm': 'layers.1.downsample.reduction.weight',
            'hf': 'swinv2.encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.0.weight'}
    assert some[style] in there
    assert not any(name.endswith(('key.bias', 'qkv.bias')) for name in there)
    back, _ = names.to_official(there)
    bare = {name[8 * name.startswith('encoder.'):]: value for name, value in back.items()}
    for name, value in weights.items():
        if name not in left_out and name[8:] not in left_out:
            np.testing.assert_array_equal(bare.pop(name[8 * name.startswith('encoder.'):]), value, err_msg=name)
    assert not bare


def test_without_buffers_the_window_is_assumed():
    config = ModelConfig(**KEYS)
    weights = official.export_weights(build_simmim(config, None))
    told, assumed = model_keys(weights, weights)
    assert told['model.type'] == 'swinv2' and told['model.depths'] == [2, 2] and told['model.num_heads'] == [2, 4]
    assert assumed['model.window_size'] == 8 and assumed['model.img_size'] == 64


def test_pixels_normalised_by_the_square_around_them():
    """Against every square by itself. seed 6"""
    side, window = 7, 3
    image = np.random.default_rng(SEED).standard_normal((2, 3, side, side)).astype('float32')
    band = band_of(side, window)
    found = [x.asnumpy() for x in normalise_around(mx.nd, mx.nd.array(image), mx.nd.array(band),
                                                   mx.nd.array(unbiased_of(band)), side)]
    for y, x in ((0, 0), (3, 6), (4, 2)):
        square = image[:, :, max(0, y - 1):y + 2, max(0, x - 1):x + 2].reshape(2, 3, -1)
        mean, deviation = square.mean(-1), np.sqrt(square.var(-1, ddof=1) + 1e-6)
        expected = (image[:, :, y, x] - mean) / deviation, mean, deviation
        for ours, theirs in zip(found, expected):
            np.testing.assert_allclose(ours[:, :, y, x], theirs, rtol=1e-4, atol=1e-5)


def test_an_encoder_of_other_windows_says_what_keeps_its_positions():
    run, larger = ModelConfig(**KEYS), ModelConfig(**dict(KEYS, img_size=64, window_size=8))
    assert offsets_told(run, run) == offsets_told(run, ModelConfig(**dict(KEYS, drop_path=0.1))) == []
    assert offsets_told(run, larger) == ['positions are relative to windows of [8, 8] here and of [4, 4] in '
                                         'pre-training: model.pretrained_window_sizes=[4,4] keeps those']
    assert offsets_told(run, larger.model_copy(update={'pretrained_window_sizes': (4, 4)})) == []
