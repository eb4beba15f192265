"""Trains a small network from fresh keys, again and again, and compares each time with what one process computes.

    repeat.py STORE TIMES DEVICES

A fault that shows in one start of four shows here. Prints `ok TIMES` on every worker.
"""
import os
import sys

import numpy as np

from mxsimmim.config import Config
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.parallel.communicators import make_communicator
from mxsimmim.parallel.control import connect
from mxsimmim.runtime.process import ALONE, process_info
from mxsimmim.training.build import build_trainer

STEPS, IMAGES, RATE = 4, 12, 1e-2


def config_of(seed, store, devices):
    """Squared error: the gradient of the absolute one jumps where a rounding changes the sign of a difference."""
    return Config(model=dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, loss='mse'),
                  mask=dict(patch_size=4), data=dict(path='digits', val_fraction=0), seed=seed,
                  devices=[f'cpu({i})' for i in range(devices)],
                  optim=dict(recipe='fixed', schedule='constant', warmup=0, base_lr=RATE * 512 / IMAGES, clip_grad=0.5),
                  train=dict(batch_size=IMAGES, store=store, check_replicas=STEPS, length=100), log=dict(every=100))


def batches(seed, part):
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        image = rng.integers(0, 256, (IMAGES, 16, 16, 3), 'uint8')
        mask = (np.argsort(rng.random((IMAGES, 16)), 1) < 9).reshape(IMAGES, 4, 4).astype('uint8')
        yield Batch({'image': image[part], 'mask': mask[part]}, 0, np.arange(IMAGES)[part])


def trained(trainer):
    for batch in batches(trainer.config.seed, trainer.split.part):
        trainer.train_step(batch)
    trainer.check_replicas()
    weights = official.export_weights(trainer.placement.net)
    return np.concatenate([weights[name].ravel() for name in sorted(weights)])


def main():
    store, times, devices = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    process = process_info(os.environ)
    communicator = make_communicator(store, process, connect(process, os.environ))
    for seed in range(times):
        ours = trained(build_trainer(config_of(seed, store, devices), process, communicator=communicator))
        alone = trained(build_trainer(config_of(seed, 'local', 1), ALONE))
        difference = np.linalg.norm(ours - alone) / np.linalg.norm(alone)
        assert difference < 1e-5, f'rank {process.rank}, seed {seed}: {difference}'
    print('ok', times, flush=True)


if __name__ == '__main__':
    main()
