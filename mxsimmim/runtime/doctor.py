"""``mxsimmim doctor``: what matters for a bug report and for speed, and what is broken.

`facts.collect` asks the machine, `judge` finds the problems, `render` shows both.
"""
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from .. import __version__
from .facts import Facts, Package, collect

# Machine code in the newest CUDA wheel, mxnet-cu112 1.9.1; there is no PTX in it that a newer GPU could translate.
WHEEL_CODE = ((5, 0), (6, 0), (7, 0), (8, 0), (8, 6))
GPU_WHEEL = 'mxnet-cu112==1.9.1'
OPERATORS = ('linear', 'attention', 'mlp', 'layer_norm', 'patchify', 'masked_loss', 'adamw')


class Problem(NamedTuple):
    """Something that does not work (`broken`) or works worse than it could, and the way out."""
    broken: bool
    text: str
    remedy: str


def main() -> int:
    """Prints the report; 1 if something is broken."""
    text, well = report()
    print(text)
    return 0 if well else 1


def report() -> Tuple[str, bool]:
    """The report as text, and whether nothing is broken."""
    facts = collect()
    problems = judge(facts)
    return render(facts, problems), not any(problem.broken for problem in problems)


def judge(facts: Facts) -> List[Problem]:
    """The problems in `facts`, the broken things first."""
    checks = (_python, _packages, _mxnet, _gpus, _blas, _operators, _horovod)
    problems = [problem for check in checks for problem in check(facts)]
    return sorted(problems, key=lambda problem: not problem.broken)


def _pip(facts: Facts, *commands: str) -> str:
    return ' && '.join(f'{facts.executable} -m pip {command}' for command in commands)


def _python(facts: Facts) -> Iterator[Problem]:
    if not (3, 8) <= facts.python[:2] <= (3, 11):
        yield Problem(True, f"Python {'.'.join(map(str, facts.python))} is none of 3.8 to 3.11, for which numpy < 1.24 "
                      'and so mxnet 1.9.1 exist', 'make clean && make demo PYTHON=/path/to/python3.11')


def _packages(facts: Facts) -> Iterator[Problem]:
    new_numpy = [p for p in facts.packages if p.name == 'numpy' and _version(p.found) >= (1, 24)]
    for numpy in new_numpy:
        yield Problem(True, f'numpy {numpy.found} lacks np.bool, which mxnet 1.9.1 needs: numpy must be below 1.24',
                      _install(facts, new_numpy))
    missing = [p for p in facts.packages if not p.found and not p.extra and not p.name.startswith('onednn')
               and not (p.name == 'mxnet' and _cuda(facts))]
    if missing:
        yield Problem(True, f"not installed: {', '.join(p.name for p in missing)}", _install(facts, missing))
    other = [p for p in facts.packages if p.found and p.pinned and p not in new_numpy
             and _version(p.found) != _version(p.pinned)]
    if other:
        yield Problem(False, 'not the tested versions: ' + ', '.join(f'{p.name} {p.found} ({p.pinned})' for p in other),
                      _install(facts, other))


def _version(text: str) -> Tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', text.split('+')[0])))


def _install(facts: Facts, packages: List[Package]) -> str:
    return _pip(facts, 'install ' + ' '.join(f'{p.name}=={p.pinned}' if p.pinned else p.name for p in packages))


def _cuda(facts: Facts) -> bool:
    return any(p.name == 'mxnet-cu112' and p.found for p in facts.packages)


def _mxnet(facts: Facts) -> Iterator[Problem]:
    error = facts.mxnet.get('error', '')
    cpu_wheel = _pip(facts, 'uninstall -y mxnet mxnet-cu112', 'install mxnet==1.9.1')
    if 'libcuda.so' in error:
        yield Problem(True, f'mxnet-cu112 is installed, but there is no NVIDIA driver: {error}',
                      f'install the NVIDIA driver, or the CPU wheel: {cpu_wheel}')
    elif error and _cuda(facts):
        yield Problem(True, f'mxnet-cu112 cannot be imported: {error}',
                      _pip(facts, "install -e '.[cu112]'", f'install --force-reinstall --no-deps {GPU_WHEEL}'))
    elif error:
        yield Problem(True, f'mxnet cannot be imported: {error}',
                      _pip(facts, 'install --force-reinstall --no-deps mxnet==1.9.1'))
    elif _cuda(facts) and 'CUDA' not in facts.mxnet['features']:
        yield Problem(True, 'mxnet-cu112 is installed, but mxnet, whose files have the same names, lies over it',
                      _pip(facts, f'install --force-reinstall --no-deps {GPU_WHEEL}'))


def has_code(capability: Tuple[int, int]) -> bool:
    """Whether mxnet-cu112 1.9.1 runs on a GPU: machine code serves its own major version and equal or newer minors."""
    return any(capability[0] == major and capability[1] >= minor for major, minor in WHEEL_CODE)


def _gpus(facts: Facts) -> Iterator[Problem]:
    if not facts.gpus:
        return
    named = [f'gpu({index}) {gpu.name} (sm_{gpu.capability[0]}{gpu.capability[1]})'
             for index, gpu in enumerate(facts.gpus)]
    able = [index for index, gpu in enumerate(facts.gpus) if has_code(gpu.capability)]
    unable = [name for index, name in enumerate(named) if index not in able]
    code = ', '.join(f'sm_{major}{minor}' for major, minor in WHEEL_CODE)
    if 'CUDA' not in facts.mxnet.get('features', ()):
        if able and not _cuda(facts):
            yield Problem(False, 'the installed mxnet is for CPU only and leaves idle: '
                          + ', '.join(named[index] for index in able),
                          _pip(facts, "install -e '.[cu112]'", f'install --force-reinstall --no-deps {GPU_WHEEL}'))
        if unable:
            yield Problem(False, f"no MXNet wheel has code for {', '.join(unable)}: the newest, mxnet-cu112 1.9.1, has "
                          f'{code} and no PTX', 'train on the CPU: devices=[cpu(0)]')
        return
    if unable:
        remedy = f"devices=[{', '.join(f'gpu({index})' for index in able)}]" if able else 'devices=[cpu(0)]'
        yield Problem(True, f"mxnet-cu112 1.9.1 has no code for {', '.join(unable)}: only {code}, and no PTX that a "
                      'newer GPU could translate', f'leave it out: {remedy}')
    if facts.driver < (11, 0):
        yield Problem(True, f'the GPU driver speaks CUDA {facts.driver[0]}.{facts.driver[1]}; mxnet-cu112 needs 11.0',
                      'install NVIDIA driver 450.80 or newer')
    elif facts.driver < (11, 8):
        yield Problem(False, f'the GPU driver speaks CUDA {facts.driver[0]}.{facts.driver[1]}, older than the 11.8 of '
                      'the compiler MXNet fuses operators with', 'install NVIDIA driver 520 or newer, or set '
                      'MXNET_USE_FUSION=0')


def _blas(facts: Facts) -> Iterator[Problem]:
    asked, used = facts.settings.get('OPENBLAS_CORETYPE', ''), facts.mxnet.get('blas', '')
    if asked.upper() not in ('', 'PRESCOTT') and used.upper() == 'PRESCOTT':
        yield Problem(False, f"MXNet's OpenBLAS does not know OPENBLAS_CORETYPE={asked} and took its slowest core, "
                      f'{used}', 'unset OPENBLAS_CORETYPE')


def _operators(facts: Facts) -> Iterator[Problem]:
    """Without the library everything is computed all the same. Where it cannot exist, there is nothing to mend."""
    lacking = facts.operators
    if 'error' in lacking and 'error' not in facts.mxnet:
        yield Problem(True, f"the native operators crash when they are loaded: {lacking['error']}",
                      f"rm {Path(__file__).parents[1] / 'ops/libmxsimmim.so'}  # MXNet's own operators serve")
    elif lacking.get('remedy'):
        yield Problem(False, f"CPUs compute slower than they could, with reference operators: {lacking['why']}",
                      lacking['remedy'])


def _horovod(facts: Facts) -> Iterator[Problem]:
    if facts.horovod.get('error') and 'error' not in facts.mxnet:
        yield Problem(True, f"horovod is installed, but cannot be imported with mxnet: {facts.horovod['error']}",
                      'rm -rf .venv && make test')


def render(facts: Facts, problems: List[Problem]) -> str:
    """The report, aligned, to 120 columns where the facts allow."""
    units = [('AVX2', 'avx2'), ('AVX-512', 'avx512f'), ('AVX-512 VNNI', 'avx512_vnni'),
             ('AVX-512 BF16', 'avx512_bf16'), ('AMX', 'amx_tile')]
    amx = f"the kernel {'grants' if facts.amx else 'refuses'} AMX" if 'amx_tile' in facts.flags else ''
    set_by = {name: f"{name}={value}, {'your environment' if name in facts.environment else 'set by mxsimmim'}"
              for name, value in facts.settings.items()}
    vectors = ', '.join(name for name, flag in units if flag in facts.flags)
    rows = [('mxsimmim', f"{__version__} in {Path(__file__).parents[1]}"),
            ('python', f"{'.'.join(map(str, facts.python))} at {facts.executable}"),
            ('system', facts.system), ('', ''),
            ('CPU', f'{facts.cpu}, {facts.cores} cores to use'),
            ('vectors', (vectors or 'none known') + _bracket(amx)),
            ('memory', f'{facts.memory[0]:.1f} GiB, {facts.memory[1]:.1f} GiB free'),
            ('disk here', f'{facts.disk:.1f} GiB free')]
    for index, gpu in enumerate(facts.gpus):
        major, minor = gpu.capability
        rows.append((f'gpu({index})', f'{gpu.name}, {gpu.memory:.0f} GiB, compute capability {major}.{minor}: '
                     f"mxnet-cu112 1.9.1 has {'' if has_code(gpu.capability) else 'no '}code for it"))
    rows.append(('GPU driver', f'CUDA {facts.driver[0]}.{facts.driver[1]}' if any(facts.driver) else 'none'))
    rows += [('', ''), ('mxnet', facts.mxnet.get('version', 'cannot be imported')),
             ('features', ' '.join(facts.mxnet.get('features', ()))),
             ('threads', '; '.join(text for name, text in set_by.items() if 'OMP_' in name)),
             ('BLAS core', (facts.mxnet.get('blas') or 'unknown') + _bracket(set_by.get('OPENBLAS_CORETYPE'))),
             ('oneDNN', facts.mxnet.get('isa', 'unknown') + _bracket(set_by.get('DNNL_MAX_CPU_ISA'))),
             *_operator_rows(facts.operators), ('horovod', _horovod_text(facts.horovod)), ('', '')]
    shown = [p for p in facts.packages if p.found or not (p.extra or p.name == 'mxnet' and _cuda(facts))]
    for first in range(0, len(shown), 3):
        rows.append(('' if first else 'packages', ''.join(f'{_package_text(p):<36}' for p in shown[first:first + 3])))
    lines = [_line(label, text) for label, text in rows + [('', '')]]
    for problem in problems:  # a remedy stays on one line, to be copied
        lines += [_line('BROKEN' if problem.broken else 'hint', problem.text), f"{'':<12}-> {problem.remedy}"]
    return '\n'.join(lines + ([] if any(p.broken for p in problems) else ['Nothing is broken.']))


def _line(label: str, text: str) -> str:
    return textwrap.fill(f'{label:<12}{text}', 120, subsequent_indent=' ' * 12, break_on_hyphens=False,
                         break_long_words=False).rstrip()


def _bracket(text: Optional[str]) -> str:
    return f' ({text})' if text else ''


def _operator_rows(operators: Dict[str, Any]) -> Iterator[Tuple[str, str]]:
    """Which form each operator takes, and the precision of runtime.precision=auto."""
    if 'names' not in operators:
        yield 'operators', f"reference: {operators.get('why') or operators.get('error') or 'unknown'}"
        return
    native = [name for name in OPERATORS if name in operators['names']]
    others = [name for name in OPERATORS if name not in native]
    yield 'operators', (f"native on CPUs, with {operators['instructions']}: {', '.join(native)}"
                        + (f"; reference: {', '.join(others)}" if others else ''))
    yield 'precision', f"{operators['auto']} by runtime.precision=auto, float32 by default"


def _horovod_text(horovod: Dict[str, Any]) -> str:
    if 'version' not in horovod:
        return 'cannot be imported' if horovod else 'not installed (make test installs it)'
    built = [name for name, there in (('Gloo', horovod['gloo']), ('MPI', horovod['mpi'])) if there]
    return f"{horovod['version']} with MXNet and {' and '.join(built) or 'nothing to communicate'}"


def _package_text(package: Package) -> str:
    if not package.found:
        return f'{package.name} MISSING'
    differs = package.pinned and _version(package.found) != _version(package.pinned)
    return f'{package.name} {package.found}' + (f' (tested: {package.pinned})' if differs else '')


if __name__ == '__main__':
    sys.exit(main())
