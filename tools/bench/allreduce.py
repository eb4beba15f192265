#!/usr/bin/env python
"""How fast each store adds up an array, by its size: over two devices of a process, or over two workers.

A call adds up one float32 array and waits for the result. Its bandwidth is the array's bytes over the call's seconds,
however often they travel. Workers are processes of tools/launch.py, each with one thread, on two cores, which the
server, where there is one, shares with them. PyTorch's own allreduce over Gloo stands beside them where an interpreter
has it:

    python tools/bench/allreduce.py bandwidth.png --torch-python ~/torch/bin/python

Prints two tables for docs/benchmarks.md and draws the picture. Takes some 2 minutes.
"""
import argparse
import json
import os
import statistics
import sys
import time
from typing import Callable, Dict, List, Tuple

from common import require_torch
from scale import MODES, job, join, join_gloo, one_cpu_a_core

COMMUNICATORS = {'local': ('local, 2 devices', None, 'local'), 'device': ('device, 2 devices', None, 'device'), **MODES,
          'ddp': ('PyTorch, Gloo', *MODES['ddp'][1:])}
SIZES = [2 ** power for power in range(12, 27, 2)]  # bytes
BLOCK, MOST = 2 ** 26, 100  # bytes, and calls at most, between two looks at the clock
Seconds = Dict[int, float]  # bytes -> seconds a call
Sum = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('picture', metavar='PNG', nargs='?', default='allreduce.png', help='picture to write '
                        '(default: allreduce.png)')
    parser.add_argument('--stores', choices=COMMUNICATORS, nargs='+', default=list(COMMUNICATORS), metavar='STORE',
                        help=f'of {", ".join(COMMUNICATORS)} (default: all)')
    parser.add_argument('--rounds', type=int, default=7, help='measurements of each size (default: 7)')
    parser.add_argument('--torch-python', default=sys.executable, metavar='PATH',
                        help='interpreter that has PyTorch (default: this one)')
    parser.add_argument('--worker', choices=COMMUNICATORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.rounds)
    from mxsimmim.runtime import facts
    os.sched_setaffinity(0, one_cpu_a_core()[:2])
    if 'ddp' in args.stores:
        try:
            require_torch(args.torch_python)
        except SystemExit as missing:
            print(missing, file=sys.stderr)
            args.stores.remove('ddp')
    machine = facts.collect()
    print(f'{machine.cpu}, 2 of {machine.cores} cores, {machine.system}; median of {args.rounds}\n', flush=True)
    found = {}
    for store in args.stores:
        print(COMMUNICATORS[store][0], file=sys.stderr, flush=True)
        program = [args.torch_python if store == 'ddp' else sys.executable, __file__, '--worker', store, '--rounds',
                   str(args.rounds)]
        found[store] = {int(size): seconds for size, seconds in job(program, COMMUNICATORS[store][1]).items()}
    print('\n'.join(table('microseconds a call', found, lambda size, seconds: f'{seconds * 1e6:,.0f}')))
    print('\n' + '\n'.join(table('MB/s', found, lambda size, seconds: f'{size / seconds / 1e6:,.0f}')))
    draw(found, args.picture)


def work(store: str, rounds: int) -> None:
    """A process of a job. Rank 0 prints seconds a call of each size."""
    sums, barrier, rank = (torch_sums if store == 'ddp' else mxnet_sums)(store)
    seconds = {}
    for size, call in sums.items():
        calls = min(MOST, BLOCK // size)
        call()
        seconds[size] = statistics.median(clock(call, barrier, calls) for _ in range(rounds))
    if rank == 0:
        print(json.dumps(seconds), flush=True)


def clock(call: Sum, barrier: Sum, calls: int) -> float:
    """Mean seconds of a call; all workers begin together, and no call ends before all have made it."""
    barrier()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def mxnet_sums(name: str) -> Tuple[Dict[int, Sum], Sum, int]:
    """For each size the sum of an array of that size; a barrier; the rank."""
    alone = COMMUNICATORS[name][1] is None
    process = join(threads=0 if alone else 1)
    import mxnet as mx

    from mxsimmim.ops import select_backend
    from mxsimmim.parallel.communicators import make_communicator
    from mxsimmim.parallel.control import connect
    backend = select_backend('float32', [mx.cpu()])
    control = connect(process, os.environ)
    communicator = make_communicator(COMMUNICATORS[name][2], process, control)

    def made(size: int) -> Sum:
        copies, = communicator.allocate([size // 4], [mx.cpu(device) for device in range(2 if alone else 1)], backend)
        handle = communicator.register([copies])

        def call() -> None:
            communicator.all_reduce(handle)
            for copy in copies:
                copy.wait_to_read()
        return call
    return {size: made(size) for size in SIZES}, lambda: control.barrier('round'), process.rank


def torch_sums(_name: str) -> Tuple[Dict[int, Sum], Sum, int]:
    """As `mxnet_sums`."""
    import torch
    rank, _ = join_gloo()

    def made(size: int) -> Sum:
        array = torch.zeros(size // 4)
        return lambda: torch.distributed.all_reduce(array)
    return {size: made(size) for size in SIZES}, torch.distributed.barrier, rank


def table(title: str, found: Dict[str, Seconds], cell: Callable[[int, float], str]) -> List[str]:
    """Lines of a table: a row a store, a column a size."""
    lines = [f'| {title} | ' + ' | '.join(map(label, SIZES)) + ' |', '|---|' + '--:|' * len(SIZES)]
    return lines + [f'| {COMMUNICATORS[store][0]} | ' + ' | '.join(cell(size, seconds[size]) for size in SIZES) + ' |'
                    for store, seconds in found.items()]


def label(size: int) -> str:
    """4 KB, 1 MB: in powers of 1024."""
    return f'{size >> 20} MB' if size >> 20 else f'{size >> 10} KB'


def draw(found: Dict[str, Seconds], path: str) -> None:
    """Bandwidth against size, both logarithmic."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for (store, seconds), marker in zip(found.items(), 'os^vDPX*'):
        axes.loglog(SIZES, [size / seconds[size] / 1e6 for size in SIZES], marker=marker, label=COMMUNICATORS[store][0])
    axes.set_xticks(SIZES, map(label, SIZES))
    axes.minorticks_off()
    axes.set_xlabel('size of the array')
    axes.set_ylabel('summed, MB/s')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    main()
