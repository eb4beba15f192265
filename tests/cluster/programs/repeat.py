"""Trains a small network from fresh keys, again and again, and compares each time with what one process computes.

    repeat.py STORE TIMES DEVICES

A fault that shows in one start of four shows here. Prints `ok TIMES` on every worker.
"""
import os
import sys

import mxnet as mx
import numpy as np

from mxsimmim.config import ModelConfig, OptimConfig, TrainConfig
from mxsimmim.data.loader import Batch
from mxsimmim.data.sampling import split
from mxsimmim.interop import official
from mxsimmim.models import build_simmim, named_parameters
from mxsimmim.ops import select_backend
from mxsimmim.optim import AdamW, weight_decays
from mxsimmim.parallel.updates import SynchronousUpdate
from mxsimmim.parallel.control import connect
from mxsimmim.parallel.placement import Replicated
from mxsimmim.parallel.replicas import compare
from mxsimmim.parallel.communicators import make_communicator
from mxsimmim.runtime.process import ALONE, world

# Squared error: the gradient of the absolute one jumps where a rounding changes the sign of a difference.
MODEL = ModelConfig(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, loss='mse')
STEPS, IMAGES = 4, 12


def batches(seed, part):
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        image = rng.integers(0, 256, (IMAGES, 16, 16, 3), 'uint8')
        mask = (np.argsort(rng.random((IMAGES, 16)), 1) < 9).reshape(IMAGES, 4, 4).astype('uint8')
        yield Batch(image[part], mask[part], np.zeros((IMAGES, 0), 'float32')[part], 0, np.arange(IMAGES)[part])


def trained(seed, backend, store, devices, part):
    net = build_simmim(MODEL, seed, backend)
    placement = Replicated(net, [mx.cpu(i) for i in range(devices)])
    parameters = named_parameters(net)
    adamw = AdamW(parameters, weight_decays(parameters, 'fixed', 'vit', 0.05), OptimConfig(), backend=backend)
    aggregation = SynchronousUpdate(parameters, adamw, store, TrainConfig(batch_size=IMAGES), 0.5)
    for step, batch in enumerate(batches(seed, part)):
        aggregation.step(step, 1e-2, placement.forward_backward(batch, IMAGES))
    compare(parameters, store.control, STEPS)
    weights = official.export_weights(net)
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


def main():
    name, times, devices = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    place = world(os.environ)
    backend = select_backend('float32', [mx.cpu()])
    store = make_communicator(name, place, connect(place, os.environ))
    for seed in range(times):
        ours = trained(seed, backend, store, devices, split(IMAGES, place.size)[place.rank])
        alone = trained(seed, backend, make_communicator('local', ALONE), 1, slice(0, IMAGES))
        difference = np.linalg.norm(ours - alone) / np.linalg.norm(alone)
        assert difference < 1e-5, f'rank {place.rank}, seed {seed}: {difference}'
    print('ok', times, flush=True)


if __name__ == '__main__':
    main()
