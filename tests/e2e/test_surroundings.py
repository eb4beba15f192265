"""What the machine does to the command: no home, no terminal, names that are no text, file systems that lack calls."""
import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.running import BASE, DEADLINE, ROOT, command, metrics, weights
from support.tiny import TINY

from mxsimmim import cli
from mxsimmim.config import Config
from mxsimmim.system import files
from mxsimmim.tasks.registry import TASKS
from mxsimmim.training.room import checkpoint_bytes
from mxsimmim.training.run_logger import RunLogger

pytestmark = pytest.mark.unmeasured

SHORT = [*TINY, 'train.length=10', 'optim.milestones=[8]', 'validation.every=10', 'log.every=5']
NAMES = [b'caf\xe9', b'-x', b'a\nb', b'\x1b[31m', 'größe, "q"'.encode(), '\u202eمرحبا'.encode(), b'$x^{$', b'n' * 200]
CLASSES = [*SHORT, 'data.path=data', 'data.val_fraction=0.25', 'train.batch_size=8', 'name=ft',
           'model.use_mean_pooling=true']
# Neither a name nor a home, and no right to write what is not its own; it may read where this Python is.
NOBODY = ['setpriv', '--reuid=12345', '--regid=12345', '--clear-groups', '--inh-caps=+dac_read_search',
          '--ambient-caps=+dac_read_search', 'env', '-u', 'HOME']
ASCII = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}


@pytest.fixture
def inside(monkeypatch, tmp_path):
    """Runs the command in this process, in an empty folder; its log, where it trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mxsimmim.runtime.environment.prepare', lambda config: None)

    def run(*words, status=0):
        assert cli.main([str(word) for word in words]) == status
        logs = sorted(tmp_path.glob('runs/*/logs/rank-0.log'), key=os.path.getmtime)
        return logs[-1].read_text() if logs else ''
    return run


def jpeg(number):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 20, 3), 'uint8')).save(file, 'JPEG')
    return file.getvalue()


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    """A classifier of images and classes with odd names, trained by nobody, without home, locale and streams."""
    folder = tmp_path_factory.mktemp('odd')
    for number, name in enumerate(NAMES):
        os.makedirs(os.path.join(os.fsencode(folder), b'data', name))
        for other in NAMES[:6]:
            with open(os.path.join(os.fsencode(folder), b'data', name, other + b'.jpg'), 'wb') as file:
                file.write(jpeg(number))
    words, environ = command('finetune', BASE, *CLASSES, os.fsdecode(b'output=r\xe9s')), {**os.environ, **ASCII}
    if os.getuid() == 0 and shutil.which('setpriv') and subprocess.run([*NOBODY, 'true'], check=False).returncode == 0:
        words = NOBODY + words
        os.chmod(folder, 0o777)
        # pytest's own folders are for their owner only, which nobody has to pass.
        for parent in list(folder.parents)[:2]:
            os.chmod(parent, 0o755)
    for key in ('MPLCONFIGDIR', 'XDG_CONFIG_HOME', 'XDG_CACHE_HOME', 'PYTHONIOENCODING'):
        environ.pop(key, None)
    done = subprocess.run(['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh', *words], cwd=folder, env=environ,
                          timeout=DEADLINE, check=False)
    assert done.returncode == 0
    return folder


def test_a_run_without_home_terminal_and_locale(odd):
    run = odd / os.fsdecode(b'r\xe9s') / 'ft'
    log = (run / 'logs' / 'rank-0.log').read_bytes()
    assert b'evaluation.json, evaluation.txt (all classes), confusion.png\n' in log and b'warning' not in log
    assert b'kept in r\xe9s/ft/best' in log
    assert Image.open(run / 'confusion.png').size[0] > 500
    table = (run / 'evaluation.txt').read_bytes().split(b'\n')
    assert [line.split(b'  ')[0] for line in table] == [
        b'class', rb'\x1b[31m', b'$x^{$', b'-x', rb'a\nb', b'caf\xe9', 'größe, "q"'.encode(), b'n' * 31 + '…'.encode(),
        rb'\u202e' + 'مرحبا'.encode(), b'']
    state = json.loads(next(run.glob('checkpoints/*/state.json')).read_bytes().decode('ascii'))['state']
    assert sorted(os.fsencode(name) for name in state['classes']) == sorted(NAMES)
    assert state['config']['output'] == os.fsdecode(b'r\xe9s')
    for record in metrics(run):  # nothing that a library or we print has got into what was opened first
        assert set(record) & {'loss', 'val_loss'}
    if os.getuid() == 0 and (run / 'config.yaml').stat().st_uid == 0:
        pytest.skip('all of it but an unknown user: setpriv cannot make one here')
    assert (run / 'config.yaml').stat().st_uid == (12345 if os.getuid() == 0 else os.getuid())


@pytest.mark.parametrize('encoding', ['ascii:strict', 'latin-1'])
def test_names_go_through_to_programs(odd, encoding):
    """What is printed opens the file, but for what would break the line or command a terminal."""
    environ = {**os.environ, 'PYTHONIOENCODING': encoding}
    done = subprocess.run(command('predict', os.fsdecode(b'r\xe9s/ft'), 'data', '--top', 1), cwd=odd, env=environ,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, b'')
    lines = done.stdout.splitlines()
    assert len(lines) == 48 and b'\x1b' not in done.stdout
    plain = [name for name in NAMES if name not in (b'a\nb', b'\x1b[31m', NAMES[5])]
    if encoding == 'latin-1':  # a name that it has is in the terminal's charset
        plain.remove(NAMES[4])
        assert any(line.startswith('data/größe, "q"/größe, "q".jpg '.encode('latin-1')) for line in lines)
    for name in plain[:-2]:
        for other in plain[:-2]:
            assert any(line.startswith(b'data/%s/%s.jpg ' % (name, other)) for line in lines), (name, other)


def test_broken_files_with_odd_names(odd, inside, capsys):
    names = [os.fsdecode(name) for name in (b'caf\xe9.jpg', b'a\nb.jpg', b'\x1b[31m.jpg')]
    for name in names:
        (odd / name).write_bytes(b'\xff\xd8nonsense')
    inside('predict', odd / os.fsdecode(b'r\xe9s') / 'ft', *(odd / name for name in names), status=1)
    said = capsys.readouterr().err.splitlines()  # in a stream of pytest's, which takes UTF-8 alone
    assert said == [f'mxsimmim: error: {odd}/{name}.jpg: not an image, or of an unknown format'
                    for name in (r'caf\xe9', r'a\nb', r'\x1b[31m')]


def test_exports_to_odd_names(odd, inside, tmp_path):
    odd_name = os.fsdecode(b'\xe9')
    folder = tmp_path / odd_name
    folder.mkdir()
    for name, words in (('.pth', []), ('.x.onnx', ['--format', 'onnx']), ('.n', ['--format', 'symbol'])):
        inside('export', odd / os.fsdecode(b'r\xe9s') / 'ft', folder / (odd_name + name), *words)
    assert sorted(os.listdir(folder)) == [odd_name + end for end in (
        '.n-0000.params', '.n-symbol.json', '.n.json', '.pth', '.x.json', '.x.onnx')]
    for end in ('.n.json', '.x.json'):
        classes = json.loads((folder / (odd_name + end)).read_bytes().decode('ascii'))['classes']
        assert sorted(map(os.fsencode, classes)) == sorted(NAMES)
    inside('import', folder / (odd_name + '.pth'), 'runs/back')


@pytest.mark.parametrize('target, words, status, complaint', [
    ('full', ['config'], 1, b'mxsimmim: error: standard output cannot be written: No space left on device\n'),
    ('full', ['--help'], 1, b'mxsimmim: error: standard output cannot be written: No space left on device\n'),
    ('pipe', ['config'], 1, b''), ('closed', ['config'], 0, b'')])
def test_output_that_nobody_takes(target, words, status, complaint, tmp_path):
    outputs = {'full': '>/dev/full', 'closed': '>&-', 'pipe': ''}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(['sh', '-c', f'exec "$@" {outputs[target]}', 'sh', *command(*words)], stdout=writer,
                          stderr=subprocess.PIPE, cwd=tmp_path, timeout=DEADLINE, check=False,
                          preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN))
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, complaint)


def refusing(monkeypatch, lock, flush):
    """A file system that knows neither locks nor flushed folders."""
    def flock(*_):
        raise OSError(lock, os.strerror(lock))
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f'/proc/self/fd/{descriptor}'):
            raise OSError(flush, os.strerror(flush))
        real(descriptor)
    monkeypatch.setattr(fcntl, 'flock', flock)
    monkeypatch.setattr(os, 'fsync', fsync)


def test_file_systems_that_lack_calls(inside, monkeypatch, tmp_path):
    assert 'warning' not in inside('pretrain', BASE, *SHORT, 'name=whole')
    for name, lock, flush in (('nfs', errno.ENOLCK, errno.EINVAL), ('lustre', errno.ENOSYS, errno.ENOTSUP),
                              ('fuse', errno.EOPNOTSUPP, errno.EBADF)):
        with monkeypatch.context() as patch:
            refusing(patch, lock, flush)
            log = inside('pretrain', BASE, *SHORT, f'name={name}')
        assert [line[20:] for line in log.splitlines() if 'warning: the file system' in line] == [
            f'warning: the file system of runs/{name} does not flush folders to the disk ({os.strerror(flush)}): after '
            'a power cut the newest checkpoint may not be there',
            f'warning: the file system of runs/{name} has no locks ({os.strerror(lock)}): nothing keeps another '
            'process from training there, too']
        assert weights(tmp_path / 'runs' / name) == weights(tmp_path / 'runs' / 'whole')
        assert metrics(tmp_path / 'runs' / name) == metrics(tmp_path / 'runs' / 'whole')


def fail(*_, **__):
    raise RuntimeError('no\nfont')


def test_a_run_goes_on_without_its_extras(inside, monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            raise OSError(errno.EIO, 'gone')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    monkeypatch.setattr('mxsimmim.tasks.pretrain.grid', fail)
    monkeypatch.setattr(RunLogger, '_event', fail)
    log = inside('pretrain', BASE, *SHORT, 'validation.every=5', 'name=pre')
    assert [line[20:] for line in log.splitlines() if 'warning' in line] == [
        'warning: TensorBoard fails, and the run goes on without: no font',
        'warning: the progress bar fails, and the run goes on without: [Errno 5] gone',
        'warning: a picture fails, and the run goes on without: no font']
    assert len([row for row in metrics(tmp_path / 'runs/pre') if 'val_loss' in row]) == 2
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    log = inside('finetune', BASE, *SHORT, 'model.use_mean_pooling=true', 'name=ft')
    said = 'matplotlib, which draws, does not load here (import of matplotlib.figure halted; None in sys.modules)'
    assert f'warning: confusion.png could not be drawn: {said}: install it again' in log and 'top-1' in log
    assert json.loads((tmp_path / 'runs/ft/evaluation.json').read_text())['images'] == 180
    assert len((tmp_path / 'runs/ft/evaluation.txt').read_text().splitlines()) == 11
    inside('plot', 'runs/ft', status=1)  # what is asked for the picture alone
    assert f'mxsimmim: error: {said}' in sys.stderr.getvalue()


def test_no_room(inside, monkeypatch, tmp_path, capsys):
    """One line before anything is trained, and nothing left behind."""
    config = Config(model={'img_size': 16, 'patch_size': 4, 'embed_dim': 16, 'depth': 2, 'num_heads': 2},
                    mask={'patch_size': 4}, data={'path': 'digits'})
    size = checkpoint_bytes(config, TASKS['pretrain'](config))
    monkeypatch.setattr(files, 'free', lambda folder: 2 * size - 1)
    inside('pretrain', BASE, *TINY, 'name=run', status=1)
    assert capsys.readouterr().err == (f'mxsimmim: error: runs/run: checkpoints need {2 * size:,} bytes there '
                                       f'({size:,} each), and {2 * size - 1:,} are free: make room, or set output=\n')
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files, 'free', lambda folder: 2 * size)
    inside('pretrain', BASE, *SHORT, 'name=run')
    saved = next((tmp_path / 'runs/run/checkpoints').glob('step-*'))
    headers = 20_000
    assert size < sum(file.stat().st_size for file in saved.glob('*.safetensors')) < size + headers
    monkeypatch.setattr(files, 'free', lambda folder: 0)
    inside('pretrain', BASE, *SHORT, 'name=run')  # which is at its end, and saves nothing more


def test_the_launcher_without_streams(tmp_path):
    words = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / 'launch.py'), '-n', '1', '-s', '1', '--',
             sys.executable, '-W', 'ignore', '-m', 'mxsimmim', 'pretrain', str(BASE), *SHORT, 'name=job']
    done = subprocess.run(['sh', '-c', 'exec "$@" <&- >&- 2>&-', 'sh', *words], cwd=tmp_path, timeout=DEADLINE,
                          check=False)
    assert done.returncode == 0
    assert b'curves: mxsimmim plot runs/job' in (tmp_path / 'logs' / 'worker-0.log').read_bytes()
    assert metrics(tmp_path / 'runs' / 'job')[-1]['step'] == 10
