#!/usr/bin/env python
"""What a checkpoint costs the steps beside it: written while training goes on, and, for comparison, while it waits.

A step is as in train.py. A turn is a few steps, before which a checkpoint is begun or not; every step is waited for,
and so is, after a turn, what is still being written. Kinds of turns alternate, so that whatever else the machine does
meets all alike. The stall is what a turn takes longer than the median turn without a checkpoint, also while arrays are
copied. Ctrl-C ends the measurement: the table has the turns so far.

    python tools/bench/saves.py --model vit_base --batch 32 --folder /disk
"""
import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

from common import SHAPES, add_case_options, masks, random_batch, step_config

KINDS = 'no checkpoint', 'written meanwhile', 'meanwhile, at the same priority', 'waited for'
SMALL = dict(type='vit', img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, init_values=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    SHAPES['vit_small'] = SMALL
    add_case_options(parser)
    parser.set_defaults(model=['vit_small'], batch=[16], precision=['float32'])
    parser.add_argument('--rounds', type=int, default=5, help='turns of each kind (default: 5)')
    parser.add_argument('--steps', type=int, default=3, help='of a turn (default: 3)')
    parser.add_argument('--folder', help='where checkpoints are written (default: a temporary one)')
    args = parser.parse_args()
    from mxsimmim.config import RuntimeConfig
    from mxsimmim.runtime import environment
    environment.prepare(RuntimeConfig(threads=args.threads))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for model in args.model:
            for batch in args.batch:
                for precision in args.precision:
                    measure(model, batch, precision, args, Path(folder))


def measure(model: str, batch: int, precision: str, args: argparse.Namespace, folder: Path) -> None:
    """Print a table for docs/benchmarks.md."""
    import mxnet as mx
    import numpy as np

    from mxsimmim.ops import select_backend
    from mxsimmim.training import saver
    from mxsimmim.training.build import build_trainer
    config = step_config(SHAPES[model], batch, 'local').model_copy(update={'output': str(folder), 'name': 'run'})
    trainer = build_trainer(config, backend=select_backend(precision, [mx.cpu()]))
    images = random_batch(config.model, np.array(masks(model, batch), np.uint8), 0)
    yields, publish = saver.yield_cores, trainer._publish
    found: Dict[str, List[Dict[str, float]]] = {kind: [] for kind in KINDS}
    writing: List[float] = []

    def timed(*arguments: Any) -> Path:
        began = time.thread_time()
        path = publish(*arguments)
        writing.append(time.thread_time() - began)
        return path
    vars(trainer)['_publish'] = timed
    begin: Dict[str, Callable[[], None]] = dict(zip(KINDS, (
        lambda: None, lambda: trainer.save(wait=False), lambda: trainer.save(wait=False), trainer.save)))
    with contextlib.suppress(KeyboardInterrupt):
        for turn, kind in ((turn, kind) for turn in range(args.rounds + 1) for kind in KINDS):  # the first warms up
            saver.yield_cores = yields if 'same' not in kind else lambda: None
            writing[:] = [0.0] * (kind == KINDS[0])
            cpu, times = time.process_time(), [time.monotonic()]
            begin[kind]()
            times.append(time.monotonic())
            for _ in range(args.steps):
                trainer.train_step(images)
                mx.nd.waitall()
            times.append(time.monotonic())
            trainer.saver.wait()
            if turn:
                found[kind].append({'begin': times[1] - times[0], 'turn': times[2] - times[0], 'writing': writing[0],
                                    'left': time.monotonic() - times[2], 'cpu': time.process_time() - cpu})

    def middle(kind: str, name: str) -> float:
        return statistics.median(row[name] for row in found[kind])
    size = sum(file.stat().st_size for file in folder.glob('run/checkpoints/step-*/*')) / 2  # two are kept
    print(f'{model}, {batch} images, {precision}: {size / 1e6:,.0f} MB a checkpoint; medians of '
          f'{len(found[KINDS[-1]])} turns of {args.steps} steps\n\n| a checkpoint | s until training goes on | CPU s '
          'of writing it | CPU s of a turn | s of a turn | longer than without | s until it is written, then |\n'
          '|---|--:|--:|--:|--:|--:|--:|')
    for kind in KINDS:
        begun, written, cpu, own, left = (middle(kind, name) for name in ('begin', 'writing', 'cpu', 'turn', 'left'))
        turns = [row['turn'] for row in found[kind]]
        print(f'| {kind} | {begun:.3f} | {written:.3f} | {cpu:.2f} | {own:.2f} ({min(turns):.2f} to {max(turns):.2f}) '
              f'| {100 * (own / middle(KINDS[0], "turn") - 1):.1f} % | {left:.3f} |', flush=True)


if __name__ == '__main__':
    main()
