"""Comparison of the weights of workers that must hold the same."""
import mxnet as mx
import pytest
from support.workers import each

from mxsimmim.config import ModelConfig
from mxsimmim.models import build_simmim, parameter_specs
from mxsimmim.models.shards import Shard
from mxsimmim.parallel.mesh import Mesh
from mxsimmim.parallel.replicas import ReplicasDiffer, compare

CONFIG = ModelConfig(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2)


@pytest.mark.parametrize('changed, different', [
    ((), []),
    ([(3, 'encoder.blocks.0.mlp.fc1.weight')], [3]),  # a part, which rank 1 has, too
    ([(1, 'encoder.patch_embed.proj.weight'), (2, 'encoder.blocks.0.norm1.bias')], [1, 2]),  # copies, which all have
    ([(2, 'encoder.blocks.0.attn.proj.bias')], [2])])  # which the first parts have alone
def test_parts_are_compared_with_the_same_parts_and_copies_with_all(changed, different):
    """2 replicas in 2 parts."""
    def work(control):
        specs = parameter_specs(build_simmim(CONFIG, 5, shard=Shard(control.mesh.coordinate('tensor'), 2)))
        for rank, name in changed:
            if rank == control.rank:
                value, = (spec.parameter.data() for spec in specs if spec.name == name)
                value[:] = value + 1
        mx.nd.waitall()
        compare(specs, control, 7)
    for told in each(4, work, mesh=Mesh(1, 2, 2)):
        assert isinstance(told, ReplicasDiffer) == bool(different)
        if different:
            ranks = ', '.join(f'rank {rank}' for rank in different)
            assert str(told).startswith(f'after step 7 the weights of {ranks} differ from those of the first worker')
