"""Workers that compute half blocks together, on one host and on several; one that ends."""
import sys

import pytest
from support import machine
from support.jobs import HOROVOD, PROGRAMS
from support.running import rounds

pytestmark = [pytest.mark.unmeasured, machine.natively]

TOGETHER = ['--', sys.executable, '-W', 'ignore', PROGRAMS / 'together.py']
# By default MXNet begins operators of a library in the order of the program, whatever their arrays: they share a
# resource. With more copies of it, passes overtake each other backward.
OVERTAKING = ['--env', 'MXNET_CPU_TEMP_COPY=64', '--env', 'MXNET_CPU_PARALLEL_RAND_COPY=64']

KILLED = 'killed', 137, ['worker 1 on ', ' was killed by SIGKILL']


@pytest.mark.parametrize('words, network, arrays', [
    (HOROVOD, 'swin', 2),
    (['-n', 3, '--horovod', '--env', 'MXSIMMIM_FIRST_RANKS=0,2'], 'vit', 2),  # as if the third had a host for itself
], ids=['one host', 'two hosts'])
def test_gradients_are_those_of_one_worker(launcher, words, network, arrays):
    """Sums in shared memory; among hosts by Horovod."""
    pytest.importorskip('horovod')
    out, _ = launcher.run(*words, *OVERTAKING, *TOGETHER, network)
    assert f'{arrays} arrays in shared memory' in out


@pytest.mark.soak
@pytest.mark.parametrize('end, status, told', rounds([KILLED], [KILLED, (
    'fails', 1, ['worker 1 on ', 'this worker does not go on'])]))
def test_a_worker_that_ends_ends_the_job(launcher, end, status, told):
    """In the middle of passes, while the other waits for its sums."""
    pytest.importorskip('horovod')
    _, err = launcher.run(*HOROVOD, *OVERTAKING, *TOGETHER, 'vit', end, status=status)
    assert all(text in err for text in told), err
