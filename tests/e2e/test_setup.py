"""What a newcomer meets before anything runs: the search for a Python, `make`, `setup.py`."""
import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mxsimmim
from mxsimmim.ops import build
from mxsimmim.runtime import environment

ROOT = Path(__file__).parents[2]
MODULES = {'PIL': 'pillow', 'cv2': 'opencv-python-headless', 'sklearn': 'scikit-learn', 'yaml': 'pyyaml'}


def run(*command, **options):
    return subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60, **options)


def fake_python(path: Path, version: str, venv: bool = True) -> Path:
    """A command that answers as find_python.sh asks: its version and place, then whether it has venv."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit {0 if venv else 1};; esac\necho "{version} {path}"\n')
    path.chmod(0o755)
    return path


def find_python(tmp_path: Path, **environ):
    """tools/find_python.sh with only tmp_path/a and tmp_path/b on PATH, and cat."""
    for folder in 'ab':
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / 'a/cat').symlink_to(shutil.which('cat'))
    return run('/bin/sh', ROOT / 'tools/find_python.sh',
               env={'PATH': f'{tmp_path}/a:{tmp_path}/b', 'HOME': str(tmp_path), **environ})


def test_newest_fitting_python_of_all_on_path(tmp_path):
    fake_python(tmp_path / 'a/python3', '3.13.0')
    fake_python(tmp_path / 'a/python3.9', '3.9.18')
    shim = fake_python(tmp_path / 'a/python3.10', '')
    shim.write_text('#!/bin/sh\necho "pyenv: python3.10: command not found" >&2\nexit 127\n')
    fitting = fake_python(tmp_path / 'b/python3.10', '3.10.13')
    assert find_python(tmp_path).stdout == f'{fitting}\n'


def test_python_of_pyenv_that_is_not_on_path(tmp_path):
    fake_python(tmp_path / 'a/python3', '3.12.1')
    fake_python(tmp_path / '.pyenv/versions/3.8.18/bin/python3.8', '3.8.18')
    fitting = fake_python(tmp_path / '.pyenv/versions/3.11.7/bin/python3.11', '3.11.7')
    assert find_python(tmp_path).stdout == f'{fitting}\n'


def test_no_fitting_python_says_what_was_found(tmp_path):
    new = fake_python(tmp_path / 'a/python3', '3.12.1')
    old = fake_python(tmp_path / 'b/python', '2.7.18')
    debian = fake_python(tmp_path / 'b/python3.11', '3.11.2', venv=False)
    found = find_python(tmp_path)
    assert (found.returncode, found.stdout) == (1, '')
    assert 'mxsimmim needs Python 3.8, 3.9, 3.10 or 3.11' in found.stderr
    assert f'  3.12.1 at {new}: does not fit\n' in found.stderr
    assert f'  2.7.18 at {old}: does not fit\n' in found.stderr
    assert f'  3.11.2 at {debian}: fits, but has no venv module: sudo apt-get install python3.11-venv\n' in found.stderr
    assert 'make demo PYTHON=/path/to/python3.11' in found.stderr


def test_no_python_at_all(tmp_path):
    found = find_python(tmp_path)
    assert found.returncode == 1
    assert 'Found on PATH and in pyenv:\n  none\n' in found.stderr


def test_named_python_is_taken_or_refused(tmp_path):
    fake_python(tmp_path / 'a/python3.11', '3.11.7')
    older = fake_python(tmp_path / 'mine/python', '3.8.18')
    assert find_python(tmp_path, PYTHON=str(older)).stdout == f'{older}\n'
    newer = fake_python(tmp_path / 'mine/python3', '3.13.0')
    (tmp_path / 'a/cat').unlink()
    refused = find_python(tmp_path, PYTHON=str(newer))
    assert (refused.returncode, refused.stdout) == (1, '')
    assert f'PYTHON={newer} is none:\n  3.13.0 at {newer}: does not fit\n' in refused.stderr
    (tmp_path / 'a/cat').unlink()
    assert f'  {tmp_path}/none: not a Python\n' in find_python(tmp_path, PYTHON=f'{tmp_path}/none').stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of what `make` reads, with a .venv that looks installed."""
    for name in ('Makefile', 'setup.py', 'pyproject.toml', 'tools/find_python.sh', 'mxsimmim/ops/build.py',
                 'mxsimmim/ops/src/abi.cc'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    horovod = re.search(r'horovod==([\d.]+)', (ROOT / 'setup.py').read_text())[1]
    for name in ('bin/python', f'horovod-{horovod}', 'base', 'test', '../build/lint/ready'):
        (tmp_path / '.venv' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / '.venv' / name).touch(mode=0o755)
    (tmp_path / '.venv/whole').write_text(f'{tmp_path}\n')
    return tmp_path


def planned(checkout: Path, target: str) -> str:
    """The commands `make` would run, but for those of installing."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(('MAKE', 'MFLAGS'))}
    plan = run('make', '--no-print-directory', '-n', target, cwd=checkout, env=env)
    assert plan.returncode == 0, plan.stderr
    return plan.stdout


def test_second_make_installs_nothing(checkout):
    plan = planned(checkout, 'test')
    assert re.findall(r'-m pytest (.*?) \|\|', plan) == ["-n 3 --dist worksteal -m 'not alone'",
                                                        '-m alone $(grep -rlI mark.alone tests)']
    assert 'install' not in plan and planned(checkout, 'coverage').count(plan) == 1
    assert [line for line in planned(checkout, 'demo').splitlines() if not line.startswith('echo ')] == [
        '.venv/bin/python tools/launch.py -n 2 -s 1 -- .venv/bin/mxsimmim pretrain conf/digits.yaml',
        '.venv/bin/python -W ignore tools/few_labels.py runs/digits']
    assert planned(checkout, 'lint').splitlines() == [
        'build/lint/bin/ruff check .', 'build/lint/bin/mypy',
        'build/lint/bin/clang-format --dry-run -Werror mxsimmim/ops/src/*']


def test_linters_are_pinned_in_setup_alone_and_need_nothing_of_ours(checkout):
    (checkout / 'build/lint/ready').unlink()
    plan = planned(checkout, 'lint')
    pins = dict(re.findall(r"'([\w-]+)==([\d.]+)'", plan))
    assert set(pins) == {'ruff', 'mypy', 'clang-format', 'numpy', 'pydantic', 'pillow'}
    assert 'mxnet' not in plan and ' -e ' not in plan
    for name in ('Makefile', '.pre-commit-config.yaml', 'pyproject.toml', '.ci/run'):
        assert not re.search(r'(ruff|mypy|clang-format)\W+\d|rev:', (ROOT / name).read_text()), name


@pytest.mark.parametrize('changed', ['setup.py', 'mxsimmim/ops/src/abi.cc'])
def test_changed_setup_and_operators_install_again_into_the_same_place(checkout, changed):
    newer = (checkout / '.venv/test').stat().st_mtime + 10
    os.utime(checkout / changed, (newer, newer))
    plan = planned(checkout, 'test')
    assert "if [ '' ]" in plan and "pip install --progress-bar off --no-build-isolation -e ." in plan
    headers = plan.index(f'pip install --progress-bar off "{build.HEADERS}; platform_system')
    assert headers < plan.index('--no-build-isolation -e .') < plan.index('library.status()')
    assert '.[test,horovod]' in plan and 'pip wheel' not in plan


@pytest.mark.parametrize('damage', [
    lambda venv: (venv / 'whole').unlink(),  # pip was interrupted
    lambda venv: (venv / 'whole').write_text('/elsewhere\n'),  # the checkout was moved
    lambda venv: (venv / 'bin/python').unlink(),  # its Python was removed
], ids=['interrupted', 'moved', 'no python'])
def test_what_is_not_whole_is_installed_anew(checkout, damage):
    damage(checkout / '.venv')
    assert "if [ 'yes' ]" in planned(checkout, 'demo')


def test_setup_refuses_other_pythons():
    code = 'import pathlib, sys, setuptools; sys.version_info = (3, 12, 1); exec(open("setup.py").read())'
    refused = run(sys.executable, '-c', code, cwd=ROOT)
    assert refused.returncode == 1
    assert 'mxsimmim needs Python 3.8 to 3.11' in refused.stderr


def test_without_a_compiler_all_but_the_operators_is_built(tmp_path):
    for name in ('setup.py', 'pyproject.toml', 'mxsimmim'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name, **({'ignore': shutil.ignore_patterns('libmx*', '__pycache__')}
                                              if copy is shutil.copytree else {}))
    (tmp_path / 'bin').mkdir()
    env = {**os.environ, 'PATH': str(tmp_path / 'bin')}
    env.pop('CXX', None)
    made = run(sys.executable, '-m', 'pip', 'wheel', '-v', '--no-deps', '--no-build-isolation', '-w', 'wheels', '.',
               cwd=tmp_path, env=env)
    assert made.returncode == 0, made.stdout + made.stderr
    said = [line.strip() for line in (made.stdout + made.stderr).splitlines() if 'native operators' in line]
    reason = 'no C++ compiler was found (g++, c++, clang++)'
    assert said == ['warning: the native operators are not built, slower ones will be used: '
                    f'{reason}: sudo apt-get install g++']
    wheel, = (tmp_path / 'wheels').iterdir()
    with zipfile.ZipFile(wheel) as content:
        names = [name for name in content.namelist() if 'libmx' in name]
        assert names == [f'mxsimmim/ops/{build.NOTE}']
        assert content.read(names[0]).decode() == f'{reason}\nsudo apt-get install g++\n'


def pins():
    """{extra or '': {distribution: requirement}} of the installed project."""
    result = {}
    for text in metadata.requires('mxsimmim'):
        requirement, _, marker = text.partition(';')
        extra = re.search(r'extra == "(.*?)"', marker)
        name = re.match(r'[\w.-]+', requirement)[0].lower()
        result.setdefault(extra[1] if extra else '', {})[name] = requirement.strip()
    return result


def test_installed_metadata_are_these():
    assert metadata.version('mxsimmim') == mxsimmim.__version__
    assert pins()['']['mxnet'] == 'mxnet==1.9.1'
    assert pins()['']['numpy'] == 'numpy==1.23.5'
    assert pins()['horovod'] == {'horovod': 'horovod==0.28.1'}
    assert pins()['']['onednn-cpu-gomp'] == build.ONEDNN


def test_every_import_of_the_package_is_required():
    imported = set()
    for path in (ROOT / 'mxsimmim').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split('.')[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split('.')[0])
    ours = {'mxsimmim', 'horovod', 'importlib_metadata'}  # an extra; numba's, on Python 3.8, where it is there
    foreign = {name for name in imported - ours if not _standard(name)}
    names = [name for extra in ('', 'deploy', 'detect', 'ray') for name in pins()[extra]]
    required = set(names) | {name.replace('-', '_') for name in names}
    assert {MODULES.get(name, name).lower() for name in foreign} <= required


def _standard(name: str) -> bool:
    """Whether a module belongs to Python (sys.stdlib_module_names exists from 3.10 only)."""
    from importlib.util import find_spec
    spec = find_spec(name)
    return spec is not None and 'site-packages' not in (spec.origin or '')


def test_cuda_extra_brings_each_library_that_is_loaded():
    packages = {f"nvidia-{folder.replace('_', '-')}-cu11" for folder, _ in environment.CUDA_LIBRARIES}
    assert set(pins()['cu112']) == packages | {'mxnet-cu112'}
