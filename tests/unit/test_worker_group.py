"""Workers of a host that compute half blocks together: the loss and the gradients of one device."""
import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from support import machine
from support.trainer import random_batches
from support.workers import each

from mxsimmim.config import ModelConfig
from mxsimmim.models import build_simmim, joined, parameter_specs
from mxsimmim.models.division import divide
from mxsimmim.models.shards import Shard, gradient_axes
from mxsimmim.ops import OpBackend
from mxsimmim.parallel.placement import hybridize
from mxsimmim.parallel.tensor import TensorParallel
from mxsimmim.parallel.worker_group import HostSums, WorkerGroup

pytestmark = machine.natively
VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4, drop_path=0.3)
SWIN = dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)
SEED = 27


def test_sums_of_several_sizes():
    """Of as many elements as an array has, in the first memory that it fits in."""
    workers = each(2, lambda control: HostSums([6, 20], [0, 1], control))
    for shape in ((2, 3), (1,), (4, 5), (7,)):
        sums = [sums.sum(mx.nd.full(shape, 10 ** rank)) for rank, sums in enumerate(workers)]
        assert all(total.shape == shape and np.all(total.asnumpy() == 11) for total in sums), shape


@pytest.mark.parametrize('keys', [VIT, SWIN], ids=['vit', 'swin'])
def test_gradients_are_those_of_one_device(keys):
    """Twice, and of fewer images without gradients between: three passes that share the memory."""
    print('seed', SEED)
    config, backend = ModelConfig(**keys), OpBackend('native')
    batches = list(random_batches(config, 2, 5, SEED))

    def inputs(batch, images):
        fields = [batch.fields[name][:images] for name in ('image', 'mask')]
        keep = [(batch.fields['uniform'][:images] < 0.7) / 0.7] if config.drop_path else []
        return [*(mx.nd.array(field, dtype='uint8') for field in fields), *map(mx.nd.array, keep)]

    def run(net, compute):
        found = []
        for batch in batches:
            arrays = inputs(batch, 5)
            with autograd.record():
                loss = compute(*arrays)
            loss.backward()
            smaller = compute(*inputs(batch, 3))
            gradients = [spec.parameter.grad().asnumpy() for spec in parameter_specs(net)]
            found.append((loss.asscalar(), smaller.asscalar(), gradients))
        return parameter_specs(net), found

    def work(control):
        net = build_simmim(config, SEED, backend)
        parts = divide(net, [Shard(control.rank, control.size)])
        group = WorkerGroup(mx.cpu(), [5 * 4 * 16, 5 * 65 * 16], range(control.size), control)
        together = TensorParallel(net, parts, [group])
        for graph in together.graphs:
            hybridize(graph, backend)
        return run(net, together)
    whole = build_simmim(config, SEED, backend)
    specs, expected = run(whole, whole)
    (first, ours), (second, theirs) = each(2, work)
    for (loss, smaller, gradients), (*one, own), (*two, others) in zip(expected, ours, theirs):
        assert one == two
        np.testing.assert_allclose(one, [loss, smaller], rtol=1e-6)
        other, terms = {spec.key: gradient for spec, gradient in zip(second, others)}, []
        for spec, gradient in zip(first, own):
            if 'tensor' in gradient_axes(spec.name):
                gradient = gradient + other[spec.key]
            elif spec.shard.count == 1 and spec.key in other:  # of what both compute
                np.testing.assert_array_equal(gradient, other[spec.key])
            terms.append((spec, gradient))
            terms += [(part, other[part.key]) for part in second if part.name == spec.name and spec.shard.count > 1]
        found = joined(*zip(*terms))
        assert len(found) == len(specs)
        for spec, gradient in zip(specs, gradients):
            error = np.linalg.norm(found[spec.name] - gradient)
            assert error <= 1e-5 * max(np.linalg.norm(gradient), 1e-2), (spec.name, error)
