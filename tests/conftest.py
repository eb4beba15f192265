"""For all tests: their tiers, what beside each other they may use, and what none leaves to the next."""
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

# Two workers of pytest-xdist have a core each: with more threads in each they would wait for each other. MXNet reads
# it when it is imported, and commands that tests start inherit it.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')

TIERS = {'unit': 'unit', 'numerics': 'unit', 'e2e': 'integration', 'cluster': 'cluster'}  # of the folders

MEASURED = 1.0  # seconds of a test for which coverage counts, with whatever parameters
spent = defaultdict(float)  # of each, here

# What tests start should die of these, also under nohup and in the background of a script, where they are ignored: a
# child inherits that, but not a function.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_collection_modifyitems(items):
    """Marks each test with the tier of its folder; `soak_*.py` is slow besides. What is slow begins first, so that no
    worker is left with it at the end."""
    for item in items:
        item.add_marker(TIERS[item.path.relative_to(Path(__file__).parent).parts[0]])
        if item.path.name.startswith('soak_'):
            item.add_marker('slow')
    items.sort(key=lambda item: item.get_closest_marker('slow') is None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Traces nothing for coverage, in no process, while a test runs that is marked `unmeasured`, or that ran for long
    with other parameters: it runs the same lines again, and tracing makes Python several times as slow."""
    name, began = item.nodeid.partition('[')[0], time.monotonic()
    if spent[name] < MEASURED and not item.get_closest_marker('unmeasured'):
        yield
        spent[name] += time.monotonic() - began
        return
    measured = os.environ.pop('COVERAGE_PROCESS_START', None)
    tracer, of_threads = sys.gettrace(), threading._trace_hook
    sys.settrace(None)
    threading.settrace(None)
    yield
    sys.settrace(tracer)
    threading.settrace(of_threads)
    if measured is not None:
        os.environ['COVERAGE_PROCESS_START'] = measured
