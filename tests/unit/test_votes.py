"""What workers agree on after a step: to stop, and to save by rank 0's clock. All do the same after the same step."""
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support.workers import each

from mxsimmim.parallel import protocol
from mxsimmim.parallel.asynchronous import AsynchronousUpdate
from mxsimmim.parallel.periodic import LocalSGD
from mxsimmim.parallel.updates import SynchronousUpdate


def bare(kind, **attributes):
    """An update rule that can do nothing but vote."""
    rule = kind.__new__(kind)
    vars(rule).update(attributes)
    return rule


def polled(rule, rank, saving, stopping=(), due=(), last=12, pause=lambda: None):
    """[(step, stop_at, save)] of the steps after which a worker hears of anything; rank 0 rings, rank 1 stops."""
    heard = []
    for step in range(1, last + 1):
        agreed = rule.poll(step, rank == 1 and step in stopping, rank == 0 and step in saving, step in due)
        if agreed != (None, False):
            heard.append((step, *agreed))
        if step == agreed.stop_at:
            break
        pause()
    return heard


def test_a_worker_alone_is_heard_at_once():
    rule = bare(SynchronousUpdate, _several=False)
    assert polled(rule, 0, saving=(2, 5)) == [(2, None, True), (5, None, True)]
    assert rule.poll(7, True) == (7, False)


def test_synchronous_workers_hear_a_step_later():
    def work(control):
        rule = bare(SynchronousUpdate, _several=True, _votes=None, _communicator=SimpleNamespace(control=control))
        return polled(rule, control.rank, saving=(2, 5, 9), stopping=(9,))
    assert each(3, work) == [[(3, None, True), (6, None, True), (10, 10, True)]] * 3


def test_workers_that_go_alone_hear_where_they_meet():
    def work(control):
        rule = bare(LocalSGD, _every=4, _last=12, _saving=False, workers=SimpleNamespace(control=control))
        return polled(rule, control.rank, saving=(1, 3, 8), stopping=(12,))
    assert each(2, work) == [[(4, None, True), (8, None, True), (12, 12, False)]] * 2


class Board:
    """The servers' board, as each worker pulls it."""

    def __init__(self):
        self._sums, self._lock = np.zeros(protocol.BOARD_SHAPE), threading.Lock()

    def add(self, field, values):
        with self._lock:
            self._sums[0, field:field + len(values)] += values

    def asnumpy(self):
        return self._sums.copy()


@pytest.mark.parametrize('seed', range(6))
def test_asynchronous_workers_go_on_to_the_furthest_one(seed):
    print('seed', seed)
    board, last = Board(), 60

    def work(control):
        rng = np.random.default_rng([seed, control.rank])
        rule = bare(AsynchronousUpdate, _stop_at=None, _save_at=0, _saves=0, _boards=[None, board], _write=board.add,
                    workers=SimpleNamespace(control=control))
        return polled(rule, control.rank, saving=(3, 4, 15, 16, 40), stopping=(55,), due=range(8, 61, 8), last=last,
                      pause=lambda: time.sleep(rng.random() * 0.004))
    first, *others = each(3, work)
    saves = [step for step, _, save in first if save]
    assert all([step for step, _, save in heard if save] == saves for heard in others)
    assert 3 <= len(saves) <= 5 and 3 <= saves[0] and 40 <= saves[-1]
    (stop_at,) = {heard[-1][1] for heard in (first, *others)}
    assert 55 <= stop_at <= last and {heard[-1][0] for heard in (first, *others)} == {stop_at}
