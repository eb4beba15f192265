"""How a run is doing, told by what rank 0 wrote last."""
import contextlib
import json
import os
import platform
import time

import numpy as np
import pytest

from mxsimmim import cli
from mxsimmim.cluster import run_status
from mxsimmim.cluster.outcome import Exit, Outcome
from mxsimmim.cluster.restarts import failure_of
from mxsimmim.cluster.spec import Process
from mxsimmim.config import Config
from mxsimmim.training import checkpoint, status
from mxsimmim.training.run_folder import write_config

NOW = 2_000_000_000.0


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run, of which this process is rank 0."""
    monkeypatch.setattr(status, 'alive', lambda pid: pid == os.getpid())
    folder = tmp_path / 'run'
    folder.mkdir()
    write_config(folder, Config(output=str(tmp_path), name='run'))
    return folder


@pytest.mark.parametrize('told, age, gone, expected', [
    (dict(state='training', pause=1), 59, False, 'training'),
    (dict(state='training', pause=1), 61, False, 'silent'),
    (dict(state='training', pause=30), 149, False, 'training'),  # records come every 30 s
    (dict(state='training', pause=30), 151, False, 'silent'),
    (dict(state='training', pause=1), 1, True, 'killed'),
    (dict(state='failed', pause=1), 1000, True, 'failed'),
    (dict(state='ended', pause=1), 1000, True, 'ended'),
    (dict(state='restarting', pause=1), 9, True, 'restarting'),
    (dict(state='restarting', pause=1), 61, True, 'silent'),  # the launcher is gone, or waits for a host
])
def test_the_state(told, age, gone, expected):
    assert status.state_now(told, age, gone) == expected


@pytest.mark.parametrize('seconds, slow', [
    ([], []), ([1], []), ([1, 2], []), ([1, 2.1], [1]), ([1, 1, 2.1, 1], [2]), ([1, 1, 3, 3], [2, 3]), ([0, 0, 1], [])])
def test_stragglers(seconds, slow):
    assert status.stragglers(seconds) == slow


HOUR = status.AGAIN


@pytest.mark.parametrize('records, named', [  # (when, stragglers) of each record; (when, rank) of each warning
    ([(0, [1]), (5, []), (10, [1]), (15, [2])], []),  # a busy machine: never the same one twice in a row
    ([(0, [1]), (5, [1]), (10, [1])], [(5, 1)]),
    ([(0, [1]), (5, [1]), (10, []), (15, [1]), (20, [1])], [(5, 1)]),  # it comes back
    ([(0, [1]), (5, [1, 2]), (10, [1, 2])], [(5, 1), (10, 2)]),
    ([(0, [1]), (5, [1]), (HOUR, [1]), (HOUR + 5, [1]), (HOUR + 10, [1])], [(5, 1), (HOUR + 5, 1)]),
])
def test_stragglers_that_are_named(records, named):
    """Once they persist, and not again within an hour."""
    before, last, found = [], {}, []
    for now, slow in records:
        for rank in status.to_name(slow, before, last, now):
            last[rank] = now
            found.append((now, rank))
        before = slow
    assert found == named


HOSTS = [{'host': 'a', 'seconds': 0.5}, {'host': 'b', 'seconds': 1.25}]
KILLED = [{'rank': 1, 'host': 'b', 'why': 'was killed by SIGKILL'}]


@pytest.mark.parametrize('told, expected', [
    (dict(state='training'), {}),
    (dict(state='training', workers=HOSTS), {0: 'training', 1: 'slow'}),
    (dict(state='ended', workers=HOSTS), {0: 'ended', 1: 'ended'}),
    (dict(state='killed', workers=HOSTS), {0: 'killed', 1: 'unknown'}),
    (dict(state='restarting', workers=HOSTS, gone=KILLED), {0: 'restarting', 1: 'was killed by SIGKILL'}),
    (dict(state='failed', gone=KILLED), {1: 'was killed by SIGKILL'}),  # before it told of the others
])
def test_the_state_of_each_worker(told, expected):
    found = status.workers(told)
    assert {worker['rank']: worker['state'] for worker in found} == expected
    assert all(worker['host'] == 'ab'[worker['rank']] for worker in found)
    assert [worker['seconds'] for worker in found] == ([0.5, 1.25] if 'workers' in told else [None] * len(found))


def test_numbers_that_json_does_not_have(run):
    status.StatusFile(run, 10, 0).tell(workers=[*HOSTS, {'host': 'c', 'seconds': float('nan')}], steps_per_second=2.0)
    assert [worker['seconds'] for worker in status.read(run)['workers']] == [0.5, 1.25, None]
    assert json.dumps(status.read(run), allow_nan=False)
    assert status.text(run, status.read(run)).splitlines()[-1] == '  rank 2 on c: not known'


def test_what_the_launcher_adds(run, capsys):
    file = status.StatusFile(run, 100, 20)
    file.tell(workers=HOSTS, error='rank 1 has ended')
    failed = [Exit(Process('worker', 1, 0), 'b', -9, NOW), Exit(Process('server', 0, 0), 'b', 1, NOW)]
    failure = failure_of(Outcome(failed=failed))
    assert list(failure.gone) == KILLED
    run_status.tell_failure(run, failure, 1.0)
    assert status.read(run)['state'] == 'restarting'
    run_status.tell_failure(run, failure, None)
    assert cli.main(['status', str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{run}: failed, step 20 of 100'
    assert lines[3:] == ['  error: rank 1 has ended', *(f'  {cause}' for cause in failure.causes),
                         '  rank 0 on a: 0.5 s a step', '  rank 1 on b: 1.25 s a step, was killed by SIGKILL']
    status.StatusFile(run, 100, 20)  # the next attempt
    assert status.read(run)['workers'] == [] and 'causes' not in status.read(run)
    run_status.tell_failure(run / 'elsewhere', failure, None)  # of a machine that does not see it


def test_a_launcher_does_not_wait_for_a_disk(run, monkeypatch):
    os.mkfifo(run / 'status.json')  # whoever opens it waits
    monkeypatch.setattr(run_status, 'PATIENCE', 0.1)
    began = time.monotonic()
    run_status.tell_failure(run, failure_of(Outcome()), None)
    assert time.monotonic() - began < 5
    with contextlib.suppress(OSError):
        os.close(os.open(run / 'status.json', os.O_WRONLY | os.O_NONBLOCK))  # lets the thread go


def test_a_run_that_trains(run, capsys, monkeypatch):
    monkeypatch.setattr(status.time, 'time', lambda: NOW)
    file = status.StatusFile(run, 100, 20)
    monkeypatch.setattr(status.time, 'time', lambda: NOW + 4)
    file.tell(step=40, loss=0.25, epoch=1.5, images_per_second=64.0, steps_per_second=0.5, workers=HOSTS,
              restarts=[(NOW - 9, 'worker 1 on b was killed by SIGKILL')])
    for step in (20, 40, 60):
        path = checkpoint.save(run / 'checkpoints', step, {'weights': {'a': np.zeros(5, 'float32')}}, {}, keep=9)
    (path / 'weights.safetensors').write_bytes(b'half')  # of step 60
    monkeypatch.setattr(status.time, 'time', lambda: NOW + 10)
    assert cli.main(['status', str(run), '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {'state': 'training', 'age': 6, 'pause': 4, 'left': 120, 'checkpoint': 40, 'host': platform.node(),
                'pid': os.getpid(), 'started': NOW}
    assert {name: found[name] for name in expected} == expected
    assert cli.main(['status', str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f'{run}: training, step 40 of 100, epoch 1.5, loss 0.25, 64 images/s, left 0:02:00',
        f'  heard of 0:00:06 ago, from process {os.getpid()} on {platform.node()}',
        '  newest whole checkpoint: step 40',
        f'  restarted {status.stamp(NOW - 9)}: worker 1 on b was killed by SIGKILL',
        '  rank 0 on a: 0.5 s a step', '  rank 1 on b: 1.25 s a step, over twice the median']


def test_watching_ends_with_the_run(run, capsys, monkeypatch):
    file, looks = status.StatusFile(run, 10, 0), []
    states = ['training'] * 2 + ['failed', 'restarting'] + ['training'] * 2 + ['failed'] * (status.SETTLED + 1)

    def sleep(seconds):
        looks.append(seconds)
        file.tell(state=states[min(len(looks), 6)], error='E')
    monkeypatch.setattr(status.time, 'sleep', sleep)
    assert cli.main(['status', str(run), '--watch', '--json']) == 0
    assert [json.loads(line)['state'] for line in capsys.readouterr().out.splitlines()] == states
    assert looks == [status.WATCHED] * (len(states) - 1)
    file.tell(state='ended')
    assert cli.main(['status', str(run), '--watch']) == 0 and len(looks) == len(states) - 1
    assert '  error: E' in status.text(run, status.read(run)) and status.read(run)['left'] is None


def test_a_process_that_is_no_more(run):
    status.StatusFile(run, 10, 0)
    told = json.loads((run / status.FILE).read_text())
    (run / status.FILE).write_text(json.dumps({**told, 'pid': 2 ** 22 + 1}))
    assert status.read(run)['state'] == 'killed'
    (run / status.FILE).write_text(json.dumps({**told, 'pid': 2 ** 22 + 1, 'host': 'elsewhere'}))
    assert status.read(run)['state'] == 'training'


def test_what_is_no_run(run, capsys):
    for content, part in ((None, 'has no status.json: it has not trained yet'), ('{', 'status.json: cannot be read: ')):
        if content:
            (run / status.FILE).write_text(content)
        assert cli.main(['status', str(run)]) == 1 and part in capsys.readouterr().err
    assert cli.main(['status', str(run.parent)]) == 1
    assert 'is not the folder of a run' in capsys.readouterr().err


def test_a_disk_that_takes_nothing(run):
    file = status.StatusFile(run, 10, 0)
    file._path = run / 'gone' / status.FILE
    file.tell(step=3)
    assert status.read(run)['step'] == 0
