"""Metrics without gap or double, TensorBoard told the same, and a terminal that is never messed up."""
import contextlib
import fcntl
import io
import os
import random
import re
import resource
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mxsimmim.training import run_logger
from mxsimmim.training.run_logger import RunLogger, read_metrics

ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(Path(run_logger.__file__).parents[2])}


def opened(run, start=0, **options):
    return RunLogger(run, 100, start, stream=io.StringIO(), **options)


def lines(run):
    return (run / 'metrics.jsonl').read_bytes().split(b'\n')


def events(run):
    """The events of each file in tensorboard/, oldest first, parsed from the framing of TFRecord files."""
    from tensorboardX.proto.event_pb2 import Event
    files = []
    for path in sorted((run / 'tensorboard').iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, found = path.read_bytes(), []
        while data:
            length, = struct.unpack('<Q', data[:8])  # then 4 bytes of checksum; 4 more follow the content
            found.append(Event.FromString(data[12:12 + length]))
            data = data[16 + length:]
        files.append(found)
    return files


def test_records(tmp_path):
    before = time.time()
    with opened(tmp_path) as monitored:
        monitored.write(10, {'loss': np.float32(0.5), 'lr': 1e-4, 'skipped': np.int64(3), 'images_per_second': 7.25})
        assert len(lines(tmp_path)) == 2 and lines(tmp_path)[1] == b''  # on the disk at once
        monitored.write(10, {'val_loss': float('nan'), 'grad_norm': float('inf')}, echo=False)
    first, second = read_metrics(tmp_path)
    assert before - 0.001 <= first.pop('time') <= second.pop('time') <= time.time() + 0.001
    assert first == {'step': 10, 'loss': 0.5, 'lr': 1e-4, 'skipped': 3, 'images_per_second': 7.25}
    assert second == {'step': 10, 'val_loss': None, 'grad_norm': None}
    assert b'NaN' not in lines(tmp_path)[1] and isinstance(first['skipped'], int)


def test_events_and_going_back(tmp_path):
    """What happened stands among the records; those after a step go, in TensorBoard, too, and it is told once."""
    with opened(tmp_path) as monitored:
        monitored.write(0, {'val_loss': 3.0})
        for step in (10, 20, 30):
            monitored.write(step, {'loss': 0.5})
        monitored.event(25, 'skipped', cause='loss')
        monitored.rewind(20)
        monitored.event(20, 'rollback', spike_step=28, spike_loss=99.5, deviations=float('inf'))
        monitored.write(30, {'loss': 0.25})
        records = read_metrics(tmp_path)
        assert [record['step'] for record in records] == [0, 10, 20, 20, 30] and records[-1]['loss'] == 0.25
        assert {**records[3], 'time': 0} == {'step': 20, 'event': 'rollback', 'spike_step': 28, 'spike_loss': 99.5,
                                             'deviations': None, 'time': 0}
        monitored.rewind(0)
        monitored.event(0, 'rollback')
    [found] = events(tmp_path)
    assert [(event.step, event.session_log.status) for event in found if event.HasField('session_log')] == [
        (0, 1), (21, 1), (0, 1)]
    with opened(tmp_path, 0):  # from the checkpoint of step 0
        pass
    assert [(record['step'], record.get('event')) for record in read_metrics(tmp_path)] == [(0, 'rollback')]


def write_steps(run, start, stop, mark):
    with opened(run, start) as monitored:
        if start == 0:
            monitored.write(0, {'val_loss': mark})
        for step in range(start + 10, stop + 1, 10):
            monitored.write(step, {'loss': mark})


@pytest.mark.parametrize('torn', [b'', b'{"step": 90, "lo', b'{', b'\0' * 100])
def test_resuming_leaves_neither_gap_nor_double(tmp_path, torn):
    write_steps(tmp_path, 0, 80, 1.0)
    with open(tmp_path / 'metrics.jsonl', 'ab') as file:
        file.write(torn)
    write_steps(tmp_path, 40, 60, 2.0)
    write_steps(tmp_path, 50, 100, 3.0)
    records = read_metrics(tmp_path)
    assert [record['step'] for record in records] == list(range(0, 101, 10))
    assert [record.get('loss') for record in records] == [None] + [1.0] * 4 + [2.0] + [3.0] * 5
    write_steps(tmp_path, 0, 20, 4.0)  # interrupted before its first checkpoint
    assert [(record['step'], record.get('loss', record.get('val_loss'))) for record in read_metrics(tmp_path)] == [
        (0, 4.0), (10, 4.0), (20, 4.0)]
    assert not list(tmp_path.glob('.*'))


def test_tensorboard_is_told_to_forget_what_was_dropped(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog
    write_steps(tmp_path, 0, 30, 1.0)
    wait_for_another_second()
    write_steps(tmp_path, 20, 40, 2.0)
    seen = [[(event.step, [(value.tag, value.simple_value) for value in event.summary.value]) for event in file
             if event.HasField('summary')] for file in events(tmp_path)]
    assert [[step for step, _ in file] for file in seen] == [[0, 10, 20, 30], [30, 40]]
    assert seen[0][0][1] == [('val_loss', 1.0)]
    assert dict(seen[1][0][1])['loss'] == 2.0
    starts = [[(event.step, event.session_log.status) for event in file if event.HasField('session_log')]
              for file in events(tmp_path)]
    assert starts == [[(0, SessionLog.START)], [(21, SessionLog.START)]]


def wait_for_another_second():
    """The files are named by second and process, and this process opens both."""
    deadline = time.time() + 5
    second = int(time.time())
    while int(time.time()) == second and time.time() < deadline:
        time.sleep(0.01)


def test_not_finite_values_are_not_sent_to_tensorboard(tmp_path):
    with opened(tmp_path) as monitored:
        monitored.write(1, {'loss': float('nan'), 'lr': 0.25})
    sent = {value.tag: value.simple_value for event in events(tmp_path)[0] for value in event.summary.value}
    assert sent.keys() == {"lr"} and sent['lr'] == 0.25


def test_picture(tmp_path):
    image = np.random.RandomState(0).randint(0, 256, (8, 6, 3)).astype('uint8')
    with opened(tmp_path) as monitored:
        path = monitored.picture(1234, 'validation', image)
    assert path == tmp_path / 'pictures' / 'validation-00001234.png'
    assert np.array_equal(np.asarray(Image.open(path)), image)
    sent = [(event.step, value) for event in events(tmp_path)[0] for value in event.summary.value]
    assert len(sent) == 1 and sent[0][0] == 1234
    shown = sent[0][1]
    assert (shown.tag, shown.image.height, shown.image.width, shown.image.colorspace) == ('validation', 8, 6, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.image.encoded_image_string))), image)


@pytest.mark.parametrize('content, number', [
    (b'hello\n', 1), (b'hello', 1), (b'[1, 2]\n{"step": 1}\n', 1), (b'{"step": 1}\n{"loss": 2}\n{"step": 3}\n', 2),
    (b'{"step": 1}\nnot JSON\n{"step": 3}\n', 2), (b'{"step": "1"}\n{"step": 3}\n', 1), (b'{"step": 1}\n\xff\n', 2)])
def test_foreign_files_are_refused_and_kept(tmp_path, content, number):
    (tmp_path / 'metrics.jsonl').write_bytes(content)
    for use in (read_metrics, opened):
        with pytest.raises(ValueError, match=f'metrics.jsonl: line {number} is not a JSON object with a step.*move'):
            use(tmp_path)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == content


def test_reading_without_a_file(tmp_path):
    with pytest.raises(ValueError, match=f'{tmp_path}/metrics.jsonl: no such file: give the folder of a run'):
        read_metrics(tmp_path)


def test_lines_without_a_terminal(tmp_path, monkeypatch):
    clock = iter([0.0, 60.0, 3000.0])
    monkeypatch.setattr(run_logger, 'time', SimpleNamespace(monotonic=lambda: next(clock), time=time.time,
                                                            strftime=time.strftime))
    stream = io.StringIO()
    with RunLogger(tmp_path, 2400, stream=stream) as monitored:
        monitored.write(120, {'skipped': 0, 'lr': 1e-4, 'loss': 0.48214, 'grad_norm': 1.3214, 'epoch': 3.2,
                              'images_per_second': 312.3, 'broken_images': 0})
        monitored.write(120, {'val_loss': 0.12344, 'avg_dist': 9.5})
        monitored.write(240, {'loss': float('nan'), 'images_per_second': 3.14159, 'skipped': 2, 'broken_images': 1})
        monitored.message('two\nlines')
    assert stream.getvalue().splitlines() == [
        'step 120/2400  epoch 3.20  loss 0.4821  lr 1.0e-04  grad_norm 1.32  312 images/s  left 0:19:00',
        'step 120/2400  val_loss 0.1234  avg_dist 9.500',
        'step 240/2400  loss nan  3.14 images/s  skipped 2  broken_images 1  left 7:30:00',
        'two', 'lines']


def test_no_echo(tmp_path):
    with opened(tmp_path) as monitored:
        monitored.write(1, {'loss': 1.0}, echo=False)
        assert monitored.stream.getvalue() == ''
    assert read_metrics(tmp_path)[0]['loss'] == 1.0


@pytest.mark.parametrize('value, digits, text', [
    (0.0, 4, '0.000'), (0.00012345, 4, '0.0001234'), (0.5, 4, '0.5000'), (12.345, 4, '12.35'), (999.96, 4, '1000'),
    (1234.5, 4, '1234'), (123456.0, 3, '123456'), (12345, 3, '12345'), (99.96, 3, '100'), (-3.14159, 3, '-3.14'),
    (float('inf'), 4, 'inf'), (float('nan'), 4, 'nan'), (1e-9, 3, '1.00e-09')])
def test_numbers(value, digits, text):
    assert run_logger._number(value, digits) == text


def test_log(tmp_path):
    for text in ('first', 'second\nthird: ä'):
        with opened(tmp_path) as monitored:
            monitored.message(text)
    written = (tmp_path / 'logs' / 'rank-0.log').read_text(encoding='utf-8').splitlines()
    assert [line[20:] for line in written] == ['first', 'second', 'third: ä']
    assert all(re.match(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ', line) for line in written)


@pytest.mark.parametrize('columns', [50, 80, 120])
def test_bar(tmp_path, columns):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
    with open(slave, 'w', encoding='utf-8') as stream:
        with RunLogger(tmp_path, 2400, start=100, stream=stream) as monitored:
            monitored.write(120, {'loss': 0.48214, 'lr': 1e-4, 'grad_norm': 1.3214, 'epoch': 3.2,
                                  'images_per_second': 312.3})
            monitored.write(120, {'val_loss': 0.12344})
            monitored.message('a message')
            monitored.write(125, {'avg_dist': 9.5})  # of updates before those that the device is at
    shown = b''
    with contextlib.suppress(OSError):  # how a terminal whose other end was closed says that this was all
        while True:
            shown += os.read(master, 1 << 20)
    shown = shown.decode()
    os.close(master)
    pieces = [piece for piece in re.split(r'[\r\n]+', shown) if piece.strip()]
    assert max(map(len, pieces)) <= columns
    assert 'step 120/2400  val_loss 0.1234' in pieces and 'a message' in pieces
    bars = [piece for piece in pieces if '|' in piece]
    assert bars[0].startswith('100/2400 |') and bars[-1].startswith('125/2400 |')
    whole = '  loss 0.4821  312 images/s  lr 1.0e-04  grad 1.32'
    if columns >= 80:
        assert re.search(r'\| left [\d:]+' + re.escape(whole) + '$', bars[-1])


def test_a_full_disk_is_an_error_and_no_hang(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as monitored:
        monitored.write(10, {'loss': 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        try:
            with pytest.raises(ValueError, match=r'(metrics.jsonl|tensorboard): cannot be written: .*Make room'):
                for step in range(20, 2000, 10):
                    monitored.write(step, {'loss': 1.0, 'filler': 1e-300})
            with pytest.raises(ValueError, match='rank-0.log: cannot be written: .*Make room'):
                monitored.message('text ' * 1000)
            with pytest.raises(ValueError, match='picture-00000001.png: cannot be written: File too large.*Make room'):
                monitored.picture(1, 'picture', np.random.RandomState(0).randint(0, 256, (99, 99, 3)).astype('uint8'))
            monitored.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    last = read_metrics(tmp_path)[-1]['step']
    assert last >= 100
    with opened(tmp_path, start=last) as monitored:
        monitored.write(last + 10, {'loss': 1.0})
    assert [record['step'] for record in read_metrics(tmp_path)] == list(range(10, last + 11, 10))


WRITE_FOR_EVER = '''
import io, itertools, sys
from pathlib import Path
from types import SimpleNamespace
from mxsimmim.training.run_logger import RunLogger
monitor = RunLogger(Path(sys.argv[1]), 10 ** 9, int(sys.argv[2]), stream=io.StringIO())
print('ready', flush=True)
for step in itertools.count(int(sys.argv[2]) + 1):
    monitor.write(step, {'loss': step / 7, 'grad_norm': step / 11})
'''


def test_sigkill_leaves_whole_lines(tmp_path):
    seed = random.randrange(2 ** 32)
    print(f'seed {seed}')
    draw = random.Random(seed)
    start = 0
    for _ in range(5):
        process = subprocess.Popen([sys.executable, '-c', WRITE_FOR_EVER, str(tmp_path), str(start)],
                                   stdout=subprocess.PIPE, env=ENVIRONMENT)
        assert process.stdout.readline() == b'ready\n'
        time.sleep(draw.uniform(0.02, 0.1))
        process.kill()
        process.communicate(timeout=60)
        assert lines(tmp_path)[-1] == b''
        records = read_metrics(tmp_path)
        assert [record['step'] for record in records] == list(range(1, len(records) + 1))
        start = draw.randint(start, len(records))


def test_slow_imports_wait():
    heavy = 'mxnet', 'matplotlib', 'tensorboardX', 'PIL', 'tqdm'
    program = ('import sys, mxsimmim.training.run_logger, mxsimmim.tasks.pictures, mxsimmim.training.checkpoint; '
               f'print([name for name in {heavy!r} if name in sys.modules])')
    found = subprocess.run([sys.executable, '-c', program], stdout=subprocess.PIPE, text=True, check=True,
                           env=ENVIRONMENT).stdout
    assert found.strip() == '[]'
