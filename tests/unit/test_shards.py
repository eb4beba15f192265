"""How parameters are cut: by name, and back to the whole, bit for bit."""
import weakref

import numpy as np
import pytest

from mxsimmim.config import Config, ModelConfig
from mxsimmim.interop import official
from mxsimmim.models import build_classifier, build_simmim, joined, parameter_specs
from mxsimmim.models.division import divide
from mxsimmim.models.shards import Shard, cut_of, gradient_axes, is_copied, join, part_of, whole_shape

VIT = dict(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=6, mlp_ratio=2)
SWIN = dict(type='swin', img_size=16, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=2)
SWINV2 = dict(SWIN, type='swinv2')
SEED = 3


def build_three(config, seed, **parts):
    return build_classifier(config, 3, seed, **parts)


@pytest.mark.parametrize('name, whole, expected', [
    ('encoder.blocks.0.attn.qkv.weight', [[0], [1], [10], [11], [20], [21]], [[[0], [10], [20]], [[1], [11], [21]]]),
    ('layers.0.blocks.1.attn.qkv.bias', [0, 1, 10, 11, 20, 21], [[0, 10, 20], [1, 11, 21]]),
    ('blocks.3.attn.q_bias', [0, 1, 2, 3], [[0, 1], [2, 3]]),
    ('blocks.3.attn.proj.weight', [[0, 1], [2, 3]], [[[0], [2]], [[1], [3]]]),
    ('blocks.3.mlp.fc1.weight', [[0, 1], [2, 3]], [[[0, 1]], [[2, 3]]]),
    ('blocks.3.mlp.fc1.bias', [0, 1], [[0], [1]]),
    ('blocks.3.mlp.fc2.weight', [[0, 1], [2, 3]], [[[0], [2]], [[1], [3]]]),
    ('layers.0.blocks.0.attn.logit_scale', [[[0]], [[1]]], [[[[0]]], [[[1]]]]),
    ('layers.0.blocks.0.attn.cpb_mlp.2.weight', [[0, 1], [2, 3]], [[[0, 1]], [[2, 3]]]),
    ('encoder.rel_pos_bias.relative_position_bias_table', [[0, 1], [2, 3]], [[[0], [2]], [[1], [3]]]),
    *((name, [0, 1], [[0, 1], [0, 1]]) for name in (
        'patch_embed.proj.weight', 'blocks.0.attn.proj.bias', 'blocks.0.mlp.fc2.bias', 'blocks.0.norm1.weight',
        'blocks.0.gamma_1', 'layers.0.blocks.0.attn.cpb_mlp.0.bias', 'cls_token',
        'layers.0.downsample.reduction.weight', 'head.weight', 'decoder.0.bias'))])
def test_parts_of_two(name, whole, expected):
    whole = np.array(whole)
    parts = [part_of(name, whole, Shard(index, 2)) for index in range(2)]
    assert [part.tolist() for part in parts] == expected
    assert part_of(name, whole, Shard()) is whole
    assert (cut_of(name) is None) == (expected[0] == whole.tolist())
    assert join(name, parts).tolist() == whole.tolist()
    assert whole_shape(name, parts[0].shape, Shard(0, 2)) == whole.shape
    is_term = any(part in name for part in ('norm1', 'gamma', 'cpb_mlp.0'))
    assert gradient_axes(name) == (('data', 'tensor') if is_term else ('data',))
    assert gradient_axes(name, post_norm=True) == (('data', 'tensor') if is_term and 'norm1' not in name else ('data',))


@pytest.mark.parametrize('keys, count', [(VIT, 2), (VIT, 3), ({**VIT, 'use_rpb': True, 'use_shared_rpb': False}, 6),
                                         (SWIN, 2), (SWINV2, 2)])
@pytest.mark.parametrize('build', [build_simmim, build_three])
def test_a_network_in_parts_is_the_whole(build, keys, count):
    """Under the reference's names; every part has the same share, and decay goes by the whole's shape."""
    config = ModelConfig(**keys)
    whole, net = official.export_weights(build(config, SEED)), build(config, SEED)
    divided = divide(net, [Shard(index, count) for index in range(count)])
    assert {len(parts) for parts in divided.values()} == {count}
    specs = parameter_specs(net)
    assert len({spec.key for spec in specs}) == len(specs)
    assert list(joined(specs, [spec.parameter.data().asnumpy() for spec in specs])) == list(whole)
    found = official.export_weights(net)
    assert list(found) == list(whole) and all(np.array_equal(found[name], whole[name]) for name in whole)
    for spec in specs:
        assert (spec.shard.count == count) == (cut_of(spec.name) is not None)
        assert np.prod(spec.whole_shape) == spec.parameter.data().size * spec.shard.count == whole[spec.name].size
    other = official.export_weights(build(config, SEED + 1))
    official.load_weights(net, other)
    found = official.export_weights(net)
    assert all(np.array_equal(found[name], other[name]) for name in other)


@pytest.mark.parametrize('keys, stages', [({**VIT, 'use_mean_pooling': True}, [slice(0, 2), slice(2, 4)]),
                                          (SWIN, [slice(0, 5)]), (SWINV2, [slice(0, 5)])])
@pytest.mark.parametrize('build', [build_simmim, build_three])
def test_a_worker_begins_with_its_part_of_the_whole(build, keys, stages):
    """As it is drawn with the whole, bit for bit."""
    config, found = ModelConfig(**keys), {}
    for own in range(len(stages)):
        parts = {}
        for index in range(2):
            for spec in parameter_specs(build(config, SEED, parts=stages, own=own, shard=Shard(index, 2))):
                parts.setdefault(spec.name, []).append(spec.parameter.data().asnumpy())
        for name, values in parts.items():
            assert len(values) == (2 if cut_of(name) or is_copied(name) else 1)
            assert cut_of(name) or all(np.array_equal(value, values[0]) for value in values)
            found[name] = join(name, values)
    expected = {spec.name: spec.parameter.data().asnumpy() for spec in parameter_specs(build(config, SEED))}
    assert set(found) == set(expected) and all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize('keys, most', [
    (dict(num_heads=12), 12), (dict(num_heads=12, mlp_ratio=4 / 3), 4), (dict(embed_dim=15, num_heads=5), 5),
    (dict(embed_dim=15, num_heads=5, mlp_ratio=2.1), 1),
    (dict(type='swin', patch_size=4, embed_dim=96, depths=[1, 1], num_heads=[3, 6]), 3),
    (dict(type='swin', patch_size=4, embed_dim=96, depths=[1, 1], num_heads=[4, 6]), 2)])
def test_most_parts(keys, most):
    assert ModelConfig(**keys).most_parts == most


@pytest.mark.parametrize('keys, answer', [
    (dict(parallel=dict(tensor=5)), 'parallel.tensor=5 does not divide the heads, model.num_heads=12, and the MLP of '
     'every block: possible are 1, 2, 3, 4, 6, 12'),
    (dict(parallel=dict(tensor=2), model=dict(type='swin', patch_size=4, embed_dim=96, depths=[2, 2],
                                              num_heads=[3, 6])), 'model.num_heads=[3, 6], and the MLP of every block: '
     'possible are 1, 3'),
    (dict(parallel=dict(tensor=2), devices=['cpu(0)', 'cpu(1)', 'cpu(2)']), 'parallel.tensor=2 needs 2 devices a '
     'worker, or a multiple, and devices=[cpu(0), cpu(1), cpu(2)] names 3: name more of them with devices=[…]'),
    (dict(parallel=dict(tensor=2, pipeline=2), devices=['cpu(0)', 'cpu(1)', 'cpu(2)']), 'parallel.pipeline=2 x '
     'parallel.tensor=2 needs 4 devices a worker, or a multiple, and devices=[cpu(0), cpu(1), cpu(2)] names 3'),
    (dict(parallel=dict(tensor=2), devices=[f'cpu({i})' for i in range(6)], train=dict(batch_size=2)),
     'train.batch_size=2 is less than 3 groups of devices x train.accumulate=1')])
def test_refusals(keys, answer):
    with pytest.raises(ValueError) as error:
        Config(**keys)
    assert answer in str(error.value)


def test_nothing_of_the_whole_stays():
    """Its parts are as many numbers; else a divided network would need the memory of both."""
    net = build_simmim(ModelConfig(**VIT), SEED)
    whole = [weakref.ref(spec.parameter) for spec in parameter_specs(net) if cut_of(spec.name)]
    divide(net, [Shard(index, 2) for index in range(2)])
    assert len(whole) > 10 and [parameter() for parameter in whole] == [None] * len(whole)
