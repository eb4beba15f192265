#!/usr/bin/env python
"""What a model that is divided between two processes gains and needs, beside PyTorch doing the same.

A step is forward, backward, clipping of the whole model's norm and AdamW, on random images that are in memory already.
One process computes the whole batch; two of a core and a thread each compute it together. With `--mode pipeline` (1F1B)
each has half of the blocks, and the batch passes through them in M micro-batches: at best they reach M / (M + 1) of
twice the images/s. With `--mode tensor` each has half of every block; PyTorch sums over Gloo.

Efficiency is the images/s of two over twice those of one. `apart` are two processes that compute a batch each and know
nothing of each other: their efficiency is what the machine takes by itself, as its cores share memory, caches and their
clock. CPU time is that of a step over all processes: where the machine does other work it says what dividing costs, and
efficiency does not. Memory is the largest resident set of any process. Every measurement is a job of its own, started
by tools/launch.py; all take turns, and ratios are medians over the turns. PyTorch may be installed elsewhere:

    python tools/bench/parallel.py --torch-python ~/torch/bin/python

Prints a table for docs/parallelism.md. A turn of ViT-B with 16 images takes some ten minutes, and 9 GB.
"""
import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

from common import CLIP, DECAY, RATE, WARM_UP, memory, random_batch, step_config
from scale import job, join, join_gloo, on_two_cores

MODELS = {
    'vit_base': dict(type='vit', img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=0.1),
    'vit_large': dict(type='vit', img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16, init_values=0.1),
    'tiny': dict(type='vit', img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, init_values=0.1),
}
APART = 0  # in place of a number of processes: two that have nothing to do with each other
SIDES = {'ours': 'mxsimmim', 'torch': 'PyTorch'}


class Worker(NamedTuple):
    """A process of a job: its step, how to wait for the end of those begun, and all processes' values of a number."""
    step: Callable[[], Any]
    wait: Callable[[], None]
    gather: Callable[[float], List[float]]
    rank: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=MODELS, default='vit_base')
    parser.add_argument('--mode', choices=['pipeline', 'tensor'], default='pipeline', help='(default: pipeline)')
    parser.add_argument('--batch', type=int, default=32, help='images a step (default: 32)')
    parser.add_argument('--micro-batches', type=int, default=8, help='of a pipeline (default: 8)')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each job (default: 5)')
    parser.add_argument('--steps', type=int, default=3, help='measured steps a turn (default: 3)')
    parser.add_argument('--sides', choices=SIDES, nargs='+', default=[*SIDES])
    parser.add_argument('--torch-python', default=sys.executable, metavar='PATH',
                        help='interpreter that has PyTorch (default: this one)')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    machine = on_two_cores(args.torch_python if 'torch' in args.sides else None)
    how = f'pipeline, {args.micro_batches} micro-batches' if args.mode == 'pipeline' else args.mode
    print(f'{args.model}, {machine.cpu}, 2 of {machine.cores} cores, {machine.system}; {how}, batch {args.batch}, '
          f'1 thread a worker, float32; median of {args.rounds} turns of {args.steps} steps\n', flush=True)
    print('\n'.join(table(measure(args), args.batch)))


def measure(args: argparse.Namespace) -> Dict[Tuple[str, int], List[Dict[str, float]]]:
    """(side, processes or APART) -> what each turn measured: seconds a step, CPU time, most memory of a process, GB."""
    found: Dict[Tuple[str, int], List[Dict[str, float]]] = {}
    for turn in range(args.rounds):
        print(f'turn {turn + 1} of {args.rounds}', file=sys.stderr, flush=True)
        for side in args.sides:
            program = [args.torch_python if side == 'torch' else sys.executable, __file__, '--worker', side, '--model',
                       args.model, '--mode', args.mode, '--batch', str(args.batch), '--micro-batches',
                       str(args.micro_batches), '--steps', str(args.steps)]
            found.setdefault((side, 1), []).append(job(program))
            found.setdefault((side, 2), []).append(job(program, ['--horovod']))
            with ThreadPoolExecutor(2) as apart:
                both = list(apart.map(job, [program, program]))
            found.setdefault((side, APART), []).append({name: statistics.mean(each[name] for each in both)
                                                        for name in both[0]})
    return found


def work(args: argparse.Namespace) -> None:
    """A process of a job. Rank 0 prints what was measured."""
    import time
    worker = (torch_worker if args.worker == 'torch' else mxnet_worker)(MODELS[args.model], args.batch, args.mode,
                                                                              args.micro_batches)
    for _ in range(WARM_UP):
        worker.step()
    worker.wait()
    worker.gather(0)
    began, used = time.perf_counter(), time.process_time()
    for _ in range(args.steps):
        worker.step()
    worker.wait()
    used = time.process_time() - used
    seconds = worker.gather((time.perf_counter() - began) / args.steps)
    shares = worker.gather(used / args.steps)
    peaks = worker.gather(memory('VmHWM'))
    if worker.rank == 0:
        print(json.dumps({'step': max(seconds), 'cpu': sum(shares), 'memory': max(peaks)}), flush=True)


def mxnet_worker(keys: dict, batch: int, mode: str, micro_batches: int) -> Worker:
    """The project's own trainer, of a model that is divided where there are two workers."""
    process = join(threads=1)
    import mxnet as mx
    import numpy as np

    from mxsimmim.config import ParallelConfig
    from mxsimmim.ops import select_backend
    from mxsimmim.parallel.strategies import strategy_of
    from mxsimmim.training.build import build_trainer
    from mxsimmim.training.start import joined

    config = step_config(keys, batch, 'auto')
    divided = ParallelConfig(**{mode: process.size, 'micro_batches': micro_batches})
    config = config.model_copy(update={'parallel': divided})
    entered = joined(config, strategy_of(config, process), process)
    communicator = entered.__enter__()
    trainer = build_trainer(config, process, communicator=communicator, backend=select_backend('float32', [mx.cpu()]))
    rng = np.random.default_rng(0)
    images = random_batch(config.model, rng.integers(0, 2, (batch, config.model.grid, config.model.grid), np.uint8), 0)

    def step() -> None:
        trainer.train_step(images)
        trainer.update_rule.poll(trainer.step, False)

    control = communicator.control
    return Worker(step, mx.nd.waitall, lambda value: control.all_gather('measured', value), process.rank)


def torch_worker(keys: dict, batch: int, mode: str, micro_batches: int) -> Worker:
    """PyTorch doing the same, see torch_parallel.py."""
    import torch
    from torch import distributed
    from torch_parallel import clip, part_of, stage_of, whole
    from torch_simmim import build_simmim, parameter_groups

    rank, size = join_gloo()
    torch.manual_seed(0)
    model = build_simmim(**keys)
    side, grid = keys['img_size'], keys['img_size'] // keys['patch_size']
    image = torch.randn(batch, 3, side, side)
    mask = torch.randint(0, 2, (batch, grid, grid))
    part = (whole(model, image, mask) if size == 1 else stage_of(model, image, mask, rank, micro_batches)
            if mode == 'pipeline' else part_of(model, image, mask, rank, size))
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{**group, 'params': [p for p in group['params'] if p.requires_grad]}
              for group in parameter_groups(model, DECAY)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        part.forward_backward()
        if size == 1:
            torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        else:
            clip(part.counted, parameters, CLIP)
        optimizer.step()

    def gather(value: float) -> List[float]:
        values: List[Any] = [value] * size
        if size > 1:
            distributed.all_gather_object(values, value)
        return values

    return Worker(step, lambda: None, gather, rank)


def table(found: Dict[Tuple[str, int], List[Dict[str, float]]], batch: int) -> List[str]:
    """Lines of the table; each ratio is the median of the turns' ratios."""
    def ratio(numbers: List[float], others: List[float]) -> float:
        return statistics.median(a / b for a, b in zip(numbers, others))

    def of(side: str, processes: int, what: str) -> List[float]:
        return [turn[what] for turn in found[side, processes]]

    lines = ['| program | images/s, 1 process | 2 | efficiency | apart | CPU s a step, 1 | 2 | GB a process, 1 | 2 '
             '| ratio |', '|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|']
    for side in dict.fromkeys(side for side, _ in found):
        one, two = of(side, 1, 'step'), of(side, 2, 'step')
        used, memories = [[of(side, processes, what) for processes in (1, 2)] for what in ('cpu', 'memory')]
        lines.append(f'| {SIDES[side]} | {batch / statistics.median(one):.2f} | {batch / statistics.median(two):.2f} '
                     f'| {ratio(one, two) / 2:.1%} | {ratio(one, of(side, APART, "step")):.1%} '
                     f'| {statistics.median(used[0]):.2f} '
                     f'| {statistics.median(used[1]):.2f} | {statistics.median(memories[0]):.2f} '
                     f'| {statistics.median(memories[1]):.2f} | {ratio(memories[1], memories[0]):.2f} |')
    if len({side for side, _ in found}) == 2:
        lines += ['', f'Ours over PyTorch, images/s of two processes: '
                  f'{ratio(of("torch", 2, "step"), of("ours", 2, "step")):.2f}']
    return lines


if __name__ == '__main__':
    main()
