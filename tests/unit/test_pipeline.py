"""Transparency of a pipeline: cut in whatever way, a network has the gradients and the answers of one device."""
import json
import os
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from support import machine, passing
from support.running import DEADLINE, ROOT, rounds
from support.trainer import build_tiny_trainer, random_batches, relative_difference, tiny_config, train_randomly

from mxsimmim.config import ModelConfig
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.models import build_classifier, build_simmim, named_parameters
from mxsimmim.models.cost import segment_costs
from mxsimmim.ops import REFERENCE, OpBackend
from mxsimmim.parallel.pipeline import Pipeline
from mxsimmim.parallel.placement import Replicated
from mxsimmim.parallel.schedules import stages_of
from mxsimmim.planner import costs
from mxsimmim.planner.cluster import Cluster
from mxsimmim.tasks.pictures import grid, to_uint8
from mxsimmim.tasks.registry import TASKS
from mxsimmim.training.build import build_trainer
from mxsimmim.training.run_folder import checkpoint_to_resume

VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2, drop_path=0.3)
SWIN = dict(type='swin', img_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4,
            drop_path=0.2)
NETWORKS = [VIT, {**VIT, 'use_rpb': True, 'use_shared_rpb': False, 'use_ape': True, 'depth': 3},
            {**VIT, 'use_mean_pooling': True, 'init_values': None, 'norm_targets': True, 'drop_path': 0},
            SWIN, {**SWIN, 'ape': True, 'drop_path': 0}]
SEED = 9
IDS = ['vit', 'vit, own tables, positions', 'vit, pooling', 'swin', 'swin, positions']


def build(keys, devices=1, images=11, backend=REFERENCE, accumulate=1, recipe='fixed', **parallel):
    print('seed', SEED)
    return build_tiny_trainer(model=keys, devices=[f'cpu({i})' for i in range(devices)], seed=SEED, parallel=parallel,
                              optim=dict(recipe=recipe, clip_grad=0.5), backend=backend,
                              train=dict(batch_size=images, accumulate=accumulate, store='local', check_replicas=1))


def trained(trainer, steps=10):
    return train_randomly(trainer, steps, SEED)


@pytest.fixture(scope='module')
def alone():
    """What one device makes of a network, computed once."""
    made = {}

    def run(keys, form, **more):
        name = repr((keys, form, more))
        if name not in made:
            made[name] = trained(build(keys, backend=OpBackend(form), **more))
        return made[name]
    return run


CASES = [*((keys, 2, 2, 4) for keys in NETWORKS), (VIT, 3, 3, 1), (VIT, 4, 2, 3), (VIT, 4, 4, 5), (SWIN, 4, 2, 3),
         ({**VIT, 'drop_path': 0.0}, 3, 3, 2), ({**SWIN, 'drop_path': 0.0}, 2, 2, 2)]
IN_BOTH_FORMS = (VIT, 4, 2, 3), (SWIN, 4, 2, 3)  # of the operators: all in `make soak`


@pytest.mark.unmeasured
@pytest.mark.soak
@pytest.mark.parametrize('form, keys, devices, stages, micro_batches', [
    (form, *case) for form in machine.FORMS for case in CASES
    if form == machine.FORMS[-1] or case in rounds(IN_BOTH_FORMS, CASES)],
                         ids=lambda value: value['type'] if isinstance(value, dict) and 'type' in value else None)
def test_weights_are_those_of_one_device(alone, form, keys, devices, stages, micro_batches):
    """10 steps of 11 images, which no number of micro-batches and replicas divides."""
    trainer = build(keys, devices, backend=OpBackend(form), pipeline=stages, micro_batches=micro_batches)
    assert isinstance(trainer.placement, Pipeline)
    weights, rows = trained(trainer)
    expected, expected_rows = alone(keys, form)
    assert relative_difference(weights, expected) < 1e-5
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


@pytest.mark.parametrize('recipe', ['fixed', 'reference'])
@pytest.mark.parametrize('keys', [VIT, {**SWIN, 'recompute': True}], ids=['vit', 'swin, recomputed'])
def test_accumulated_parts(alone, keys, recipe):
    """With the reference's clipping between the parts, and with activations computed again."""
    form = machine.FORMS[-1]
    if form == 'reference':
        keys = {**keys, 'recompute': False}
    more = dict(accumulate=2, recipe=recipe)
    weights, rows = trained(build(keys, 2, backend=OpBackend(form), pipeline=2, micro_batches=3, **more))
    expected, expected_rows = alone(keys, form, **more)
    assert relative_difference(weights, expected) < 1e-5
    np.testing.assert_allclose(rows, expected_rows, rtol=1e-4)


@pytest.mark.parametrize('form', machine.FORMS)
@pytest.mark.parametrize('keys', [VIT, SWIN], ids=['vit', 'swin'])
def test_schedules_compute_the_same_bits(keys, form):
    one, other = (trained(build(keys, 3, backend=OpBackend(form), pipeline=3, micro_batches=5, schedule=name), 4)
                  for name in ('gpipe', '1f1b'))
    assert all(np.array_equal(one[0][name], other[0][name]) for name in one[0])
    np.testing.assert_array_equal(one[1], other[1])


def pair(make, keys, stages, replicas, micro_batches):
    """The same network on one device and cut."""
    config = ModelConfig(**keys)
    nets = [make(config), make(config)]
    parallel = tiny_config(model=keys, parallel=dict(pipeline=stages)).parallel
    contexts = [mx.cpu(i) for i in range(stages * replicas)]
    return (Replicated(nets[0], [mx.cpu(0)]),
            Pipeline(nets[1], contexts, stages_of(parallel, segment_costs(config)), micro_batches))


@pytest.mark.parametrize('keys', NETWORKS[:4], ids=IDS[:4])
@pytest.mark.parametrize('stages, replicas', [(2, 1), (3, 1), (2, 2)])
def test_answers(keys, stages, replicas):
    """Loss without gradient, reconstruction, and the logits of a classifier."""
    batch, = random_batches(ModelConfig(**keys), 1, 5, SEED)
    batch.fields.pop('uniform', None)  # nothing is dropped
    one, cut = pair(lambda config: build_simmim(config, SEED), keys, stages, replicas, 2)
    np.testing.assert_allclose(cut.loss(batch).asscalar(), one.loss(batch).asscalar(), rtol=1e-6)
    np.testing.assert_allclose(cut.reconstruct(batch), one.reconstruct(batch), rtol=1e-5, atol=1e-6)
    keys = {key: value for key, value in keys.items() if key != 'norm_targets'}
    one, cut = pair(lambda config: build_classifier(config, 3, SEED), keys, stages, replicas, 2)
    assert cut.outputs(batch).shape == (5, 3)
    np.testing.assert_allclose(cut.outputs(batch), one.outputs(batch), rtol=1e-5, atol=1e-6)


@machine.natively
@pytest.mark.parametrize('keys', [VIT, SWIN], ids=['vit', 'swin'])
def test_pictures_are_those_of_one_device(keys):
    """Natively the last stage computes masked cells alone, and no others are drawn."""
    batch, = random_batches(ModelConfig(**keys), 1, 3, SEED)
    batch.fields.pop('uniform')
    one, cut = (to_uint8(placement.reconstruct(batch), [0.5] * 3, [0.2] * 3) for placement in pair(
        lambda config: build_simmim(config, SEED, OpBackend('native')), keys, 2, 1, 2))
    drawn, expected = (grid(batch.fields['image'], batch.fields['mask'], images).astype(int) for images in (cut, one))
    assert abs(drawn - expected).max() <= 1  # of 255, where a value is on an edge


@pytest.mark.parametrize('keys', [VIT, {**VIT, 'use_mean_pooling': True}, SWIN], ids=['vit', 'vit, pooling', 'swin'])
def test_gradients_of_a_classifier(keys):
    rng = np.random.default_rng(SEED)
    images, = random_batches(ModelConfig(**keys), 1, 7, SEED)
    batch = Batch({'image': images.fields['image'], 'uniform': images.fields['uniform'],
                   'label': rng.dirichlet(np.ones(3), 7).astype('float32')}, 0, images.index)
    placements = pair(lambda config: build_classifier(config, 3, SEED), keys, 2, 2, 2)
    losses = [placement.forward_backward(batch, 7).asscalar() for placement in placements]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    one, cut = ({name: sum(g.asnumpy() for g in p.list_grad()) for name, p in named_parameters(placement.net).items()}
                for placement in placements)
    assert relative_difference(cut, one) < 1e-5 and all(np.abs(value).max() > 0 for value in one.values())


def test_where_parameters_lie():
    """With the stage that uses them, in each replica; the shared table with all; what nothing uses with the head."""
    net = build({**VIT, 'use_mean_pooling': True}, 4, pipeline=2, micro_batches=2).placement.net
    there = {name: [str(ctx) for ctx in p.list_ctx()] for name, p in named_parameters(net).items()}
    first, second, every = ['cpu(0)', 'cpu(2)'], ['cpu(1)', 'cpu(3)'], ['cpu(0)', 'cpu(1)', 'cpu(2)', 'cpu(3)']
    assert there.pop('encoder.rel_pos_bias.relative_position_bias_table') == every
    assert there['encoder.fc_norm.weight'] == there['decoder.0.weight'] == second
    for name, contexts in there.items():
        early = name.startswith(('encoder.blocks.0.', 'encoder.blocks.1.', 'encoder.patch_embed.')) or name in (
            'encoder.cls_token', 'encoder.mask_token')
        assert contexts == (first if early else second), name


def test_a_run_goes_on_under_another_layout(tmp_path):
    """The same weights and moments at the hand-over, bit by bit, and the same validation loss."""
    keys = dict(output=str(tmp_path), name='run', data=dict(path='digits', val_fraction=0.1, threads=1),
                validation=dict(images=8, pictures=1))

    def config(devices, **parallel):
        return tiny_config(model=VIT, devices=[f'cpu({i})' for i in range(devices)], seed=SEED, parallel=parallel,
                           train=dict(length=4, batch_size=8, store='local'), **keys)
    trainer = build_trainer(config(2, pipeline=2, micro_batches=2))
    trainer.fit()
    saved, moments = official.export_weights(trainer.placement.net), trainer.update_rule.state_dict()
    losses = {}
    for devices, parallel in ((1, {}), (3, dict(pipeline=3, micro_batches=4)), (4, dict(pipeline=2, micro_batches=1))):
        new = config(devices, **parallel)
        checkpoint = checkpoint_to_resume(new, TASKS['pretrain'](new), print)
        again = build_trainer(new, checkpoint=checkpoint)
        assert again.step == 4
        for ours, theirs in ((official.export_weights(again.placement.net), saved),
                             (again.update_rule.state_dict(), moments)):
            assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in theirs)
        losses[devices] = again.validate()['val_loss']
    np.testing.assert_allclose(list(losses.values()), losses[1], rtol=1e-6)


@machine.natively
@pytest.mark.unmeasured
def test_memory_of_what_is_in_flight():
    """A cached graph keeps as many states as micro-batches are in flight, each as large as the planner says."""
    # Blocks of 64 KB and more come from the system and go back to it, so that what is resident is what is held.
    environ = {**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': str(1 << 16)}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'support.passing'], cwd=ROOT / 'tests', env=environ,
                          timeout=DEADLINE, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    config = tiny_config(model=passing.MODEL, train=dict(batch_size=2 * passing.IMAGES))
    stages = costs.stages_for(config, Cluster(1, 2, 1e12, kind='cpu'),
                              costs.Layout(pipeline=passing.STAGES, micro_batches=2))
    state = passing.IMAGES * np.mean([stage.kept + stage.planned for stage in stages])
    # 1F1B of two stages has 2 and 1 in flight, however many there are; GPipe all of them on each.
    assert found['1f1b 6'] - found['1f1b 2'] < 0.4 * state
    np.testing.assert_allclose(found['gpipe 3'] - found['1f1b 6'], (2 * 3 - 3) * state, rtol=0.15)
    np.testing.assert_allclose(found['gpipe 5'] - found['gpipe 3'], 2 * 2 * state, rtol=0.15)
    assert found['evaluation'] - found['gpipe 5'] < 0.8 * state  # of micro-batches, too
