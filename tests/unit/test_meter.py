import json
import math

import mxnet as mx
import pytest

from mxsimmim.training.spikes import LEAST
from mxsimmim.training.step_metrics import LossSpike, StepMetrics, TooManyBadSteps


def stats(loss, norm, applied=1):
    return mx.nd.array([loss, norm, applied])


def test_summary_is_the_mean_over_applied_updates():
    meter = StepMetrics(3)
    for step, row in enumerate([(1.0, 4.0), (float('nan'), 9.0, 0), (3.0, 8.0)], 1):
        meter.add(step, step / 10, stats(*row))
    summary = meter.summary()
    assert (summary['loss'], summary['grad_norm'], summary['lr'], summary['skipped']) == (2.0, 6.0, 0.3, 1)
    assert not meter.pending


def test_a_window_cut_by_an_interruption_sums_up_the_same():
    whole, before = StepMetrics(9), StepMetrics(9)
    rows = [(0.1, 1.1), (float('nan'), float('inf'), 0), (0.7, 1.3), (0.2, 0.9)]
    for step, row in enumerate(rows, 1):
        whole.add(step, 0.1, stats(*row))
        if step <= 2:
            before.add(step, 0.1, stats(*row))
    after = StepMetrics(9, json.loads(json.dumps(before.state(), allow_nan=False)))
    for step, row in enumerate(rows[2:], 3):
        after.add(step, 0.1, stats(*row))
    first, second = whole.summary(), after.summary()
    assert {k: first[k] for k in ('loss', 'grad_norm', 'lr', 'skipped')} == \
           {k: second[k] for k in ('loss', 'grad_norm', 'lr', 'skipped')}


def test_bad_steps_in_a_row_end_the_run_across_an_interruption():
    meter = StepMetrics(3)
    for step in (1, 2):
        meter.add(step, 0.5, stats(float('nan'), 1.0, 0))
    resumed = StepMetrics(3, meter.state())
    resumed.add(3, 0.25, stats(1.0, float('inf'), 0))
    with pytest.raises(TooManyBadSteps) as error:
        resumed.read()
    for part in ('3 steps in a row', 'train.max_bad_steps=3', 'step 3', 'rate 0.25', 'norm inf'):
        assert part in str(error.value)
    assert error.value.step == 3


def test_one_good_step_starts_the_count_anew():
    meter = StepMetrics(2)
    for step, applied in enumerate([0, 1, 0, 1, 0], 1):
        meter.add(step, 0.1, stats(1.0, 1.0, applied))
    assert meter.summary()['skipped'] == 3


def test_nothing_applied_has_no_mean():
    meter = StepMetrics(5)
    meter.add(1, 0.1, stats(float('nan'), 1.0, 0))
    assert math.isnan(meter.summary()['loss'])


def test_a_spike_is_raised_before_what_comes_after_it():
    """With the losses before it, which an interruption does not forget; what was skipped is told, once."""
    told = []
    first = StepMetrics(9, spike=10, on_skip=lambda row: told.append(row.step))
    for step in range(1, LEAST + 2):
        first.add(step, 0.1, stats(1 + 0.1 * (step % 3), 1.0) if step != 7 else stats(99.0, float('inf'), 0))
    state = json.loads(json.dumps(first.state(), allow_nan=False))
    assert told == [7] and len(state['recent']) == LEAST
    resumed = StepMetrics(9, state, spike=10, on_skip=lambda row: told.append(row.step))
    for step, loss in ((22, 1.2), (23, 50.0), (24, 60.0)):
        resumed.add(step, 0.1, stats(loss, 1.0))
    with pytest.raises(LossSpike) as error:
        resumed.read()
    assert error.value.step == 23 and error.value.spike.spike_loss == 50 and told == [7]
    assert error.value.spike.median == pytest.approx(1.1)
    plain = StepMetrics(9, state)
    plain.add(22, 0.1, stats(50.0, 1.0))
    assert plain.summary()['skipped'] == 1 and 'recent' not in plain.state()
