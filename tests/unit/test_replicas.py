"""Comparison of the weights of workers that must hold the same."""
import platform

import mxnet as mx
import pytest
from support.workers import each

from mxsimmim.config import ModelConfig
from mxsimmim.models import build_simmim, parameter_specs
from mxsimmim.models.shards import Shard
from mxsimmim.parallel.mesh import Mesh
from mxsimmim.parallel.replicas import ReplicasDiffer, alone, compare

CONFIG = ModelConfig(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2)
HOST = platform.node()
PROJECTION, BLOCK = 'encoder.patch_embed.proj.weight', 'encoder.blocks.0'
NORM, MLP = f'{BLOCK}.norm1.bias', f'{BLOCK}.mlp.fc1.weight'


@pytest.mark.parametrize('values, expected', [
    ('a', []), ('aa', []), ('aaaa', []),
    ('aab', [2]), ('baa', [0]), ('aabaa', [2]), ('abaca', [1, 3]),
    ('ab', None), ('abc', None), ('aabb', None), ('aabbc', None)])
def test_who_is_alone(values, expected):
    """More than half decide; of two that differ, and of two halves, nobody knows."""
    assert alone(values) == expected


def told(mesh, changed, copies=1):
    """What each worker of a mesh is told if these (rank, device, parameter) have changed."""
    def work(control):
        shard = Shard(control.mesh.coordinate('tensor'), control.mesh.tensor)
        net = build_simmim(CONFIG, 5, shard=shard)
        net.collect_params().reset_ctx([mx.cpu(i) for i in range(copies)])
        specs = parameter_specs(net)
        for rank, device, name in changed:
            if rank == control.rank:
                value, = (spec.parameter.list_data()[device] for spec in specs if spec.name == name)
                value[:] = value + 1
        mx.nd.waitall()
        compare(specs, control, 7)
    first, *others = each(mesh.size, work, mesh=mesh)
    assert all(str(other) == str(first) for other in others)
    assert first is None or isinstance(first, ReplicasDiffer) and str(first).startswith('after step 7 ')
    return str(first or '').replace(f' on {HOST}', '').partition(': a faulty memory')[0]


@pytest.mark.parametrize('workers, copies, changed, text', [
    (3, 1, [], ''), (1, 2, [], ''),
    (3, 1, [(2, 0, PROJECTION)],
     f'after step 7 rank 2, cpu(0) has other weights than the 2 copies that agree ({PROJECTION})'),
    (3, 1, [(0, 0, NORM), (0, 0, MLP), (0, 0, PROJECTION)],
     f'after step 7 rank 0, cpu(0) has other weights than the 2 copies that agree ({MLP}, {PROJECTION} and 1 more)'),
    (2, 2, [(1, 1, NORM)], f'after step 7 rank 1, cpu(1) has other weights than the 3 copies that agree ({NORM})'),
    (1, 3, [(0, 1, NORM)], f'after step 7 rank 0, cpu(1) has other weights than the 2 copies that agree ({NORM})'),
    (2, 1, [(1, 0, NORM)], f'after step 7 the weights of rank 0, cpu(0) and of rank 1, cpu(0) differ ({NORM}), and of '
     'two nobody can tell which are wrong'),
    (1, 2, [(0, 1, NORM)], f'after step 7 the weights of rank 0, cpu(0) and of rank 0, cpu(1) differ ({NORM}), and of '
     'two nobody can tell which are wrong'),
    (2, 2, [(1, 0, NORM), (1, 1, NORM)], 'after step 7 the weights of rank 0, cpu(0) and of rank 0, cpu(1) and of rank '
     f'1, cpu(0) and of rank 1, cpu(1) differ ({NORM}), and nobody can tell which are wrong')])
def test_copies_that_differ_are_named(workers, copies, changed, text):
    """Over workers and the devices of each, of which three or more tell which one is alone."""
    assert told(Mesh(data=workers), changed, copies) == text


@pytest.mark.parametrize('changed, parts', [
    ([(3, MLP)], ['the weights of rank 1, cpu(0) and of rank 3, cpu(0) differ']),  # a part, which rank 1 has, too
    ([(1, PROJECTION)], ['rank 1, cpu(0) has other weights than the 3 copies that agree']),  # which all have
    ([(1, PROJECTION), (2, f'{BLOCK}.attn.proj.bias')],  # which the first parts have alone
     ['rank 1, cpu(0) has other weights than the 3 copies', 'rank 0, cpu(0) and of rank 2, cpu(0) differ'])])
def test_parts_are_compared_with_the_same_parts_and_copies_with_all(changed, parts):
    """2 replicas in 2 parts."""
    text = told(Mesh(1, 2, 2), [(rank, 0, name) for rank, name in changed])
    assert all(part in text for part in parts), text
