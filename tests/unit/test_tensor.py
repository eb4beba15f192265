"""Transparency of tensor parallelism: half blocks computed in parts have the gradients and answers of one device."""
import mxnet as mx
import numpy as np
import pytest
from support import machine
from support.running import rounds
from support.trainer import build_tiny_trainer, random_batches, relative_difference, tiny_config, train_randomly

from mxsimmim.config import ModelConfig
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.models import build_classifier, build_simmim, named_parameters, parameter_specs
from mxsimmim.ops import REFERENCE, OpBackend
from mxsimmim.parallel.placement import Replicated
from mxsimmim.parallel.replicas import ReplicasDiffer
from mxsimmim.tasks.registry import TASKS
from mxsimmim.training.build import build_trainer
from mxsimmim.training.run_folder import checkpoint_to_resume

VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4, drop_path=0.3)
SWIN = dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4,
            drop_path=0.2)
OTHERS = [{**VIT, 'use_rpb': True, 'use_shared_rpb': False, 'use_ape': True},
          {**VIT, 'use_mean_pooling': True, 'init_values': None, 'norm_targets': True, 'drop_path': 0.0},
          {**SWIN, 'ape': True, 'drop_path': 0.0}]
NAMES = ['vit', 'swin', 'vit, own tables, positions', 'vit, pooling, none dropped', 'swin, positions, none dropped']
SEED = 9
# A form of the operators, a network, and layouts of so many steps; of MXNet's own form the last ones in `make soak`.
CASES = [pytest.param(form, *case, id=f'{name}-{form}') for form in machine.FORMS for name, case in zip(NAMES, (
    (VIT, [(2, 2), (4, 4), (4, 2), (4, 2, 2)], 10), (SWIN, [(2, 2), (4, 2), (4, 2, 2)], 5),
    *((keys, [(4, 2, 2)], 3) for keys in OTHERS))) if name in rounds(NAMES[:2], NAMES) or form == machine.FORMS[-1]]


def build(keys, devices=1, backend=REFERENCE, tensor=1, stages=1, recipe='fixed', **train):
    print('seed', SEED)
    return build_tiny_trainer(model=keys, devices=[f'cpu({i})' for i in range(devices)], seed=SEED, backend=backend,
                              parallel=dict(tensor=tensor, pipeline=stages, micro_batches=2),
                              optim=dict(recipe=recipe, clip_grad=0.02),
                              train=dict(batch_size=11, store='local', check_replicas=1, **train))


@pytest.mark.soak
@pytest.mark.parametrize('form, keys, layouts, steps', CASES)
def test_weights_are_those_of_one_device(form, keys, layouts, steps):
    """Steps of 11 images, all clipped, on (devices, parts, stages); (4, 2): one of two replicas has 6 images."""
    expected, expected_rows = train_randomly(build(keys, backend=OpBackend(form)), steps, SEED)
    assert expected_rows[:, 1].min() > 0.02
    for devices, *layout in layouts:
        weights, rows = train_randomly(build(keys, devices, OpBackend(form), *layout), steps, SEED)
        assert relative_difference(weights, expected) < 1e-6, (devices, layout)
        np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


@pytest.mark.parametrize('recipe', ['fixed', 'reference'])
@pytest.mark.parametrize('keys', [VIT, {**SWIN, 'recompute': True}], ids=['vit', 'swin, recomputed'])
def test_accumulated_parts(keys, recipe):
    """With the reference's clipping between the parts, and with activations computed again; of a pipeline, too."""
    form = machine.FORMS[-1]
    if form == 'reference':
        keys = {**keys, 'recompute': False}
    (weights, rows), (expected, expected_rows) = (
        train_randomly(build(keys, devices, OpBackend(form), min(2, devices), stages, recipe, accumulate=2), 3, SEED)
        for devices, stages in ((4, 2), (1, 1)))
    assert relative_difference(weights, expected) < 1e-6
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


def pair(net, replicas=2):
    """Placements of the networks that `net()` builds: on one device, and in two parts."""
    return (Replicated(net(), [mx.cpu(0)]),
            Replicated(net(), [mx.cpu(i) for i in range(2 * replicas)], tensor=2))


@pytest.mark.soak
@pytest.mark.parametrize('form, keys, _layouts, _steps', CASES)
def test_answers(form, keys, _layouts, _steps):
    """Loss without gradient, reconstruction of masked cells, and the logits of a classifier."""
    config, backend = ModelConfig(**keys), OpBackend(form)
    batch, = random_batches(config, 1, 5, SEED)
    batch.fields.pop('uniform', None)  # nothing is dropped
    one, two = pair(lambda: build_simmim(config, SEED, backend))
    np.testing.assert_allclose(two.loss(batch).asscalar(), one.loss(batch).asscalar(), rtol=1e-6)
    mask = batch.fields['mask'].repeat(4, 1).repeat(4, 2)[:, None]
    np.testing.assert_allclose(two.reconstruct(batch) * mask, one.reconstruct(batch) * mask, rtol=1e-5, atol=1e-5)
    one, two = pair(lambda: build_classifier(config, 3, SEED, backend))
    assert two.outputs(batch).shape == (5, 3)
    np.testing.assert_allclose(two.outputs(batch), one.outputs(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('form, precision', machine.ABLE)
@pytest.mark.parametrize('keys', [{**VIT, 'depth': 10}, SWIN], ids=NAMES[:2])
def test_gradients_of_a_classifier(keys, form, precision):
    """Of a ViT with so many users of one table that MXNet does not keep their gradients, but adds to one of them."""
    config, backend = ModelConfig(**keys), OpBackend(form, precision)
    rng = np.random.default_rng(SEED)
    images, = random_batches(config, 1, 7, SEED)
    batch = Batch({'image': images.fields['image'], 'uniform': images.fields['uniform'],
                   'label': rng.dirichlet(np.ones(3), 7).astype('float32')}, 0, images.index)
    one, two = pair(lambda: build_classifier(config, 3, SEED, backend))
    losses, gradients = [], []
    for placement in (one, two):
        losses.append(placement.forward_backward(batch, 7).asscalar())
        for spec in parameter_specs(placement.net):
            first, *others = spec.parameter.list_grad()
            for other in others:
                first += other.as_in_context(first.context)
        gradients.append(official.export_weights(placement.net, grad=True))
    tolerance = {'float32': 1e-5, 'bf16': 3e-2}[precision]
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance)
    for name, expected in gradients[0].items():
        error = np.linalg.norm(gradients[1][name] - expected)
        assert error <= tolerance * max(np.linalg.norm(expected), 1e-2), (name, error)
        assert np.abs(expected).max() > 0


def test_where_parameters_lie():
    """What is cut with its part, what half blocks share with all, the rest on the first device of each group."""
    net = build({**VIT, 'use_mean_pooling': True}, 4, tensor=2).placement.net
    groups = {None: ['cpu(0)', 'cpu(2)'], 0: ['cpu(0)', 'cpu(2)'], 1: ['cpu(1)', 'cpu(3)']}
    for spec in parameter_specs(net):
        part = spec.shard.index if spec.shard.count > 1 else None
        shared = '.norm1.' in spec.name or '.norm2.' in spec.name or '.gamma_' in spec.name
        expected = ['cpu(0)', 'cpu(1)', 'cpu(2)', 'cpu(3)'] if shared else groups[part]
        assert [str(ctx) for ctx in spec.parameter.list_ctx()] == expected, spec.key
        cut = spec.name.endswith(('qkv.weight', 'q_bias', 'v_bias', 'table', 'proj.weight', 'fc1.weight', 'fc1.bias',
                                  'fc2.weight')) and 'patch_embed' not in spec.name
        assert (part is not None) == cut, spec.key


@pytest.mark.parametrize('name', ['encoder.blocks.0.norm1.weight', 'encoder.blocks.1.mlp.fc1.weight[1]',
                                  'encoder.cls_token'])
def test_replicas_that_differ_are_seen(name):
    trainer = build(VIT, 4, tensor=2)
    parameter, = (spec.parameter for spec in parameter_specs(trainer.placement.net) if spec.key == name)
    parameter.list_data()[-1][:] += 1e-3
    with pytest.raises(ReplicasDiffer, match='device'):
        trainer.check_replicas()


@pytest.mark.unmeasured
def test_a_run_goes_on_under_another_layout(tmp_path):
    """The same weights, averages and moments at the hand-over, bit by bit, and the same validation loss; and back."""
    keys = dict(output=str(tmp_path), name='run', data=dict(path='digits', val_fraction=0.1, threads=1),
                validation=dict(images=8, pictures=1))

    def config(devices, **parallel):
        return tiny_config(model=VIT, devices=[f'cpu({i})' for i in range(devices)], seed=SEED, parallel=parallel,
                           train=dict(length=100, batch_size=8, store='local', ema=0.9, check_replicas=1), **keys)

    def arrays(trainer):
        return (official.export_weights(trainer.placement.net), trainer.average.arrays(),
                trainer.update_rule.state_dict())
    whole = {f'{moment}.{name}' for moment in ('mean', 'var') for name in named_parameters(build(VIT).placement.net)}
    trainer = build_trainer(config(1))
    for step, (devices, parallel) in enumerate([(2, dict(tensor=2)), (1, {}), (4, dict(tensor=2)),
                                                (4, dict(tensor=2, pipeline=2, micro_batches=2))], 1):
        train_randomly(trainer, 2, SEED + step)
        trainer.save()
        new = config(devices, **parallel)
        again = build_trainer(new, checkpoint=checkpoint_to_resume(new, TASKS['pretrain'](new), print))
        assert again.step == 2 * step
        for ours, theirs in zip(arrays(again), arrays(trainer)):
            assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        assert set(again.update_rule.state_dict()) == whole
        np.testing.assert_allclose(again.validate()['val_loss'], trainer.validate()['val_loss'], rtol=1e-6)
        trainer = again
