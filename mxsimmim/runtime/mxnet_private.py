"""Everything private of MXNet that this package uses, each as a function read in the source of MXNet 1.9.1.

No other module touches a private name of MXNet; a test of each function asserts what is relied on here. MXNet is
imported inside the functions: servers and the environment are set up before.
"""
import atexit
import contextlib
import ctypes
import functools
import inspect
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from types import ModuleType
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence

if TYPE_CHECKING:
    import mxnet as mx
    from mxnet.gluon import Block, Parameter

SUPPORTED = '1.9.1'

# enum values of include/mxnet/engine.h and base.h, 1.9.1
_PRIORITIZED = ctypes.c_int(3)  # FnProperty::kCPUPrioritized: threads that do not compute
_CPU = (ctypes.c_int * 2)(1, 0)  # Context: device type kCPU, number 0


def check_version(found: str) -> None:
    """Refuse a version of MXNet whose private functions nobody has read.

    Raises:
        ValueError: naming the supported version.
    """
    if found != SUPPORTED:
        raise ValueError(f'mxnet {found} is installed, and mxsimmim uses private functions of mxnet {SUPPORTED}: '
                         f'{sys.executable} -m pip install mxnet=={SUPPORTED}')


@functools.lru_cache(maxsize=None)
def _base() -> ModuleType:
    """Return mxnet.base of a supported MXNet."""
    import mxnet
    check_version(mxnet.__version__)
    return mxnet.base


def _call(name: str, *arguments: Any) -> None:
    """Call a function of libmxnet.

    Raises:
        mxnet.MXNetError: what the function says.
    """
    base = _base()
    base.check_call(getattr(base._LIB, name)(*arguments))


# The import

@contextlib.contextmanager
def light_import() -> Iterator[None]:
    """Has `import mxnet` within this `with` statement take a third of the time and 75 MB less; no other import changes.

    1.9.1 writes and compiles a Python function for each of 2,500 operators; here each is written when it is first
    called, and until then has neither documentation nor signature. And it looks for packages that it does without
    (`_OPTIONAL`), which import half of SciPy. Where MXNet was imported before, or is another version, nothing happens.
    """
    sys.meta_path.insert(0, _LightImport)
    try:
        yield
    finally:
        sys.meta_path.remove(_LightImport)
        base = sys.modules.get('mxnet.base')
        for name in _REGISTERING:
            if hasattr(getattr(base, name, None), '__wrapped__'):
                setattr(base, name, getattr(base, name).__wrapped__)


# By model.py; contrib/quantization.py and test_utils.py; image/image.py; onnx/mx2onnx. Nothing here uses these modules.
_OPTIONAL = ('sklearn', 'scipy', 'scipy.stats', 'cv2', 'onnx')
_REGISTERING = ('_init_op_module', '_init_np_op_module')  # of mxnet.base, for ndarray/register.py and its likes


class _LightImport:
    """Sees which module MXNet imports next."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        mxnet, base = sys.modules.get('mxnet'), sys.modules.get('mxnet.base')  # this may be left of a failed import
        if not mxnet or getattr(base, '__version__', None) != SUPPORTED or hasattr(mxnet, 'api'):
            return None
        if name in _OPTIONAL:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        if name == 'distutils':  # for a class of version.py: Python's own, as that of setuptools brings the rest along
            return PathFinder.find_spec(name)
        if name in ('mxnet.symbol.register', 'mxnet.ndarray.register'):
            for each in _REGISTERING:
                if not hasattr(getattr(base, each), '__wrapped__'):
                    setattr(base, each, _registering_lazily(getattr(base, each)))
        return None


def _registering_lazily(register: Callable[..., None]) -> Callable[..., None]:
    """Change `_init_op_module` or `_init_np_op_module`, whose `make_op_func` makes a function of an operator."""
    signature = inspect.signature(register)

    @functools.wraps(register)
    def lazily(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        given.arguments['make_op_func'] = functools.partial(_made_when_called, given.arguments['make_op_func'])
        register(*given.args, **given.kwargs)
    return lazily


def _made_when_called(make: Callable[..., Any], handle: Any, name: str, function_name: str) -> Callable[..., Any]:
    """Return a function that calls what `make(handle, name, function_name)` returns, and `make` when first needed."""
    made = functools.lru_cache(maxsize=None)(lambda: make(handle, name, function_name))

    def operator(*args: Any, **kwargs: Any) -> Any:
        return made()(*args, **kwargs)
    operator.__name__, operator.__doc__ = function_name, ''  # which MXNet reads
    return operator


# Networks

def structural_parameters(block: 'Block', prefix: str = '') -> 'Dict[str, Parameter]':
    """Return all parameters by the path of attributes that leads to them, which begins with `prefix` and a dot, if any.

    1.9.1: `Block._collect_params_with_prefix`, which `save_parameters` uses too; a block may override it.
    """
    _base()
    return block._collect_params_with_prefix(prefix)


def children(block: 'Block') -> 'Dict[str, Block]':
    """Return the blocks that are attributes of `block`, by name, in order of definition (1.9.1: `Block._children`)."""
    _base()
    return dict(block._children)


def replace_child(block: 'Block', child: 'Block', other: 'Block') -> None:
    """Put another block in the place of a child of a sequence (1.9.1: `Block._children`)."""
    _base()
    name, = (name for name, each in block._children.items() if each is child)
    block._children[name] = other


def set_gradients(parameter: 'Parameter', arrays: 'Sequence[mx.nd.NDArray]') -> None:
    """Have autograd write the gradient into `arrays`, one a context, of the parameter's shape.

    1.9.1: what `Parameter._init_grad` does with new arrays. `cast`, `reset_ctx` and a new `grad_req` undo it.
    """
    _base()
    from mxnet import autograd
    parameter._grad = list(arrays)
    autograd.mark_variables(parameter.list_data(), parameter._grad, parameter.grad_req)


def renew(parameter: 'Parameter') -> None:
    """Give a parameter without gradient other NDArray objects, of the same memory.

    1.9.1: a backward pass forgets what autograd knows of an array without gradient (`Imperative::Backward`,
    `AGInfo::Clear`), also where another graph that is still to go back has the same object: its pass then fails with
    "The any container is empty". So two graphs that are recorded before either goes back need different ones.
    """
    _base()
    parameter._data = [copy.detach() for copy in parameter._data]


# Parameter servers

def barrier(store: 'mx.kvstore.KVStore') -> None:
    """Wait until all workers of the store are here, without a deadline (1.9.1: `KVStore._barrier`).

    Of this worker's own pushes and pulls it waits for none: `mx.nd.waitall` before it does.
    """
    _base()
    store._barrier()


def send_command(store: 'mx.kvstore.KVStore', head: int, body: str) -> None:
    """Have the controller of every server called, and wait until all have (1.9.1: `_send_command_to_servers`)."""
    _base()
    store._send_command_to_servers(head, body)


def set_updater(store: 'mx.kvstore.KVStore', update: 'Callable[[int, mx.nd.NDArray, mx.nd.NDArray], None]') -> None:
    """Have `update(key, pushed, stored)` called for what is pushed; it writes to `stored`.

    1.9.1: `KVStore._set_updater`. Without it a server keeps the sum. Its exceptions are lost in ctypes.
    """
    _base()
    store._set_updater(update)


def create_server() -> ctypes.c_void_p:
    """Return the handle of a 'dist' store, for `run_server` and `mx.kv.KVStore`, without `import mxnet`.

    1.9.1: `MXKVStoreCreate` of libmxnet.so, where MXNet's own libinfo.py finds it. What the package adds takes 0.5 s of
    a core and 60 MB, and a scheduler, or a server that only adds up, uses nothing of it.
    """
    handle = ctypes.c_void_p()
    _check(load_library(), load_library().MXKVStoreCreate(b'dist', ctypes.byref(handle)))
    return handle


def run_server(handle: ctypes.c_void_p, control: Callable[[int, Optional[bytes], Any], None]) -> None:
    """Serve until all workers are done, or, as a scheduler, wait for that; `control(head, body, None)` gets commands.

    1.9.1: `MXKVStoreRunServer`, the loop that `import mxnet` starts by itself where DMLC_ROLE is set.
    """
    controller = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(control)
    _check(load_library(), load_library().MXKVStoreRunServer(handle, controller, None))


@functools.lru_cache(maxsize=None)
def load_library() -> ctypes.CDLL:
    """Load libmxnet alone; `import mxnet` later finds it loaded."""
    package = find_spec('mxnet')
    if not package or not package.submodule_search_locations:
        raise ValueError(f'mxnet is not installed: {sys.executable} -m pip install mxnet=={SUPPORTED}')
    place = package.submodule_search_locations[0]
    spec = spec_from_file_location('libinfo', os.path.join(place, 'libinfo.py'))
    assert spec and spec.loader
    libinfo = module_from_spec(spec)
    try:
        spec.loader.exec_module(libinfo)
    except OSError as error:
        raise ValueError(f'{place} is no whole mxnet ({error}): {sys.executable} -m pip install --force-reinstall '
                         f'mxnet=={SUPPORTED}') from None
    check_version(libinfo.__version__)
    library = ctypes.CDLL(libinfo.find_lib_path()[0], ctypes.RTLD_LOCAL)
    library.MXGetLastError.restype = ctypes.c_char_p
    return library


def _check(library: ctypes.CDLL, status: int) -> None:
    """As MXNet's `check_call`."""
    if status:
        raise RuntimeError(library.MXGetLastError().decode(errors='replace'))


# Arrays and the engine

def data_address(array: 'mx.nd.NDArray') -> int:
    """Return where the elements of a CPU array lie, in plain order.

    1.9.1: `MXNDArrayGetData`. Undoes a layout of oneDNN's own, in which an operator of ours would be given a copy, and
    waits only then; elements under way must be waited for with `wait_to_read`.
    """
    address = ctypes.c_void_p()
    _call('MXNDArrayGetData', array.handle, ctypes.byref(address))
    assert address.value is not None  # memory is there before the elements are
    return address.value


def push_host_task(function: Any, argument: ctypes.Structure, written: 'Sequence[mx.nd.NDArray]') -> None:
    """Have the engine call a C function, void(void *context, void *completion, void *argument), that returns at once.

    1.9.1: `MXEnginePushAsyncND`. It is called once nobody uses the arrays `written`, in one of few threads that do not
    compute. What uses the arrays later waits until somebody has called the `CallbackOnComplete` at `completion`, whose
    three pointers must be copied. `argument` must live until then.
    """
    handles = (ctypes.c_void_p * len(written))(*(array.handle for array in written))
    _call('MXEnginePushAsyncND', function, ctypes.byref(argument), None, _CPU, None, 0, handles, len(written),
          ctypes.byref(_PRIORITIZED), 0, b'host task', False)


def forget_shutdown() -> None:
    """Have the end of the interpreter not wait for operators under way (1.9.1: `base._notify_shutdown`, by atexit).

    Nothing where MXNet was not imported.
    """
    if 'mxnet' in sys.modules:
        atexit.unregister(sys.modules['mxnet'].base._notify_shutdown)


# Operators

def load_operators(path: str, prefix: str) -> List[str]:
    """Load a library of operators; return the names of those with this prefix, now in `mx.nd` and `mx.sym`.

    1.9.1: as `mxnet.library.load`, which makes the Python functions of all operators anew, in 0.4 s: `MXLoadLib`, then
    `_make_ndarray_function` and `_make_symbol_function` of the new ones alone.

    Raises:
        mxnet.MXNetError: MXNet does not take the library.
    """
    base = _base()
    from mxnet import ndarray, symbol
    from mxnet.ndarray.register import _make_ndarray_function
    from mxnet.symbol.register import _make_symbol_function
    _call('MXLoadLib', base.c_str(path), base.mx_uint(0))
    names, count = ctypes.POINTER(ctypes.c_char_p)(), ctypes.c_uint()
    _call('MXListAllOpNames', ctypes.byref(count), ctypes.byref(names))
    found = [name for name in (names[i].decode() for i in range(count.value)) if name.startswith(prefix)]
    for name in found:
        handle = base.OpHandle()
        _call('NNGetOpHandle', base.c_str(name), ctypes.byref(handle))
        for module, make in ((ndarray, _make_ndarray_function), (symbol, _make_symbol_function)):
            function = make(handle, name, name)
            function.__module__ = module.__name__
            for where in (module, module.op):
                setattr(where, name, function)
    return found
