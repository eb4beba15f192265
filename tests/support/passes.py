"""Passes of a network, several of them under way, computed by one worker or by a group together."""
import mxnet as mx
import numpy as np
from mxnet import autograd

from mxsimmim.models import build_simmim, parameter_specs
from mxsimmim.models.division import divide
from mxsimmim.models.shards import Shard, part_of
from mxsimmim.parallel.placement import hybridize
from mxsimmim.parallel.tensor import TensorParallel
from mxsimmim.runtime import mxnet_private

from .trainer import random_batches

SEED = 27
NETWORKS = {
    'vit': dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=6, drop_path=0.3),
    'swin': dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4),
    'swinv2': dict(type='swinv2', img_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2],
                   window_size=4, drop_path=0.2),
}
IMAGES = [3, 2, 3, 1, 2, 2, 3, 1]  # of each micro-batch
# In the order of the program: F forward, B backward, E without gradient.
TWO_UNDER_WAY = 'F0 F1 E2 B0 F2 B1 E3 E0 F3 B2 B3 E1 F4 B4'
GPIPE = ' '.join(f'{way}{number}' for way in 'FB' for number in range(len(IMAGES)))


def largest(config):
    """Elements of the tokens of the largest micro-batch."""
    return max(IMAGES) * ((config.img_size // config.patch_size) ** 2 + (config.type == 'vit')) * config.embed_dim


def compute_passes(config, net, compute, plan):
    """Losses, and gradients by the parameters' keys, added up over the micro-batches."""
    whole, = random_batches(config, 1, sum(IMAGES), SEED)
    ends = np.cumsum(IMAGES)

    def inputs(number):
        part = slice(ends[number] - IMAGES[number], ends[number])
        keep = [(whole.fields['uniform'][part] < 0.7) / 0.7] if config.drop_path else []
        return [*(mx.nd.array(whole.fields[name][part], dtype='uint8') for name in ('image', 'mask')),
                *map(mx.nd.array, keep)]
    specs = parameter_specs(net)
    for spec in specs:
        spec.parameter.grad_req = 'add'
    constants = [p for p in net.collect_params().values() if p.grad_req == 'null']
    losses, kept = [], {}
    for way, number in ((word[0], int(word[1:])) for word in plan.split()):
        if way == 'B':
            kept.pop(number).backward()
            continue
        if way == 'F':
            for parameter in constants:
                mxnet_private.renew(parameter)
        with autograd.record() if way == 'F' else autograd.pause():
            loss = compute(*inputs(number))
        if way == 'F':
            kept[number] = loss
        losses.append(loss)
    return [loss.asscalar() for loss in losses], {spec.key: (spec, spec.parameter.grad().asnumpy()) for spec in specs}


def build(config, backend):
    """The network, whose every weight has an effect: SwinV2's branches begin with a factor of 0."""
    net = build_simmim(config, SEED, backend)
    for spec in parameter_specs(net):
        if spec.name.endswith(('norm1.weight', 'norm2.weight')):
            spec.parameter.set_data(mx.nd.ones(spec.parameter.shape))
    return net


def compute_whole(config, backend, plan):
    """By one worker: losses and gradients."""
    net = build(config, backend)
    return compute_passes(config, net, net, plan)


def compute_together(config, backend, control, group, plan):
    """By this worker of a group: losses, and (spec, gradient) of what it has, sums over the group where they are."""
    net = build(config, backend)
    parts = divide(net, [Shard(control.rank, control.size)])
    together = TensorParallel(net, parts, [group])
    for graph in together.graphs:
        hybridize(graph, backend)
    losses, found = compute_passes(config, net, together, plan)
    terms = control.all_gather('gradients', {key: value for key, (spec, value) in found.items()
                                             if spec.is_term})
    return losses, {key: (spec, sum(np.array(other[key]) for other in terms) if key in terms[0] else value)
                    for key, (spec, value) in found.items()}


def assert_same(results, expected, tolerance=1e-5):
    """That all workers have the same losses, bit by bit, and each the gradients of what it has."""
    losses, whole = expected
    for own, gradients in results:
        assert own == results[0][0]
        np.testing.assert_allclose(own, losses, rtol=1e-6)
        for key, (spec, gradient) in gradients.items():
            value = part_of(spec.name, whole[spec.name][1], spec.shard)
            error = np.linalg.norm(gradient - value)
            assert error <= tolerance * max(np.linalg.norm(value), 1e-2), (key, error)
            if spec.shard.count == 1 and key in results[0][1]:  # what all compute, or the sum of their terms
                np.testing.assert_array_equal(gradient, results[0][1][key][1])
