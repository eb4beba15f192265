"""Each place where something is waited for in vain: the error names the rank, the host, the step and the operation."""
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.running import DIGITS, command
from support.tiny import TINY
from support.workers import each

from mxsimmim.config import CheckpointConfig, configfile
from mxsimmim.data.loader import Loader
from mxsimmim.data.transforms import PretrainTransform
from mxsimmim.inference import evaluate
from mxsimmim.parallel.channels import pipeline_channels
from mxsimmim.parallel.control import ControlPlane
from mxsimmim.parallel.worker_group import WorkerGroup
from mxsimmim.runtime import watchdog
from mxsimmim.training import check, run_logger, start, step_metrics
from mxsimmim.training.trainer import Trainer

LIMIT = 0.3  # seconds, before the first record
CONFIG = configfile.load(DIGITS, TINY)


@pytest.fixture
def told(monkeypatch):
    """What watches of this process say of waits in vain; it is not ended, and they say it again and again."""
    found = []
    monkeypatch.setattr(watchdog.report, 'tell', lambda stalled='', **_: stalled and found.append(stalled))
    monkeypatch.setattr(watchdog, 'end_within', lambda *_: None)
    monkeypatch.setattr(watchdog.faulthandler, 'dump_traceback', lambda file: None)
    monkeypatch.setattr(os, '_exit', lambda status: None)
    return found


def wait(told, work, what, peers=()):
    """The first thing that was said of `what` while `work()` waits in a thread, and the thread."""
    thread = threading.Thread(target=work, daemon=True)
    with watchdog.Watch('rank 3 on host', LIMIT / watchdog.START) as watch:
        watch.step = lambda: 7
        watch.join(lambda: list(peers), lambda status: None)
        thread.start()
        end = time.monotonic() + 20
        while time.monotonic() < end and not any(what in text for text in told):
            watchdog.beat()  # of this thread
            time.sleep(0.005)
    return next(text for text in told if what in text), thread


class Source:
    """Images of which none comes before `event`."""

    def __init__(self, event):
        self._event = event

    def __len__(self):
        return 8

    def name(self, index):
        return f'{index}.png'

    def read(self, index):
        self._event.wait()
        return b''


def exchange(event):
    """As `asnumpy` of what a pull, a push or an allreduce writes."""
    meter = step_metrics.StepMetrics(3)
    meter.add(1, 0.1, SimpleNamespace(asnumpy=lambda: event.wait() and np.zeros(3)))
    meter.read()


def data(event):
    transform = PretrainTransform(CONFIG.data, CONFIG.mask, CONFIG.model)
    loader = Loader(Source(event), transform, lambda step: (0, [5]), 0, 1, 1, 100, lambda text: None)
    try:
        next(iter(loader.iterate(0, 1)))
    except ValueError:  # no image
        pass


def saving(event):
    trainer = SimpleNamespace(config=SimpleNamespace(checkpoint=CheckpointConfig()), timetable=None)
    try:
        Trainer._publish(trainer, None, lambda: event.wait() and 1 / 0, 40)
    except ZeroDivisionError:
        pass


def writing(event):
    with run_logger._writing(Path('runs/x/metrics.jsonl')):
        event.wait()


def going_on(event, monkeypatch):
    monkeypatch.setattr(start, 'checkpoint_to_resume', lambda *_: event.wait() and None)
    start.find_checkpoint(CONFIG, None, ControlPlane(), print)


def turn(event):
    group = WorkerGroup.__new__(WorkerGroup)
    group._turn, group._gone_back = threading.Condition(), 0

    def go_back():
        event.wait()
        with group._turn:
            group._gone_back = 1
            group._turn.notify_all()
    threading.Thread(target=go_back, daemon=True).start()
    with group._turn:
        group._wait_for_turn(1)


@pytest.mark.parametrize('work, what, together', [
    (exchange, 'computation and exchange of gradients', True),
    (data, 'data (5.png is being read for ', False),
    (saving, 'the checkpoint of step 40', False),
    (writing, 'a write to runs/x/metrics.jsonl', False),
    (going_on, 'the checkpoint to go on from', False),
    (turn, 'the turn of a backward pass', True)])
def test_of_one_process(told, monkeypatch, work, what, together):
    """`together`: others may be why, and they are named."""
    event, peers = threading.Event(), [watchdog.Peer('rank 1 on b', 60.0, 'data')]
    arguments = (event, monkeypatch) if work is going_on else (event,)
    text, thread = wait(told, lambda: work(*arguments), what, peers)
    event.set()
    thread.join(20)
    assert not thread.is_alive()
    head, _, tail = text.partition(f' s for {what}')
    assert head.startswith('rank 3 on host has waited ')
    assert float(head.split()[-1]) > LIMIT * (watchdog.TOGETHER if together else 1)
    assert f' after step 7, longer than runtime.deadline allows ({LIMIT:g} s)' in tail
    why = 'nothing is heard of rank 1 on b for 60 s, since it waited for data: it is stopped, or cut off'
    assert tail.endswith(f' s): {why}' if together else f'allows ({LIMIT:g} s)')


@pytest.mark.parametrize('axis, name, what', [
    ('data', 'barrier', "'the end' of all workers (without rank 0)"),
    ('data', 'all_gather', "'counts' of all workers (without rank 0)"),
    ('pipeline', 'receive', 'an array of rank 0'),
    ('pipeline', 'send', 'rank 0 to take an array')])
def test_of_two_workers(told, axis, name, what):
    """The one of rank 1 waits for that of rank 0."""
    go = threading.Event()

    def work(control):
        before, after = pipeline_channels(control, None) if axis == 'pipeline' else (None, None)
        channel, large = before or after, np.zeros(1 << 20, 'float32')
        first = control.rank == 0
        if name == 'receive':
            go.wait() and channel.send(large) if first else channel.receive_values()
        elif name == 'send':
            for _ in range(30):  # more than both ends keep
                go.wait() and channel.receive_values() if first else channel.send(large)
        else:
            if first:
                go.wait()
            control.barrier('the end') if name == 'barrier' else control.all_gather('counts', 1)
        if channel:
            channel.close()
        return True
    results = []
    text, thread = wait(told, lambda: results.extend(each(2, work, axis=axis)), what)
    go.set()
    thread.join(20)
    assert results == [True, True]
    assert text.startswith('rank 3 on host has waited ')
    assert f' s for {what} after step 7, longer than runtime.deadline allows ({LIMIT:g} s)' in text


@pytest.mark.parametrize('module, patched, what', [
    (check, '_devices', 'the check of devices'), (evaluate, 'contexts_of', 'what comes before and after the training')])
def test_checks_and_evaluations_are_watched(told, monkeypatch, tmp_path, module, patched, what):
    """What they do is under a deadline, in a thread that here waits for an event."""
    event, config = threading.Event(), configfile.load(DIGITS, [*TINY, 'runtime.deadline=0.03'])

    def late(*_):
        event.wait(20)
        raise ValueError('late')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, patched, late)
    monkeypatch.setattr(watchdog.report, 'tell', lambda stalled, step: (told.append(stalled), event.set()))
    if module is check:
        assert check.check(config, {}) == 1
    else:
        with pytest.raises(ValueError, match='late'):
            evaluate.evaluate(config)
    text = next(text for text in told if what in text)
    assert text.startswith('rank 0 on ') and f' s for {what} after step 0, longer' in text


def test_an_import(tmp_path):
    """Of MXNet, before there is a step or a connection: here of a stand-in whose file does not come."""
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'mxnet').mkdir()
    (tmp_path / 'mxnet' / '__init__.py').write_text(f'open({str(tmp_path / "fifo")!r})\n')
    result = subprocess.run(command('pretrain', DIGITS, *TINY, 'runtime.deadline=0.05'), cwd=tmp_path, timeout=60,
                            env={**os.environ, 'PYTHONPATH': str(tmp_path), 'HOROVOD_RANK': '1', 'HOROVOD_SIZE': '2'},
                            stderr=subprocess.PIPE, universal_newlines=True)
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert last.startswith('mxsimmim: error: rank 1 on ') and last.endswith(
        ' s for the import of MXNet and of what needs it after step 0, longer than runtime.deadline allows (0.5 s)')
    assert f'File "{tmp_path}/mxnet/__init__.py", line 1 in <module>\n' in result.stderr


def test_the_import_of_the_command(tmp_path):
    """Which reads the configuration, and with it the deadline."""
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'pydantic.py').write_text(f'open({str(tmp_path / "fifo")!r})\n')
    program = ('from mxsimmim.runtime import watchdog; from mxsimmim.__main__ import main; '
               'watchdog.UNKNOWN = watchdog.LEAST = 0.4; main(["doctor"])')
    result = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, timeout=60, stderr=subprocess.PIPE,
                            env={**os.environ, 'PYTHONPATH': str(tmp_path)}, universal_newlines=True)
    assert result.returncode == 1
    assert ' s for the command to load after step 0, longer than runtime.deadline allows (0.4 s)' in result.stderr
    assert f'File "{tmp_path}/pydantic.py", line 1 in <module>\n' in result.stderr
