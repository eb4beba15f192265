"""Imports go one way: a folder knows those before it in this list, a module its neighbours in the same folder."""
import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / 'mxsimmim'
ORDER = ['__init__', 'system', 'config', 'runtime', 'cluster', 'ops', 'data', 'models', 'interop', 'optim', 'parallel',
         'tasks', 'training', 'inference', 'cli', '__main__']
# What answers before, or without, the second that `import mxnet` takes.
WITHOUT_MXNET = ['__init__', 'system', 'config', 'runtime', 'cluster', 'data', 'cli', '__main__',
                 'training/run_folder', 'training/checkpoint', 'training/run_logger', 'training/plots',
                 'tasks/__init__', 'tasks/classes', 'tasks/pictures', 'tasks/baselines', 'training/__init__',
                 'parallel/__init__', 'inference/__init__',
                 'parallel/strategies', 'parallel/protocol', 'parallel/server']  # servers must be set up before mxnet
FILES = sorted(PACKAGE.rglob('*.py'))
TESTS = PACKAGE.with_name('tests')


def place(path):
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def imports(path, everywhere):
    """Dotted names imported by a file, relative ones resolved; at the top only, or inside functions too."""
    tree = ast.parse(path.read_text())
    package = ('mxsimmim',) + path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = '.'.join(base + ((node.module,) if node.module else ()))
            yield module
            yield from (f'{module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = ORDER.index(place(path))
    for name in imports(path, everywhere=True):
        parts = name.split('.')
        if parts[0] == 'mxsimmim' and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= own, f'{path.name} imports {name}'


@pytest.mark.parametrize('path', [
    p for p in FILES if {place(p), str(p.relative_to(PACKAGE).with_suffix(''))} & set(WITHOUT_MXNET)],
                         ids=lambda p: str(p.relative_to(PACKAGE)))
def test_mxnet_is_not_imported_at_the_top(path):
    assert not any(name.split('.')[0] == 'mxnet' for name in imports(path, everywhere=False))


@pytest.mark.parametrize('path', [p for p in FILES if place(p) == 'cluster'], ids=lambda p: p.name)
def test_the_launcher_needs_the_standard_library_only(path):
    names = {name.split('.')[0] for name in imports(path, everywhere=True)}
    assert names <= {'mxsimmim'} | (sys.stdlib_module_names if sys.version_info >= (3, 10) else names)


def test_nothing_imports_tools():
    assert not any(name.split('.')[0] == 'tools' for path in FILES for name in imports(path, everywhere=True))


@pytest.mark.parametrize('path', sorted(TESTS.rglob('*.py')), ids=lambda p: str(p.relative_to(TESTS)))
def test_tests_share_through_support_only(path):
    """No test imports another, also in the programs that it starts; `support` knows neither tests nor hooks."""
    named = re.findall(r'^\s*(?:from|import) +((?:test_|soak_|conftest\b)\w*)', path.read_text(), re.MULTILINE)
    assert set(named) <= {path.stem} - {'conftest'}
