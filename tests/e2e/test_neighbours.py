"""Packages that users have beside ours: no command imports one that it was not asked for."""
import json
import os
import signal
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from support.running import DEADLINE, ROOT, command, metrics
from support.tiny import TINY

from mxsimmim.system.guards import OPTIONAL

pytestmark = pytest.mark.unmeasured

NEIGHBOURS = {
    'torch', 'torchvision', 'torchaudio', 'tensorflow', 'keras', 'tensorboard', 'jax', 'jaxlib', 'flax', 'gluoncv',
    'gluonnlp', 'autogluon', 'comet_ml', 'wandb', 'mlflow', 'visdom', 'moviepy', 'imageio', 'soundfile', 'librosa',
    'pandas', 'polars', 'pyarrow', 'h5py', 'IPython', 'ipywidgets', 'ipykernel', 'notebook', 'cupy', 'transformers',
    'datasets', 'timm', 'lightning', 'pytorch_lightning', 'dask', 'distributed', 'xarray', 'seaborn', 'plotly',
    'bokeh', 'skimage', 'albumentations', 'dgl', 'triton', 'paddle', 'logfire', 'numba_scipy', 'numba_plugin',
    'pydantic_plugin', *OPTIONAL}
PLUGINS = '[numba_extensions]\ninit = numba_plugin:init\n\n[pydantic]\nneighbour = pydantic_plugin:plugin\n'
# Which setup.py pins, so that they look for the same everywhere; and what they look for that is no package.
PINNED = {'mxnet', 'numpy', 'scipy', 'sklearn', 'pydantic', 'yaml', 'tqdm', 'tensorboardX', 'matplotlib', 'PIL', 'cv2',
          'simplejpeg', 'numba', 'safetensors', 'onnx', 'onnxruntime', 'prometheus_client'}
NO_PACKAGES = {'__builtin__', 'winreg', 'msvcrt', 'backports_abc'}


@pytest.fixture(scope='module')
def neighbours(tmp_path_factory):
    """An environment with `NEIGHBOURS`."""
    return environment(tmp_path_factory.mktemp('neighbours'), NEIGHBOURS)


def environment(folder, names):
    """Variables with which the import of each of these packages is noted in a file and kills the process."""
    for name in names:
        package = folder.joinpath(*name.split('.'))
        package.mkdir(parents=True)
        (package / '__init__.py').write_text(
            'import os, signal, traceback\nwith open(os.environ["NOTED"], "a") as file:\n'
            '    print(__name__, *traceback.format_stack(), file=file)\nos.kill(os.getpid(), signal.SIGSEGV)\n')
    info = folder / 'neighbour-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: neighbour\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text(PLUGINS)
    (folder / 'noted').touch()
    path = os.pathsep.join(map(str, [folder, ROOT, ROOT / 'tests']))
    return {**os.environ, 'PYTHONPATH': path, 'NOTED': str(folder / 'noted')}


@pytest.fixture(autouse=True)
def noted(neighbours):
    """What was imported of them, and by whom: nothing, else the test has failed."""
    note = Path(neighbours['NOTED'])
    note.write_text('')
    yield note
    assert note.read_text() == ''


def run(environ, folder, *words):
    ended = subprocess.run(list(map(str, words)), env=environ, cwd=folder, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, universal_newlines=True, timeout=3 * DEADLINE)
    noted = Path(environ['NOTED']).read_text()
    assert ended.returncode == 0, f'{words}\n{ended.stdout}\n{ended.stderr[-3000:]}\n{noted}'


def job(words):
    return [sys.executable, ROOT / 'tools/launch.py', '-n', 2, *words, '--', *command(
        'pretrain', ROOT / 'conf/digits.yaml', *TINY, 'name=tiny', 'train.length=4', 'optim.warmup=1',
        'optim.milestones=[2]', 'log.every=2')]


@pytest.mark.parametrize('code', ['import google.cloud', 'import torch.nn',
                                  'import numba\nnumba.njit(lambda x: x)(1)', 'import pydantic\n'
                                  'class Some(pydantic.BaseModel): pass'])
def test_without_our_guard_they_would_be_imported(neighbours, noted, code):
    """Else the other tests would prove nothing."""
    ended = subprocess.run([sys.executable, '-c', code], env=neighbours, timeout=DEADLINE)
    assert ended.returncode == -signal.SIGSEGV and len(noted.read_text()) > 100
    noted.write_text('')


def test_commands(tmp_path, neighbours):
    """None of the neighbours is imported, and no package that we pin looks for another one."""
    run(neighbours, tmp_path, sys.executable, '-W', 'ignore', '-m', 'support.every_command')
    missed = json.loads((tmp_path / 'missed.json').read_text())
    assert {name for name, by in missed if by in PINNED} <= NO_PACKAGES, 'add it to guards.OPTIONAL'


def test_detection(tmp_path):
    """The only task that imports GluonCV, which looks for others."""
    (tmp_path / 'neighbours').mkdir()
    run(environment(tmp_path / 'neighbours', NEIGHBOURS - {'gluoncv'}), tmp_path, sys.executable, '-W', 'ignore', '-m',
        'support.every_command', 'detect')
    assert 'val_box_ap' in metrics(tmp_path / 'runs' / 'detector')[-1]


@pytest.mark.parametrize('words', [['-s', 1], ['--horovod']])
def test_jobs(tmp_path, neighbours, words):
    if words == ['--horovod']:
        pytest.importorskip('horovod')
    run(neighbours, tmp_path, *job(words))
    assert metrics(tmp_path / 'runs' / 'tiny')[-1]['step'] == 4


needs_torch = pytest.mark.skipif(util.find_spec('torch') is None, reason='needs PyTorch, which `make bench` installs')
BOTH = """
import torch
import mxnet as mx
import horovod.mxnet as hvd
hvd.init()
total = hvd.allreduce(mx.nd.ones(3) * (hvd.rank() + 1), average=False)
print('sum', total.asnumpy().tolist(), torch.ones(3).sum().item())
"""


@needs_torch
@pytest.mark.parametrize('words', [['-s', 1], ['--horovod']])
def test_jobs_beside_pytorch(tmp_path, words):
    if words == ['--horovod']:
        pytest.importorskip('horovod')
    run({**os.environ, 'NOTED': os.devnull}, tmp_path, *job(words))
    assert 'torch' not in (tmp_path / 'logs' / 'worker-0.log').read_text()
    assert metrics(tmp_path / 'runs' / 'tiny')[-1]['step'] == 4


@needs_torch
def test_a_program_of_the_users_that_has_both(tmp_path):
    """PyTorch must come first: its library crashes where Horovod's is loaded, which makes its names visible to all."""
    pytest.importorskip('horovod')
    run({**os.environ, 'NOTED': os.devnull}, tmp_path, sys.executable, ROOT / 'tools/launch.py', '-n', 2, '--horovod',
        '--', sys.executable, '-W', 'ignore', '-c', BOTH)
    for rank in range(2):
        assert (tmp_path / 'logs' / f'worker-{rank}.log').read_text() == 'sum [3.0, 3.0, 3.0] 3.0\n'
