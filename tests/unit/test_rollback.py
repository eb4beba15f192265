"""A loss that spikes: back to the last checkpoint and past the batches since then, however often a run is killed."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from support.running import rounds
from support.together import together
from support.trainer import tiny_config

from mxsimmim.config import CheckpointConfig
from mxsimmim.data.sampling import batch_at
from mxsimmim.interop import official
from mxsimmim.training.build import build_trainer
from mxsimmim.training.checkpoint import newest, save, saved_steps
from mxsimmim.training.restore import before_spike
from mxsimmim.training.run_folder import folder_of
from mxsimmim.training.run_logger import RunLogger, read_metrics
from mxsimmim.training.spikes import Spike
from mxsimmim.training.step_metrics import LossSpike

LENGTH = 40


class Killed(Exception):
    """The end of a process."""


def config(folder, name='run', length=LENGTH, **train):
    return tiny_config(output=str(folder), name=name, checkpoint=dict(every=10), log=dict(every=7),
                       train=dict(length=length, batch_size=4, rollback=True, **train))


def spiking(trainer, bad, calls=None, kills=()):
    """The trainer, to which the batches at these places in the order of the data have a loss of 100.

    It is killed in the steps of these numbers; `calls` holds those that other processes made before.
    """
    compute, made = trainer.placement.forward_backward, [] if calls is None else calls
    orders = {tuple(batch_at(place, len(trainer.task.source), 4, 0)[1][trainer.split.part]) for place in bad}

    def forward_backward(batch, *others):
        made.append(trainer.step)
        if len(made) in kills:
            raise Killed
        loss = compute(batch, *others)
        return loss + 100 if tuple(batch.index) in orders else loss
    trainer.placement.forward_backward = forward_backward
    return trainer


def weights(trainer):
    return official.export_weights(trainer.placement.net)


def assert_same(ours, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def trained(config, bad, kills=(), **keys):
    """The trainer at the end of a run that is killed in these steps, and goes on each time."""
    calls = []
    while True:
        checkpoints = folder_of(config) / 'checkpoints'
        saved = newest(checkpoints, print)
        with RunLogger(folder_of(config), LENGTH, saved.step if saved else 0) as logger:
            trainer = build_trainer(config, checkpoint=saved, logger=logger, **keys)
            try:
                assert spiking(trainer, bad, calls, kills).fit() == 0
                return trainer
            except Killed:
                continue


def events(run):
    return [{key: value for key, value in row.items() if key != 'time'} for row in read_metrics(run) if 'event' in row]


def losses(run):
    return [(row['step'], row['loss']) for row in read_metrics(run) if 'loss' in row]


@pytest.fixture(scope='module')
def left_out(tmp_path_factory):
    """A run that never has batches 20 to 24."""
    ours = build_trainer(config(tmp_path_factory.mktemp('left_out')))
    ours.skipped_batches = [(20, 5)]
    assert ours.fit() == 0
    return ours


@pytest.mark.parametrize('kills', [(), (27,), (25, 31), (33,)], ids=str)
def test_the_batches_since_the_checkpoint_are_left_out(tmp_path, capsys, left_out, kills):
    """The spike of step 25 is seen when step 28 is logged. Killed before or after that, the run ends the same."""
    ours = trained(config(tmp_path), [24], kills)
    assert ours.step == LENGTH and ours.skipped_batches == [(20, 5)]
    assert_same(weights(ours), weights(left_out))
    assert_same(ours.update_rule.state_dict(), left_out.update_rule.state_dict())
    run = tmp_path / 'run'
    assert saved_steps(run / 'checkpoints') == [30, 40]
    [event] = events(run)
    assert (event['step'], event['event'], event['spike_step']) == (20, 'rollback', 25)
    assert 100 < event['spike_loss'] < 103 and 0.3 < event['median'] < 2 and event['deviations'] > 100
    assert [step for step, _ in losses(run)] == [7, 14, 21, 28, 35, 40]
    assert all(loss < 3 for _, loss in losses(run))
    assert 'back to the checkpoint of step 20, without the 5 batches since then' in capsys.readouterr().err


def test_before_the_first_checkpoint_and_twice_with_progress(tmp_path):
    """Back to step 0, where a run with rollbacks saves first; later spikes are counted anew."""
    ours = trained(config(tmp_path), [22, 24, 37, 60])
    # Step 23 goes back to 20, whence batch 24 comes second; 37 is step 33 by then, and 60 is behind the last one.
    assert ours.skipped_batches == [(20, 3), (20, 2), (30, 3)]
    assert [(row['step'], row['spike_step']) for row in events(tmp_path / 'run')] == [(20, 23), (20, 22), (30, 33)]
    early = tiny_config(output=str(tmp_path), name='early', checkpoint=dict(every=50), log=dict(every=7),
                        train=dict(length=30, batch_size=4, rollback=True))
    ours = trained(early, [24, 54])  # the second one is the last step's, seen before its checkpoint is saved
    assert ours.skipped_batches == [(0, 25), (0, 30)] and saved_steps(tmp_path / 'early' / 'checkpoints') == [0, 30]
    assert [(row['step'], row['spike_step']) for row in events(tmp_path / 'early')] == [(0, 25), (0, 30)]
    assert [step for step, _ in losses(tmp_path / 'early')] == [7, 14, 21, 28, 30]


def test_a_run_that_comes_back_again_and_again_ends(tmp_path):
    with pytest.raises(ValueError, match=r'^step 21 has a loss of 10\d\.?\d*, .* \(train.spike=10\), after 3 others '
                       'since the checkpoint of step 20: other batches do not help. Lower optim.base_lr'):
        trained(config(tmp_path), range(24, 200))
    assert [(row['step'], row['spike_step']) for row in events(tmp_path / 'run')] == [(20, 25), (20, 21), (20, 21)]
    state = json.loads((tmp_path / 'run' / 'checkpoints' / 'step-00000020' / 'state.json').read_text())['state']
    assert state['skipped_batches'] == [[20, 5], [20, 1], [20, 1]]


def test_the_second_place_will_do(tmp_path):
    """Where the run's own folder has no checkpoint any more."""
    second = tmp_path / 'second'
    keys = config(tmp_path).model_copy(update={'checkpoint': CheckpointConfig(copy_to=str(second))})
    path = save(second / 'run' / 'checkpoints', 20, {}, {}, keep=1)
    alone = SimpleNamespace(rank=0, broadcast_object=lambda _, make: make())
    saved, told = before_spike(keys, LossSpike(30, Spike(9.0, 0.5, 12.0)), alone, print)
    assert (saved.step, saved.path) == (20, path) and told.startswith('step 30 has a loss of 9, 12 robust deviations')


def test_without_the_key_nothing_happens(tmp_path):
    keys = tiny_config(output=str(tmp_path), name='off', train=dict(length=30, batch_size=4), log=dict(every=7))
    ours = spiking(build_trainer(keys), [25])
    assert ours.fit() == 0 and ours.skipped_batches == [] and 'recent' not in ours.state_dict()['meter']


@pytest.mark.soak
@pytest.mark.parametrize('keys', [
    dict(ema=0.9, compression='2bit', threshold=0.02), dict(aggregation='elastic', local_steps=5),
    dict(aggregation='local_sgd', local_steps=5, average_moments=False)][:rounds(2, 3)],
    ids=lambda keys: ' '.join(map(str, keys.values())))
@pytest.mark.unmeasured
def test_workers_go_back_together(tmp_path, keys):
    """One worker's loss spikes, all go back, to what each of them had: as if the batches had never come."""
    def work(build):
        whole = build(config(tmp_path, 'whole', 30, **keys))
        whole.skipped_batches = [(20, 5)]
        assert whole.fit() == 0
        ours = build(config(tmp_path, 'run', 30, **keys))
        spiking(ours, [24] if ours.control.rank else [])
        assert ours.fit() == 0 and ours.skipped_batches == [(20, 5)]
        assert_same(weights(ours), weights(whole))
        if ours.average:
            assert_same(ours.average.arrays(), whole.average.arrays())
    together(2, work)
