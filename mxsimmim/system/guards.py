"""What a process of ours does before it imports what it needs. Standard library only.

`name_crashes` has a crash in native code name its Python line; `alone` keeps out what nobody asked for.
"""
import contextlib
import faulthandler
import sys
from typing import Any, Iterator, List

# What the packages that we need import where they find it, and do without, by who does. PyTorch is why they are kept
# out: its library crashes where Horovod was loaded before (Horovod makes its own names and MXNet's visible to all).
# The others cost time, or end the run where their installation is broken.
OPTIONAL = (
    'torch', 'comet_ml', 'boto3', 'google.cloud', 'crc32c',  # tensorboardX
    'h5py', 'bokeh', 'boken',  # MXNet
    'backports.zstd', 'zstandard', 'brotli', 'brotlicffi', 'simplejson', 'socks',  # requests and urllib3, for MXNet
    'lz4', 'psutil', 'scikits', 'sksparse', 'uarray', 'pickle5',  # joblib, SciPy and NumPy
    'cffi', 'defusedxml', 'olefile',  # Pillow
    'colorama',  # numba
    'cython_bbox', 'nvidia', 'redis',  # GluonCV and portalocker
    'aiodns',  # aiohttp
)


def name_crashes() -> None:
    """Has a crash in native code write the Python line of each thread to standard error, if there is one.

    Before `import mxnet`: MXNet leaves a handler of SIGSEGV that it finds, and its own says nothing of Python.
    """
    if sys.stderr is None:  # closed: its number is free for the next file, which PYTHONFAULTHANDLER would write into
        faulthandler.disable()
    elif not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):  # not a file
            faulthandler.enable()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keeps out of this process what nobody asked for: `OPTIONAL`, and plugins.

    An import of one of `OPTIONAL` raises ModuleNotFoundError, unless it was imported before. Plugins are what installed
    packages register with pydantic and numba, which import it all at the first class or compilation. After the
    `with` statement all is as before.
    """
    hidden = [name for name in OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be imported
    kinds = _distributions()
    registered = [kind.entry_points for kind in kinds]
    for kind in kinds:
        kind.entry_points = property(lambda self: [])
    try:
        yield
    finally:
        for kind, kept in zip(kinds, registered):
            kind.entry_points = kept
        for name in hidden:
            if sys.modules.get(name, '') is None:
                del sys.modules[name]


def unusable(what: str, error: Exception, extra: str = 'deploy') -> ValueError:
    """What to raise where `what` asks for packages of the `extra`, and importing them raised `error`."""
    if isinstance(error, ModuleNotFoundError):
        return ValueError(f"{what} needs the package {error.name}: pip install 'mxsimmim[{extra}]'")
    return ValueError(f'{what} needs a package that is installed, but does not load ({type(error).__name__}: {error}): '
                      f"pip install --force-reinstall 'mxsimmim[{extra}]'")


def _distributions() -> List[Any]:
    """The classes whose `entry_points` pydantic and numba read."""
    from importlib import metadata
    kinds: List[Any] = [metadata.Distribution]
    if sys.version_info < (3, 9):  # where numba needs this package
        with contextlib.suppress(ImportError):
            import importlib_metadata
            kinds.append(importlib_metadata.Distribution)
    return kinds
