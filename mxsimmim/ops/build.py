"""Compiles the native operators, src/*.cc, into libmxsimmim.so.

Standard library only: setup.py runs it before anything is installed, and `make sanitize` runs it as a command.

The code is for any x86-64; what needs more, AVX2 or AVX-512, lies in files of their own, which are called only on CPUs
that have it.
"""
import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

NAME = 'libmxsimmim.so'
NOTE = 'libmxsimmim.txt'  # beside the place of a library that could not be built: why
SOURCES = Path(__file__).resolve().parent / 'src'
ONEDNN, HEADERS = 'onednn-cpu-gomp==2023.2.0', 'onednn-devel-cpu-gomp==2023.2.0'  # of PyPI, oneDNN 3.2
FLAGS = ['-O3', '-std=c++17', '-fopenmp', '-fPIC', '-fvisibility=hidden', '-fno-math-errno', '-Wall', '-Wextra']
# Sums of kernels may be taken in another order, so that they become vectors; NaN and infinity stay what they are.
REORDER = ['-fno-trapping-math', '-fassociative-math', '-fno-signed-zeros', '-freciprocal-math']
KERNELS = {
    'kernels_avx2.cc': ['-mavx2', '-mfma', '-mf16c'] + REORDER,
    'kernels_avx512.cc': ['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mfma', '-mprefer-vector-width=512']
    + REORDER,
}
LINK = ['-shared', '-fopenmp', '-Wl,--no-undefined', '-Wl,-Bsymbolic']
SANITIZE = ['-g1', '-O1', '-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-fno-omit-frame-pointer']


class NotBuilt(Exception):
    """There is no library: `why`, and the `remedy`, empty where there is none."""

    def __init__(self, why: str, remedy: str = ''):
        super().__init__(': '.join(filter(None, (why, remedy))))
        self.why, self.remedy = why, remedy


def digest() -> str:
    """A short hash of everything the library is made from; empty where the sources are not there."""
    if not SOURCES.is_dir():
        return ''
    whole = hashlib.sha256()
    for path in [Path(__file__), *_files('.cc', '.h', '.inl')]:
        whole.update(f'{path.name} {path.stat().st_size}\n'.encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def _files(*suffixes: str) -> List[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in suffixes)


def installed_file(requirement: str, ending: str) -> Optional[Path]:
    """A file of an installed distribution, wherever its installer put it."""
    try:
        files = metadata.files(requirement.split('==')[0]) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(os.path.abspath(str(file.locate()))) for file in files)
    return next((path for path in paths if path.as_posix().endswith(f'/{ending}') and path.exists()), None)


def check_machine() -> None:
    """Admit Linux on x86-64.

    Raises:
        NotBuilt: it is another.
    """
    if (platform.system(), platform.machine()) != ('Linux', 'x86_64'):
        raise NotBuilt(f'native operators are for Linux on x86-64, this is {platform.system()} on {platform.machine()}')


def build(target: Path, objects: Path, sanitize: bool = False) -> None:
    """Writes the library `target`; keeps objects in a folder, and compiles those that changed.

    Raises:
        NotBuilt: no compiler, no oneDNN, or errors.
    """
    check_machine()
    compiler = find_compiler()
    header = installed_file(HEADERS, 'include/oneapi/dnnl/dnnl.h')
    onednn = installed_file(ONEDNN, 'lib/libdnnl.so.3')
    if not header or not onednn:
        raise NotBuilt('oneDNN is not installed', f'pip install {HEADERS}')
    flags = FLAGS + ['-I', str(header.parents[2])] + (SANITIZE if sanitize else [])
    try:
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            made = list(pool.map(lambda job: _compile(compiler, *job), _jobs(objects, flags)))
        # An inline function that several files have is taken from the first: so those for any CPU come first.
        draft = target.with_name(f'.{target.name}.{os.getpid()}')
        _run([compiler, *LINK, *(SANITIZE if sanitize else []), *map(str, made), str(onednn), '-o', str(draft)])
        os.replace(draft, target)  # processes that use the old one keep it
    except OSError as error:
        raise NotBuilt(f'{error.filename}: {error.strerror}') from None


def find_compiler() -> str:
    """$CXX, or the first of g++, c++ and clang++.

    Raises:
        NotBuilt: none of them is there.
    """
    for name in filter(None, (os.environ.get('CXX'), 'g++', 'c++', 'clang++')):
        path = shutil.which(name)
        if path:
            return path
    raise NotBuilt('no C++ compiler was found (g++, c++, clang++)', 'sudo apt-get install g++')


def _jobs(objects: Path, flags: List[str]) -> Iterator[Tuple[Path, List[str], Path]]:
    """(source, flags, object) of each file. The object's name tells what it was made from."""
    headers = b''.join(path.read_bytes() for path in _files('.h', '.inl'))
    for source in sorted(_files('.cc'), key=lambda path: (path.name in KERNELS, path.name)):
        own = flags + KERNELS.get(source.name, [])
        if source.name == 'about.cc':
            own = own + [f'-DMXSIMMIM_SOURCES="{digest()}"']
        made_from = hashlib.sha256(headers + source.read_bytes() + repr(own).encode()).hexdigest()[:16]
        yield source, own, objects / f'{source.stem}-{made_from}.o'


def _compile(compiler: str, source: Path, flags: List[str], made: Path) -> Path:
    if not made.exists():
        draft = made.with_suffix(f'.{os.getpid()}')
        _run([compiler, *flags, '-c', str(source), '-o', str(draft)])
        for older in made.parent.glob(f'{source.stem}-*.o'):
            older.unlink()
        os.replace(draft, made)
    return made


def _run(command: List[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        lines = done.stdout.splitlines() or [f'status {done.returncode}']
        first = next((line for line in lines if ' error: ' in line or 'undefined reference' in line), lines[-1])
        raise NotBuilt(f'{os.path.basename(command[0])} failed: {first}',
                       'export CXX=/path/to/a/newer/g++')
    if done.stdout.strip():
        print(done.stdout.strip(), file=sys.stderr)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Compiles the native operators.')
    parser.add_argument('target', type=Path, help=f'file to write, a {NAME}')
    parser.add_argument('--objects', type=Path, help="folder for object files (objects beside the target)")
    parser.add_argument('--sanitize', action='store_true', help='with AddressSanitizer and UndefinedBehaviorSanitizer')
    given = parser.parse_args()
    try:
        build(given.target.resolve(), given.objects or given.target.resolve().parent / 'objects', given.sanitize)
    except NotBuilt as error:
        sys.exit(f'{given.target}: {error}')
