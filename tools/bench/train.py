#!/usr/bin/env python
"""Time and memory of a training step, beside the same model in PyTorch, eager and compiled, at the same precision.

A step is forward, backward, clipping of the global norm and AdamW, on random images under the paper's masks; both see
the same masks. bf16 means that both multiply in bf16 and keep weights in float32: in PyTorch, autocast. Each program is
a process of its own, which builds its model and warms up; then they take turns, so that whatever else the machine does
meets all of them alike, and the ratio is the median over these turns. PyTorch may be installed elsewhere:

    python tools/bench/train.py --torch-python ~/torch/bin/python -o docs/step.png

Prints a table for docs/benchmarks.md and, with -o, draws it. PyTorch's two ways are in memory together where they fit,
else one after the other, each in turns with ours; a batch of 32 needs some 16 GB. Takes some 40 minutes.
"""
import argparse
import contextlib
import json
import statistics
import sys
from typing import Any, Dict, List, Optional, Sequence

from common import (
    CLIP,
    DECAY,
    OURS,
    RATE,
    SHAPES,
    SIDES,
    THEIRS,
    Case,
    Measured,
    Worker,
    add_case_options,
    cases,
    describe,
    masks,
    memory,
    our_worker,
    require_torch,
)
from product import Rates, measured_rates, step_products
from turns import Side, serve as answer_turns

NAMES = {'mxsimmim': 'mxsimmim', 'eager': 'PyTorch', 'compiled': 'PyTorch, compiled'}
ROOM = 1.4  # of what the first of PyTorch's processes needed must be free for the second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser)
    parser.add_argument('--rounds', type=int, default=5, help='turns of each program (default: 5)')
    parser.add_argument('--steps', type=int, default=0, help='steps a turn (default: 2, and 1 from a batch of 16 on)')
    parser.add_argument('-o', '--output', metavar='PNG', help='draw a bar chart into this file')
    parser.add_argument('--torch-python', default=sys.executable, metavar='PATH',
                        help='interpreter that has PyTorch (default: this one)')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return serve(args.worker, json.loads(sys.stdin.readline()))
    from mxsimmim.runtime import facts
    require_torch(args.torch_python)
    machine = facts.collect()
    args.threads = args.threads or machine.cores
    rates = measured_rates(args, args.threads)
    peak = '; best product: ' + ', '.join(f'{p} {best(rates, p):.0f} GFLOP/s' for p in args.precision) if rates else ''
    print(f'{describe(machine, args.threads)}; median of {args.rounds} turns{peak}\n\n'
          '| model, batch, precision | program | images/s | s/step | mxsimmim is | of the best product rate '
          '| peak memory, GB |\n|---|---|--:|--:|--:|--:|--:|', flush=True)
    found = []
    for case in cases(args):
        found.append(measure(case, args))
        print('\n'.join(rows(found[-1], best(rates, case.precision) if rates else None)), flush=True)
        if args.output:  # after each case: a long run that is stopped has drawn what it measured
            from chart import draw
            draw(found, NAMES[OURS], f'{machine.cpu}, {machine.cores} cores', args.output)


def best(rates: Rates, precision: str) -> float:
    """The machine's best measured product rate, GFLOP/s."""
    return max(rates[precision].values())


def measure(case: Case, args: argparse.Namespace) -> Measured:
    """Turns of our side and of as many of PyTorch's as fit into memory beside it, until all have had theirs."""
    found = Measured(case, {side: [] for side in SIDES}, {side: [] for side in THEIRS}, {}, {})
    steps = args.steps or (2 if case.batch < 16 else 1)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(side(OURS, case, args))
        waiting = list(THEIRS)
        while waiting:
            with contextlib.ExitStack() as some:
                theirs: List[Side] = []
                while waiting and (not theirs or memory('MemAvailable', '/proc/meminfo') > ROOM * theirs[0].peak):
                    theirs.append(some.enter_context(side(waiting.pop(0), case, args)))
                take_turns(found, ours, theirs, args.rounds, steps)
    return found


def side(name: str, case: Case, args: argparse.Namespace) -> Side:
    """Start a program."""
    task = dict(case=case, masks=masks(case.model, case.batch), threads=args.threads)
    return Side(name, sys.executable if name == OURS else args.torch_python, __file__, task, args.threads)


def take_turns(found: Measured, ours: Side, theirs: Sequence[Side], rounds: int, steps: int) -> None:
    """Adds to `found` what each side took in each round."""
    sizes = {side.parameters for side in [ours, *theirs]}
    assert len(sizes) == 1, f'not the same model: {sizes} parameters'
    for _ in range(rounds):
        reference = ours.run(steps)
        found.seconds[ours.name].append(reference)
        for side in theirs:
            found.seconds[side.name].append(side.run(steps))
            found.speedups[side.name].append(found.seconds[side.name][-1] / reference)
    for side in [ours, *theirs]:
        found.peaks[side.name], found.versions[side.name] = side.peak, side.version


def serve(name: str, task: Dict[str, Any]) -> None:
    """The worker's loop, until the parent closes its end."""
    case = Case(*task['case'])
    build = our_worker if name == OURS else torch_worker
    worker = build(SHAPES[case.model], case.batch, task['masks'], case.precision, task['threads'],
                   **({} if name == OURS else dict(compiled=name == 'compiled')))
    answer_turns(worker)


def torch_worker(keys: Dict[str, Any], batch: int, hidden: List[List[List[int]]], precision: str, threads: int,
                 compiled: bool) -> Worker:
    """Build PyTorch's step at its best here.

    Fused AdamW (half of foreach's time), gradients set to None, explicit attention, which beats
    scaled_dot_product_attention by 3 to 5 %, and all of a bf16 forward pass, autocast included, compiled.
    """
    import torch
    from torch_simmim import build_simmim, parameter_groups

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = build_simmim(**keys)
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(net, DECAY), lr=RATE, fused=True)
    image, mask = torch.randn(batch, 3, keys['img_size'], keys['img_size']), torch.tensor(hidden)

    def loss(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            return net(image, mask)

    run = torch.compile(loss) if compiled else loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(image, mask).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()

    return Worker(step, lambda: None, sum(p.numel() for p in parameters), f'PyTorch {torch.__version__}')


def rows(found: Measured, rate: Optional[float]) -> List[str]:
    """Lines of the table; `rate` is the machine's best for products in this precision, GFLOP/s."""
    lines, flops = [], sum(product.flops for product in step_products(found.case))
    for side in SIDES:
        seconds = statistics.median(found.seconds[side])
        ratio = '' if side == OURS else f'{found.speedup(side):.2f} times as fast'
        share = f'{flops / seconds / rate / 1e9:.2f}' if rate else ''
        lines.append(f'| {found.case.title} | {NAMES[side]} ({found.versions[side]}) | {found.images(side):.2f} '
                     f"| {seconds:.2f} | {f'**{ratio}**' if side == found.rival else ratio} | {share} "
                     f'| {found.peaks[side]:.1f} |')
    return lines


if __name__ == '__main__':
    main()
