"""The best validation so far and what follows from those that are not, by tables."""
import json
import math

import pytest

from mxsimmim.config import TrainConfig
from mxsimmim.training.plateau import PlateauTracker


def observed(scores, **keys):
    """(is a new best, factor, ended) after each of the scores."""
    progress = PlateauTracker(TrainConfig(**keys))
    return [(progress.observe(score), progress.factor, progress.ended) for score in scores]


def test_a_best_is_higher_than_all_before():
    assert [best for best, *_ in observed([-3, -4, -3, -2.5, -2.5, 7])] == [True, False, False, True, False, True]


def test_nan_is_never_the_best():
    assert [best for best, *_ in observed([math.nan, -1, math.nan, 0])] == [False, True, False, True]
    assert observed([math.nan] * 2, stop_early=2)[-1] == (False, 1.0, True)


def test_the_rate_falls_after_patience_validations_without_a_best_and_again_after_as_many():
    scores = [5, 4, 5, 4, 4, 6, 1, 1, 1]
    assert [factor for _, factor, _ in observed(scores, lr_on_plateau=0.5, patience=2)] == [
        1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]  # a new best restores nothing
    assert [factor for _, factor, _ in observed(scores, patience=2)] == [1.0] * 9


def test_it_ends_after_stop_early_validations_without_a_best():
    scores = [5, 4, 4, 6, 5, 6, 4]
    assert [ended for *_, ended in observed(scores, stop_early=3)] == [False] * 6 + [True]
    assert not any(ended for *_, ended in observed(scores))
    assert not PlateauTracker(TrainConfig(stop_early=1)).ended


@pytest.mark.parametrize('cut', range(8))
def test_the_state_goes_through_json(cut):
    """Cut anywhere, what follows is the same; and `stop_early` counts what was before it was set."""
    scores, keys = [1, 3, 2, 2, math.nan, 2, 3], dict(lr_on_plateau=0.1, patience=2, stop_early=4)
    first = PlateauTracker(TrainConfig(lr_on_plateau=0.1, patience=2))
    for score in scores[:cut]:
        first.observe(score)
    second = PlateauTracker(TrainConfig(**keys), json.loads(json.dumps(first.state())))
    found = [(second.observe(score), second.factor, second.ended) for score in scores[cut:]]
    assert found == observed(scores, **keys)[cut:]
    assert second.state() == {'best': 3, 'without': 5, 'patient': 1, 'factor': pytest.approx(0.01)}


def test_a_state_is_a_copy():
    progress = PlateauTracker(TrainConfig())
    progress.state()['factor'] = 0.0
    assert progress.factor == 1
