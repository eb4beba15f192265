"""What each of the workers that compute blocks together allocates for their sums."""
from types import SimpleNamespace

import mxnet as mx

from mxsimmim.config import Config
from mxsimmim.models.cost import token_shapes
from mxsimmim.ops import REFERENCE
from mxsimmim.parallel.mesh import Mesh
from mxsimmim.training.build import build_group

SWIN = dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)


def sizes(monkeypatch, mesh, images):
    """Elements of the arrays for a worker that has this many of 20 images, in 3 accumulated parts."""
    made = []
    monkeypatch.setattr('mxsimmim.training.build.WorkerGroup', lambda *arguments: made.append(arguments))
    config = Config(model=SWIN, mask=dict(patch_size=8), parallel=dict(tensor=2, micro_batches=2),
                    train=dict(batch_size=20, accumulate=3))
    communicator = SimpleNamespace(control=SimpleNamespace(mesh=mesh), over=lambda axes: axes)
    build_group(config, communicator, [mx.cpu()], REFERENCE, images)
    for context, found, axes, backend in made:
        assert (context, axes, backend) == (mx.cpu(), ('tensor',), REFERENCE)
        return found


def test_arrays_are_those_of_the_largest_batch(monkeypatch):
    """Each stage of Swin has as many tokens as it needs; validation has equal parts, and no micro-batches."""
    assert token_shapes(Config(model=SWIN, mask=dict(patch_size=8)).model) == [(64, 8), (16, 16)]
    assert sizes(monkeypatch, Mesh(2, 2, 1), 10) is None
    assert sizes(monkeypatch, Mesh(1, 2, 2), 15) == [5 * 256, 5 * 512]
    assert sizes(monkeypatch, Mesh(1, 2, 2), 5) == [2 * 256, 4 * 256, 2 * 512, 4 * 512][:2] + [4 * 512]
    assert sizes(monkeypatch, Mesh(2, 2, 2), 15) == [3 * 256, 5 * 256, 3 * 512, 5 * 512]
