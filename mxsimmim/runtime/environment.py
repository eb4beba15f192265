"""What must be set before ``import mxnet``: threads, BLAS core, CUDA libraries. Standard library only.

MXNet reads these once, when its library is loaded; `prepare` is therefore the first thing a command does. What MXNet
does without it: half of the CPUs (it takes the other half for hyper-threads), and on a CPU newer than its OpenBLAS the
slowest of that library's cores.
"""
import ctypes
import difflib
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Dict, FrozenSet, Iterable, Iterator, List, Mapping, Optional, Set

if TYPE_CHECKING:
    from mxsimmim.config import RuntimeConfig

# Names that OpenBLAS 0.3.13, the one inside mxnet 1.9.1, takes in OPENBLAS_CORETYPE. With any other name it falls back
# to PRESCOTT, whose batch_dot ran at half the speed of HASWELL's.
BLAS_CORES = ('PRESCOTT', 'CORE2', 'PENRYN', 'DUNNINGTON', 'NEHALEM', 'ATHLON', 'OPTERON', 'OPTERON_SSE3', 'BARCELONA',
              'NANO', 'ATOM', 'SANDYBRIDGE', 'BOBCAT', 'BULLDOZER', 'PILEDRIVER', 'STEAMROLLER', 'EXCAVATOR', 'HASWELL',
              'ZEN', 'SKYLAKEX')

# How long libgomp's threads spin for the next operator before they sleep, in loops: some tens of microseconds. Its own
# default, milliseconds, takes a core from our decoding threads and from other processes: the digits demo fell from 150
# to 13 images/s beside two of these, and ViT-B gains nothing by it.
SPINS = 20_000

# What libmxnet.so of mxnet-cu112 links beside the driver, each after those it needs: (folder in nvidia/, file).
CUDA_LIBRARIES = (('cuda_runtime', 'libcudart.so.11.0'), ('nvtx', 'libnvToolsExt.so.1'),
                  ('cuda_nvrtc', 'libnvrtc.so.11.2'), ('cublas', 'libcublasLt.so.11'), ('cublas', 'libcublas.so.11'),
                  ('cufft', 'libcufft.so.10'), ('curand', 'libcurand.so.10'), ('cusolver', 'libcusolver.so.11'),
                  ('cudnn', 'libcudnn.so.8'), ('nccl', 'libnccl.so.2'))


def prepare(config: 'RuntimeConfig') -> None:
    """Sets the environment for `import mxnet` and loads the CUDA libraries it will look for.

    A definite value in `config` wins over the environment, and the environment over 'auto'. Calling it again changes
    nothing.

    Raises:
        ValueError: `config.blas_core` is not a core of MXNet's OpenBLAS.
        RuntimeError: mxnet is imported already, so that a setting would have no effect.
    """
    changes = {name: value for name, value in settings(config, os.environ, cpu_flags(), cores()).items()
               if os.environ.get(name) != value}
    if 'mxnet' in sys.modules:
        if changes:
            late = ', '.join(f'{name}={value}' for name, value in changes.items())
            raise RuntimeError(f'environment.prepare() came after `import mxnet`, too late for {late}: call it first')
        return
    os.environ.update(changes)
    if _installed('mxnet-cu112'):
        for path in cuda_libraries(_nvidia_folders()):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def settings(config: 'RuntimeConfig', environ: Mapping[str, str], flags: FrozenSet[str], cores: int) -> Dict[str, str]:
    """The environment variables to set, given what is set already, the CPU's flags and the cores at hand.

    Raises:
        ValueError: `config.blas_core` is not a core of MXNet's OpenBLAS.
    """
    result = {}
    if config.threads or not environ.get('OMP_NUM_THREADS'):
        result['OMP_NUM_THREADS'] = str(config.threads or cores)
    name = config.blas_core.upper()
    if name == 'AUTO':
        name = environ.get('OPENBLAS_CORETYPE') or blas_core(flags) or 'NONE'
    elif name not in BLAS_CORES + ('NONE',):
        near = difflib.get_close_matches(name, BLAS_CORES, 1)
        raise ValueError(f"key 'runtime.blas_core': '{config.blas_core}' is not a core of MXNet's OpenBLAS"
                         + (f' (did you mean {near[0]}?)' if near else '')
                         + f": write auto, none, or one of {', '.join(BLAS_CORES)}")
    if name != 'NONE':
        result['OPENBLAS_CORETYPE'] = name
    if not environ.get('OMP_WAIT_POLICY') and not environ.get('GOMP_SPINCOUNT'):
        result['GOMP_SPINCOUNT'] = str(SPINS)
    return result


def blas_core(flags: FrozenSet[str]) -> Optional[str]:
    """The OpenBLAS core for a CPU with these flags; None leaves the choice to OpenBLAS."""
    if flags >= {'avx512f', 'avx512dq', 'avx512bw', 'avx512vl'}:
        return 'SKYLAKEX'
    return 'HASWELL' if flags >= {'avx2', 'fma'} else None


def cpu_flags(cpuinfo: Path = Path('/proc/cpuinfo')) -> FrozenSet[str]:
    """The CPU's features as Linux names them (avx2, avx512f, amx_tile, …); empty where it does not say."""
    for line in contents(cpuinfo).splitlines():
        if line.startswith('flags'):
            return frozenset(line.partition(':')[2].split())
    return frozenset()


def cores(root: Path = Path('/')) -> int:
    """Physical cores this process may use, at least 1: those of its affinity mask, within its cgroup's CPU quota.

    Hyper-threads of one core count once: they share the one vector unit that MXNet's operators keep busy.
    """
    return max(1, int(min([len(_physical(root))] + list(_quotas(root)))))


def cpus_of_part(place: int, parts: int, root: Path = Path('/')) -> Set[int]:
    """The CPUs of part `place` of `parts` of this process's: whole cores, neighbours by number; all, if too few."""
    found = _physical(root)
    if parts <= len(found):
        found = found[place * len(found) // parts:(place + 1) * len(found) // parts]
    return set().union(*found)


def _physical(root: Path) -> List[Set[int]]:
    """The CPUs, hyper-threads, of each physical core that this process may use."""
    found: Dict[str, Set[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else range(os.cpu_count() or 1):
        siblings = contents(root / f'sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list')
        found.setdefault(siblings or str(cpu), set()).add(cpu)
    return list(found.values())


def _quotas(root: Path) -> Iterator[float]:
    """CPUs' worth of time granted to the process's cgroup and each of its parents."""
    for words in cgroup_values(root, 'cpu.max'):  # version 2: quota and period, µs
        if words[0] != 'max':
            yield int(words[0]) / int(words[1])
    quotas, periods = (cgroup_values(root, f'cpu.cfs_{what}_us') for what in ('quota', 'period'))  # version 1
    for (quota, *_), (period, *_) in zip(quotas, periods):
        if int(quota) > 0:
            yield int(quota) / int(period)


def cgroup_values(root: Path, name: str) -> Iterator[List[str]]:
    """The words of file `name` in the process's cgroup and in each of its parents, versions 1 and 2."""
    for line in contents(root / 'proc/self/cgroup').splitlines():
        _, controllers, path = line.split(':', 2)
        mount = root / 'sys/fs/cgroup' / controllers
        folder = mount / path.strip('/')
        for parent in [folder] + [p for p in folder.parents if p == mount or mount in p.parents]:
            words = contents(parent / name).split()
            if words:
                yield words


def cuda_libraries(folders: Iterable[str]) -> List[str]:
    """Paths of the CUDA libraries that the ``nvidia-*-cu11`` packages put into `folders`, in loading order.

    One that is in none of the folders is left out: the system's own may serve.
    """
    paths = [[path for path in (os.path.join(folder, package, 'lib', name) for folder in folders)
              if os.path.exists(path)] for package, name in CUDA_LIBRARIES]
    return [found[0] for found in paths if found]


def request_amx() -> bool:
    """Asks the kernel to let this process use AMX tiles; True where the CPU has them and the kernel grants it."""
    if platform.machine() != 'x86_64' or 'amx_tile' not in cpu_flags():
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # of Linux's asm/unistd_64.h and asm/prctl.h
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _nvidia_folders() -> List[str]:
    from importlib.util import find_spec
    spec = find_spec('nvidia')
    return list(spec.submodule_search_locations or ()) if spec else []


def _installed(distribution: str) -> bool:
    from importlib import metadata
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def contents(path: Path) -> str:
    """A file's text without the blanks around it; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ''
