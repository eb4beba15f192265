"""Prints what memory a pipeline over contexts holds after steps with other schedules and micro-batches, bytes by name.

    python -m support.passing

Weights are few and activations large. States of cached graphs stay, so that each row holds at least what is before it.
"""
import json
import re
from pathlib import Path

import mxnet as mx

from mxsimmim.ops import select_backend
from mxsimmim.parallel.schedules import SCHEDULES

from .trainer import build_tiny_trainer, random_batches

MODEL = dict(img_size=128, patch_size=8, embed_dim=96, depth=8, num_heads=2)
IMAGES, STAGES = 4, 2  # of a micro-batch
STEPS = [('1f1b', 2), ('1f1b', 6), ('gpipe', 3), ('gpipe', 5)]


def trainer():
    """In which the parts of a batch are micro-batches of `IMAGES`."""
    return build_tiny_trainer(model=MODEL, devices=[f'cpu({i})' for i in range(STAGES)],
                              parallel=dict(pipeline=STAGES, micro_batches=2),
                              train=dict(batch_size=2 * IMAGES, store='local'),
                              backend=select_backend('float32', [mx.cpu()]))


def resident():
    """Bytes that this process has."""
    mx.nd.waitall()
    return 1024 * int(re.search(r'RssAnon:\s*(\d+)', Path('/proc/self/status').read_text())[1])


def main():
    built, found = trainer(), {}
    placement = built.placement
    for schedule, micro_batches in STEPS:
        placement._schedule, placement._micro_batches = SCHEDULES[schedule], micro_batches
        batch, = random_batches(built.config.model, 1, IMAGES * micro_batches, 3)
        placement.forward_backward(batch, IMAGES * micro_batches)
        found[f'{schedule} {micro_batches}'] = resident()
    placement.loss(batch)
    placement.forward_backward(batch, IMAGES * micro_batches)
    found['evaluation'] = resident()
    print(json.dumps(found))


if __name__ == '__main__':
    main()
