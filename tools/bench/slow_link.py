#!/usr/bin/env python
"""A pipeline beside data parallelism where the link between two hosts is slow: seconds a step, and bytes on the link.

The hosts are network namespaces of this machine, as the tests of jobs have them, so that it needs root; each sends and
receives at `--rate` at most, and has a worker of one core and thread. A step is forward, backward, exchange, clipping
and AdamW, on random images that are in memory already. The layouts take turns, and every measurement is a job of its
own; numbers are medians over the turns.

    python tools/bench/slow_link.py

Prints a table for docs/parallelism.md. Takes ten minutes a turn, and for ViT-L 16 GB.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Tuple

from common import memory, random_batch, step_config
from parallel import MODELS
from scale import LAUNCH, join, on_two_cores

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tests'))
from support.hosts import Hosts, three_hosts  # type: ignore[import-not-found]  # noqa: E402

LAYOUTS = {'pipeline': 'pipeline of 2', 'data': 'data parallelism of 2'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=MODELS, default='vit_large')
    parser.add_argument('--batch', type=int, default=8, help='images a step (default: 8)')
    parser.add_argument('--micro-batches', type=int, default=8, help='of the pipeline (default: 8)')
    parser.add_argument('--precision', choices=['float32', 'bf16'], default='float32', help='of products '
                        '(default: float32)')
    parser.add_argument('--rate', default='1gbit', help="of each host's link, as tc writes it (default: 1gbit)")
    parser.add_argument('--rounds', type=int, default=3, help='turns of each layout (default: 3)')
    parser.add_argument('--steps', type=int, default=2, help='measured steps a turn, after one more (default: 2)')
    parser.add_argument('--worker', choices=LAYOUTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    machine = on_two_cores(None)
    print(f'{args.model}, {machine.cpu}, a core and a thread a worker, {machine.system}; links of {args.rate}; batch '
          f'{args.batch}, {args.micro_batches} micro-batches, {args.precision}; median of {args.rounds} turns of '
          f'{args.steps} steps\n', flush=True)
    found: Dict[str, List[Dict[str, float]]] = {layout: [] for layout in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder, three_hosts(Path(folder) / 'hosts') as hosts:
        (Path(folder) / 'hostfile').write_text('host0\nhost1\n')
        hosts.limit(args.rate)
        for turn in range(args.rounds):
            for layout in LAYOUTS:
                found[layout].append(measure(args, hosts, Path(folder), layout))
                print(f'turn {turn + 1} of {args.rounds}, {layout}: {found[layout][-1]}', file=sys.stderr, flush=True)
    print('\n'.join(table(found)))


def measure(args: argparse.Namespace, hosts: Hosts, folder: Path, layout: str) -> Dict[str, float]:
    """Return what a job of two workers on two hosts has measured."""
    worker = [sys.executable, __file__, '--worker', layout, '--model', args.model, '--batch', str(args.batch),
              '--micro-batches', str(args.micro_batches), '--steps', str(args.steps), '--precision', args.precision]
    process = subprocess.run([sys.executable, str(LAUNCH), '-n', '2', '-H', 'hostfile', '--horovod', '--env',
                              'OMP_NUM_THREADS=1', '--', *worker], cwd=folder, env=hosts.environ,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    lines = [line[line.index('{'):] for line in process.stdout.splitlines() if '{"step"' in line]
    if process.returncode or not lines:
        sys.exit(f'{layout}: exit status {process.returncode}\n{process.stdout}\n{process.stderr}')
    answer: Dict[str, float] = json.loads(lines[-1])
    return answer


def work(args: argparse.Namespace) -> None:
    """A worker of a job. Rank 0 prints what was measured; bytes are those of its host."""
    process = join(threads=1)
    import mxnet as mx
    import numpy as np

    from mxsimmim.config import ParallelConfig
    from mxsimmim.parallel.strategies import strategy_of
    from mxsimmim.training.build import build_trainer
    from mxsimmim.training.start import joined

    stages = process.size if args.worker == 'pipeline' else 1
    config = step_config(MODELS[args.model], args.batch, 'auto')
    config = config.model_copy(update={
        'parallel': ParallelConfig(pipeline=stages, micro_batches=args.micro_batches),
        'runtime': config.runtime.model_copy(update={'precision': args.precision})})
    with joined(config, strategy_of(config, process), process) as communicator:
        control = communicator.control
        trainer = build_trainer(config, process, communicator=communicator)
        rng, grid = np.random.default_rng(control.mesh.coordinate('data')), config.model.grid
        own = trainer.split.part
        images = random_batch(config.model, rng.integers(0, 2, (own.stop - own.start, grid, grid), np.uint8), 0)

        def step() -> None:
            trainer.train_step(images)
            trainer.update_rule.poll(trainer.step, False)
            mx.nd.waitall()
        step()
        control.barrier('measured steps begin')
        before, began = traffic(), time.perf_counter()
        for _ in range(args.steps):
            step()
        control.barrier('measured steps have ended')
        seconds, (sent, received) = time.perf_counter() - began, traffic()
        peak = max(control.all_gather('memory', memory('VmHWM')))
        if process.rank == 0:
            print(json.dumps({'step': seconds / args.steps, 'sent': (sent - before[0]) / args.steps,
                              'received': (received - before[1]) / args.steps, 'memory': peak}), flush=True)


def traffic() -> Tuple[int, int]:
    """Return the bytes that this host has sent and received on eth0; see proc(5)."""
    line = next(line for line in Path('/proc/self/net/dev').read_text().splitlines() if 'eth0:' in line)
    numbers = line.partition(':')[2].split()
    return int(numbers[8]), int(numbers[0])


def table(found: Dict[str, List[Dict[str, float]]]) -> List[str]:
    """Return the lines of the table, and how much faster the pipeline is in each turn, by the median."""
    lines = ['| layout | s/step | MB a step that host 0 sends | receives | GB a process |', '|---|--:|--:|--:|--:|']
    for layout, turns in found.items():
        step, sent, received, peak = (statistics.median(turn[what] for turn in turns)
                                      for what in ('step', 'sent', 'received', 'memory'))
        lines.append(f'| {LAYOUTS[layout]} | {step:.2f} | {sent / 1e6:.1f} | {received / 1e6:.1f} | {peak:.2f} |')
    ratios = [data['step'] / pipeline['step'] for pipeline, data in zip(found['pipeline'], found['data'])]
    return [*lines, '', f'Data parallelism over the pipeline, seconds: {statistics.median(ratios):.2f} '
                        f'({", ".join(f"{ratio:.2f}" for ratio in ratios)})']


if __name__ == '__main__':
    main()
