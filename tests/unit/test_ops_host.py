"""Sums in memory that several workers see; here they are threads, or one of them a process that has ended."""
import subprocess
import sys
import textwrap
from typing import NamedTuple

import mxnet as mx
import numpy as np
import pytest
from support import machine
from support.workers import each

from mxsimmim.ops import OpBackend
from mxsimmim.parallel.control import ControlPlane
from mxsimmim.parallel.shared_memory import SharedMemoryGroup, is_supported

SIZES = [1, 5000, 16, 100_003]
SECONDS = 60


@pytest.fixture(autouse=True)
def native():
    machine.need_native()


@pytest.mark.parametrize('context, form, expected', [
    (mx.cpu(), 'native', True),
    (mx.cpu(1), 'native', False),
    (mx.cpu(), 'reference', False),
    (mx.gpu(), 'native', False),
])
def test_who_can_use_it(context, form, expected):
    assert is_supported(context, OpBackend(form)) == expected


def memories(count, everybody=True):
    return each(count, lambda control: SharedMemoryGroup(SIZES, list(range(count)), control.rank, control, everybody))


@pytest.mark.parametrize('count', [1, 2, 3])
def test_sums(count):
    """Bit for bit the sums in the order of ranks, in all workers, again and again."""
    print('seed 40')
    rng, workers = np.random.default_rng(40), memories(count)
    assert all(np.all(memory._addresses % 64 == 0) for memory in workers)
    for _ in range(20):
        values = [[rng.standard_normal(size).astype('float32') for size in SIZES] for _ in workers]
        for memory, own in zip(workers, values):
            for i in reversed(range(len(SIZES))):
                memory.arrays[i][:] = own[i]
                memory.all_reduce(i)
        for i in range(len(SIZES)):
            expected = values[0][i].copy()
            for own in values[1:]:
                expected += own[i]
            for memory in workers:
                np.testing.assert_array_equal(memory.arrays[i].asnumpy(), expected)


def test_sums_of_several_hosts():
    """The first worker gets the sum, and the others what it makes of that."""
    workers = memories(2, everybody=False)
    for times in range(1, 4):
        for i in reversed(range(len(SIZES))):
            for rank, memory in enumerate(workers):
                memory.arrays[i][:] = times * (rank + 1)
                memory.all_reduce(i)
                if memory.first:
                    memory.arrays[i] += 10
                memory.broadcast(i)
        for memory in workers:
            assert all(np.all(array.asnumpy() == 3 * times + 10) for array in memory.arrays)


def test_sums_are_in_order_with_what_mxnet_does():
    """Each waits for the product that its array is made of, and what follows waits for it."""
    workers, big = memories(2), mx.nd.ones((1200, 1200))
    for times in range(3):
        for memory in workers:
            memory.arrays[1][:] = mx.nd.dot(big, big).reshape((-1,))[:5000] * times
            memory.all_reduce(1)
        after = [memory.arrays[1] + 0 for memory in workers]
        for memory in workers:
            memory.arrays[1][:] = -1
        assert all(np.all(array.asnumpy() == 2 * 1200 * times) for array in after)


def test_memory_that_cannot_be_had():
    """All workers learn of it: here there is no such process as the first one says it is."""
    class Misled(NamedTuple):
        control: ControlPlane

        def all_gather(self, name, value):
            values = self.control.all_gather(name, value)
            return [2 ** 22 + 1] * 2 if name == 'process numbers' else values  # beyond the largest process id

    def made(control):
        return SharedMemoryGroup(SIZES, [0, 1], control.rank, Misled(control), True)
    errors = each(2, made)
    assert all(isinstance(error, OSError) and 'rank 1 cannot share memory' in str(error) for error in errors), errors
    assert 'No such file' in str(errors[1])


@pytest.mark.parametrize('other, why', [
    ('', 'process PID, a worker of this host, has ended before its job: its log says why'),
    ('import time; time.sleep(60)',
     'the workers of this host have not all come to a sum within 0.5 s: their logs say what they do')],
                         ids=['ended', 'late'])
def test_a_worker_that_does_not_come(other, why):
    """The others wait for it; then their sums are NaN, so that nothing is updated with them."""
    program = textwrap.dedent('''
        import subprocess, sys
        from types import SimpleNamespace
        import numpy as np
        from mxsimmim.ops import library
        library.load()
        from mxsimmim.parallel import shared_memory
        from mxsimmim.parallel.shared_memory import SharedMemoryGroup
        shared_memory.DEADLINE = 0.5 if sys.argv[1] else 60
        other = subprocess.Popen([sys.executable, '-c', sys.argv[1]])
        answers = iter([other.pid, 0, ''])  # its process, its file, that it has the memory
        control = SimpleNamespace(all_gather=lambda _, value: [value, next(answers)])
        memory = SharedMemoryGroup([7, 70], [0, 1], 0, control, True)
        memory.check()
        for i in (1, 0):
            memory.all_reduce(i)
        sys.argv[1] or other.wait()
        print(all(np.isnan(array.asnumpy()).all() for array in memory.arrays))
        try:
            memory.check()
        except RuntimeError as error:
            print(str(error).replace(str(other.pid), 'PID'))
        other.kill()
    ''')
    said = subprocess.run([sys.executable, '-W', 'ignore', '-c', program, other], stdout=subprocess.PIPE,
                          timeout=SECONDS, check=True, universal_newlines=True).stdout
    assert said.splitlines() == ['True', why]
