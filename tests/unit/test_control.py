"""What workers tell each other beside arrays: exactly, in order, with deadlines, and only among themselves."""
import socket
import time

import numpy as np
import pytest
from support.workers import KEY, each

from mxsimmim.parallel.control import ControlError, ControlPlane, _listen, connect
from mxsimmim.parallel.mesh import Mesh
from mxsimmim.runtime.process import ALONE, ProcessInfo

VALUES = [0.1, float('nan'), float('inf'), 2 ** 53 - 1, 5e-324, None, True, 'ä\udce9\n', {'a': [1, {}]}]


@pytest.mark.parametrize('count', [1, 2, 5])
def test_values_arrive_exactly(count):
    def work(control):
        gathered = control.all_gather('values', [control.rank, *VALUES])
        arrays = control.all_gather('arrays', np.arange(3, dtype='float32') + control.rank)
        number = control.all_gather('number', np.float32(0.1))
        shared = control.broadcast_object('object', lambda: {'rank': control.rank, 'values': VALUES})
        control.barrier('end')
        return gathered, arrays, number, shared
    for gathered, arrays, number, shared in each(count, work):
        assert [row[0] for row in gathered] == list(range(count))
        assert all(repr(row[1:]) == repr(VALUES) for row in gathered)
        assert arrays == [[rank, rank + 1, rank + 2] for rank in range(count)]
        assert number == [float(np.float32(0.1))] * count
        assert shared['rank'] == 0 and repr(shared['values']) == repr(VALUES)


def test_only_rank_0_makes_what_is_broadcast():
    made = []
    each(3, lambda control: control.broadcast_object('x', lambda: made.append(control.rank)))
    assert made == [0]


def test_calls_under_way_are_answered_in_any_order():
    def work(control):
        pending = [control.start_gather('step', [step, control.rank]) for step in range(100)]
        return [pending[step].result() for step in reversed(range(100))]
    assert each(3, work) == [[[[step, rank] for rank in range(3)] for step in reversed(range(100))]] * 3


def test_large_values_arrive_whole():
    """A megabyte of each of three workers: many times what a socket takes at once."""
    def work(control):
        return control.all_gather('text', str(control.rank) * (1 << 20)) == [digit * (1 << 20) for digit in '012']
    assert each(3, work) == [True] * 3


def test_who_ends_is_missed_at_once():
    def work(control):
        control.barrier('together')
        if control.rank == 2:
            raise RuntimeError('the cause')
        return control.all_gather('alone', 1)
    began = time.monotonic()
    *others, cause = each(3, work)
    assert isinstance(cause, RuntimeError)
    assert [str(error) for error in others] == ['control plane: rank 2 has ended: its log says why'] * 2
    assert time.monotonic() - began < 10


def test_rank_0_is_missed_too():
    def work(control):
        control.barrier('together')
        if control.rank == 0:
            raise RuntimeError('the cause')
        time.sleep(0.2)
        return control.all_gather('alone', 1)
    _, *others = each(3, work)
    assert [str(error) for error in others] == ['control plane: rank 0 has ended: its log says why'] * 2


def test_who_says_goodbye_is_not():
    def work(control):
        control.barrier('together')
        time.sleep(0.3 * control.rank)
        return control.rank
    assert each(3, work) == [0, 1, 2]


def test_a_deadline_names_the_call():
    def work(control):
        if control.rank == 0:
            with pytest.raises(ControlError, match=r"not all workers have come to 'the evaluation' within 0\.2 s"):
                control.all_gather('the evaluation', 1, seconds=0.2)
        else:
            time.sleep(0.5)
            assert control.all_gather('the evaluation', 2) == [1, 2]
        return 'done'
    assert each(2, work) == ['done', 'done']


def test_workers_that_do_different_things_are_told():
    errors = each(2, lambda control: control.all_gather(('validation', 'checkpoint')[control.rank], 1))
    assert [str(error) for error in errors] == [
        "control plane: rank 1 is at 'checkpoint', rank 0 at 'validation'"] * 2


def test_who_has_not_come_is_named():
    """Also to those that are not rank 0, which knows."""
    def work(control):
        control.sign([f'rank {control.rank} on h{control.rank}', 'data', False])
        control.barrier('together')
        if control.rank == 2:
            time.sleep(1.5)
            return control.all_gather('a step', 1)
        if control.rank == 1:
            with pytest.raises(ControlError, match=r"come to 'a step' within 0.5 s \(without rank 2\)"):
                control.start_gather('a step', 1).result(0.5)
            return control.peers()
        return control.all_gather('a step', 1)
    _, (first, last), _ = each(3, work)
    assert first[:1] + first[2:] == ('rank 0 on h0', 'data', False) and 0 < first.silent < 10
    assert last[:1] + last[2:] == ('rank 2 on h2', 'data', False)


def test_who_does_not_come_at_all_is_named():
    with _listen('127.0.0.1', 0, 3) as listener:
        with pytest.raises(ControlError, match=r"come to 'the start' within 0.3 s \(without ranks 1, 2\)"):
            ControlPlane(Mesh(data=3), [listener.getsockname()], KEY, listener, 0.3)


def test_another_key_is_refused(monkeypatch):
    monkeypatch.setattr('mxsimmim.parallel.control.CONNECT', 1.0)
    own, stranger = each(2, lambda control: control.all_gather('x', 1), keys={1: b'another'})
    assert str(stranger) == 'control plane: rank 0 has ended, or knows another key'
    assert isinstance(own, ControlError)


def test_strangers_are_left_alone():
    """Who speaks something else to the hub is sent away, who is silent keeps nobody from meeting."""
    def work(control):
        hub = control._connection.getpeername()
        with socket.create_connection(hub, 10) as silent, socket.create_connection(hub, 10) as loud:
            greeting = loud.recv(64)
            loud.sendall(b'GET / HTTP/1.0\r\n\r\n' + bytes(100))
            gathered = control.all_gather('x', control.rank)
            return silent.recv(64) != greeting, loud.recv(64), gathered
    assert each(2, work) == [(True, b'', [0, 1])] * 2


def test_a_job_of_one_needs_no_network():
    with connect(ALONE, {}) as control:
        assert control.all_gather('x', np.ones(2)) == [[1, 1]]


def test_a_hub_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr('mxsimmim.parallel.control.CONNECT', 0.3)
    with _listen('127.0.0.1', 0, 1) as taken:
        port = taken.getsockname()[1]
    file = tmp_path / 'key'
    file.write_text(KEY.hex())
    file.chmod(0o600)
    process = ProcessInfo(rank=1, size=2, transport='ps', control=f'127.0.0.1:{port}')
    with pytest.raises(ControlError, match=rf'cannot be reached at 127\.0\.0\.1:{port} within 0\.3 s: .*refused'):
        connect(process, {'MXSIMMIM_KEY_FILE': str(file)})
