"""What a process of ours does first: hides what is optional, and has crashes name their line."""
import subprocess
import sys
from importlib import metadata, util

import pytest

from mxsimmim.runtime import fault
from mxsimmim.system import guards

PLUGINS = """
[numba_extensions]
init = plugin:init

[pydantic]
ours = plugin:plugin
"""


def run(*words, **keys):
    return subprocess.run([sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=60, **keys)


@pytest.fixture
def somebodys(tmp_path, monkeypatch):
    """Packages of a user: two that ours look for, and one that registers itself as a plugin."""
    (tmp_path / 'comet_ml.py').write_text('here = True\n')
    (tmp_path / 'boto3.py').write_text('raise OSError("libx.so: cannot open shared object file")\n')
    info = tmp_path / 'plugin-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text(PLUGINS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop('comet_ml', None)


def registered():
    return [point.value for found in metadata.distributions() for point in found.entry_points
            if point.value.startswith('plugin:')]


def test_what_is_optional_is_hidden_for_as_long_as_we_are_alone(somebodys):
    assert registered() == ['plugin:init', 'plugin:plugin']
    with guards.alone():
        for name in ('comet_ml', 'boto3'):
            with pytest.raises(ModuleNotFoundError, match=name):
                __import__(name)
            assert util.find_spec(name) is None
        assert registered() == [] and metadata.version('plugin') == '1.0'
        with guards.alone():
            pass
        with pytest.raises(ModuleNotFoundError):
            import comet_ml
    import comet_ml
    assert comet_ml.here and registered() == ['plugin:init', 'plugin:plugin']
    with pytest.raises(OSError, match='libx.so'):
        __import__('boto3')
    with guards.alone():  # what was imported before is not taken away
        assert __import__('comet_ml') is comet_ml
    assert sys.modules['comet_ml'] is comet_ml


def test_an_error_gives_back_what_was_hidden(somebodys):
    with pytest.raises(KeyError), guards.alone():
        raise KeyError
    assert __import__('comet_ml').here and registered()


def test_packages_that_were_asked_for_and_do_not_load():
    missing = ModuleNotFoundError("No module named 'onnx'", name='onnx')
    assert str(guards.unusable('ONNX', missing)) == "ONNX needs the package onnx: pip install 'mxsimmim[deploy]'"
    broken = OSError('libprotobuf.so.32: cannot open shared object file')
    assert str(guards.unusable('ONNX', broken)) == (
        'ONNX needs a package that is installed, but does not load (OSError: libprotobuf.so.32: cannot open shared '
        "object file): pip install --force-reinstall 'mxsimmim[deploy]'")


def test_a_crash_names_its_line_though_mxnet_has_a_handler_too(tmp_path):
    program = tmp_path / 'program.py'
    program.write_text('from mxsimmim.system import guards\nguards.name_crashes()\nimport ctypes\nimport mxnet\n'
                       'def crash():\n    ctypes.string_at(0)\ncrash()\n')
    ended = run('-W', 'ignore', program)
    assert ended.returncode == -11
    assert fault.place(ended.stderr.splitlines()).endswith(f'called at {program}:6 in crash')


@pytest.mark.parametrize('stream', ['None', 'io.StringIO()', 'open(os.devnull, "w", opener=lambda *_: 99)', 'Odd()'])
def test_without_a_standard_error_of_use_nothing_happens(stream):
    code = f"""
import faulthandler, io, os, sys
from mxsimmim.system import guards
class Odd:
    def fileno(self): return -1
    def flush(self): pass
try:
    sys.stderr = {stream}
except OSError:
    sys.stderr = None
guards.name_crashes()
print(faulthandler.is_enabled())"""
    assert run('-c', code).stdout == 'False\n'


def test_a_closed_standard_error_is_not_written_to(tmp_path):
    """Its number is that of the next file opened, which Python's own fault handler would write into."""
    code = ('from mxsimmim.system import guards\nguards.name_crashes()\nimport os\nfile = open("next", "w")\n'
            'assert file.fileno() == 2\nos.abort()')
    words = ['sh', '-c', 'exec "$0" "$@" 2>&-', sys.executable, '-X', 'faulthandler', '-c', code]
    assert subprocess.run(words, cwd=tmp_path, timeout=60).returncode == -6
    assert (tmp_path / 'next').read_text() == ''
