#!/usr/bin/env python
"""How well training spreads from one worker to two, a core and a thread each, beside PyTorch's DDP over Gloo.

Efficiency is the images/s of two workers over twice those of one, which is the same program alone while the other core
idles. A step is forward, backward, exchange, clipping of the global norm and AdamW, on random images that are in
memory already: no time goes into data. Every measurement is a job of its own, started by tools/launch.py, that
takes a few steps to warm up; all take turns, and ratios are medians over the turns. A job of two workers also measures
its parts: steps without any exchange (so its workers only get in each other's way), and the exchange of all gradients
with nothing else to do. What the exchange adds to a step, over what it takes by itself, was not hidden behind the
backward pass. PyTorch may be installed elsewhere:

    python tools/bench/scale.py --torch-python ~/torch/bin/python

Prints tables for docs/benchmarks.md. Takes half an hour and 6 GB.
"""
import argparse
import atexit
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from common import CLIP, DECAY, MODELS, RATE, TITLES, WARM_UP, random_batch, require_torch, step_config

if TYPE_CHECKING:
    from mxsimmim.runtime.facts import Facts
    from mxsimmim.runtime.process import ProcessInfo
    from mxsimmim.training.trainer import UpdateRule

LAUNCH = Path(__file__).resolve().parents[1] / 'launch.py'
MODES = {  # title, the launcher's options, the store's name
    'horovod': ('Horovod', ['--horovod'], 'horovod'),
    'messages': ('Horovod, no shared memory', ['--horovod', '--env', 'MXSIMMIM_FIRST_RANKS='], 'horovod'),
    'dist_sync': ('dist_sync, 1 server', ['-s', '1'], 'dist_sync'),
    'dist_device_sync': ('dist_device_sync, 1 server', ['-s', '1'], 'dist_device_sync'),
    'p3': ('dist_sync, 1 server, P3', ['-s', '1', '--p3'], 'dist_sync'),
    'ddp': ('PyTorch DDP, Gloo', ['--horovod'], ''),  # for the ranks in the environment; PyTorch does the rest
}
BUCKET = 25 * 2 ** 20 // 4  # DDP's own size of an allreduce, elements
Seconds = Dict[str, List[float]]  # what was measured -> seconds a step, one a round


class Worker(NamedTuple):
    """What a worker process measures. All but `barrier` return at once or when done; `wait` waits for it."""
    step: Callable[[], None]
    alone: Callable[[], None]  # a step without the exchange
    exchange: Callable[[], None]  # the exchange without a step
    wait: Callable[[], None]
    barrier: Callable[[], None]
    rank: int
    size: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=MODELS, default='vit_base')
    parser.add_argument('--modes', choices=MODES, nargs='+', default=['horovod', 'dist_sync', 'ddp'], metavar='MODE',
                        help=f'of {", ".join(MODES)} (default: horovod dist_sync ddp)')
    parser.add_argument('--precision', choices=['float32', 'bf16'], default='float32', help='of products '
                        '(default: float32)')
    parser.add_argument('--batch', type=int, default=4, help='images a step and worker (default: 4)')
    parser.add_argument('--rounds', type=int, default=7, help='turns of each job (default: 7)')
    parser.add_argument('--steps', type=int, default=5, help='measured steps a turn (default: 5)')
    parser.add_argument('--torch-python', default=sys.executable, metavar='PATH',
                        help='interpreter that has PyTorch (default: this one)')
    parser.add_argument('--worker', choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    machine = on_two_cores(args.torch_python if 'ddp' in args.modes else None)
    print(f'{TITLES[args.model]}, {machine.cpu}, 2 of {machine.cores} cores, {machine.system}; batch {args.batch} and '
          f'1 thread a worker, {args.precision}; median of {args.rounds} turns of {args.steps} steps\n', flush=True)
    print('\n'.join(table(measure(args), args.batch)))


def on_two_cores(torch_python: Optional[str]) -> 'Facts':
    """Describe the machine, of which the program and its jobs now use two cores.

    Ends the program where there is only one, or where this interpreter, if one is named, has no PyTorch.
    """
    from mxsimmim.runtime import facts
    cores = one_cpu_a_core()
    if len(cores) < 2:
        sys.exit('one core: two workers would only share it')
    os.sched_setaffinity(0, cores[:2])
    if torch_python:
        require_torch(torch_python)
    return facts.collect()


def one_cpu_a_core() -> List[int]:
    """One of the CPUs of each physical core that this process may use."""
    from mxsimmim.runtime.environment import contents
    siblings = '/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list'
    return sorted({contents(Path(siblings.format(cpu))) or cpu: cpu for cpu in os.sched_getaffinity(0)}.values())


def measure(args: argparse.Namespace) -> Dict[str, Seconds]:
    """Seconds a step of each mode: of 'one' worker, and of two a 'step' and its parts, 'alone' and 'exchange'."""
    seconds: Dict[str, Seconds] = {mode: {} for mode in args.modes}
    for turn in range(args.rounds):
        print(f'turn {turn + 1} of {args.rounds}', file=sys.stderr, flush=True)
        one: Dict[bool, float] = {}  # a worker alone exchanges nothing: it is the same in all our modes
        for mode in args.modes:
            theirs = mode == 'ddp'
            program = [args.torch_python if theirs else sys.executable, __file__, '--worker', mode, '--model',
                       args.model, '--batch', str(args.batch), '--steps', str(args.steps), '--precision',
                       args.precision]
            if theirs not in one:
                one[theirs] = job(program)['step']
            for what, value in {'one': one[theirs], **job(program, MODES[mode][1])}.items():
                seconds[mode].setdefault(what, []).append(value)
    return seconds


def job(program: Sequence[str], options: Optional[Sequence[str]] = None) -> Dict[str, float]:
    """What the program prints as JSON, alone or, with `options` for the launcher, as two workers of a thread each."""
    launcher = [sys.executable, str(LAUNCH), '-n', '2', '--env', 'OMP_NUM_THREADS=1', *(options or ()), '--']
    with tempfile.TemporaryDirectory() as folder:  # for the launcher's logs
        process = subprocess.run((launcher if options is not None else []) + list(program), cwd=folder,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    found = [line for line in process.stdout.splitlines() if line.startswith('{')]  # libraries print, too
    if process.returncode or not found:
        sys.exit(f"{' '.join(program)}: exit status {process.returncode}\n{process.stdout}\n{process.stderr}")
    return json.loads(found[-1])


def work(args: argparse.Namespace) -> None:
    """A process of a job. Rank 0 prints what it measured."""
    worker = (torch_worker if args.worker == 'ddp' else mxnet_worker)(MODELS[args.model], args.batch, args.worker,
                                                                             args.precision)
    for _ in range(WARM_UP):
        worker.step()
    parts = {'step': worker.step}
    if worker.size > 1:
        parts.update(alone=worker.alone, exchange=worker.exchange)
    seconds = {what: clock(part, worker, args.steps) for what, part in parts.items()}
    if worker.rank == 0:
        print(json.dumps(seconds), flush=True)


def clock(function: Callable[[], None], worker: Worker, times: int) -> float:
    """Mean seconds of a call, between two barriers."""
    worker.wait()
    worker.barrier()
    began = time.perf_counter()
    for _ in range(times):
        function()
    worker.wait()
    worker.barrier()
    return (time.perf_counter() - began) / times


def join(threads: int) -> 'ProcessInfo':
    """Prepare MXNet's environment; return which process of its job this is; a server or scheduler ends in here."""
    from mxsimmim import config as cfg
    from mxsimmim.runtime import environment
    from mxsimmim.runtime.process import process_info
    environment.prepare(cfg.RuntimeConfig(threads=threads))
    process = process_info(os.environ)
    if process.role != 'worker':
        from mxsimmim.parallel.server import serve
        sys.exit(serve())
    return process


def join_gloo() -> Tuple[int, int]:
    """Rank and size, PyTorch's process group being there if there are several."""
    import torch
    torch.set_num_threads(1)
    rank, size = int(os.environ.get('HOROVOD_RANK', 0)), int(os.environ.get('HOROVOD_SIZE', 1))
    if size > 1:
        os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
        rendezvous = Path('rendezvous').resolve().as_uri()
        torch.distributed.init_process_group('gloo', rendezvous, rank=rank, world_size=size)
        atexit.register(torch.distributed.destroy_process_group)  # its threads may else abort the process at its end
    return rank, size


def mxnet_worker(keys: dict, batch: int, mode: str, precision: str) -> Worker:
    """The parts of a trainer, with the communicator of this mode where there are two workers."""
    process = join(threads=1)
    import mxnet as mx
    import numpy as np

    from mxsimmim.ops import select_backend
    from mxsimmim.parallel.communicators import make_communicator
    from mxsimmim.parallel.control import connect
    from mxsimmim.parallel.strategies import Strategy, horovod_settings
    from mxsimmim.parallel.updates import SynchronousUpdate
    from mxsimmim.training.build import build_trainer, build_update_rule
    from mxsimmim.training.timetable import expected_step

    total, store = batch * process.size, MODES[mode][2] if process.size > 1 else 'local'
    config = step_config(keys, total, store)
    os.environ.update({**horovod_settings(expected_step(config, process)), **os.environ})  # as training.start does
    control = connect(process, os.environ)
    communicator = make_communicator(store, process, control)
    trainer = build_trainer(config, process, communicator=communicator,
                            backend=select_backend(precision, [mx.cpu()]))
    placement, together = trainer.placement, trainer.update_rule
    assert isinstance(together, SynchronousUpdate)
    alone = build_update_rule(config, trainer.task, placement.net, Strategy('local', 'sync'),
                              make_communicator('local'), trainer.timetable, trainer.split, together.optimizer)
    handle = communicator.register(together.gradients())
    rng = np.random.default_rng(process.rank)
    images = random_batch(config.model, rng.integers(0, 2, (batch, config.model.grid, config.model.grid), np.uint8),
                          process.rank)
    updates = iter(range(sys.maxsize))

    def step(update_rule: 'UpdateRule') -> None:
        update = next(updates)
        update_rule.step(update, RATE, placement.forward_backward(images, total))
        update_rule.poll(update + 1, False)

    return Worker(lambda: step(trainer.update_rule), lambda: step(alone), lambda: communicator.all_reduce(handle),
                  mx.nd.waitall, lambda: control.barrier('round'), process.rank, process.size)


def torch_worker(keys: dict, batch: int, _: str, precision: str) -> Worker:
    """DDP at its best here: gradients are views of its buckets, the optimiser is fused."""
    import torch
    from torch import distributed
    from torch_simmim import build_simmim, parameter_groups

    rank, size = join_gloo()
    torch.manual_seed(0)
    model = build_simmim(**keys)
    net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if size > 1 else model
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, DECAY), lr=RATE, fused=True)
    side, grid = keys['img_size'], keys['img_size'] // keys['patch_size']
    image, mask = torch.randn(batch, 3, side, side), torch.randint(0, 2, (batch, grid, grid))
    buckets = torch.zeros(sum(p.numel() for p in parameters)).split(BUCKET)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            loss = net(image, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()

    def alone() -> None:
        with net.no_sync():
            step()

    def exchange() -> None:
        for work in [distributed.all_reduce(bucket, async_op=True) for bucket in buckets]:
            work.wait()

    return Worker(step, alone, exchange, lambda: None, distributed.barrier if size > 1 else lambda: None, rank, size)


def table(seconds: Dict[str, Seconds], batch: int) -> List[str]:
    """Lines of the two tables; each ratio is the median of the turns' ratios."""
    efficiency = {mode: [one / two for one, two in zip(s['one'], s['step'])] for mode, s in seconds.items()}
    lines = ["| mode | images/s, 1 worker | 2 workers | efficiency | of DDP's |", '|---|--:|--:|--:|--:|']
    for mode, s in seconds.items():
        one, two = statistics.median(s['one']), statistics.median(s['step'])
        versus = [ours / ddp for ours, ddp in zip(efficiency[mode], efficiency.get('ddp', []))]
        lines.append(f'| {MODES[mode][0]} | {batch / one:.2f} | {2 * batch / two:.2f} '
                     f'| {statistics.median(efficiency[mode]):.1%} '
                     f'| {f"{statistics.median(versus):.3f}" if versus and mode != "ddp" else ""} |')
    lines += ['', '| mode, seconds a step | 1 worker | 2 workers, no exchange | with exchange | the exchange by itself '
              '| of which hidden |', '|---|--:|--:|--:|--:|--:|']
    for mode, s in seconds.items():
        hidden = [1 - (step - alone) / exchange for step, alone, exchange in zip(s['step'], s['alone'], s['exchange'])]
        medians = ' | '.join(f'{statistics.median(s[what]):.3f}' for what in ('one', 'alone', 'step', 'exchange'))
        lines.append(f'| {MODES[mode][0]} | {medians} | {statistics.median(hidden):.0%} |')
    return lines


if __name__ == '__main__':
    main()
