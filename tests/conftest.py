"""For all tests."""
import sys

import pytest


@pytest.fixture(autouse=True)
def own_choice_of_operators():
    """A command that a test runs in this process chooses the form of the operators: for this test alone."""
    yield
    if 'mxsimmim.ops' in sys.modules:
        ops = sys.modules['mxsimmim.ops']
        ops._chosen = ops.Choice()
