"""Times steps of a worker that computes as long as its gradients travel.

    overlap.py STORE

Rank 0 prints as JSON the seconds, medians, of a step, of one that exchanges nothing, and of the exchange by itself,
and the keys under which a step's gradients are summed.
"""
import json
import os
import statistics
import sys
import time

from mxsimmim.config import Config, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from mxsimmim.runtime.environment import prepare
from mxsimmim.runtime.process import ALONE, world

MODEL = ModelConfig(img_size=64, patch_size=8, embed_dim=384, depth=8, num_heads=6)  # 14 million parameters
IMAGES, STEPS = 16, 3  # of a worker; images make the pass about as long as the exchange


def main():
    prepare(RuntimeConfig(threads=1))
    place = world(os.environ)
    if place.role != 'worker':
        from mxsimmim.parallel.server import serve
        sys.exit(serve())
    import mxnet as mx
    import numpy as np

    from mxsimmim.data.loader import Batch
    from mxsimmim.models import build_simmim, named_parameters
    from mxsimmim.ops import select_backend
    from mxsimmim.optim import AdamW, weight_decays
    from mxsimmim.parallel.updates import SynchronousUpdate
    from mxsimmim.parallel.control import connect
    from mxsimmim.parallel.strategies import horovod_settings
    from mxsimmim.parallel.placement import Replicated
    from mxsimmim.parallel.communicators import make_communicator
    from mxsimmim.training.timetable import expected_step

    backend = select_backend('float32', [mx.cpu()])
    net = build_simmim(MODEL, 0, backend)
    placement = Replicated(net, [mx.cpu()])
    parameters = named_parameters(net)
    adamw = AdamW(parameters, weight_decays(parameters, 'fixed', 'vit', 0.05), OptimConfig(), backend=backend)
    train = TrainConfig(batch_size=IMAGES * place.size)
    os.environ.update(horovod_settings(expected_step(Config(model=MODEL, train=train), place)))
    control = connect(place, os.environ)
    store = make_communicator(sys.argv[1], place, control)
    alone, together = (SynchronousUpdate(parameters, adamw, s, train, 5.0)
                       for s in (make_communicator('local', ALONE), store))
    handle = store.register(together.gradients())
    rng = np.random.default_rng(0)
    batch = Batch(rng.integers(0, 256, (IMAGES, 64, 64, 3), 'uint8'), rng.integers(0, 2, (IMAGES, 8, 8), 'uint8'),
                  np.zeros((IMAGES, 0), 'float32'), 0, np.arange(IMAGES))

    def seconds(function):
        mx.nd.waitall()
        control.barrier('round')
        began = time.perf_counter()
        function()
        mx.nd.waitall()
        return time.perf_counter() - began

    measured = {'step': lambda: together.step(0, 1e-3, placement.forward_backward(batch, train.batch_size)),
                'alone': lambda: alone.step(0, 1e-3, placement.forward_backward(batch, train.batch_size)),
                'exchange': lambda: store.all_reduce(handle)}
    times = [{what: seconds(function) for what, function in measured.items()} for _ in range(1 + STEPS)][1:]
    if place.rank == 0:
        medians = {what: statistics.median(each[what] for each in times) for what in measured}
        print(json.dumps({**medians, 'keys': [key - len(handle.keys) for key in handle.keys]}), flush=True)


if __name__ == '__main__':
    main()
