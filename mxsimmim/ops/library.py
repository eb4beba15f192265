"""The library of native operators: where it is, whether it fits, and loading it into MXNet.

Without it everything is computed all the same, by MXNet's own operators.
"""
import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..runtime import environment, mxnet_private
from .build import NAME, NOTE, ONEDNN, NotBuilt, check_machine, digest, installed_file

FOLDER = Path(__file__).parent
PREFIX = 'mxsimmim_'  # of our operators' names in MXNet
VARIABLE = 'MXSIMMIM_LIBRARY'  # for development: another library, such as one with sanitizers
BF16 = ('avx512_core_bf16', 'avx512_core_amx')  # instructions that multiply bf16 faster than float32
EMULATED = ('avx512_core',)  # where oneDNN can multiply bf16, more slowly

_isa: Optional[str] = None  # of the library that MXNet has loaded
_loading = threading.Lock()  # MXNet refuses operators that it has: of two threads the second would find none, for good
_told = False


class Opened(NamedTuple):
    """A library that this process can use: its file and the best instructions it will use, in oneDNN's names."""
    path: Path
    isa: str


def find() -> Path:
    """The compiled library.

    Raises:
        NotBuilt: it is not there.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).resolve()
    check_machine()
    path = FOLDER / NAME
    if not path.exists():
        note = environment.contents(FOLDER / NOTE)
        why, _, remedy = note.partition('\n')
        raise NotBuilt(f'{NAME} was not built' + (f': {why}' if why else ''),
                       ' && '.join(filter(None, (remedy.strip(), install_command()))))
    return path


def install_command() -> str:
    """What builds the library where this package is installed."""
    root = FOLDER.parents[1]
    if (root / 'setup.py').exists():
        return f'{_short(sys.executable)} -m pip install --no-deps -e {_short(str(root))}'
    return f'{_short(sys.executable)} -m pip install --force-reinstall --no-deps /path/to/the/sources'


def _short(path: str) -> str:
    here = os.getcwd()
    return '.' if path == here else os.path.relpath(path) if path.startswith(here + os.sep) else path


def open_library() -> Opened:
    """Opens the library, and oneDNN before it, and asks it what it is; MXNet need not be there.

    Raises:
        NotBuilt: it is not there, or does not fit the machine or the Python files beside it.
    """
    path = find()
    onednn = installed_file(ONEDNN, 'lib/libdnnl.so.3')
    if onednn is None:
        raise NotBuilt('oneDNN is not installed', f'{_short(sys.executable)} -m pip install {ONEDNN}')
    environment.request_amx()
    # Names are looked up in these libraries first: MXNet has an older oneDNN inside, some of whose names Horovod makes
    # visible to all. Sanitizers do not support that.
    mode = os.RTLD_NOW | (0 if os.environ.get(VARIABLE) else os.RTLD_DEEPBIND)
    try:
        ctypes.CDLL(str(onednn), mode=mode)  # by its soname, where ours finds it
        library = ctypes.CDLL(str(path), mode=mode)
        library.mxsimmim_sources.restype = library.mxsimmim_isa.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise NotBuilt(f'{path} cannot be loaded: {error}', install_command()) from None
    if digest() not in ('', library.mxsimmim_sources().decode()):
        raise NotBuilt(f'{path} was built from other sources than those beside it', install_command())
    isa = library.mxsimmim_isa().decode()
    if not isa:
        raise NotBuilt('native operators need a CPU with AVX2 and FMA'
                       + (f" (DNNL_MAX_CPU_ISA={os.environ['DNNL_MAX_CPU_ISA']})" if 'DNNL_MAX_CPU_ISA' in os.environ
                          else ''))
    return Opened(path, isa)


def function(name: str) -> Any:
    """A function of the library, which is loaded, for ctypes."""
    return getattr(ctypes.CDLL(str(find())), name)


def show_stacks(file: int) -> None:
    """Write the native stack of each thread into an open file, by its number; nothing without the library."""
    if _isa is not None:
        function('mxsimmim_stacks')(file)


def load() -> str:
    """Makes the operators known to MXNet, once a process; the instructions they use, as in `Opened`.

    Comes after `environment.prepare`: it imports mxnet.

    Raises:
        NotBuilt: as `open_library`, or MXNet refuses the library.
    """
    global _isa
    with _loading:
        if _isa is None:
            opened = open_library()
            import mxnet
            try:
                mxnet_private.load_operators(str(opened.path), PREFIX)
            except mxnet.MXNetError as error:
                raise NotBuilt(f'MXNet {mxnet.__version__} does not load {opened.path}: '
                               + str(error).strip().splitlines()[-1]) from None
            _isa = opened.isa
        return _isa


def admit(precision: str) -> str:
    """Loads the library for products in `precision`; the instructions they use, as in `Opened`.

    Raises:
        NotBuilt: as `load`.
        ValueError: bf16, on a CPU that cannot multiply it.
    """
    isa = load()
    if precision == 'bf16' and isa not in BF16 + EMULATED:
        raise ValueError(f"key 'runtime.precision': bf16 needs a CPU with AVX-512, this one has {isa}: write "
                         'runtime.precision=float32, or auto, which takes bf16 where it is faster')
    return isa


def status() -> str:
    """One line: which form operators take on CPUs here, and why, if not the native one; MXNet need not be there."""
    try:
        return f'native ({open_library().isa})'
    except NotBuilt as error:
        return f'reference, slower: {error}'


def tell_once(text: str) -> None:
    """Print the first text that this process gives it, on stderr."""
    global _told
    if not _told:
        print(f'mxsimmim: {text}', file=sys.stderr, flush=True)
    _told = True
