"""The trainer by itself: where it stops, goes on, and what it says of steps that cannot be applied."""
import signal
from types import SimpleNamespace

import mxnet as mx
import numpy as np
import pytest
from support.trainer import build_tiny_trainer, random_batches, tiny_config

from mxsimmim.interop import official
from mxsimmim.models import named_parameters
from mxsimmim.parallel.mesh import Mesh
from mxsimmim.training import status
from mxsimmim.training.build import build_trainer
from mxsimmim.training.checkpoint import load, saved_steps
from mxsimmim.training.run_logger import RunLogger
from mxsimmim.training.step_metrics import TooManyBadSteps


class StopAt:
    """A signal that comes while a trainer makes update number `step`."""

    def __init__(self, trainer, step):
        self._trainer, self._step = trainer, step

    @property
    def signal(self):
        return signal.SIGTERM if self._trainer.step == self._step else 0


def weights(trainer):
    return official.export_weights(trainer.placement.net)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, capsys):
    def config(name):
        return tiny_config(output=str(tmp_path), name=name, checkpoint=dict(every=4), log=dict(every=3),
                           train=dict(length=9, ema=0.5))

    whole = build_trainer(config('whole'))
    assert whole.fit() == 0 and whole.step == 9
    first = build_trainer(config('cut'))
    assert first.fit(StopAt(first, 5)) == signal.SIGTERM and first.step == 5
    assert 'stopped by signal 15: step 5 is saved' in capsys.readouterr().err
    checkpoints = tmp_path / 'cut' / 'checkpoints'
    assert saved_steps(checkpoints) == [4, 5]
    second = build_trainer(config('cut'), checkpoint=load(checkpoints / 'step-00000005'))
    assert second.step == 5 and second.state_dict() == first.state_dict()
    assert second.fit() == 0 and second.step == 9
    for ours, expected in ((weights(second), weights(whole)), (second.average.arrays(), whole.average.arrays()),
                           (second.update_rule.state_dict(), whole.update_rule.state_dict())):
        assert set(ours) == set(expected)
        assert all(np.array_equal(ours[name], expected[name]) for name in ours)


def test_a_record_is_one_write_of_the_status(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(status, 'write', lambda path, told: written.append(told))
    with RunLogger(tmp_path / 'run', 6) as logger:
        trainer = build_trainer(tiny_config(output=str(tmp_path), name='run', log=dict(every=2), train=dict(length=6)),
                                logger=logger)
        assert trainer.fit() == 0
    assert [told['step'] for told in written] == [0, 2, 4, 6]
    for told in written[1:]:
        (worker,), speed = told['workers'], told['steps_per_second']
        assert worker['seconds'] > 0 and speed * 8 == pytest.approx(told['images_per_second']) and told['loss'] > 0


def test_a_trainer_without_a_logger_validates(tmp_path):
    trainer = build_tiny_trainer(output=str(tmp_path), name='run', data=dict(val_fraction=0.1),
                                 validation=dict(images=16, pictures=2))
    values = trainer.validate()
    assert 0.5 < values['val_loss'] < 3 and trainer.validate() == values
    assert not list(tmp_path.iterdir())


def test_a_step_counts_and_tells_what_it_did():
    trainer = build_tiny_trainer(train=dict(batch_size=4))
    before = weights(trainer)
    for batch in random_batches(trainer.config.model, 2, 4, seed=1):
        loss, norm, applied = trainer.train_step(batch).asnumpy()
        assert 0 < loss < 3 and norm > 0 and applied == 1
    assert trainer.step == 2 and trainer.metrics.summary()['loss'] == pytest.approx(loss, rel=0.5)
    largest = max(np.abs(after - before[name]).max() for name, after in weights(trainer).items())
    assert 1e-3 < largest < 3e-3  # two updates of AdamW with a rate of 1e-3, and decay


@pytest.mark.parametrize('rank, size, name, told', [
    (0, 1, 'bad-samples.txt', 'Samples of step 3: '),
    (3, 4, 'bad-samples-3.txt', 'Samples of step 3 that rank 3 had: ')])
def test_the_samples_of_bad_steps_are_listed_by_each_worker(tmp_path, rank, size, name, told):
    trainer = build_tiny_trainer(output=str(tmp_path), name='run', log=dict(every=1),
                                 train=dict(batch_size=10, max_bad_steps=3))
    named_parameters(trainer.placement.net)['decoder.0.bias'].set_data(mx.nd.full((48,), np.nan))
    trainer.control = SimpleNamespace(rank=rank, size=size, mesh=Mesh(data=size, rank=rank))
    with pytest.raises(TooManyBadSteps) as error:
        trainer.fit()
    expected = [f'digits#{index}' for index in trainer.samples(2)[1]]
    assert (tmp_path / 'run' / name).read_text().split() == expected and len(expected) == 10
    assert str(error.value).endswith(
        f'. {told}{", ".join(expected[:8])} and 2 more, all in {tmp_path}/run/{name}')
    assert [path.name for path in (tmp_path / 'run').iterdir()] == [name]


def test_samples_that_cannot_be_listed_hide_nothing(tmp_path):
    (tmp_path / 'run').touch()
    trainer = build_tiny_trainer(output=str(tmp_path), name='run', train=dict(max_bad_steps=1, batch_size=4, length=1))
    named_parameters(trainer.placement.net)['decoder.0.bias'].set_data(mx.nd.full((48,), np.nan))
    with pytest.raises(TooManyBadSteps, match=r'not finite in 1 steps .*: digits#\d+, .* \(which cannot be written: '):
        trainer.fit()
