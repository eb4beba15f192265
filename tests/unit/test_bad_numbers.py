"""Numbers that are not finite: however the work is shared, all skip that step, and go on as if it had not been."""
import numpy as np
import pytest
from support import machine
from support.together import together
from support.trainer import build_tiny_trainer, random_batches, take, tiny_config

from mxsimmim.interop import official
from mxsimmim.models import parameter_specs
from mxsimmim.ops import OpBackend
from mxsimmim.training.build import build_trainer
from mxsimmim.training.checkpoint import load
from mxsimmim.training.run_logger import RunLogger, read_metrics

SEED, IMAGES = 17, 8
VIT = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)


def batches(config, *bad):
    """A good batch, and after each in which one image, (number, value), is not finite another good one; floats."""
    made = list(random_batches(config.model, 1 + 2 * len(bad), IMAGES, SEED))
    for batch in made:
        batch.fields['image'] = batch.fields['image'].transpose(0, 3, 1, 2).astype('float32') / 255
    for batch, (image, value) in zip(made[1::2], bad):
        batch.fields['image'][image] = value
    return made


def held(trainer):
    """Weights and moments, of which all copies are the same."""
    moments = {name: [copy.asnumpy() for copy in copies]
               for name, copies in trainer.update_rule.optimizer.moments.items()}
    moments.update({spec.key: [copy.asnumpy() for copy in spec.parameter.list_data()]
                    for spec in parameter_specs(trainer.placement.net)})
    assert all(np.array_equal(copy, copies[0]) for copies in moments.values() for copy in copies[1:])
    return {name: copies[0] for name, copies in moments.items()}


def same(ours, expected):
    return all(np.array_equal(ours[name], value) for name, value in expected.items())


def assert_skipped(trainer, made):
    """Of the steps every other one, from the second on, changes nothing."""
    rows = []
    for number, batch in enumerate(made):
        before = held(trainer)
        rows.append(trainer.train_step(take(batch, trainer.split.part)).asnumpy())
        assert same(held(trainer), before) == number % 2, (number, rows)
    rows = np.array(rows)
    assert np.array_equal(rows[:, 2], 1 - np.arange(len(rows)) % 2)
    assert np.isfinite(rows[::2]).all() and not np.isfinite(rows[1::2]).all(1).any()


@pytest.mark.parametrize('devices, parallel, train, recipe', [
    (1, {}, {}, 'fixed'), (2, {}, {}, 'fixed'), (2, dict(tensor=2), {}, 'fixed'),
    (2, dict(pipeline=2, micro_batches=4), {}, 'fixed'),
    (1, {}, dict(accumulate=4), 'fixed'), (1, {}, dict(accumulate=4), 'reference'),
    (2, dict(pipeline=2, micro_batches=2), dict(accumulate=2), 'reference')], ids=str)
def test_layouts_of_a_worker(devices, parallel, train, recipe):
    """An image of the first micro-batch, or of the last, is not finite."""
    trainer = build_tiny_trainer(model=VIT, devices=[f'cpu({i})' for i in range(devices)], parallel=parallel,
                                 optim=dict(recipe=recipe, clip_grad=0.5),
                                 train=dict(batch_size=IMAGES, store='local', **train))
    assert_skipped(trainer, batches(trainer.config, (0, np.nan), (IMAGES - 1, np.inf)))


@pytest.mark.parametrize('form, precision', machine.ABLE)
def test_forms_and_precisions(form, precision):
    trainer = build_tiny_trainer(model=VIT, train=dict(batch_size=IMAGES), backend=OpBackend(form, precision))
    assert_skipped(trainer, batches(trainer.config, (3, np.nan), (2, np.inf)))


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e30], ids=str)
@pytest.mark.parametrize('devices', [1, 2])
def test_early_parts_of_the_reference_recipe(bad, devices):
    """A gradient of the first part alone: 1e30, whose square is infinite, would be clipped to nothing."""
    trainer = build_tiny_trainer(model=VIT, devices=[f'cpu({i})' for i in range(devices)],
                                 optim=dict(recipe='reference', clip_grad=0.5),
                                 train=dict(batch_size=IMAGES, accumulate=4, store='local'))
    clip, calls = trainer._on_micro_batch, []

    def spoiled():
        calls.append(trainer.step)
        if calls == [0] * 3 + [1]:
            trainer.update_rule._parameters[2].list_grad()[-1][:] = bad
        clip()
    trainer._on_micro_batch = spoiled
    for number, batch in enumerate(random_batches(trainer.config.model, 3, IMAGES, SEED)):
        before = held(trainer)
        *_, applied = trainer.train_step(batch).asnumpy()
        assert applied == (number != 1) and same(held(trainer), before) == (number == 1), number
    assert len(calls) == 9


@pytest.mark.parametrize('train', [{}, {'compression': '2bit', 'threshold': 0.02}, {'compression': 'fp16'},
                                   {'accumulate': 2}], ids=lambda keys: ' '.join(map(str, keys.values())) or '-')
def test_workers_agree(train):
    """One worker's image, or only its loss, is not finite: all skip."""
    def work(build):
        trainer = build(tiny_config(model=VIT, train=dict(batch_size=IMAGES, **train)))
        if trainer.control.rank == 1:
            compute = trainer.placement.forward_backward
            trainer.placement.forward_backward = lambda *given: compute(*given) + (np.inf if trainer.step == 3 else 0)
        made = batches(trainer.config, (IMAGES - 1, np.nan))
        assert_skipped(trainer, [*made, made[0], made[0]])
        trainer.metrics.read()
        assert trainer.metrics.skipped == 2
    together(2, work, 'horovod' if train.get('compression') == 'fp16' else 'ps')


@pytest.mark.parametrize('aggregation', ['local_sgd', 'elastic'])
def test_workers_that_go_alone_skip_alone(aggregation):
    """Between meetings; the job counts the step as skipped, in all workers, and meets with finite weights."""
    def work(build):
        trainer = build(tiny_config(model=VIT, train=dict(batch_size=IMAGES, aggregation=aggregation, local_steps=3)))
        alone = trainer.control.rank == 1
        rows = []
        for number, batch in enumerate(batches(trainer.config, (IMAGES - 1, np.nan))):
            before = held(trainer)
            rows.append(trainer.train_step(take(batch, trainer.split.part)).asnumpy())
            assert same(held(trainer), before) == (alone and number == 1)
        assert [applied for *_, applied in rows] == [1, not alone, 1]
        trainer.metrics.read()
        return trainer.metrics.skipped, official.export_weights(trainer.placement.net)
    (skipped, ours), (others, theirs) = together(2, work)
    assert skipped == others == 1
    assert all(np.isfinite(value).all() for value in [*ours.values(), *theirs.values()])
    if aggregation == 'local_sgd':
        assert same(ours, theirs)


def test_each_skipped_step_is_an_event(tmp_path):
    """Written once, also by a run that goes on; the log's records count them as ever."""
    keys = tiny_config(output=str(tmp_path), name='run', model=VIT, log=dict(every=4), checkpoint=dict(every=3),
                       train=dict(batch_size=IMAGES, length=12))
    bad = {3: 'loss', 6: 'gradient', 7: 'gradient', 11: 'loss'}

    def spoil(trainer):
        compute = trainer.placement.forward_backward

        def forward_backward(batch, *others):
            loss, cause = compute(batch, *others), bad.get(trainer.step + 1)
            if cause == 'gradient':
                trainer.update_rule._parameters[0].list_grad()[0][:] = np.nan
            return loss * np.nan if cause == 'loss' else loss
        trainer.placement.forward_backward = forward_backward
        return trainer
    with RunLogger(tmp_path / 'run', 12) as logger:
        trainer = spoil(build_trainer(keys, logger=logger))
        for _, batch in trainer.loader.iterate(0, 7):
            trainer.train_step(batch)
            if trainer.step == 6:
                trainer.save()
        trainer.metrics.read()  # and the process ends

    with RunLogger(tmp_path / 'run', 12, 6) as logger:
        saved = load(tmp_path / 'run' / 'checkpoints' / 'step-00000006')
        assert spoil(build_trainer(keys, checkpoint=saved, logger=logger)).fit() == 0
    records = read_metrics(tmp_path / 'run')
    assert [(row['step'], row['event'], row['cause']) for row in records if 'event' in row] == [
        (step, 'skipped', cause) for step, cause in bad.items()]
    assert [(row['step'], row['skipped']) for row in records if 'loss' in row] == [(4, 1), (8, 3), (12, 4)]
