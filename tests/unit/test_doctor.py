"""doctor.py: a table of machines, and what is wrong with each."""
import re
import subprocess
import sys

import pytest

from mxsimmim.runtime import doctor, facts
from mxsimmim.runtime.facts import Facts, Gpu, Package

CPU_WHEEL = (Package('mxnet', '1.9.1', '1.9.1'), Package('numpy', '1.23.5', '1.23.5'),
             Package('mxnet-cu112', '1.9.1', '', 'cu112'), Package('torch', '2.13.0', '2.13.0+cpu', 'bench'))
GPU_WHEEL = CPU_WHEEL[:2] + (Package('mxnet-cu112', '1.9.1', '1.9.1', 'cu112'),)
WELL = Facts(python=(3, 11, 7), executable='.venv/bin/python', system='Linux', cpu='a CPU', flags=frozenset({'avx2'}),
             cores=8, amx=False, memory=(64.0, 60.0), disk=100.0, driver=(0, 0), gpus=(), packages=CPU_WHEEL,
             environment={}, settings={'OMP_NUM_THREADS': '8', 'OPENBLAS_CORETYPE': 'HASWELL', 'GOMP_SPINCOUNT': '20'},
             mxnet={'version': '1.9.1', 'features': ['MKLDNN'], 'blas': 'Haswell', 'isa': 'Intel AVX2'}, horovod={},
             operators={'instructions': 'avx2', 'auto': 'float32', 'names': list(doctor.OPERATORS)})
CUDA = {**WELL.mxnet, 'features': ['CUDA', 'CUDNN', 'MKLDNN']}
H100, A10 = Gpu('NVIDIA H100', (9, 0), 80.0), Gpu('NVIDIA A10', (8, 6), 24.0)
T4, TITAN = Gpu('Tesla T4', (7, 5), 16.0), Gpu('GTX TITAN', (3, 5), 6.0)
FORCE = 'install --force-reinstall --no-deps mxnet-cu112==1.9.1'


def with_gpus(*gpus, wheel=GPU_WHEEL, mxnet=CUDA, driver=(12, 4)):
    return dict(gpus=gpus, packages=wheel, mxnet=mxnet, driver=driver)


@pytest.mark.parametrize('changes, broken, text, remedy', [
    (dict(python=(3, 12, 1)), True, 'Python 3.12.1', 'PYTHON=/path/to/python3.11'),
    (dict(python=(3, 7, 16)), True, 'Python 3.7.16', 'PYTHON=/path/to/python3.11'),
    (dict(packages=(CPU_WHEEL[0], Package('numpy', '1.23.5', '1.26.4'))), True, 'numpy 1.26.4 lacks np.bool',
     '.venv/bin/python -m pip install numpy==1.23.5'),
    (dict(packages=(CPU_WHEEL[0], Package('numpy', '1.23.5', '1.22.4'))), False, r'numpy 1.22.4 \(1.23.5\)',
     'install numpy==1.23.5'),
    (dict(packages=CPU_WHEEL + (Package('tqdm', '4.67.1', ''),)), True, 'not installed: tqdm', 'install tqdm==4.67.1'),
    (dict(packages=CPU_WHEEL + (Package('typing_extensions', '', ''),)), True, 'typing_extensions',
     'install typing_extensions'),
    (dict(mxnet={'error': 'SIGILL: '}), True, 'mxnet cannot be imported: SIGILL',
     'install --force-reinstall --no-deps mxnet==1.9.1'),
    (dict(mxnet={'error': 'OSError: libcuda.so.1: cannot open'}, packages=GPU_WHEEL), True, 'no NVIDIA driver',
     'uninstall -y mxnet mxnet-cu112'),
    (dict(mxnet={'error': 'OSError: libcudnn.so.8: cannot open'}, packages=GPU_WHEEL), True, 'libcudnn.so.8', FORCE),
    (dict(packages=GPU_WHEEL), True, 'lies over it', FORCE),
    (with_gpus(H100), True, r'no code for gpu\(0\) NVIDIA H100 \(sm_90\): only sm_50, .*, sm_86',
     r'devices=\[cpu\(0\)\]'),
    (with_gpus(TITAN), True, 'sm_35', r'devices=\[cpu\(0\)\]'),
    (with_gpus(H100, T4, A10), True, r'no code for gpu\(0\) NVIDIA H100 \(sm_90\): ',
     r'devices=\[gpu\(1\), gpu\(2\)\]'),
    (with_gpus(T4, driver=(10, 2)), True, 'CUDA 10.2', '450.80'),
    (with_gpus(T4, driver=(11, 4)), False, 'CUDA 11.4, older than the 11.8', 'MXNET_USE_FUSION=0'),
    (with_gpus(T4, wheel=CPU_WHEEL, mxnet=WELL.mxnet), False, r'idle: gpu\(0\) Tesla T4 \(sm_75\)', FORCE),
    (with_gpus(H100, wheel=CPU_WHEEL, mxnet=WELL.mxnet), False, 'no MXNet wheel has code for', r'devices=\[cpu\(0\)\]'),
    (dict(settings={'OMP_NUM_THREADS': '8', 'OPENBLAS_CORETYPE': 'COOPERLAKE'},
          mxnet={**WELL.mxnet, 'blas': 'Prescott'}), False, 'does not know OPENBLAS_CORETYPE=COOPERLAKE',
     'unset OPENBLAS_CORETYPE'),
    (dict(operators={'why': 'libmxsimmim.so was not built', 'remedy': 'apt && pip'}), False,
     'slower than they could, with reference operators: libmxsimmim.so was not built', '^apt && pip$'),
    (dict(operators={'error': 'SIGILL: '}), True, 'native operators crash when they are loaded: SIGILL', 'rm .*.so'),
    (dict(horovod={'error': 'ImportError: undefined symbol'}), True, 'horovod is installed, but .*undefined symbol',
     'make test'),
])
def test_each_problem_has_its_remedy(changes, broken, text, remedy):
    problem, = doctor.judge(WELL._replace(**changes))
    assert problem.broken is broken
    assert re.search(text, problem.text), problem.text
    assert re.search(remedy, problem.remedy), problem.remedy


@pytest.mark.parametrize('changes', [
    {}, with_gpus(T4), with_gpus(A10, T4, driver=(11, 8)),
    dict(horovod={'version': '0.28.1', 'gloo': True, 'mpi': False}),
    dict(packages=GPU_WHEEL[1:] + (Package('mxnet', '1.9.1', ''),), mxnet=CUDA),  # the CUDA wheel alone serves
    dict(operators={'why': 'native operators are for Linux on x86-64', 'remedy': ''}),
])
def test_nothing_to_complain_of(changes):
    assert doctor.judge(WELL._replace(**changes)) == []
    assert doctor.render(WELL._replace(**changes), []).endswith('\nNothing is broken.')


def test_broken_things_come_first():
    problems = doctor.judge(WELL._replace(python=(3, 12, 1), **with_gpus(T4, H100, wheel=CPU_WHEEL, mxnet=WELL.mxnet),
                                          horovod={'error': 'x'}))
    assert [problem.broken for problem in problems] == [True, True, False, False]


@pytest.mark.parametrize('capability, runs', [
    ((3, 7), False), ((5, 0), True), ((5, 2), True), ((6, 1), True), ((7, 0), True), ((7, 5), True), ((8, 0), True),
    ((8, 6), True), ((8, 9), True), ((9, 0), False), ((10, 0), False), ((12, 0), False),
])
def test_machine_code_serves_newer_minor_versions_of_its_major_one(capability, runs):
    assert doctor.has_code(capability) is runs


def test_report_is_aligned_and_keeps_remedies_on_one_line():
    ill = WELL._replace(**with_gpus(H100, T4), flags=frozenset({'avx2', 'avx512f', 'amx_tile'}),
                        environment={'OMP_NUM_THREADS': '8'})
    text = doctor.render(ill, doctor.judge(ill))
    lines = text.splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert all(re.match(r'(\S.{10} |\s{12})\S', line) for line in lines if line), text
    assert 'vectors     AVX2, AVX-512, AMX (the kernel refuses AMX)' in lines
    assert 'threads     OMP_NUM_THREADS=8, your environment; GOMP_SPINCOUNT=20, set by mxsimmim' in lines
    assert 'BLAS core   Haswell (OPENBLAS_CORETYPE=HASWELL, set by mxsimmim)' in lines
    assert lines[-1] == '            -> leave it out: devices=[gpu(1)]'


@pytest.mark.parametrize('operators, expected', [
    (WELL.operators, ['operators   native on CPUs, with avx2: linear, attention, mlp, layer_norm, patchify, '
                      'masked_loss, adamw',
                      'precision   float32 by runtime.precision=auto, float32 by default']),
    ({'instructions': 'avx512_core_amx', 'auto': 'bf16', 'names': ['mlp', 'adamw', 'more']},
     ['operators   native on CPUs, with avx512_core_amx: mlp, adamw; reference: linear, attention, layer_norm, '
      'patchify,', '            masked_loss', 'precision   bf16 by runtime.precision=auto, float32 by default']),
    ({'why': 'this is a toaster', 'remedy': ''}, ['operators   reference: this is a toaster']),
])
def test_which_form_operators_take(operators, expected):
    lines = doctor.render(WELL._replace(operators=operators), []).splitlines()
    first = lines.index(expected[0])
    assert lines[first:first + len(expected) + 1] == expected + [next(
        line for line in lines if line.startswith('horovod'))]


def test_this_machine():
    found = facts.collect()
    assert found.python == sys.version_info[:3]
    assert found.mxnet['version'] == '1.9.1'
    assert 'MKLDNN' in found.mxnet['features'] and found.mxnet['isa']
    assert found.cores >= 1
    assert 0 <= found.memory[1] <= found.memory[0]
    assert {p.name: p.found for p in found.packages}['numpy'] < '1.24'
    assert set(found.operators) == {'why', 'remedy'} or set(doctor.OPERATORS) <= set(found.operators['names'])


def test_a_machine_that_tells_nothing(monkeypatch):
    monkeypatch.setattr(facts.environment, 'contents', lambda path: '')
    monkeypatch.setattr(facts, '_ask', lambda *_: {})
    found = facts.collect()
    assert (found.flags, found.memory, found.gpus, found.mxnet) == (frozenset(), (0.0, 0.0), (), {})
    doctor.render(found, doctor.judge(found))


@pytest.mark.parametrize('function, expected', [
    ('_no_such_function', r'AttributeError: .*_no_such_function'),
    ('os.abort', 'SIGABRT: '),
    ('sys.exit', 'exit 0: '),
])
def test_what_crashes_is_reported(function, expected):
    assert re.match(expected, facts._ask(function)['error'])


def test_command_exits_0_where_nothing_is_broken():
    child = subprocess.run([sys.executable, '-m', 'mxsimmim.runtime.doctor'], stdout=subprocess.PIPE,
                           universal_newlines=True, timeout=120)
    assert (child.returncode, child.stdout.splitlines()[-1]) == (0, 'Nothing is broken.')


def test_packages_for_other_pythons_and_of_two_extras(monkeypatch):
    newer = '%d.%d' % (sys.version_info[0], sys.version_info[1] + 1)
    monkeypatch.setattr(facts.metadata, 'requires', lambda _: [
        'numpy==1.23.5', f'aiohttp==3.10.11; python_version >= "{newer}" and extra == "deploy"',
        f'aiohttp==3.13.3; python_version < "{newer}" and extra == "deploy"',
        f'aiohttp==3.13.3; python_version < "{newer}" and extra == "test"'])
    assert [(p.name, p.pinned, p.extra) for p in facts._package_versions()] == [
        ('numpy', '1.23.5', ''), ('aiohttp', '3.13.3', 'deploy')]
