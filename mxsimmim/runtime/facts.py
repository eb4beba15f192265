"""What `mxsimmim doctor` reports: facts about this machine, its Python packages and its MXNet.

Whatever may crash (`import mxnet`, the GPU driver) is asked in a process of its own. Standard library only, and what
the machine does not tell stays empty or 0.
"""
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, FrozenSet, Iterator, NamedTuple, Tuple

from . import environment, fault

GIB = 2 ** 30
VARIABLES = ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'OPENBLAS_CORETYPE', 'DNNL_MAX_CPU_ISA')
# RuntimeConfig's defaults, without needing pydantic.
AUTO: Any = SimpleNamespace(threads=0, blas_core='auto')


class Gpu(NamedTuple):
    """One GPU as its driver describes it; memory in GiB."""
    name: str
    capability: Tuple[int, int]
    memory: float


class Package(NamedTuple):
    """A distribution: the version setup.py pins ('' for any), the version found ('' for none), the extra it is of."""
    name: str
    pinned: str
    found: str
    extra: str = ''


class Facts(NamedTuple):
    """What was found. Sizes in GiB; `mxnet` and `horovod` hold 'error' where the import failed."""
    python: Tuple[int, ...]
    executable: str
    system: str
    cpu: str
    flags: FrozenSet[str]
    cores: int
    amx: bool
    memory: Tuple[float, float]  # usable, free
    disk: float
    driver: Tuple[int, int]  # newest CUDA the GPU driver speaks; (0, 0) without one
    gpus: Tuple[Gpu, ...]
    packages: Tuple[Package, ...]
    environment: Dict[str, str]  # set by the user
    settings: Dict[str, str]  # as `environment.prepare` leaves them
    mxnet: Dict[str, Any]  # version, features, isa, blas
    horovod: Dict[str, Any]  # version, gloo, mpi; empty where it is not installed
    operators: Dict[str, Any]  # of our library: instructions, names, auto; or why there is none, and the remedy


def collect() -> Facts:
    """Asks the machine; what it does not tell stays empty or 0."""
    version = sys.version_info
    variables = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    flags, cores = environment.cpu_flags(), environment.cores()
    driver = _ask('_driver')
    return Facts(python=tuple(version[:3]), executable=_short(sys.executable), flags=flags, cores=cores,
                 system=' '.join((platform.system(), platform.release(), platform.machine(), *platform.libc_ver())),
                 cpu=_cpu_model(), amx=environment.request_amx(), memory=_memory(), disk=_disk(),
                 driver=tuple(driver.get('cuda', (0, 0))),
                 gpus=tuple(Gpu(name, tuple(capability), memory)
                            for name, capability, memory in driver.get('gpus', ())),
                 packages=tuple(_package_versions()), environment=variables,
                 settings={**variables, **environment.settings(AUTO, os.environ, flags, cores)},
                 mxnet=_ask('_import_mxnet'), horovod=_ask('_import_horovod'), operators=_ask('report', 'ops.backend'))


def _ask(function: str, module: str = 'runtime.facts') -> Dict[str, Any]:
    """What a function of ours returns in a process of its own; {'error': …} if it fails or crashes."""
    code = ('import json\nfrom mxsimmim.runtime.mxnet_private import light_import\n'
            'from mxsimmim.system import guards\nguards.name_crashes()\n'
            'try:\n    with guards.alone(), light_import():\n'
            f'        from mxsimmim.{module.replace(".", " import ")} as module\n'
            f'        answer = module.{function}()\n'
            'except Exception as error: answer = dict(error=f"{type(error).__name__}: {error}")\n'
            'print("\\n" + json.dumps(answer), flush=True)')
    env = {name: value for name, value in os.environ.items() if name != 'DMLC_ROLE'}  # a server's import never returns
    paths = [str(Path(__file__).parents[2]), env.get('PYTHONPATH')]
    env.update(DNNL_VERBOSE='1', PYTHONPATH=os.pathsep.join(filter(None, paths)))
    try:
        child = subprocess.run([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               universal_newlines=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {'error': str(error)}
    answers = [line for line in child.stdout.splitlines() if line.startswith('{')]
    if not answers:
        name = signal.Signals(-child.returncode).name if child.returncode < 0 else f'exit {child.returncode}'
        place = fault.place(child.stderr.splitlines())
        return {'error': f'{name}: ' + (f'crashed {place}' if place else ' '.join(child.stderr.split()[-30:]))}
    isa = re.search(r'^(?:dnnl|onednn)_verbose,info,cpu,isa:(.*)$', child.stdout, re.MULTILINE)
    return {**json.loads(answers[-1]), **({'isa': isa[1]} if isa else {})}


def _import_mxnet() -> Dict[str, Any]:
    environment.prepare(AUTO)
    import mxnet
    x = mxnet.nd.ones((4, 4))
    mxnet.nd.FullyConnected(x, x, no_bias=True, num_hidden=4).wait_to_read()  # makes oneDNN name its instruction set
    try:
        openblas = ctypes.CDLL(str(Path(mxnet.__file__).parent / 'libopenblas.so.0'))
        openblas.openblas_get_corename.restype = ctypes.c_char_p
        blas = openblas.openblas_get_corename().decode()
    except (OSError, AttributeError):
        blas = ''
    return {'version': mxnet.__version__, 'blas': blas,
            'features': [feature.name for feature in mxnet.runtime.feature_list() if feature.enabled]}


def _import_horovod() -> Dict[str, Any]:
    from importlib.util import find_spec
    if find_spec('horovod') is None:
        return {}
    environment.prepare(AUTO)
    import horovod.mxnet as hvd
    return {'version': metadata.version('horovod'), 'gloo': bool(hvd.gloo_built()), 'mpi': bool(hvd.mpi_built())}


def _driver() -> Dict[str, Any]:
    """The newest CUDA version the NVIDIA driver speaks, and [name, capability, GiB] of each GPU."""
    try:
        cuda = ctypes.CDLL('libcuda.so.1')
    except OSError:
        return {}
    count, device, value, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(100)
    gpus = []
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0:
        for index in range(count.value):
            cuda.cuDeviceGet(ctypes.byref(device), index)
            cuda.cuDeviceGetName(name, len(name), device)
            cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
            capability = []
            for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
                cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
                capability.append(value.value)
            gpus.append([name.value.decode(), capability, size.value / GIB])
    cuda.cuDriverGetVersion(ctypes.byref(value))
    return {'cuda': [value.value // 1000, value.value % 1000 // 10], 'gpus': gpus}


def _package_versions() -> Iterator[Package]:
    """What setup.py names, in its order; mxnet and numpy even where mxsimmim itself is not installed."""
    def found(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ''
    try:
        required = metadata.requires('mxsimmim') or []
    except metadata.PackageNotFoundError:
        required = ['mxnet==1.9.1', 'numpy==1.23.5', 'mxnet-cu112==1.9.1; extra == "cu112"']
    seen = set()
    for text in required:
        parts = re.match(r'([\w.-]+)(?:\[.*?\])?\s*(?:\(?==([\w.+!]+)\)?)?[^;]*;?(.*)', text)
        assert parts, text
        name, pinned, marker = parts.groups()
        if 'platform_machine' in marker and platform.machine() not in marker:
            continue
        version = re.search(r'python_version\s*(<|>=)\s*["\'](\d+)\.(\d+)["\']', marker)
        if version and (version[1] == '<') != (sys.version_info[:2] < (int(version[2]), int(version[3]))):
            continue
        if name in seen:  # in two extras
            continue
        seen.add(name)
        extra = re.search(r'extra == ["\']([\w-]+)["\']', marker)
        yield Package(name, pinned or '', found(name), extra[1] if extra else '')


def _cpu_model() -> str:
    match = re.search(r'^model name\s*:\s*(.*)$', environment.contents(Path('/proc/cpuinfo')), re.MULTILINE)
    return match[1] if match else platform.processor() or 'unknown'


def _memory() -> Tuple[float, float]:
    """Memory this process may use and what of it is free, GiB."""
    text = environment.contents(Path('/proc/meminfo'))
    total, free = (int(match[1]) * 1024 if match else 0 for match in
                   (re.search(rf'^{name}:\s*(\d+)', text, re.MULTILINE) for name in ('MemTotal', 'MemAvailable')))
    limits = [int(words[0]) for name in ('memory.max', 'memory.limit_in_bytes')
              for words in environment.cgroup_values(Path('/'), name) if words[0] != 'max']
    total = min([total] + limits)
    return total / GIB, min(free, total) / GIB


def _short(path: str) -> str:
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path


def _disk() -> float:
    try:
        return shutil.disk_usage('.').free / GIB
    except OSError:
        return 0.0
