"""How faults are drawn, and what is told of them."""
import json
from collections import Counter

import pytest
from support.fault_job import HAPPEN
from support.faults import EARLIEST, KINDS, LATEST, MODES, course, draw, table


@pytest.mark.parametrize('seed', [1, 20260101])
def test_all_kinds_and_modes_are_covered_evenly(seed):
    faults = draw(seed, 100)
    kinds, modes = Counter(fault.kind for fault in faults), Counter(fault.mode for fault in faults)
    assert set(kinds) == set(KINDS) == set(HAPPEN) and set(modes) == set(MODES)
    assert set(kinds.values()) == {7, 8} and min(modes.values()) >= 14 and max(modes.values()) <= 19
    assert len({(fault.kind, fault.mode) for fault in faults[:84]}) == 84  # each of the 14 under each of the 6
    assert all(EARLIEST <= fault.step <= LATEST for fault in faults)
    assert {fault.target for fault in faults if fault.kind == 'stopped helper'} >= {'agent', 'server'}
    assert not [fault for fault in faults if fault.target == 'server' and '--horovod' in MODES[fault.mode].launch]
    assert len(set(map(str, faults))) == 100


def test_a_fault_follows_from_seed_and_number():
    assert draw(5, 100)[:10] == draw(5, 10) != draw(6, 10)
    assert len({fault.kind for fault in draw(5, 10)}) == 10 and len({fault.mode for fault in draw(5, 10)}) == 6
    assert {fault.kind for fault in draw(5, 10, ['full disk', 'link down'])} == {'full disk', 'link down'}


@pytest.mark.parametrize('history, cost', [
    ([(0, 0), (5, 2), (6, 20), (6.5, 24)], (0.0, 0)),  # ended as it happened
    ([(0, 0), (6, 20), (7.5, 24), (7.9, 26)], (0.5, 0)),  # nothing to be seen of it
    ([(0, 0), (6, 26), (9, 20), (16, 22), (16.5, 30)], (9.0, 6)),  # went on from step 20
    ([(0, 0), (6, 26), (7.2, 28), (9, 0), (16, 2), (17, 4)], (9.0, 28)),  # began anew
    ([(0, 0), (6, 26), (9, 20), (16, 22), (19, 20), (30, 22)], (23.0, 8)),  # failed twice
])
def test_what_a_fault_cost(history, cost):
    assert course(history, 7.0) == pytest.approx(cost)


def test_the_table():
    records = [dict(kind='host lost', recovered=True, seconds=8.0, lost=4), dict(kind='full disk', recovered=False),
               dict(kind='host lost', recovered=True, seconds=12.5, lost=9),
               dict(kind='host lost', recovered=False)]
    lines = table([json.dumps(record) for record in records]).splitlines()
    assert len(lines) == 2 + 14 + 1 and len({line.count('|') for line in lines}) == 1
    assert '| host lost | 3 | 2 | 10.2 | 12.5 | 6 | 9 |' in lines
    assert '| full disk | 1 | 0 | | | | |' in lines
    assert '| link down | not tried | | | | | |' in lines
    assert lines[-1] == '| all | 4 | 2 | 10.2 | 12.5 | 6 | 9 |'
