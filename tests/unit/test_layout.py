"""Imports go one way: a module knows those before it in this list, and its neighbours in the same folder."""
import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / 'mxsimmim'
ORDER = ['__init__', 'guards', 'files', 'text', 'paths', 'config', 'habits', 'documents', 'schedule', 'configfile',
         'world', 'runtime', 'memory', 'cluster', 'ops', 'facts', 'doctor', 'data', 'models', 'interop', 'optim',
         'meter', 'parallel', 'checkpoint', 'monitor', 'pictures', 'baselines', 'metrics', 'validation', 'evaluation',
         'run', 'trained', 'progress', 'tasks', 'plan', 'train', 'check', 'reconstruct', 'features', 'probe',
         'exchange', 'deploy', 'cli', '__main__']
# What answers before, or without, the second that `import mxnet` takes.
WITHOUT_MXNET = ['__init__', 'guards', 'files', 'text', 'cluster', 'world', 'paths', 'config', 'habits', 'documents',
                 'configfile', 'schedule', 'runtime', 'memory', 'data', 'checkpoint', 'monitor', 'pictures',
                 'baselines', 'cli', '__main__']
SERVERS = ['parallel/modes.py', 'parallel/protocol.py', 'parallel/server.py']  # which must come before mxnet
FILES = sorted(PACKAGE.rglob('*.py'))


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
    p for p in FILES if place(p) in WITHOUT_MXNET or str(p.relative_to(PACKAGE)) in SERVERS],
                         ids=lambda p: str(p.relative_to(PACKAGE)))
def test_mxnet_is_not_imported_at_the_top(path):
    assert not any(name.split('.')[0] == 'mxnet' for name in imports(path, everywhere=False))


@pytest.mark.parametrize('path', [p for p in FILES if place(p) == 'cluster'], ids=lambda p: p.name)
def test_the_launcher_needs_the_standard_library_only(path):
    names = {name.split('.')[0] for name in imports(path, everywhere=True)}
    assert names <= {'mxsimmim'} | (sys.stdlib_module_names if sys.version_info >= (3, 10) else names)


def test_nothing_imports_tools():
    assert not any(name.split('.')[0] == 'tools' for path in FILES for name in imports(path, everywhere=True))
