"""Specifications of parameters: what the optimiser, clipping, comparisons, averages and checkpoints go by."""
from types import SimpleNamespace

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import HybridBlock, Parameter, nn
from support.specs import specs_of

from mxsimmim.config import ModelConfig, OptimConfig, TrainConfig
from mxsimmim.data.batch_split import BatchSplit
from mxsimmim.interop import official
from mxsimmim.models import build_classifier, parameter_specs
from mxsimmim.ops import REFERENCE
from mxsimmim.optim import OPTIMIZERS, AdamW, parameter_groups
from mxsimmim.parallel.average import WeightAverage
from mxsimmim.parallel.communicators import make_communicator
from mxsimmim.parallel.periodic import ElasticAverage, LocalSGD
from mxsimmim.parallel.replicas import digests
from mxsimmim.parallel.updates import SynchronousUpdate, global_norm

CONTEXTS = [mx.cpu(0), mx.cpu(1)]
SEED = 31


class Normalised(HybridBlock):
    """A network with running statistics, and with a constant."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        with self.name_scope():
            self.scale = self.params.get_constant('scale', [2.0])
            self.norm = nn.BatchNorm(in_channels=3, momentum=0.5)
            self.head = nn.Dense(2, in_units=3)

    def hybrid_forward(self, F, x, scale):
        return self.head(self.norm(F.broadcast_mul(x, scale)))


def normalised(contexts):
    net = Normalised()
    net.initialize(ctx=contexts)
    return net


def trained(net, contexts, steps=3):
    """Each context sees images of its own."""
    rng = np.random.default_rng(SEED)
    specs = parameter_specs(net)
    rule = SynchronousUpdate(specs, AdamW(specs, OptimConfig()), make_communicator('local'), TrainConfig(), 1.0)
    for step in range(steps):
        images = [mx.nd.array(rng.standard_normal((4, 3)) + number, ctx=ctx) for number, ctx in enumerate(contexts)]
        with autograd.record():
            losses = [net(image).square().mean().reshape((1,)) for image in images]
        autograd.backward(losses)
        rule.step(step, 1e-2, losses[0])
    mx.nd.waitall()
    return specs, rule


def test_roles():
    roles = {spec.name: (spec.role, spec.trainable) for spec in parameter_specs(normalised([mx.cpu()]))}
    assert roles == {'norm.gamma': ('weight', True), 'norm.beta': ('weight', True),
                     'norm.running_mean': ('buffer', False), 'norm.running_var': ('buffer', False),
                     'head.weight': ('weight', True), 'head.bias': ('weight', True)}


def test_groups_are_taken_by_name():
    net = build_classifier(ModelConfig(img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2), 3)
    groups = parameter_groups(net, 0.5, 0.05)
    assert {spec.name: (spec.lr_scale, spec.decay) for spec in parameter_specs(net, groups)} == groups


def test_buffers_of_replicas_become_their_mean():
    """Exactly once: what is consolidated again stays. Weights are equal, and not touched."""
    print('seed', SEED)
    net = normalised(CONTEXTS)
    specs, rule = trained(net, CONTEXTS)
    buffers = {spec.name: [copy.asnumpy() for copy in spec.parameter.list_data()]
               for spec in specs if not spec.trainable}
    means = {name: (one + other) / 2 for name, (one, other) in buffers.items()}
    assert all(np.abs(one - other).max() > 0.1 for one, other in buffers.values())
    before = digests(specs)
    assert all(len(copies) == 2 and len(set(copies)) == 1 for copies in before.values())
    for _ in range(2):
        with rule.consolidated_weights():
            for spec in specs:
                if not spec.trainable:
                    for copy in spec.parameter.list_data():
                        np.testing.assert_allclose(copy.asnumpy(), means[spec.name], rtol=1e-6)
    assert digests(specs) == before
    saved = official.export_weights(net)
    assert set(saved) == {spec.name for spec in specs}
    again = normalised([mx.cpu()])
    official.load_weights(again, saved)
    assert all(np.array_equal(official.export_weights(again)[name], value) for name, value in saved.items())
    image = mx.nd.array(np.random.default_rng(1).standard_normal((2, 3)))
    np.testing.assert_array_equal(again(image).asnumpy(), net(image).asnumpy())


@pytest.mark.parametrize('kind', ['sync', 'local_sgd', 'elastic'])
def test_all_workers_go_on_from_the_buffers_of_rank_0(kind, monkeypatch):
    """A resumed worker other than rank 0 has read no checkpoint; every rule consolidates buffers, too."""
    net = normalised(CONTEXTS)
    specs, communicator = parameter_specs(net), make_communicator('local')
    arguments = specs, AdamW(specs, OptimConfig()), communicator, TrainConfig(), 1.0
    rule = {'sync': lambda: SynchronousUpdate(*arguments),
            'local_sgd': lambda: LocalSGD(*arguments, BatchSplit([4], 0, [1]), 9),
            'elastic': lambda: ElasticAverage(*arguments, BatchSplit([4], 0, [1]), 9)}[kind]()
    told = []
    monkeypatch.setattr(communicator, 'broadcast', lambda handle: told.extend(handle.arrays))
    rule.load_state_dict(None, 0)
    buffers = [spec.parameter for spec in specs if not spec.trainable]
    assert all(any(copies[0] is p.list_data()[0] for copies in told) for p in buffers) and len(buffers) == 2
    for p in buffers:
        for number, copy in enumerate(p.list_data()):
            copy[:] = number + 1
    with rule.consolidated_weights():
        assert all(copy.asnumpy().tolist() == [1.5] * 3 for p in buffers for copy in p.list_data())


def test_gradients_are_of_weights_alone():
    net = normalised([mx.cpu()])
    trained(net, [mx.cpu()], 1)
    assert set(official.export_weights(net, grad=True)) == {'norm.gamma', 'norm.beta', 'head.weight', 'head.bias'}


def test_averaged_weights_keep_buffers_as_they_are():
    net = normalised([mx.cpu()])
    average = WeightAverage(parameter_specs(net), 0.9)
    trained(net, [mx.cpu()], 2)
    average.update(5)
    own, averaged = official.export_weights(net), average.arrays()
    assert own.keys() == averaged.keys()
    for name, value in own.items():
        assert np.array_equal(averaged[name], value) == ('running' in name), name
    again = WeightAverage(parameter_specs(net), 0.9)
    for name in again.names():
        again.set(name, averaged[name])
    assert all(np.array_equal(again.arrays()[name], value) for name, value in averaged.items())


@pytest.mark.parametrize('optimizer', sorted(OPTIMIZERS))
def test_weights_on_different_contexts(optimizer):
    """As the stages of a pipeline have them: the same norm, clipping and update as on one context."""
    print('seed', SEED)
    results = []
    for contexts in ([mx.cpu(0), mx.cpu(0)], [mx.cpu(0), mx.cpu(1)]):
        rng = np.random.default_rng(SEED)
        made = {name: Parameter(name, shape=(4, 3)) for name in 'ab'}
        for p, ctx in zip(made.values(), contexts):
            p.initialize(ctx=[ctx])
            p.set_data(mx.nd.array(rng.standard_normal((4, 3))))
        specs = specs_of(made, dict.fromkeys('ab', 0.1))
        rule = SynchronousUpdate(specs, OPTIMIZERS[optimizer](specs, OptimConfig()), make_communicator('local'),
                                 TrainConfig(), 0.5)
        rows = []
        for step in range(3):
            gradients = [rng.standard_normal((4, 3)) for _ in made]
            for p, gradient in zip(made.values(), gradients):
                p.list_grad()[0][:] = gradient
            rows.append(rule.step(step, 1e-2, mx.nd.ones((1,), ctx=contexts[1])).asnumpy())
            assert rows[-1][1] == pytest.approx(np.sqrt(sum((g ** 2).sum() for g in gradients)), rel=1e-6)
        results.append([np.array(rows), *(p.data(ctx).asnumpy() for p, ctx in zip(made.values(), contexts))])
    for one, two in zip(*results):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_the_norm_of_arrays_on_several_contexts():
    arrays = [[mx.nd.full((2, 2), 3, ctx=ctx)] for ctx in CONTEXTS]
    norm = global_norm(arrays, REFERENCE)
    assert norm.context == CONTEXTS[0] and norm.asscalar() == pytest.approx(6 * np.sqrt(2), rel=1e-6)
