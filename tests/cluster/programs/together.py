"""Computes passes of a network by all workers of a Horovod job together, and compares with one worker.

    together.py vit|swin [END]

Rank 0 prints how many arrays lie in memory that the workers share. With END, 'killed' or 'fails', rank 1 ends in the
middle.
"""
import os
import signal
import sys
from pathlib import Path

from mxsimmim.config import Config, RuntimeConfig
from mxsimmim.parallel.strategies import Strategy
from mxsimmim.runtime.environment import prepare
from mxsimmim.runtime.process import process_info

sys.path.insert(0, str(Path(__file__).parents[2]))  # of the helpers of tests


def main():
    prepare(RuntimeConfig(threads=1))
    from support.passes import NETWORKS

    from mxsimmim.training.start import joined
    config = Config(model=NETWORKS[sys.argv[1]], mask=dict(patch_size=8), train=dict(store='horovod'))
    with joined(config, Strategy('horovod', 'sync'), process_info(os.environ)) as communicator:
        compute(config.model, communicator, *sys.argv[2:])
        if communicator.rank == 0:
            print(sum(len(memory.arrays) for memory in communicator._memories), 'arrays in shared memory', flush=True)


def compute(model, communicator, end=''):
    import mxnet as mx
    from support.passes import GPIPE, TWO_UNDER_WAY, assert_same, compute_together, compute_whole, largest

    from mxsimmim.ops import OpBackend
    from mxsimmim.parallel.worker_group import WorkerGroup

    backend, control = OpBackend('native'), communicator.control
    group = WorkerGroup(mx.cpu(), [largest(model)], communicator, backend)
    if end and control.rank == 1:
        group.begin = ending(group.begin, end)
    for plan in (TWO_UNDER_WAY, GPIPE):
        own = compute_together(model, backend, control, group, plan)
        assert_same([own], compute_whole(model, backend, plan))
        losses = control.all_gather('losses', own[0])
        assert all(other == own[0] for other in losses), losses


def ending(function, end):
    """`function`, and in place of its sixth call the end of this process."""
    calls = []

    def call():
        calls.append(end)
        if len(calls) == 6:
            if end == 'killed':
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError('this worker does not go on')
        function()
    return call


if __name__ == '__main__':
    from mxsimmim.cli import fail, leave
    try:
        main()
    except (RuntimeError, ValueError) as error:
        leave(fail(1, str(error)))
