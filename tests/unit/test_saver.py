"""Checkpoints that are written while training goes on: their bits, their errors, their copies in a second place."""
import errno
import re
import shutil
import threading
import time

import pytest
from support.checkpoints import arrays_of
from support.running import weights
from support.trainer import tiny_config

from mxsimmim.runtime import report
from mxsimmim.training import checkpoint, saver
from mxsimmim.training.build import build_trainer
from mxsimmim.training.checkpoint import CheckpointError, saved_steps
from mxsimmim.training.saver import Saver, SecondPlace
from mxsimmim.training.timetable import Alarm
from mxsimmim.training.trainer import Trainer

WAIT = 60


def config(tmp_path, name='run', every=2, length=9, **checkpoints):
    return tiny_config(output=str(tmp_path), name=name, checkpoint=dict(every=every, keep=9, **checkpoints),
                       train=dict(length=length, ema=0.5), log=dict(every=3))


def test_what_is_written_later_is_the_state_of_its_step(tmp_path, monkeypatch):
    """Arrays are written after the next update, with the bits that a save has which training waits for."""
    with monkeypatch.context() as patch:
        save = Trainer.save
        patch.setattr(Trainer, 'save', lambda self, wait=True: save(self))
        build_trainer(config(tmp_path, 'waits')).fit()
    trainer, begun, real = build_trainer(config(tmp_path)), [], checkpoint.fill

    def fill(folder, step, *rest):
        deadline = time.monotonic() + WAIT
        while trainer.step == step < 9 and time.monotonic() < deadline:
            time.sleep(0.001)
        begun.append((step, trainer.step))
        return real(folder, step, *rest)
    monkeypatch.setattr(checkpoint, 'fill', fill)
    trainer.fit()
    assert [step for step, _ in begun] == [2, 4, 6, 8, 9] and all(now > step for step, now in begun[:4])
    for step in (2, 4, 6, 8, 9):
        ours, expected = (checkpoint.load(tmp_path / name / 'checkpoints' / f'step-{step:08d}')
                          for name in ('run', 'waits'))
        assert sorted(ours.arrays) == sorted(expected.arrays) == ['ema', 'optimizer', 'weights']
        for group, named in expected.arrays.items():
            assert ours.arrays[group].keys() == named.keys()
            assert all(ours.arrays[group][name].tobytes() == value.tobytes() for name, value in named.items()), group
        assert ours.state['meter'] == expected.state['meter'] and ours.state['epoch'] == expected.state['epoch']


def test_one_save_at_a_time_and_waits_are_said_once_they_are_long(tmp_path, monkeypatch, capsys):
    trainer = build_trainer(config(tmp_path))
    under_way, most, real = [], [], checkpoint.fill

    def fill(*arguments):
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.3)
        filled = real(*arguments)
        under_way.pop()
        return filled
    monkeypatch.setattr(checkpoint, 'fill', fill)
    monkeypatch.setattr(saver, 'STANDSTILL', 0.4)  # seconds: more than the first wait, less than all four
    assert trainer.fit() == 0
    assert saved_steps(tmp_path / 'run' / 'checkpoints') == [2, 4, 6, 8, 9] and most == [1] * 5
    said = re.findall(r'training has waited ([0-9.]+) s for checkpoints', capsys.readouterr().err)
    assert len(said) == 1 and float(said[0]) >= 0.4


def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_full_disk_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    trainer = build_trainer(config(tmp_path))
    real, failed = trainer.train_step, threading.Event()

    def train_step(batch):
        if trainer.step == 4:
            assert failed.wait(WAIT)
            trainer.saver._thread.join(WAIT)
        return real(batch)

    def write_arrays(file, arrays):
        if 'step-00000004' in str(file):
            failed.set()
            full()
        return write(file, arrays)
    write = checkpoint.write_arrays
    monkeypatch.setattr(checkpoint, 'write_arrays', write_arrays)
    trainer.train_step = train_step
    with pytest.raises(CheckpointError, match=r'step-00000004: cannot save this checkpoint: No space left on device\. '
                       r'It needs [\d,]+ bytes, and .*the newest is step 2\. Make room') as caught:
        trainer.fit()
    assert trainer.step == 5 and isinstance(caught.value.__cause__, OSError)  # which a restart may mend
    assert [path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['step-00000002']


def test_a_full_disk_is_told_at_the_end(tmp_path, monkeypatch):
    """Of the save before the last, whose error comes first, and of the last one."""
    for every, missing in ((8, 8), (100, 9)):
        trainer = build_trainer(config(tmp_path, f'run{every}', every=every))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, 'write_arrays', full)
            with pytest.raises(CheckpointError, match=f'step-{missing:08d}: cannot save this checkpoint: No space'):
                trainer.fit()


def test_an_error_of_training_waits_for_the_save_under_way(tmp_path, monkeypatch, capsys):
    for name, fails in (('whole', False), ('full', True)):
        trainer, begun = build_trainer(config(tmp_path, name)), threading.Event()

        def slow(file, arrays, real=checkpoint.write_arrays, begun=begun, fails=fails):
            begun.set()
            time.sleep(0.2)
            return full() if fails else real(file, arrays)

        def train_step(batch, trainer=trainer, begun=begun, real=trainer.train_step):
            if trainer.step == 2:
                assert begun.wait(WAIT)
                raise ValueError('the training itself')
            return real(batch)
        trainer.train_step = train_step
        with monkeypatch.context() as patch, pytest.raises(ValueError, match='the training itself'):
            patch.setattr(checkpoint, 'write_arrays', slow)
            trainer.fit()
        assert saved_steps(tmp_path / name / 'checkpoints') == [2] * (not fails)
    assert capsys.readouterr().err.count('warning: ') == 1  # that the save failed, too


def test_a_launcher_hears_of_a_checkpoint_that_is_there(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(report, 'tell', lambda checkpoint: told.append(
        (checkpoint, saved_steps(tmp_path / 'run' / 'checkpoints')[-1])))
    build_trainer(config(tmp_path)).fit()
    assert told == [(step, step) for step in (2, 4, 6, 8, 9)]


def test_an_alarm_rings_once_for_each_time():
    now = [100.0]
    alarm = Alarm(60, lambda: now[0])
    rung = []
    for now[0] in (100, 159, 160, 161, 219, 221, 300, 500, 559, 561):
        if alarm.rings():
            rung.append(now[0])
    assert rung == [160, 221, 300, 500, 561]
    assert not Alarm(None, lambda: 1e9).rings()


def test_a_run_saves_by_the_clock(tmp_path):
    trainer = build_trainer(config(tmp_path, every='10 minutes', length=12))
    assert (trainer.timetable.save, trainer.timetable.save_seconds) == (12, 600)
    trainer._alarm = Alarm(600, lambda: 250.0 * trainer.step)
    trainer.fit()
    assert saved_steps(tmp_path / 'run' / 'checkpoints') == [3, 6, 9, 12]


def saved(run, step, value=None):
    return checkpoint.save(run / 'checkpoints', step, arrays_of(value or step), {'value': value or step}, keep=9)


def test_each_checkpoint_is_copied(tmp_path):
    second = tmp_path / 'disk'
    trainer = build_trainer(config(tmp_path, copy_to=str(second)))
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.yaml').write_text('x')
    trainer.fit()
    assert (second / 'run' / 'config.yaml').read_text() == 'x'
    copies = saved_steps(second / 'run' / 'checkpoints')
    assert copies[-1] == 9 and weights(second / 'run') == weights(tmp_path / 'run')
    for step in copies:
        assert checkpoint.load(second / 'run' / 'checkpoints' / f'step-{step:08d}').step == step


def test_copies_have_the_same_rule_and_their_own_past(tmp_path):
    run, second = tmp_path / 'run', tmp_path / 'disk' / 'run'
    (tmp_path / 'run').mkdir()
    (run / 'config.yaml').write_text('x')
    place = SecondPlace(second, 2, 30, pytest.fail)
    for step in (10, 20, 30, 40, 50):
        place.offer(saved(run, step))
        place.wait(WAIT)
    assert saved_steps(second / 'checkpoints') == [30, 40, 50]
    place.offer(saved(run, 50, value=7))  # another one of the same step
    place.wait(WAIT)
    assert checkpoint.load(second / 'checkpoints' / 'step-00000050').state == {'value': 7}


def test_what_is_damaged_on_the_way_is_not_a_copy(tmp_path):
    path = saved(tmp_path / 'run', 10)
    file = path / 'weights.safetensors'
    file.write_bytes(file.read_bytes()[:-1] + b'!')
    with pytest.raises(CheckpointError, match='weights.safetensors: damaged: its SHA-256 is'):
        checkpoint.copy(path, tmp_path / 'copies', keep=1)
    assert list((tmp_path / 'copies').iterdir()) == []


def test_a_second_place_that_fails_is_a_warning(tmp_path, capsys):
    (tmp_path / 'disk').write_text('')
    trainer = build_trainer(config(tmp_path, every=5, copy_to=str(tmp_path / 'disk')))
    assert trainer.fit() == 0
    said = capsys.readouterr().err
    assert (f'warning: step-00000009 is not copied to {tmp_path}/disk/run (checkpoint.copy_to): Not a directory; the '
            'run goes on') in said
    assert saved_steps(tmp_path / 'run' / 'checkpoints') == [5, 9]


def test_a_slow_second_place_holds_nobody_up(tmp_path, monkeypatch):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.yaml').write_text('x')
    said, entered, goes_on, real = [], threading.Event(), threading.Event(), checkpoint.copy

    def copy(*arguments):
        entered.set()
        assert goes_on.wait(WAIT)
        return real(*arguments)
    monkeypatch.setattr(checkpoint, 'copy', copy)
    place = SecondPlace(tmp_path / 'disk', 9, None, said.append)
    saver = Saver(said.append, place)
    for step in (1, 2, 3):
        saver.start(lambda step=step: saved(tmp_path / 'run', step))
        assert entered.wait(WAIT)
        saver.wait()
    place.wait(0.01)
    assert [text.split(':')[0] for text in said] == ['warning'] * 2
    assert 'step-00000002 is not copied there, step-00000003 will be' in said[0] and 'longer than 0.01 s' in said[1]
    goes_on.set()
    saver.finish()
    assert saved_steps(tmp_path / 'disk' / 'checkpoints') == [1, 3]


def test_the_newest_whole_one_of_two_places(tmp_path):
    first, second, said = tmp_path / 'run' / 'checkpoints', tmp_path / 'disk' / 'checkpoints', []
    assert checkpoint.newest(first, pytest.fail, second) is None
    for step in (10, 20):
        checkpoint.copy(saved(tmp_path / 'run', step), second, keep=9)
    assert checkpoint.newest(first, pytest.fail, second).path == first / 'step-00000020'
    (first / 'step-00000020' / 'weights.safetensors').unlink()
    assert checkpoint.newest(first, said.append, second).path == second / 'step-00000020'
    assert len(said) == 1 and said[0].startswith('passing over the checkpoint of step 20: ')
    shutil.rmtree(first)
    assert checkpoint.newest(first, pytest.fail, second).path == second / 'step-00000020'
    for step in (10, 20):
        (second / f'step-{step:08d}' / 'state.json').unlink()
    with pytest.raises(CheckpointError, match=f'{first} and {second}: none of its 2 checkpoints is whole'):
        checkpoint.newest(first, said.append, second)
