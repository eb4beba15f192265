#!/usr/bin/env python
"""Where the time of our training step goes, operator by operator, and how far each is from its own floor.

MXNet's profiler times every operator of some steps, forward, backward and optimiser. The floor of an operator made of
matrix products is the time these take alone (see product.py); that of one which only streams through memory is its
bytes, each read or written once, at the rate of a plain addition of large arrays. Percentages are of a profiled step.

    python tools/bench/breakdown.py --model vit_base --batch 8 --precision reference bf16

Precision `reference` is float32 on MXNet's own operators, which know attention and MLP only as many small parts: how it
was before there were native operators. Prints tables for docs/benchmarks.md. Takes some 6 minutes.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from common import PRECISIONS, SHAPES, WARM_UP, Case, add_case_options, cases, describe, masks, model_config, our_worker
from product import FORWARD, floor, measured_rates, step_products

STREAM = 2 ** 26  # values of an array for the streaming rate: far more than any cache holds
OURS = re.compile(r'(_backward_)?_?mxsimmim_(\w+)$')
KINDS = {  # of MXNet's own operators, in what order they are tried
    'matrix products': r'(_backward_)?(FullyConnected|dot|batch_dot)$',
    'softmax': r'(_backward_)?softmax$',
    'GELU': r'(_backward_)?LeakyReLU$',
    'normalisation': r'(_backward_)?(LayerNorm|rsqrt|_?square)$',
    'moving and reshaping': r'(_backward_)?_?(transpose|[Rr]eshape|slice\w*|split\w*|SliceChannel|Concat|take|copy\w*'
                            r'|Copy\w*|broadcast_(axis|like|to)|broadcast_backward|Cast|expand_dims)$',
    'AdamW': r'_adamw_update$',
}
REST = 'the rest'
Line = Tuple[str, str]  # part and pass; MXNet's own operators also run in the backward pass: no pass


class Profile(NamedTuple):
    """Of a step: seconds without the profiler and with it, each operator's calls and seconds; bytes/s of memory."""
    plain: float
    seconds: float
    operators: Dict[str, Tuple[float, float]]
    stream: float
    parameters: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser)
    for action in parser._actions:
        if action.dest == 'precision':
            action.choices = [*PRECISIONS, 'reference']
            action.help = 'of float32, bf16, reference (default: the first two)'
    parser.add_argument('--steps', type=int, default=3, help='profiled steps (default: 3)')
    parser.add_argument('--all', action='store_true', help="name every operator, not MXNet's own by kinds")
    parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return print(json.dumps(profile(cases(args)[0], args.threads, args.steps)), flush=True)
    from mxsimmim.runtime import facts
    machine = facts.collect()
    args.threads = args.threads or machine.cores
    print(f'{describe(machine, args.threads)}; mean of {args.steps} steps')
    rates = measured_rates(args, args.threads)
    for case in cases(args):
        found = ask(case, args)
        floors = floors_of(case, found, rates[case.arithmetic] if rates else None)
        print('\n'.join(table(case, found, floors, args.all)), flush=True)


def ask(case: Case, args: argparse.Namespace) -> Profile:
    """`profile` in a process of its own: what operators a network takes is settled once a process."""
    program = [sys.executable, __file__, '--worker', '--model', case.model, '--batch', str(case.batch), '--precision',
               case.precision, '--threads', str(args.threads), '--steps', str(args.steps)]
    process = subprocess.run(program, stdout=subprocess.PIPE, universal_newlines=True)
    answers = [line for line in process.stdout.splitlines() if line.startswith('[')]
    if process.returncode or not answers:
        sys.exit(f"{' '.join(program)}: exit status {process.returncode}\n{process.stdout}")
    return Profile(*json.loads(answers[-1]))


def profile(case: Case, threads: int, steps: int) -> Profile:
    """Times steps without the profiler, then as many with it."""
    worker = our_worker(SHAPES[case.model], case.batch, masks(case.model, case.batch), case.precision, threads)
    import mxnet as mx
    for _ in range(WARM_UP):
        worker.step()
    worker.wait()
    plain = statistics.median(clock(worker.step, worker.wait) for _ in range(steps))
    with tempfile.TemporaryDirectory() as folder:  # for a trace of each call, which nobody asked for
        mx.profiler.set_config(profile_symbolic=True, profile_imperative=True, aggregate_stats=True,
                               filename=f'{folder}/trace.json')
        mx.profiler.set_state('run')
        seconds = sum(clock(worker.step, worker.wait) for _ in range(steps)) / steps
        mx.profiler.set_state('stop')
        traced = json.loads(mx.profiler.dumps(reset=True, format='json'))['Time']['operator']
        mx.profiler.dump()  # else it is written at the end of the process
    operators = {name: (each['Count'] / steps, each['Total'] / steps / 1e3) for name, each in traced.items()}
    return Profile(plain, seconds, operators, streaming_rate(threads), worker.parameters)


def clock(function: Any, wait: Any) -> float:
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def streaming_rate(threads: int) -> float:
    """Bytes/s of a = a + b, two reads and a write, in NumPy: MXNet's own addition reaches less than half."""
    import numpy as np
    a, b = np.ones((2, STREAM), np.float32)
    parts = [slice(STREAM * i // threads, STREAM * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:  # NumPy lets go of the interpreter while it adds
        times = [clock(lambda: list(pool.map(lambda part: np.add(a[part], b[part], out=a[part]), parts)), lambda: None)
                 for _ in range(6)]
    return 3 * 4 * STREAM / statistics.median(times[1:])


def floors_of(case: Case, found: Profile, rates: Optional[Dict[Tuple[int, int, int], float]]) -> Dict[Line, float]:
    """Seconds that each line of the table needs at least, where that is known; without `rates`, of streams only."""
    config, floors = model_config(case.model), {}
    if rates:
        of = step_products(case)
        if case.precision == 'reference':
            floors['matrix products', ''] = floor(of, rates)
        for part in {product.part for product in of}:
            name = 'masked_loss' if part == 'loss' else part
            floors[name, 'forward'] = floor((p for p in of if p.part == part and p.phase == FORWARD), rates)
            floors[name, 'backward'] = floor((p for p in of if p.part == part and p.phase != FORWARD), rates)
    stages, values = range(config.stages), config.grid ** 2 * config.embed_dim
    # Values an image that are normalised outside of blocks: ViT's tokens at the end; Swin's after the patch embedding,
    # before each merging, which halves them, and at the end.
    normalised = sum(values >> stage for stage in [0, *stages]) if config.type == 'swin' else values + config.embed_dim
    pixels = 3 * config.side ** 2
    moved = {  # bytes read, bytes written
        ('layer_norm', 'forward'): case.batch * normalised * (4 + 4),
        ('layer_norm', 'backward'): case.batch * normalised * (8 + 4),
        ('patchify', 'forward'): case.batch * pixels * (1 + 4),
        ('square_sum', 'forward'): found.parameters * 4,
        ('adamw', 'forward'): found.parameters * (16 + 12),
        ('AdamW', ''): found.parameters * (16 + 12),
    }
    floors.update({line: size / found.stream for line, size in moved.items()})
    return floors


def line_of(operator: str, every: bool) -> Line:
    """The line of the table that an operator belongs to; with `every`, each of MXNet's own has its line."""
    match = OURS.match(operator)
    if match:
        return match[2], 'backward' if match[1] else 'forward'
    kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, operator)), REST)
    return (operator if every else kind), ''


def table(case: Case, found: Profile, floors: Dict[Line, float], every: bool = False) -> List[str]:
    """A line an operator or kind of operators, the longest first; then what is between them, and the step."""
    sums: Dict[Line, List[float]] = {}
    for operator, values in found.operators.items():
        line = sums.setdefault(line_of(operator, every), [0.0, 0.0])
        line[0], line[1] = line[0] + values[0], line[1] + values[1]
    title = (f'{case.title}: {1e3 * found.plain:.0f} ms a step without the profiler; memory streams at '
             f'{found.stream / 1e9:.1f} GB/s')
    lines = ['', title, '',
             '| operator | pass | calls | ms | of the step | floor, ms | times its floor |',
             '|---|---|--:|--:|--:|--:|--:|']
    for (part, phase), (calls, seconds) in sorted(sums.items(), key=lambda item: -item[1][1]):
        least = floors.get((part, phase))
        limits = f'{1e3 * least:.1f} | {seconds / least:.2f}' if least else ' | '
        lines.append(f"| {part} | {phase} | {calls:.0f} | {1e3 * seconds:.1f} "
                     f'| {seconds / found.seconds:.1%} | {limits} |')
    traced, known = sum(seconds for _, seconds in sums.values()), sum(floors[line] for line in sums if line in floors)
    between = found.seconds - traced
    lines.append(f'| between operators | | | {1e3 * between:.1f} | {between / found.seconds:.1%} | | |')
    limits = f'{1e3 * known:.1f} | {found.seconds / known:.2f}' if known else ' | '
    lines.append(f'| the step | | {sum(calls for calls, _ in sums.values()):.0f} | {1e3 * found.seconds:.1f} | 100.0% '
                 f'| {limits} |')
    return lines


if __name__ == '__main__':
    main()
