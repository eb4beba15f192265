"""ops/library.py and ops/build.py: building, finding and loading the native operators, and doing without them."""
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import mxnet as mx
import numpy as np
import pytest
from support import machine

from mxsimmim.ops import REFERENCE, OpBackend, build, choose, library, select_backend
from mxsimmim.ops.build import NotBuilt

CPU, GPU = SimpleNamespace(device_type='cpu'), mx.gpu(1)
ISAS = ('avx2', 'avx512_core', 'avx512_core_bf16', 'avx512_core_amx')
ROOT = Path(library.__file__).parents[2]


@pytest.fixture
def built():
    """The real library, loaded."""
    machine.need_native()


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """An empty folder where the library is looked for, on Linux and x86-64."""
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, 'FOLDER', tmp_path / 'mxsimmim/ops')
    monkeypatch.setattr(build.platform, 'system', lambda: 'Linux')
    monkeypatch.setattr(build.platform, 'machine', lambda: 'x86_64')
    library.FOLDER.mkdir(parents=True)
    return library.FOLDER


def with_isa(monkeypatch, isa):
    monkeypatch.setattr(library, '_isa', isa)


def without(monkeypatch, why='no compiler', remedy='install one'):
    def load():
        raise NotBuilt(why, remedy)
    monkeypatch.setattr(library, 'load', load)
    monkeypatch.setattr(library, '_told', False)


@pytest.mark.parametrize('isa, precision, expected', [
    ('avx2', 'float32', 'float32'), ('avx512_core', 'float32', 'float32'), ('avx512_core_amx', 'float32', 'float32'),
    ('avx2', 'auto', 'float32'), ('avx512_core', 'auto', 'float32'),
    ('avx512_core_bf16', 'auto', 'bf16'), ('avx512_core_amx', 'auto', 'bf16'),
    ('avx512_core', 'bf16', 'bf16'), ('avx512_core_bf16', 'bf16', 'bf16'), ('avx512_core_amx', 'bf16', 'bf16'),
])
def test_precision_follows_the_instructions(monkeypatch, isa, precision, expected):
    with_isa(monkeypatch, isa)
    assert select_backend(precision, [CPU, CPU]) == OpBackend('native', expected)


def test_bf16_without_avx512_is_refused(monkeypatch):
    with_isa(monkeypatch, 'avx2')
    with pytest.raises(ValueError, match=r"'runtime.precision': bf16 needs .* AVX-512, this one has avx2: write "
                                         r"runtime.precision=float32"):
        select_backend('bf16', [CPU])


@pytest.mark.parametrize('contexts', [[GPU], [CPU, GPU]])
def test_gpus_take_the_reference(monkeypatch, capsys, contexts):
    without(monkeypatch)
    assert select_backend('float32', contexts) is select_backend('auto', contexts) is REFERENCE
    with pytest.raises(ValueError, match=r"'runtime.precision': bf16 .* on CPUs only, not on gpu\(1\): .*float32"):
        select_backend('bf16', contexts)
    assert capsys.readouterr().err == ''


def test_without_the_library_cpus_take_the_reference_and_say_so_once(monkeypatch, capsys):
    without(monkeypatch)
    assert select_backend('float32', [CPU]) is select_backend('auto', [CPU]) is REFERENCE
    assert capsys.readouterr().err == ('mxsimmim: operators: reference, slower than native ones: no compiler: '
                                       'install one\n')
    with pytest.raises(ValueError, match=r"'runtime.precision': bf16 needs the native operators. no compiler: "
                                         r"install one; or write runtime.precision=float32"):
        select_backend('bf16', [CPU])


def test_choice_in_words(monkeypatch):
    assert REFERENCE.describe() == 'operators: reference, float32'
    with_isa(monkeypatch, 'avx512_core_amx')
    assert OpBackend('native', 'bf16').describe() == 'operators: native (avx512_core_amx), bf16'
    with_isa(monkeypatch, 'avx512_core')
    assert OpBackend('native', 'bf16').describe().endswith('bf16 (emulated by this CPU, slower than float32)')
    assert OpBackend('native', 'float32').describe() == 'operators: native (avx512_core), float32'


def test_not_built_names_reason_and_remedy(alone):
    with pytest.raises(NotBuilt, match=r'libmxsimmim.so was not built: .* -m pip install --force-reinstall .*/sources'):
        library.find()
    (alone.parents[1] / 'setup.py').touch()
    (alone / build.NOTE).write_text('no C++ compiler was found\napt-get install g++\n')
    with pytest.raises(NotBuilt) as caught:
        library.find()
    assert caught.value.why == 'libmxsimmim.so was not built: no C++ compiler was found'
    assert caught.value.remedy.startswith('apt-get install g++ && ')
    assert caught.value.remedy.endswith(f'-m pip install --no-deps -e {alone.parents[1]}')
    assert library.status() == f'reference, slower: {caught.value}'


@pytest.mark.parametrize('system, machine', [('Linux', 'aarch64'), ('Darwin', 'x86_64')])
def test_other_machines_have_none_and_no_remedy(alone, monkeypatch, system, machine):
    monkeypatch.setattr(build.platform, 'system', lambda: system)
    monkeypatch.setattr(build.platform, 'machine', lambda: machine)
    for function in (library.find, lambda: build.build(alone / build.NAME, alone)):
        with pytest.raises(NotBuilt, match=f'Linux on x86-64, this is {system} on {machine}$') as caught:
            function()
        assert caught.value.remedy == ''


def test_without_onednn(alone, monkeypatch):
    (alone / build.NAME).touch()
    monkeypatch.setattr(library, 'installed_file', lambda *_: None)
    with pytest.raises(NotBuilt, match='oneDNN is not installed: .* -m pip install onednn-cpu-gomp==2023.2.0$'):
        library.open_library()


def test_what_is_no_library_is_refused(built, alone):
    (alone / build.NAME).write_bytes(b'\x7fELF')
    with pytest.raises(NotBuilt, match='libmxsimmim.so cannot be loaded: .*pip install'):
        library.open_library()


def test_a_library_of_other_sources_is_refused(built, monkeypatch):
    monkeypatch.setattr(library, 'digest', lambda: '0123456789abcdef')
    with pytest.raises(NotBuilt, match='was built from other sources than those beside it: .*pip install'):
        library.open_library()


def test_loading_twice_changes_nothing(built):
    before = mx.nd.mxsimmim_linear
    assert library.load() == library.load() in ISAS
    assert mx.nd.mxsimmim_linear is before
    assert library.status() == f'native ({library.load()})'


@pytest.mark.parametrize('limit, expected', [
    ('AVX2', 'native (avx2)'),
    ('SSE41', 'reference, slower: native operators need a CPU with AVX2 and FMA (DNNL_MAX_CPU_ISA=SSE41)'),
])
def test_older_instructions(built, limit, expected):
    """And all that without MXNet."""
    code = ('import sys; from mxsimmim.ops import library; print(library.status()); '
            'assert "mxnet" not in sys.modules, "mxnet"')
    child = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'DNNL_MAX_CPU_ISA': limit},
                           stdout=subprocess.PIPE, universal_newlines=True, timeout=60, check=True)
    assert child.stdout == expected + '\n'


@pytest.mark.parametrize('form, precision', machine.CHOICES)
def test_each_choice_computes_or_is_refused(form, precision):
    """Where oneDNN has the product, it is right; where it has none, nobody gets as far as to ask for it."""
    if (form, precision) in machine.ABLE:
        rng = np.random.default_rng(7)
        x, weight = rng.standard_normal((5, 64)), rng.standard_normal((3, 64))
        y = OpBackend(form, precision).linear(mx.nd, mx.nd.array(x), mx.nd.array(weight), units=3).asnumpy()
        np.testing.assert_allclose(y, x @ weight.T, atol=0.1 if precision == 'bf16' else 1e-4)
    elif machine.ISA:
        for made in (lambda: select_backend(precision, [CPU]), lambda: OpBackend(form, precision)):
            with pytest.raises(ValueError, match=f"^key 'runtime.precision': bf16 needs .* has {machine.ISA}: write "
                                                 "runtime.precision=float32, or auto, "):
                made()
    else:
        with pytest.raises(NotBuilt, match='^native operators (are for|need a CPU with AVX2)'):
            OpBackend(form, precision)
        with pytest.raises(ValueError, match=r"^key 'runtime.precision': bf16 needs the native operators\. native .*; "
                                             'or write runtime.precision=float32$'):
            select_backend('bf16', [CPU])
    if form == 'native' and machine.ISA:
        rate = library.function('mxsimmim_product_rate')  # 0 where oneDNN refuses
        rate.restype = library.ctypes.c_double
        sizes = [library.ctypes.c_int64(64)] * 3
        assert (rate(*sizes, int(precision == 'bf16'), 1) > 0) == ((form, precision) in machine.ABLE)


def test_the_reference_has_no_bf16():
    with pytest.raises(ValueError, match='the reference form computes in float32, not in bf16'):
        OpBackend('reference', 'bf16')


def test_wrong_shapes_are_errors_that_name_both(built):
    native = OpBackend('native')
    with pytest.raises(mx.MXNetError, match=r'mxsimmim_linear: .*\(4, 6\) .*\(2, 3, 5\)'):
        native.linear(mx.nd, mx.nd.ones((2, 3, 5)), mx.nd.ones((4, 6)), mx.nd.ones((4,)), units=4).wait_to_read()


def test_library_beside_horovods_and_mxnets_onednn(built):
    """Horovod makes names of MXNet visible to all libraries, its older oneDNN's among them."""
    code = '''
import ctypes
from types import SimpleNamespace
from mxsimmim.runtime import environment
environment.prepare(SimpleNamespace(threads=1, blas_core='auto'))
import mxnet as mx, os
ctypes.CDLL(os.path.join(os.path.dirname(mx.__file__), 'libmxnet.so'), mode=ctypes.RTLD_GLOBAL)
from mxsimmim.ops import REFERENCE, OpBackend
x, weight, bias = mx.nd.random.normal(shape=(6, 64)), mx.nd.random.normal(shape=(48, 64)), mx.nd.zeros(48)
y, z = (backend.linear(mx.nd, x, weight, bias, units=48) for backend in (OpBackend('native'), REFERENCE))
print(float((y - z).abs().max().asscalar()))
'''
    child = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, universal_newlines=True, timeout=60,
                           check=True)
    assert float(child.stdout) < 1e-4


@pytest.mark.parametrize('own, others, form, said', [
    ('native', 'native', 'native', []), ('reference', 'reference', 'reference', []),
    ('reference', 'native', 'reference', []),
    ('native', 'reference', 'reference', ['rank 1 computes with reference operators (its log says why): so do all']),
])
def test_all_workers_take_the_same_form(monkeypatch, own, others, form, said):
    from mxsimmim.config import Config
    from mxsimmim.training import start
    monkeypatch.setattr(library, 'admit', lambda _: '')
    backend = OpBackend(own)
    monkeypatch.setattr(start, 'select_backend', lambda *_: backend)
    control = SimpleNamespace(all_gather=lambda _, value: [value, others == 'native'])
    log = []
    assert start.agree_on_backend(Config(), [CPU], control, log.append) is (backend if form == own else REFERENCE)
    assert log == said


def test_the_name_before(monkeypatch):
    with_isa(monkeypatch, 'avx512_core_amx')
    assert choose('auto', [CPU]) == OpBackend('native', 'bf16')


def test_a_backend_does_not_change():
    with pytest.raises(FrozenInstanceError):
        OpBackend().form = 'native'


@pytest.mark.parametrize('asked, expected', [('float32', 'float32'), ('auto', 'auto'), ('bf16', 'auto')])
def test_a_trained_network_runs_where_bf16_does_not(monkeypatch, asked, expected):
    from mxsimmim.config import Config, RuntimeConfig
    from mxsimmim.inference import trained
    seen = []
    monkeypatch.setattr(trained, 'select_backend', lambda *given: seen.append(given))
    config = Config(devices=('cpu(1)',), runtime=RuntimeConfig(precision=asked))
    assert trained.devices_for(config) == ([mx.cpu(1)], None)
    assert seen == [(expected, [mx.cpu(1)])]


needs_compiler = pytest.mark.skipif(
    not (build.installed_file(build.HEADERS, 'dnnl.h') and any(map(build.shutil.which, ('g++', 'c++', 'clang++')))),
    reason='needs a C++ compiler and the headers of oneDNN')


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Sources of two functions."""
    monkeypatch.setattr(build, 'SOURCES', tmp_path / 'src')
    build.SOURCES.mkdir()
    (build.SOURCES / 'one.h').write_text('int one();\n')
    (build.SOURCES / 'one.cc').write_text('#include "one.h"\nint one() { return 1; }\n')
    (build.SOURCES / 'about.cc').write_text('extern "C" __attribute__((visibility("default"))) const char* of() '
                                            '{ return MXSIMMIM_SOURCES; }\n')
    return build.SOURCES


def of(path):
    function = library.ctypes.CDLL(str(path)).of
    function.restype = library.ctypes.c_char_p
    return function().decode()


@needs_compiler
def test_only_what_changed_is_compiled(sources, tmp_path):
    def compiled():
        return {path.name.split('-')[0]: path.stat().st_mtime_ns for path in objects.iterdir()}
    objects, target = tmp_path / 'objects', tmp_path / 'a' / build.NAME
    build.build(target, objects)
    assert of(target) == build.digest() != ''
    first = compiled()
    build.build(target, objects)
    assert compiled() == first and set(first) == {'one', 'about'}
    (sources / 'one.cc').write_text('#include "one.h"\nint one() { return 2; }\n')
    build.build(tmp_path / 'b' / build.NAME, objects)
    assert compiled()['one'] > first['one'] and len(list(objects.iterdir())) == 2
    assert of(tmp_path / 'b' / build.NAME) == build.digest() != of(target)
    (sources / 'one.h').write_text('int one();  // a header changes both\n')
    second = compiled()
    build.build(target, objects)
    assert all(compiled()[name] > second[name] for name in second)


@needs_compiler
def test_errors_of_the_compiler_are_shown(sources, tmp_path, capfd):
    (sources / 'one.cc').write_text('int one() { return none; }\n')
    with pytest.raises(NotBuilt, match=r"failed: .*one.cc:1:.*error: .*none"):
        build.build(tmp_path / build.NAME, tmp_path / 'objects')
    assert 'one.cc' in capfd.readouterr().err and not (tmp_path / build.NAME).exists()


@needs_compiler
def test_a_function_that_is_nowhere_is_an_error(sources, tmp_path):
    (sources / 'one.cc').write_text('int two();\nint one() { return two(); }\n')
    with pytest.raises(NotBuilt, match='two'):
        build.build(tmp_path / build.NAME, tmp_path / 'objects')


def test_no_compiler(monkeypatch, sources, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    with pytest.raises(NotBuilt, match=r'no C\+\+ compiler was found \(g\+\+, c\+\+, clang\+\+\): .*install g\+\+'):
        build.build(tmp_path / build.NAME, tmp_path / 'objects')


def test_no_headers(monkeypatch, sources, tmp_path):
    monkeypatch.setattr(build, 'find_compiler', lambda: 'g++')
    monkeypatch.setattr(build, 'installed_file', lambda *_: None)
    with pytest.raises(NotBuilt, match='oneDNN is not installed: pip install onednn-devel-cpu-gomp==2023.2.0'):
        build.build(tmp_path / build.NAME, tmp_path / 'objects')


@needs_compiler
def test_code_for_any_cpu_comes_first(sources, tmp_path):
    """Of an inline function in several files the linker takes the first: it must not be the one for AVX-512."""
    (sources / 'one.h').write_text('template <class T> T scaled(T a, T b) { return a * b; }\n')
    for name, function in (('kernels_avx2', 'a'), ('kernels_avx512', 'b'), ('one', 'c'), ('zero', 'd')):
        (sources / f'{name}.cc').write_text(f'#include "one.h"\nfloat {function}(float x) {{ return scaled(x, x); }}\n')
    order = [source.name for source, _, _ in build._jobs(tmp_path, build.FLAGS)]
    assert order == ['about.cc', 'one.cc', 'zero.cc', 'kernels_avx2.cc', 'kernels_avx512.cc']
    assert not [flag for flag in build.FLAGS if flag.startswith('-m')]


def test_pins_agree():
    assert build.HEADERS in (ROOT / 'pyproject.toml').read_text()
    assert build.ONEDNN.split('==')[1] == build.HEADERS.split('==')[1]


@pytest.mark.parametrize('classes', [(), ('a', 'b')])
def test_exported_graphs_do_without_the_library(built, classes):
    from mxsimmim.config import Config
    from mxsimmim.inference.graph import answer, random_inputs, trace
    from mxsimmim.inference.trained import Trained
    from mxsimmim.models import build_classifier, build_simmim
    config = Config(model=dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2), mask=dict(patch_size=8),
                    task='classify' if classes else 'pretrain')

    def net(backend):
        return build_classifier(config.model, 2, 0, backend) if classes else build_simmim(config.model, 0, backend)
    trained, native = Trained(config, net(REFERENCE), {'classes': classes}, 1), net(OpBackend('native'))
    graph = trace(trained)
    inputs = random_inputs(trained)
    call = native if classes else native.reconstruct
    ours = call(*map(mx.nd.array, inputs)).asnumpy()
    with pytest.raises(AssertionError):
        trace(trained._replace(net=native))
    assert '"op": "mxsimmim_' not in graph.symbol.tojson()
    assert np.abs(ours - answer(trained, inputs)).max() < 1e-5
