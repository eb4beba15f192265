"""How a run is doing, told by what rank 0 wrote last."""
import json
import os
import platform

import numpy as np
import pytest

from mxsimmim import cli
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
])
def test_the_state(told, age, gone, expected):
    assert status.state_now(told, age, gone) == expected


@pytest.mark.parametrize('seconds, slow', [
    ([], []), ([1], []), ([1, 2], []), ([1, 2.1], [1]), ([1, 1, 2.1, 1], [2]), ([1, 1, 3, 3], [2, 3]), ([0, 0, 1], [])])
def test_stragglers(seconds, slow):
    assert status.stragglers(seconds) == slow


def test_a_run_that_trains(run, capsys, monkeypatch):
    monkeypatch.setattr(status.time, 'time', lambda: NOW)
    file = status.StatusFile(run, 100, 20)
    monkeypatch.setattr(status.time, 'time', lambda: NOW + 4)
    workers = [{'host': 'a', 'seconds': 0.5}, {'host': 'b', 'seconds': 1.25}]
    file.tell(step=40, loss=0.25, epoch=1.5, images_per_second=64.0, steps_per_second=0.5, workers=workers,
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

    def sleep(seconds):
        looks.append(seconds)
        file.tell(state='failed' if len(looks) == 2 else 'training', error='E')
    monkeypatch.setattr(status.time, 'sleep', sleep)
    assert cli.main(['status', str(run), '--watch', '--json']) == 0
    assert [json.loads(line)['state'] for line in capsys.readouterr().out.splitlines()] == ['training'] * 2 + ['failed']
    assert looks == [status.WATCHED] * 2
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
