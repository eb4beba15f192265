"""Which workers can compute blocks together, and what each of them allocates for that."""
from types import SimpleNamespace

import mxnet as mx
import pytest
from support import machine

from mxsimmim.config import Config
from mxsimmim.models.cost import token_shapes
from mxsimmim.ops import REFERENCE, OpBackend
from mxsimmim.parallel.mesh import Mesh
from mxsimmim.runtime.process import ProcessInfo
from mxsimmim.training.build import build_group

JOB = ProcessInfo(rank=2, size=4, transport='horovod', firsts=(0, 2))
CONTROL = SimpleNamespace(mesh=Mesh(1, 2, 2, 2), rank=2)


def group(process=JOB, backend=REFERENCE, mesh=CONTROL.mesh, **parallel):
    control = SimpleNamespace(mesh=mesh, rank=mesh.rank)
    return build_group(Config(parallel=parallel), process, control, [mx.cpu()], backend, 8)


def test_whole_models_need_no_group():
    assert group(mesh=Mesh(2, 2, 1, 2)) is None


@pytest.mark.parametrize('keys, message', [
    (dict(process=JOB._replace(firsts=(0, 3))), 'the first ranks of the hosts are [0, 3]: start the job with '
     'tools/launch.py, and give each host slots that are a multiple of 2'),
    (dict(process=JOB._replace(firsts=())), 'the first ranks of the hosts are []: '),
    (dict(mesh=Mesh(2, 1, 2, 2), micro_batches=4), 'parallel.micro_batches=4: where several workers compute'),
    (dict(), 'needs native operators on cpu(0), and rank 2 has ')])
def test_what_cannot_work_is_refused(keys, message):
    with pytest.raises(ValueError) as told:
        group(**keys)
    assert message in str(told.value)


@machine.natively
def test_arrays_are_those_of_the_largest_batch(monkeypatch):
    """Swin's stages have as many tokens as they need; of validation each replica has the same number of images."""
    made = []
    monkeypatch.setattr('mxsimmim.training.build.WorkerGroup', lambda *arguments: made.append(arguments))
    config = Config(model=dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                               window_size=4), mask=dict(patch_size=8), parallel=dict(tensor=2),
                    train=dict(batch_size=20, accumulate=3))
    assert token_shapes(config.model) == [(64, 8), (16, 16)]
    build_group(config, JOB, CONTROL, [mx.cpu()], OpBackend('native'), 15)
    build_group(config, JOB, CONTROL, [mx.cpu()], OpBackend('native'), 5)
    assert [sizes for _, sizes, *_ in made] == [[5 * 256, 5 * 512], [2 * 256, 4 * 256, 4 * 512]]
    assert made[0][2] == [2, 3]
