"""What stubs/ says of MXNet and Horovod is there: a name that only a stub has would pass mypy and fail in a run."""
import ast
import importlib
from pathlib import Path

import pytest

STUBS = Path(__file__).parents[2] / 'stubs'
OURS = ('Operator', 'mxsimmim_')  # a protocol, and the operators of our own library


def names(body):
    """(name, what it contains) of what a stub's module or class defines; attributes of instances are left out."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node.name, list(names([inner for inner in node.body if isinstance(inner, ast.FunctionDef)]))
        elif isinstance(node, ast.FunctionDef):
            yield node.name, []
        elif isinstance(node, ast.AnnAssign):
            yield node.target.id, []
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield from ((alias.asname, []) for alias in node.names if alias.asname)


def missing(owner, wanted, where):
    for name, inner in wanted:
        if not hasattr(owner, '__getitem__' if name == '__iter__' else name):  # by which Python iterates, too
            yield f'{where}.{name}'
        elif inner:
            yield from missing(getattr(owner, name), inner, f'{where}.{name}')


@pytest.mark.parametrize('path', sorted(STUBS.rglob('*.pyi')), ids=lambda path: str(path.relative_to(STUBS)))
def test_stubs_name_what_there_is(path):
    parts = path.relative_to(STUBS).with_suffix('').parts
    module = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
    if parts[0] == 'horovod':
        pytest.importorskip('horovod')
    wanted = [(name, inner) for name, inner in names(ast.parse(path.read_text()).body) if not name.startswith(OURS)]
    assert not list(missing(importlib.import_module(module), wanted, module))


def test_a_wrong_name_is_seen():
    tree = ast.parse('class Block:\n    def hybridise(self): ...\n    def forward(self): ...\nzeroes: int')
    assert list(missing(importlib.import_module('mxnet.gluon'), names(tree.body), 'gluon')) == [
        'gluon.Block.hybridise', 'gluon.zeroes']
