"""What this machine computes with, for tests that hold on every CPU: they run what it can.

What it cannot is refused; tests/unit/test_library.py checks that, and that nothing was left out that it could.
"""
import pytest

from mxsimmim.ops import library
from mxsimmim.ops.build import NotBuilt

CHOICES = (('reference', 'float32'), ('native', 'float32'), ('native', 'bf16'))


def _instructions() -> str:
    """The best that the native operators use, in oneDNN's names; empty where there can be none."""
    try:
        return library.open_library().isa
    except NotBuilt as error:
        if error.remedy:  # it could be there: without it most tests would pass without a test
            raise
        return ''


ISA = _instructions()
ABLE = tuple((form, precision) for form, precision in CHOICES
             if form == 'reference' or ISA and (precision == 'float32' or ISA in library.BF16 + library.EMULATED))
FORMS = tuple(dict.fromkeys(form for form, _ in ABLE))
PRECISIONS = tuple(precision for form, precision in ABLE if form == 'native')
WHY = 'native operators are for Linux on x86-64 with AVX2'
natively = pytest.mark.skipif(not ISA, reason=WHY)


def need_native() -> None:
    """Skips the test where there can be no native operators, and loads them where there can."""
    if not ISA:
        pytest.skip(WHY)
    library.load()
