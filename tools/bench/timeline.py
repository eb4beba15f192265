#!/usr/bin/env python
"""Who works when in a pipeline: the measured begin and end of each pass of each micro-batch, one row a stage.

Each stage is a process of one thread. Passes are waited for, so that they have an end; a step is that much slower than
one in which nothing is measured. Of the measured steps of each pipeline the shortest is drawn, as other programs can
only make one longer; of more stages than cores some wait for a core, which the picture shows as work.

    python tools/bench/timeline.py -o docs/timeline.png

Draws the picture of docs/parallelism.md. Takes a minute for each pipeline.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from common import random_batch, step_config
from scale import LAUNCH, join

NETWORK = dict(img_size=224, embed_dim=384, depth=8, num_heads=6)
FORWARD, BACKWARD = 'forward', 'backward'
COLOURS = {FORWARD: '#7fb2e5', BACKWARD: '#f0a35e'}


class Pass(NamedTuple):
    """A pass of a micro-batch through a stage, in seconds of a clock that all processes of a machine share."""
    stage: int
    direction: str
    number: int
    began: float
    ended: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stages', type=int, nargs='+', default=[2, 4], help='of each pipeline (default: 2 4)')
    parser.add_argument('--micro-batches', type=int, default=8, help='of a step, an image each (default: 8)')
    parser.add_argument('--schedule', choices=['1f1b', 'gpipe'], default='1f1b')
    parser.add_argument('--steps', type=int, default=10, help='measured steps of each pipeline (default: 10)')
    parser.add_argument('-o', '--output', default='timeline.png', help='picture to write (default: timeline.png)')
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    found = [measure(stages, args) for stages in args.stages]
    for passes in found:
        print(f'{1 + passes[-1].stage} stages: {summary(passes)}')
    draw(found, args.output)


def measure(stages: int, args: argparse.Namespace) -> List[Pass]:
    """Return the passes of the shortest step of a pipeline, by stage; time 0 is its begin."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [sys.executable, str(LAUNCH), '-n', str(stages), '--horovod', '--env', 'OMP_NUM_THREADS=1', '--',
             sys.executable, __file__, '--worker', '--micro-batches', str(args.micro_batches), '--schedule',
             args.schedule, '--steps', str(args.steps)],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    lines = [line[line.index('[['):] for line in process.stdout.splitlines() if '[[' in line]
    if process.returncode or not lines:
        sys.exit(f'exit status {process.returncode}\n{process.stdout}\n{process.stderr}')
    return [Pass(*each) for each in json.loads(lines[-1])]


def work(args: argparse.Namespace) -> None:
    """A stage. Rank 0 prints the passes of the shortest step."""
    process = join(threads=1)
    import mxnet as mx
    import numpy as np

    from mxsimmim.config import ParallelConfig
    from mxsimmim.parallel.strategies import strategy_of
    from mxsimmim.training.build import build_trainer
    from mxsimmim.training.start import joined

    config = step_config(NETWORK, args.micro_batches, 'auto').model_copy(update={'parallel': ParallelConfig(
        pipeline=process.size, micro_batches=args.micro_batches, schedule=args.schedule)})
    with joined(config, strategy_of(config, process), process) as communicator:
        control = communicator.control
        trainer = build_trainer(config, process, communicator=communicator)
        grid = config.model.grid
        masks = np.random.default_rng(0).integers(0, 2, (args.micro_batches, grid, grid), np.uint8)
        images, steps = random_batch(config.model, masks, 0), []
        taken = record(trainer.placement)
        for _ in range(args.steps + 2):
            mx.nd.waitall()
            control.barrier('step')
            taken.clear()
            trainer.train_step(images)
            steps.append([each for own in control.all_gather('passes', passes_of(taken, process.rank)) for each in own])
        best = min(steps[2:], key=lambda passes: span(passes)[1] - span(passes)[0])
        begin, _ = span(best)
        if process.rank == 0:
            print(json.dumps([[*each[:3], each[3] - begin, each[4] - begin] for each in best]), flush=True)


Taken = List[Tuple[str, bool, float, float]]  # direction, whether it goes on with the pass before, begin, end


def record(placement: Any) -> Taken:
    """Have a pipeline wait for what it computes, and return the list that this is then written to."""
    from mxnet import autograd, nd

    from mxsimmim.parallel import pipeline
    taken: Taken = []

    def timed(direction: str, function: Callable[..., Any], goes_on: Callable[..., bool]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            nd.waitall()
            began = time.monotonic()
            answer = function(*inputs)
            nd.waitall()
            taken.append((direction, goes_on(*inputs), began, time.monotonic()))
            return answer
        return call
    placement._call = timed(FORWARD, placement._call, lambda stage, *_: stage is placement._head)
    backward = timed(BACKWARD, autograd.backward, lambda *_: False)
    vars(pipeline).update(autograd=SimpleNamespace(record=autograd.record, is_recording=autograd.is_recording,
                                                   backward=backward))
    return taken


def passes_of(taken: Taken, stage: int) -> List[Pass]:
    """Number the passes of a stage, which takes the micro-batches in their order; the head belongs to its stage."""
    found: List[Pass] = []
    numbers = {FORWARD: 0, BACKWARD: 0}
    for direction, goes_on, began, ended in taken:
        if goes_on:
            found[-1] = found[-1]._replace(ended=ended)
            continue
        found.append(Pass(stage, direction, numbers[direction], began, ended))
        numbers[direction] += 1
    return found


def span(passes: List[Any]) -> Tuple[float, float]:
    """Begin of the first pass and end of the last."""
    return min(each[3] for each in passes), max(each[4] for each in passes)


def summary(passes: List[Pass]) -> str:
    """What part of a step each stage computes, and what the schedule allows."""
    begin, end = span(passes)
    busy: Dict[int, float] = {}
    for each in passes:
        busy[each.stage] = busy.get(each.stage, 0) + each.ended - each.began
    count, turns = len(busy), len(passes) // len(busy) // 2
    shares = ', '.join(f'{seconds / (end - begin):.0%}' for seconds in busy.values())
    return f'{end - begin:.3f} s, computing {shares}; the ideal is {turns / (turns + count - 1):.0%}'


def draw(found: List[List[Pass]], path: str) -> None:
    """Draw a panel a pipeline, with a bar and its number for each pass."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    heights = [1 + passes[-1].stage for passes in found]
    figure, panels = pyplot.subplots(len(found), 1, figsize=(11, 1.1 + 0.62 * sum(heights) + 0.6 * len(found)),
                                     squeeze=False, gridspec_kw={'height_ratios': [height + 0.4 for height in heights]})
    for passes, axes in zip(found, panels[:, 0]):
        stages = 1 + passes[-1].stage
        for stage, direction, number, began, ended in passes:
            axes.barh(stage, 1000 * (ended - began), 0.82, 1000 * began, color=COLOURS[direction], edgecolor='#333333',
                      linewidth=0.6)
            axes.text(500 * (began + ended), stage, str(number), ha='center', va='center', fontsize=9, color='#111111')
        axes.set_yticks(range(stages), [f'stage {stage}' for stage in range(stages)])
        axes.set_ylim(stages - 0.5, -0.5)
        axes.set_xlim(0, 1000 * span(passes)[1])
        axes.spines[['top', 'right']].set_visible(False)
        axes.set_title(f'{stages} stages', loc='left', fontsize=11)
    panels[-1][0].set_xlabel('ms since the first pass began')
    figure.legend(handles=[Patch(facecolor=colour, edgecolor='#333333', label=direction)
                           for direction, colour in COLOURS.items()], loc='upper right', ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor='white')
    pyplot.close(figure)


if __name__ == '__main__':
    main()
