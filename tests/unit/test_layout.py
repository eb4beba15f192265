"""Imports go one way: a folder knows those before it in this list, a module its neighbours in the same folder."""
import ast
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unmeasured

ROOT = Path(__file__).parents[2]
PACKAGE, TOOLS = ROOT / 'mxsimmim', ROOT / 'tools'
ORDER = ['__init__', 'system', 'config', 'runtime', 'cluster', 'ops', 'data', 'models', 'interop', 'optim', 'parallel',
         'planner', 'tasks', 'training', 'inference', 'commands', 'cli', '__main__']
# What answers before, or without, the second that `import mxnet` takes.
WITHOUT_MXNET = ['__init__', 'system', 'config', 'runtime', 'cluster', 'data', 'commands', 'cli', '__main__',
                 'training/run_folder', 'training/checkpoint', 'training/run_logger', 'training/plots',
                 'training/kept', 'training/status', 'training/exporter', 'training/dashboard',
                 'tasks/__init__', 'tasks/classes', 'tasks/pictures', 'tasks/baselines', 'training/__init__',
                 'parallel/__init__', 'inference/__init__', 'planner',
                 'parallel/strategies', 'parallel/protocol', 'parallel/server']  # servers must be set up before mxnet
FILES = sorted(PACKAGE.rglob('*.py'))
TESTS = PACKAGE.with_name('tests')


def place(path):
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def statements(path, everywhere):
    """For each import of a file, the dotted names that it may mean, relative ones resolved.

    Of `from a import b` these are `a` and `a.b`. Imports at the top only, or inside functions too.
    """
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from ([alias.name] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = '.'.join(base + ((node.module,) if node.module else ()))
            yield from ([module, f'{module}.{alias.name}'] for alias in node.names)


def imports(path, everywhere):
    """All names of `statements`."""
    return [name for names in statements(path, everywhere) for name in names]


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
    if path.name == 'ray_driver.py':  # which the launcher starts where there is Ray
        names -= {'ray'}
    assert names <= {'mxsimmim'} | (sys.stdlib_module_names if sys.version_info >= (3, 10) else names)


def test_nothing_imports_tools():
    assert not any(name.split('.')[0] == 'tools' for path in FILES for name in imports(path, everywhere=True))


@pytest.mark.parametrize('path', sorted(TESTS.rglob('*.py')), ids=lambda p: str(p.relative_to(TESTS)))
def test_tests_share_through_support_only(path):
    """No test imports another, also in the programs that it starts; `support` knows neither tests nor hooks."""
    named = re.findall(r'^\s*(?:from|import) +((?:test_|soak_|conftest\b)\w*)', path.read_text(), re.MULTILINE)
    assert set(named) <= {path.stem} - {'conftest'}


def modules():
    """Every file of the package and the tools, by the dotted name that imports it."""
    for root in (PACKAGE, TOOLS):
        for path in sorted(root.rglob('*.py')):
            parts = (root.name,) + path.relative_to(root).with_suffix('').parts
            yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts), path


def circle(graph):
    """Names along a circle of a directed graph, in their order; empty if there is none."""
    done, trail = set(), []

    def visit(name):
        if name in trail:
            return trail[trail.index(name):]
        if name in done:
            return []
        trail.append(name)
        found = next(filter(None, map(visit, sorted(graph[name]))), [])
        trail.pop()
        done.add(name)
        return found
    return next(filter(None, map(visit, sorted(graph))), [])


def test_no_module_imports_itself_by_way_of_another():
    """Also where an import stands in a function, or is for types alone: two such modules are one."""
    known = dict(modules())
    graph = {name: set() for name in known}
    for name, path in known.items():
        beside = '.'.join(path.relative_to(ROOT).parent.parts)  # where the programs in tools/ find each other
        for meant in statements(path, everywhere=True):
            meant = [other for each in meant for other in (each, f'{beside}.{each}') if other in known]
            graph[name] |= set(meant[-1:]) - {name}
    assert circle(graph) == []


def test_a_circle_is_seen():
    assert circle({'prepare': {'job', 'supervise'}, 'supervise': {'prepare'}, 'job': set()}) == ['prepare', 'supervise']
    assert circle({'a': {'b', 'c'}, 'b': {'c'}, 'c': set()}) == []


OUTSIDE_TASKS = [path for path in FILES if place(path) not in ('tasks', 'config')]


@pytest.mark.parametrize('path', OUTSIDE_TASKS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_tasks_know_which_tasks_there_are(path):
    """Others look one up in TASKS and ask it; a new task is a file, and a line there."""
    assert not any(name.startswith(('mxsimmim.tasks.pretrain', 'mxsimmim.tasks.classify'))
                   for name in imports(path, everywhere=True))
    for node in ast.walk(ast.parse(path.read_text())):
        asks = isinstance(node, ast.Attribute) and node.attr == 'classes' and 'task' in (
            getattr(node.value, 'id', None), getattr(node.value, 'attr', None))
        compares = isinstance(node, ast.Compare) and any(
            isinstance(side, ast.Attribute) and side.attr == 'task' for side in (node.left, *node.comparators))
        assert not asks and not compares, f'{path.name}, line {node.lineno}'
