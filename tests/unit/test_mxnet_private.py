"""What this package relies on of MXNet's private functions, each in numbers."""
import ast
import ctypes
import importlib
import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd
from mxnet.gluon import nn
from support import machine

from mxsimmim.runtime import mxnet_private

ROOT = Path(__file__).parents[2]
PRIVATE = {  # names of MXNet's that start with an underscore, wherever this package has use for one
    '_LIB', '_barrier', '_cached_graph', '_cached_op', '_children', '_collect_params_with_prefix', '_data', '_grad',
    '_init_grad', '_make_ndarray_function', '_make_symbol_function', '_notify_shutdown', '_reg_params',
    '_send_command_to_servers', '_set_updater', '_updater'}
OVERRIDES = {(f'models/{file}.py', '_collect_params_with_prefix')  # Gluon's own saving and loading call it
             for file in ('classifier', 'detector', 'feature_maps', 'segmenter')}
SECONDS = 60


def names(tree):
    """Attributes of anything but self, and imported names, in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == 'self'):
            yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value  # of getattr
        elif isinstance(node, ast.ClassDef):  # overrides
            yield from (each.name for each in node.body if isinstance(each, ast.FunctionDef))


@pytest.mark.parametrize('path', sorted([*ROOT.glob('mxsimmim/**/*.py'), *ROOT.glob('tools/**/*.py')]),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_else_touches_what_is_private(path):
    where = path.relative_to(ROOT / 'mxsimmim').as_posix() if ROOT / 'mxsimmim' in path.parents else path.name
    if where == 'runtime/mxnet_private.py':
        return
    found = PRIVATE.intersection(names(ast.parse(path.read_text())))
    assert {name for name in found if (where, name) not in OVERRIDES} == set()


def test_another_version_is_refused():
    mxnet_private.check_version(mx.__version__)
    with pytest.raises(ValueError, match=r'mxnet 1\.8\.0 is installed, .* of mxnet 1\.9\.1: .* -m pip install '
                                         r'mxnet==1\.9\.1'):
        mxnet_private.check_version('1.8.0')


LIGHT = """
import json, sys
from mxsimmim.runtime.mxnet_private import light_import
finders = len(sys.meta_path)
with light_import():
    import mxnet as mx
    found = [name for name in ('sklearn', 'scipy', 'cv2', 'onnx') if name in sys.modules]
    import scipy.ndimage
    from mxnet.gluon import nn
assert found == [] and len(sys.meta_path) == finders, found
import sklearn.cluster
assert not hasattr(mx.base._init_op_module, '__wrapped__') and not hasattr(mx.base._init_np_op_module, '__wrapped__')
modules = {name: module for name, module in sys.modules.items() if name.startswith('mxnet.')}
operators = {name: sorted(n for n, value in vars(module).items() if callable(value))
             for name, module in modules.items() if name.startswith(('mxnet.ndarray', 'mxnet.symbol', 'mxnet.numpy'))}
x = mx.nd.array([[1, 2], [3, 4]])
dense = nn.Dense(2, activation='relu')
dense.initialize(mx.init.One())
dense.hybridize()
try:
    mx.nd.Convolution(x, kernel=(1, 1))
    error = ''
except mx.MXNetError as raised:
    error = str(raised).splitlines()[-1]
print(json.dumps([operators, dense(x).asnumpy().tolist(), mx.nd.contrib.arange_like(x, axis=0).asnumpy().tolist(),
                  mx.np.sum(x.as_np_ndarray()).item(), mx.nd.op.batch_dot.__name__, mx.nd.op.batch_dot.__module__,
                  mx.sym.dot(mx.sym.var('a'), mx.sym.var('b'), name='c').list_outputs(), error]))
"""


def test_a_light_import_differs_in_what_it_costs_alone():
    def told(program):
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], stdout=subprocess.PIPE, timeout=SECONDS,
                              check=True, universal_newlines=True)
        return json.loads(done.stdout)
    light = told(LIGHT)
    whole = told(LIGHT.replace('with light_import():', 'if True:').replace('assert found', 'assert True or found'))
    assert {name: len(names) for name, names in light[0].items()} == {name: len(whole[0][name]) for name in light[0]}
    assert light == whole
    assert sum(map(len, light[0].values())) > 2500
    assert light[1:4] == [[[3, 3], [7, 7]], [0, 1], 10] and 'num_filter' in light[-1]


def test_what_is_imported_after_an_import_of_mxnet_has_failed(monkeypatch):
    """Python takes the package back, but not the modules of it that were whole."""
    with mxnet_private.light_import():
        monkeypatch.delitem(sys.modules, 'mxnet')
        monkeypatch.delitem(sys.modules, 'scipy.constants', raising=False)
        importlib.import_module('scipy.constants')


@pytest.mark.parametrize('renewed', [True, False])
def test_two_recorded_graphs_of_one_array_without_gradient(renewed):
    """The first to go back forgets it for the other, unless that has an object of its own."""
    constant = mx.gluon.Constant('constant', mx.nd.array([3, 4]))
    constant.initialize(ctx=[mx.cpu(0), mx.cpu(1)])
    x, made = mx.nd.array([1, 2], ctx=mx.cpu(1)), []
    x.attach_grad('add')
    for _ in range(2):
        if renewed:
            mxnet_private.renew(constant)
        with autograd.record():
            made.append(x * constant.data(mx.cpu(1)))
    made[0].backward()
    if renewed:
        made[1].backward()
        assert x.grad.asnumpy().tolist() == [6, 8]
        constant.set_data(mx.nd.array([5, 6]))
        assert [copy.asnumpy().tolist() for copy in constant.list_data()] == [[5, 6], [5, 6]]
    else:
        with pytest.raises(mx.MXNetError, match='The any container is empty'):
            made[1].backward()


class Two(nn.HybridBlock):
    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.first, self.second = nn.Dense(2, in_units=3), nn.HybridSequential()
            self.second.add(nn.Dense(1, in_units=2, use_bias=False))

    def hybrid_forward(self, F, x):
        return self.second(self.first(x))


def test_names_are_paths_of_attributes(tmp_path):
    """The same ones as in the files that Gluon writes."""
    net = Two()
    net.initialize()
    found = mxnet_private.structural_parameters(net)
    assert {name: p.shape for name, p in found.items()} == {
        'first.weight': (2, 3), 'first.bias': (2,), 'second.0.weight': (1, 2)}
    net.save_parameters(str(tmp_path / 'net.params'))
    assert set(mx.nd.load(str(tmp_path / 'net.params'))) == set(found)
    assert list(mxnet_private.children(net).items()) == [('first', net.first), ('second', net.second)]


@pytest.mark.parametrize('hybrid', [False, True])
@pytest.mark.parametrize('request_', ['write', 'add'])
def test_gradients_are_written_where_they_are_to_lie(hybrid, request_):
    """d(w.x) / dw = x, in both contexts, in a part of a larger array; 'add' adds it to what is there."""
    net, contexts = nn.Dense(1, in_units=3, use_bias=False), [mx.cpu(0), mx.cpu(1)]
    net.initialize(mx.init.One(), ctx=contexts)
    net.weight.grad_req = request_
    if hybrid:
        net.hybridize(static_alloc=True)
    whole = [mx.nd.full((5,), 7, ctx=ctx) for ctx in contexts]
    mxnet_private.set_gradients(net.weight, [array[1:4].reshape((1, 3)) for array in whole])
    for times in (1, 2):
        for ctx, scale in zip(contexts, (1, 10)):
            with autograd.record():
                loss = net(mx.nd.array([[1, 2, 3]], ctx=ctx) * scale)
            loss.backward()
        for array, own, scale in zip(whole, net.weight.list_grad(), (1, 10)):
            expected = np.array([1, 2, 3]) * scale * (times if request_ == 'add' else 1) + 7 * (request_ == 'add')
            assert array.asnumpy().tolist() == [7, *expected, 7] and own.asnumpy().tolist() == [expected.tolist()]


def test_elements_lie_where_the_address_says():
    """In plain order, also after inference of a convolution, which leaves its weight in a layout of its own."""
    net = nn.Conv2D(32, 3, in_channels=32)
    net.initialize(mx.init.Uniform())
    expected = net.weight.data().asnumpy()
    net(mx.nd.ones((1, 32, 8, 8))).wait_to_read()
    weight = net.weight.data()
    address = mxnet_private.data_address(weight)
    seen = np.frombuffer((ctypes.c_char * expected.nbytes).from_address(address), 'float32').reshape(expected.shape)
    np.testing.assert_array_equal(seen, expected)
    seen[0, 0, 0, 0] = 5  # the memory itself, not a copy
    assert weight.asnumpy()[0, 0, 0, 0] == 5 and mxnet_private.data_address(weight) == address


class Told(ctypes.Structure):
    _fields_ = [('number', ctypes.c_int)]


class Completion(ctypes.Structure):
    _fields_ = [('call', ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)), ('engine', ctypes.c_void_p),
                ('operation', ctypes.c_void_p)]


def test_a_host_task_is_ordered_by_the_engine():
    """After what makes the arrays, before what uses them; however many wait, they take no thread, nor does pushing."""
    events = []

    def run(_context, completion, argument):
        own = Completion.from_buffer_copy(ctypes.cast(completion, ctypes.POINTER(Completion)).contents)

        def complete():
            events.append(ctypes.cast(argument, ctypes.POINTER(Told)).contents.number)
            own.call(own.engine, own.operation, None)
        threading.Timer(0.2, complete).start()
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(run)
    written, others = mx.nd.ones((3,)) * 2, [mx.nd.ones((3,)) for _ in range(20)]
    written.wait_to_read()
    told = [Told(41), Told(42), *(Told(43) for _ in others)]
    began = time.monotonic()
    for argument, array in zip(told, [written, written, *others]):
        mxnet_private.push_host_task(function, argument, [array])
    assert time.monotonic() - began < 0.2 and (mx.nd.ones((3,)) + 1).asnumpy().tolist() == [2, 2, 2] and events == []
    after = written + 1
    after.wait_to_read()
    mx.nd.waitall()
    assert [number for number in events if number < 43] == [41, 42] and events[-1] == 42  # 20 others at once
    assert len(events) == 22 and 0.4 <= time.monotonic() - began < 2


def test_operators_of_a_library_are_in_both_modules():
    machine.need_native()
    from mxsimmim.ops import library
    library.load()
    assert {'mxsimmim_adamw', 'mxsimmim_square_sum'} <= set(dir(mx.nd)) & set(dir(mx.sym)) & set(dir(mx.nd.op))
    assert mx.nd.mxsimmim_square_sum(mx.nd.array([3, 4]), count=1).asnumpy().tolist() == [25]
    with pytest.raises(mx.MXNetError):
        mxnet_private.load_operators(str(ROOT / 'nowhere.so'), 'mxsimmim_')


def test_an_updater_takes_the_place_of_the_sum():
    store, seen = mx.kv.create('local'), []

    def update(key, pushed, stored):
        seen.append((key, pushed.asnumpy().tolist()))
        stored += 10 * pushed
    mxnet_private.set_updater(store, update)
    store.init(3, mx.nd.ones((2,)))
    store.push(3, [mx.nd.array([1, 2]), mx.nd.array([3, 4], ctx=mx.cpu(1))])
    pulled = mx.nd.zeros((2,))
    store.pull(3, out=pulled)
    assert pulled.asnumpy().tolist() == [41, 61] and seen == [(3, [4, 6])]


@pytest.mark.parametrize('end, expected', [('', 'waits\n'), ('mxnet_private.forget_shutdown()', '')])
def test_an_end_that_waits_for_no_operator(end, expected):
    program = textwrap.dedent(f'''
        import sys
        from types import SimpleNamespace
        from mxsimmim.runtime import mxnet_private
        mxnet_private.forget_shutdown()
        assert 'mxnet' not in sys.modules
        import mxnet
        mxnet.base._LIB = SimpleNamespace(MXNotifyShutdown=lambda: print('waits') or 0)
        {end}
    ''')
    said = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], stdout=subprocess.PIPE, timeout=SECONDS,
                          check=True, universal_newlines=True).stdout
    assert said == expected
