"""Times steps of a worker that computes as long as its gradients travel.

    overlap.py STORE

Rank 0 prints as JSON the least seconds of a step, of one that exchanges nothing, and of the exchange by itself, and the
keys under which a step's gradients are summed.
"""
import json
import os
import sys
import time

from mxsimmim.config import Config, RuntimeConfig
from mxsimmim.parallel.strategies import Strategy
from mxsimmim.runtime.environment import prepare
from mxsimmim.runtime.process import process_info

MODEL = dict(img_size=64, patch_size=8, embed_dim=384, depth=5, num_heads=6)  # 9 million parameters
IMAGES, STEPS = 16, 5  # of a worker; images make the pass about as long as the exchange


def main():
    prepare(RuntimeConfig(threads=1))
    process = process_info(os.environ)
    if process.role != 'worker':
        from mxsimmim.parallel.server import serve
        sys.exit(serve())
    from mxsimmim.training.start import joined

    images = IMAGES * process.size
    config = Config(model=MODEL, mask=dict(patch_size=8), data=dict(path='digits', val_fraction=0),
                    optim=dict(recipe='fixed', warmup=0), train=dict(batch_size=images, store=sys.argv[1]))
    with joined(config, Strategy(sys.argv[1], 'sync'), process) as communicator:
        measure(config, process, communicator)


def measure(config, process, communicator):
    import mxnet as mx
    import numpy as np

    from mxsimmim.data.loader import Batch
    from mxsimmim.parallel.communicators import make_communicator
    from mxsimmim.training.build import build_trainer, build_update_rule

    control, images = communicator.control, config.train.batch_size
    trainer = build_trainer(config, process, communicator=communicator)
    placement, together = trainer.placement, trainer.update_rule
    alone = build_update_rule(config, trainer.task, placement.net, Strategy('local', 'sync'),
                              make_communicator('local'), trainer.timetable, trainer.split, together.optimizer)
    handle = communicator.register(together.gradients())
    rng = np.random.default_rng(0)
    batch = Batch({'image': rng.integers(0, 256, (IMAGES, 64, 64, 3), 'uint8'),
                   'mask': rng.integers(0, 2, (IMAGES, 8, 8), 'uint8')}, 0, np.arange(IMAGES))

    def seconds(function):
        mx.nd.waitall()
        control.barrier('round')
        began = time.perf_counter()
        function()
        mx.nd.waitall()
        return time.perf_counter() - began

    measured = {'step': lambda: together.step(0, 1e-3, placement.forward_backward(batch, images)),
                'alone': lambda: alone.step(0, 1e-3, placement.forward_backward(batch, images)),
                'exchange': lambda: communicator.all_reduce(handle)}
    times = [{what: seconds(function) for what, function in measured.items()} for _ in range(1 + STEPS)][1:]
    if process.rank == 0:
        least = {what: min(each[what] for each in times) for what in measured}  # noise only adds
        print(json.dumps({**least, 'keys': [key - len(handle.keys) for key in handle.keys]}), flush=True)


if __name__ == '__main__':
    main()
