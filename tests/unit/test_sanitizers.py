"""The tests of the native operators once more, under AddressSanitizer and UndefinedBehaviorSanitizer."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import machine
from support.running import rounds

from mxsimmim.ops import library

ROOT = Path(__file__).parents[2]
LACKING = 77  # of tools/sanitize.py
SECONDS = 600  # one of them to compile, half a minute to run


# MXNet's own operators are not instrumented, nor are Python's transforms; networks are made of the operators.
CHOSEN = 'not (reference- or reference])' + rounds(' and (native or test_ops) and not test_ops_networks', '')


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.unmeasured
@machine.natively
@pytest.mark.skipif(bool(os.environ.get(library.VARIABLE)), reason='these are the tests that it runs')
def test_operators_under_sanitizers():
    files = sorted(str(path.relative_to(ROOT)) for name in ('test_ops*.py', 'test_transforms.py')
                   for path in Path(__file__).parent.glob(name))
    child = subprocess.run([sys.executable, 'tools/sanitize.py', '-q', '-p', 'no:cacheprovider', '-k', CHOSEN, *files],
                           cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           universal_newlines=True, timeout=SECONDS)
    if child.returncode == LACKING:
        pytest.skip(child.stdout.strip().splitlines()[-1])
    assert child.returncode == 0, child.stdout[-10_000:]
    assert int(re.search(r'(\d+) passed', child.stdout)[1]) >= 100
