"""What depends on a CPU's instructions once more, as each kind of older CPU computes it: a run of pytest for each.

oneDNN, MXNet's and ours, and the loops of the native operators go by DNNL_MAX_CPU_ISA, OpenBLAS by its core. This
machine's best path is the one that all other tests take.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import machine
from support.running import rounds

UNIT = Path(__file__).parent
# Our own loops are compiled for AVX2 and for AVX-512, and these consist of them: the second all other tests run.
LOOPS = [UNIT / f'test_ops{name}.py' for name in ('_adamw', '_pixels')]
PRODUCTS = [UNIT / f'test_ops{name}.py' for name in ('', '_parts', '_networks')]  # oneDNN's: each path has its own
NUMERICS = [UNIT.parent / 'numerics']
OTHERS = [f'{UNIT}/test_library.py::test_each_choice_computes_or_is_refused',
          *(f'{UNIT}/test_deploy_export.py::test_{name}' for name in ('int8_quantises_the_linear_maps',
                                                                     'sums_of_int8_products_do_not_saturate'))]
ALIKE = 'sizes or counts or memory or threads'  # what no instruction matters to
NATIVE = f'{ALIKE} or reference-'
# The native operators' instructions, OpenBLAS's core, the tests, those left out, and how many there are at least.
# MXNet's own form of the operators runs once, where there are no native ones. Whole networks against recorded numbers
# run where products differ most from this machine's; on the paths between in `make soak`.
PATHS = [
    ('', 'NEHALEM', NUMERICS + OTHERS, ALIKE, 35),
    ('avx2', 'HASWELL', PRODUCTS + LOOPS + NUMERICS + OTHERS, NATIVE, 220),
    ('avx512_core', 'SKYLAKEX', PRODUCTS + OTHERS + rounds([], NUMERICS), NATIVE, 120),
    ('avx512_core_bf16', 'SKYLAKEX', PRODUCTS + OTHERS + rounds([], NUMERICS), NATIVE, 120),
    ('avx512_core_amx', 'SKYLAKEX', [], NATIVE, 0),
]
pytestmark = [pytest.mark.slow, pytest.mark.unmeasured, pytest.mark.soak]
BELOW = PATHS[:[isa for isa, *_ in PATHS].index(machine.ISA)]
SECONDS = 600  # of which a run takes 20


@pytest.mark.parametrize('isa, core, tests, without, least', BELOW, ids=[isa or 'none' for isa, *_ in BELOW])
def test_as_on_an_older_cpu(isa, core, tests, without, least):
    env = {**os.environ, 'DNNL_MAX_CPU_ISA': isa.upper() or 'SSE41', 'OPENBLAS_CORETYPE': core}
    keys = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    said = subprocess.run([sys.executable, '-c', 'from mxsimmim.ops import library; print(library.status())'],
                          timeout=60, **keys)
    assert said.stdout.startswith(f'native ({isa})' if isa else 'reference, slower: '), said.stdout
    child = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-k', f'not ({without})',
                            *map(str, tests)], timeout=SECONDS, **keys)
    assert child.returncode == 0, child.stdout[-10_000:]
    passed = int(re.search(r'(\d+) passed', child.stdout)[1])
    print(passed, 'passed with', isa or 'no native operators')
    assert passed >= least, child.stdout[-10_000:]
