"""For all tests."""
import signal
import sys

import pytest

# What tests start should die of these, also under nohup and in the background of a script, where they are ignored: a
# child inherits that, but not a function.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


@pytest.fixture(autouse=True)
def own_choice_of_operators():
    """A command that a test runs in this process chooses the form of the operators: for this test alone."""
    yield
    if 'mxsimmim.ops' in sys.modules:
        ops = sys.modules['mxsimmim.ops']
        ops._chosen = ops.Choice()
