"""runtime.py: what is set before mxnet is imported, on whatever machine the tests run."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mxsimmim.config import RuntimeConfig
from mxsimmim.runtime import environment

AVX2 = frozenset({'sse4_2', 'avx', 'avx2', 'fma'})
AVX512 = AVX2 | {'avx512f', 'avx512dq', 'avx512bw', 'avx512vl'}


@pytest.mark.parametrize('flags, core', [
    (AVX512 | {'amx_tile'}, 'SKYLAKEX'),
    (AVX512, 'SKYLAKEX'),
    (AVX512 - {'avx512dq'}, 'HASWELL'),  # Knights Landing has AVX-512 without DQ, BW, VL
    (AVX2, 'HASWELL'),
    (AVX2 - {'fma'}, None),
    (frozenset(), None),
])
def test_blas_core_follows_the_flags(flags, core):
    assert environment.blas_core(flags) == core


@pytest.mark.parametrize('config, environ, expected', [
    ({}, {}, {'OMP_NUM_THREADS': '6', 'OPENBLAS_CORETYPE': 'HASWELL'}),
    ({}, {'OMP_NUM_THREADS': '3'}, {'OPENBLAS_CORETYPE': 'HASWELL'}),
    ({}, {'OMP_NUM_THREADS': ''}, {'OMP_NUM_THREADS': '6', 'OPENBLAS_CORETYPE': 'HASWELL'}),
    ({'threads': 4}, {'OMP_NUM_THREADS': '3'}, {'OMP_NUM_THREADS': '4', 'OPENBLAS_CORETYPE': 'HASWELL'}),
    ({}, {'OPENBLAS_CORETYPE': 'Zen'}, {'OMP_NUM_THREADS': '6', 'OPENBLAS_CORETYPE': 'Zen'}),
    ({'blas_core': 'nehalem'}, {'OPENBLAS_CORETYPE': 'Zen'}, {'OMP_NUM_THREADS': '6', 'OPENBLAS_CORETYPE': 'NEHALEM'}),
    ({'blas_core': 'none'}, {'OPENBLAS_CORETYPE': 'Zen'}, {'OMP_NUM_THREADS': '6'}),
])
def test_configuration_beats_environment_beats_auto(config, environ, expected):
    environ = {'OMP_WAIT_POLICY': 'active', **environ}
    assert environment.settings(RuntimeConfig(**config), environ, AVX2, cores=6) == expected


@pytest.mark.parametrize('environ, expected', [
    ({}, '20000'), ({'GOMP_SPINCOUNT': '5'}, None), ({'OMP_WAIT_POLICY': 'passive'}, None),
])
def test_threads_spin_briefly_unless_told_otherwise(environ, expected):
    assert environment.settings(RuntimeConfig(), environ, AVX2, cores=6).get('GOMP_SPINCOUNT') == expected


def test_unknown_core_names_the_nearest():
    with pytest.raises(ValueError, match=r"key 'runtime.blas_core': 'HASWEL' .*did you mean HASWELL\?.*auto, none"):
        environment.settings(RuntimeConfig(blas_core='HASWEL'), {}, AVX2, cores=1)


def test_flags_of_a_cpuinfo(tmp_path):
    text = 'processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu\n'
    (tmp_path / 'cpuinfo').write_text(text)
    assert environment.cpu_flags(tmp_path / 'cpuinfo') == {'fpu', 'avx2', 'fma'}
    assert environment.cpu_flags(tmp_path / 'none') == frozenset()


def _write(root: Path, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


PAIRS = {cpu: f'{cpu % 4},{cpu % 4 + 4}\n' for cpu in range(8)}  # CPUs 0 and 4 share a core, 1 and 5, …
V2 = '0::/a/b\n'
V1 = '3:memory:/x\n2:cpu,cpuacct:/x\n0::/\n'
QUOTA, PERIOD = 'cpu,cpuacct/{}cpu.cfs_quota_us', 'cpu,cpuacct/{}cpu.cfs_period_us'


@pytest.mark.parametrize('affinity, siblings, cgroup, files, expected', [
    (range(8), {}, '', {}, 8),  # nothing known of hyper-threads
    (range(8), PAIRS, '', {}, 4),
    ([1, 5, 6], PAIRS, '', {}, 2),
    (range(8), PAIRS, V2, {'a/b/cpu.max': 'max 100000\n'}, 4),
    (range(8), PAIRS, V2, {'a/b/cpu.max': '350000 100000\n'}, 3),
    (range(8), PAIRS, V2, {'a/b/cpu.max': 'max 100000\n', 'a/cpu.max': '200000 100000\n'}, 2),
    (range(8), PAIRS, V2, {'cpu.max': '50000 100000\n'}, 1),  # a container sees its own folder as the root
    (range(8), PAIRS, V1, {QUOTA.format('x/'): '250000\n', PERIOD.format('x/'): '100000\n'}, 2),
    (range(8), PAIRS, V1, {QUOTA.format(''): '-1\n', PERIOD.format(''): '100000\n'}, 4),
])
def test_cores_within_affinity_and_quota(monkeypatch, tmp_path, affinity, siblings, cgroup, files, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(affinity), raising=False)
    topology = 'sys/devices/system/cpu/cpu{}/topology/thread_siblings_list'
    _write(tmp_path, {topology.format(cpu): text for cpu, text in siblings.items()})
    _write(tmp_path, {'proc/self/cgroup': cgroup, **{f'sys/fs/cgroup/{name}': text for name, text in files.items()}})
    assert environment.cores(tmp_path) == expected


@pytest.mark.parametrize('siblings, parts, expected', [
    ({}, 2, [{1, 3}, {5, 7, 9}]),
    ({}, 6, [{1, 3, 5, 7, 9}] * 6),  # too few: the kernel knows best
    ({1: '1,7', 7: '1,7', 3: '3,9', 9: '3,9'}, 3, [{1, 7}, {3, 9}, {5}]),  # hyper-threads of a core stay together
])
def test_the_cpus_of_a_part(monkeypatch, tmp_path, siblings, parts, expected):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {1, 3, 5, 7, 9}, raising=False)
    _write(tmp_path, {f'sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list': text
                      for cpu, text in siblings.items()})
    assert [environment.cpus_of_part(place, parts, tmp_path) for place in range(parts)] == expected


def test_cores_without_affinity_masks(monkeypatch, tmp_path):
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: None)
    assert environment.cores(tmp_path) == 1


def test_cuda_libraries_in_loading_order(tmp_path):
    for package, name in reversed(environment.CUDA_LIBRARIES[1:]):
        _write(tmp_path / ('user' if package == 'cudnn' else 'venv'), {f'{package}/lib/{name}': ''})
    _write(tmp_path / 'user', {'nccl/lib/libnccl.so.2': ''})
    found = environment.cuda_libraries([str(tmp_path / 'venv'), str(tmp_path / 'user')])
    assert found == [str(tmp_path / ('user' if package == 'cudnn' else 'venv') / package / 'lib' / name)
                     for package, name in environment.CUDA_LIBRARIES[1:]]  # the first is nowhere: left to the system


def _python(code: str, **environ) -> str:
    """What a fresh process prints; `environ` on top of the tests' own, None takes a variable out."""
    env = {name: value for name, value in {**os.environ, **environ}.items() if value is not None}
    env['PYTHONPATH'] = str(Path(environment.__file__).parents[2])
    child = subprocess.run([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           universal_newlines=True, timeout=120)
    assert child.returncode == 0, child.stdout
    return child.stdout.strip()


def test_mxnet_obeys_what_was_prepared():
    code = '''
import ctypes, os
from mxsimmim.runtime import environment
from mxsimmim.config import RuntimeConfig
config = RuntimeConfig(threads=3, blas_core='NEHALEM')
environment.prepare(config)
import mxnet
blas = ctypes.CDLL(os.path.join(os.path.dirname(mxnet.__file__), 'libopenblas.so.0'))
blas.openblas_get_corename.restype = ctypes.c_char_p
environment.prepare(config)  # changes nothing, so not too late
print(blas.openblas_get_corename().decode(), ctypes.CDLL('libgomp.so.1').omp_get_max_threads())
try:
    environment.prepare(RuntimeConfig(threads=4, blas_core='NEHALEM'))
except RuntimeError as error:
    print(error)
'''
    assert _python(code, OMP_NUM_THREADS=None, OPENBLAS_CORETYPE=None).splitlines() == [
        'Nehalem 3', 'environment.prepare() came after `import mxnet`, too late for OMP_NUM_THREADS=4: call it first']


def test_runtime_imports_no_mxnet_numpy_or_pydantic():
    code = ('import sys; from mxsimmim.runtime import environment; '
            'print({"mxnet", "numpy", "pydantic"} & set(sys.modules))')
    assert _python(code) == 'set()'
