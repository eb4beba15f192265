#!/usr/bin/env python
"""What a checkpoint costs the steps beside it: written while training goes on, and, for comparison, while it waits.

A step is as in train.py. A turn is a few steps, before which a checkpoint is begun or not; every step is waited for,
and so is, at the end of a turn, what is still being written. Kinds of turns alternate, so that whatever else the machine
does meets all alike. The stall is what a turn takes longer than the median turn without a checkpoint, also while arrays
are copied. Ctrl-C ends the measurement: the table has the turns so far.

    python tools/bench/saves.py --model vit_base --batch 32 --folder /disk
"""
import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List

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
    yields = saver.yield_cores

    def step() -> None:
        trainer.train_step(images)
        mx.nd.waitall()

    begin: Dict[str, Callable[[], None]] = dict(zip(KINDS, (
        lambda: None, lambda: trainer.save(wait=False), lambda: trainer.save(wait=False), trainer.save)))
    totals: Dict[str, List[float]] = {kind: [] for kind in KINDS}
    begun: Dict[str, List[float]] = {kind: [] for kind in KINDS}
    firsts: Dict[str, List[float]] = {kind: [] for kind in KINDS}
    left: Dict[str, List[float]] = {kind: [] for kind in KINDS}
    with contextlib.suppress(KeyboardInterrupt):
        for turn, kind in ((turn, kind) for turn in range(args.rounds + 1) for kind in KINDS):  # the first warms up
            saver.yield_cores = yields if 'same' not in kind else lambda: None
            times = [time.monotonic()]
            begin[kind]()
            times.append(time.monotonic())
            for _ in range(args.steps):
                step()
                times.append(time.monotonic())
            trainer.saver.wait()
            times.append(time.monotonic())
            if turn:
                totals[kind].append(times[-1] - times[0])
                begun[kind].append(times[1] - times[0])
                firsts[kind].append(times[2] - times[0])
                left[kind].append(times[-1] - times[-2])
    plain, usual = statistics.median(totals[KINDS[0]]), statistics.median(firsts[KINDS[0]])
    size = sum(file.stat().st_size for file in (folder / 'run' / 'checkpoints').glob('step-*/*')) / 2  # two are kept
    print(f'{model}, {batch} images, {precision}: {size / 1e6:,.0f} MB a checkpoint; medians of {len(totals[KINDS[-1]])} turns of '
          f'{args.steps} steps\n\n| a checkpoint | s until training goes on | s of the step, with that | longer than '
          'without | s of a turn | longer | of that, s of waiting at its end |\n|---|--:|--:|--:|--:|--:|--:|')
    for kind in KINDS:
        own, first = statistics.median(totals[kind]), statistics.median(firsts[kind])
        print(f'| {kind} | {statistics.median(begun[kind]):.3f} | {first:.3f} | {100 * (first / usual - 1):.1f} % | '
              f'{own:.3f} ({min(totals[kind]):.3f} to {max(totals[kind]):.3f}) | {100 * (own / plain - 1):.1f} % | '
              f'{statistics.median(left[kind]):.3f} |', flush=True)


if __name__ == '__main__':
    main()
