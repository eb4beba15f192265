#!/usr/bin/env python
"""Time and memory of a training step, beside the same model in PyTorch, eager and compiled.

A step is forward, backward, clipping of the global norm and AdamW, in float32 on random images. Each side is a process
of its own, which builds its model and warms up; then they take turns, a few steps at a time, so that whatever else the
machine does meets all of them alike. The ratio is the median over these turns. PyTorch may be installed elsewhere:

    python tools/bench/train.py --torch-python ~/torch/bin/python

Prints a table for docs/benchmarks.md. All sides are in memory at once, about 12 GB; takes some 10 minutes.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Tuple

MODELS = {
    'vit_base': dict(type='vit', img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, init_values=0.1),
    'swin_base': dict(type='swin', img_size=192, patch_size=4, embed_dim=128, depths=(2, 2, 18, 2),
                      num_heads=(4, 8, 16, 32), window_size=6),
}
TITLES = {'vit_base': 'ViT-B/16, 224', 'swin_base': 'Swin-B, 192'}
SIDES = {'mxsimmim': 'mxsimmim', 'eager': 'PyTorch', 'compiled': 'PyTorch, compiled'}
RATE, DECAY, CLIP = 1e-4, 0.05, 5.0
WARM_UP = 2  # steps before the first measured one
Worker = Tuple[Callable[[], None], Callable[[], None], int, str]  # step, wait for it, parameters, version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', choices=[*MODELS, 'both'], default='both')
    parser.add_argument('--batch', type=int, default=8, help='images a step (default: 8)')
    parser.add_argument('--rounds', type=int, default=7, help='turns of each side (default: 7)')
    parser.add_argument('--steps', type=int, default=3, help='steps a turn (default: 3)')
    parser.add_argument('--threads', type=int, default=0, help='of every side (default: one a core)')
    parser.add_argument('--torch-python', default=sys.executable, metavar='PATH',
                        help='interpreter that has PyTorch (default: this one)')
    parser.add_argument('--worker', choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        build = mxnet_worker if args.worker == 'mxsimmim' else torch_worker
        return serve(*build(MODELS[args.model], args.batch, args.threads, args.worker == 'compiled'))
    from mxsimmim import facts
    require_torch(args.torch_python)
    machine = facts.collect()
    args.threads = args.threads or machine.cores
    print(f'{machine.cpu}, {machine.cores} cores, {args.threads} threads, {machine.system}; '
          f'OpenBLAS core {machine.mxnet["blas"]}; batch {args.batch}, float32; median of {args.rounds} turns of '
          f'{args.steps} steps\n', flush=True)
    print('| model | program | images/s | s/step | our time is | peak memory, GB |\n|---|---|--:|--:|--:|--:|')
    for model in MODELS if args.model == 'both' else [args.model]:
        print('\n'.join(rows(TITLES[model], args.batch, *measure(model, args))), flush=True)


def require_torch(python: str) -> None:
    """Ends the program with the remedy if the interpreter cannot import torch."""
    try:
        found = subprocess.run([python, '-c', 'import torch'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        problem = found.stdout.decode().strip().rsplit('\n', 1)[-1] if found.returncode else ''
    except OSError as error:
        problem = error.strerror
    if problem:
        sys.exit(f"{python}: cannot import torch ({problem}): pip install -e '.[bench]' (Python 3.10 or newer), or "
                 'name an interpreter that has PyTorch by --torch-python PATH')


def measure(model: str, args: argparse.Namespace) -> Tuple[Dict[str, List[float]], Dict[str, float], Dict[str, str]]:
    """Seconds a step of each side in each round, its peak memory in GB, and its version."""
    sides = {}
    try:
        for side in SIDES:
            sides[side] = Side(side, model, args)
        sizes = {side.parameters for side in sides.values()}
        assert len(sizes) == 1, f'not the same model: {sizes} parameters'
        seconds: Dict[str, List[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                seconds[name].append(side.run(args.steps))
        return (seconds, {name: side.peak for name, side in sides.items()},
                {name: side.version for name, side in sides.items()})
    finally:
        for side in sides.values():
            side.process.kill()


class Side:
    """A worker process: takes a number of steps on its standard input, answers with the seconds they took."""

    def __init__(self, name: str, model: str, args: argparse.Namespace):
        self.name = name
        python = sys.executable if name == 'mxsimmim' else args.torch_python
        self.process = subprocess.Popen(
            [python, __file__, '--worker', name, '--model', model, '--batch', str(args.batch), '--threads',
             str(args.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True,
            env={**os.environ, 'OMP_NUM_THREADS': str(args.threads)})
        about = self._answer()
        self.parameters, self.version, self.peak = about['parameters'], about['version'], 0.0

    def run(self, steps: int) -> float:
        """Seconds a step."""
        print(steps, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.peak = answer['peak']
        return answer['seconds'] / steps

    def _answer(self) -> Dict[str, float]:
        for line in self.process.stdout:
            if line.startswith('{'):  # what else a library prints is not for us
                return json.loads(line)
        sys.exit(f'{self.name}: the worker ended with status {self.process.wait()}; its last words are above')


def serve(step: Callable[[], None], wait: Callable[[], None], parameters: int, version: str) -> None:
    """The worker's loop, until the parent closes its end."""
    for _ in range(WARM_UP):
        step()
    wait()
    print(json.dumps(dict(parameters=parameters, version=version)), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        wait()
        print(json.dumps(dict(seconds=time.perf_counter() - began, peak=peak_memory())), flush=True)


def peak_memory() -> float:
    """The largest resident set this process had, GB."""
    return int(re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024 / 1e9


def mxnet_worker(keys: dict, batch: int, threads: int, _: bool) -> Worker:
    """The project's own placement, aggregation and optimiser."""
    from mxsimmim import config as cfg, runtime
    runtime.prepare(cfg.RuntimeConfig(threads=threads))
    import mxnet as mx
    import numpy as np

    from mxsimmim.data.loader import Batch
    from mxsimmim.models import build_simmim, named_parameters
    from mxsimmim.optim import AdamW, weight_decays
    from mxsimmim.parallel.aggregate import SyncGradients
    from mxsimmim.parallel.placement import Replicated
    from mxsimmim.parallel.stores import make_store
    from mxsimmim.world import ALONE

    model, data, optim = cfg.ModelConfig(**keys), cfg.DataConfig(), cfg.OptimConfig()
    net = build_simmim(model, seed=0)
    parameters = named_parameters(net)
    placement = Replicated(net, [mx.cpu()], data.mean, data.std)
    optimizer = AdamW(parameters, weight_decays(parameters, optim.recipe, model.type, DECAY), optim)
    aggregation = SyncGradients(parameters, optimizer, make_store('local', ALONE), cfg.TrainConfig(), CLIP)
    rng = np.random.default_rng(0)
    images = Batch(image=rng.integers(0, 256, (batch, model.img_size, model.img_size, 3), np.uint8),
                   mask=rng.integers(0, 2, (batch, model.grid, model.grid), np.uint8),
                   uniform=np.empty((batch, 0), np.float32), epoch=0, index=np.arange(batch))
    updates = iter(range(sys.maxsize))

    def step() -> None:
        aggregation.step(next(updates), RATE, placement.forward_backward(images, batch))

    return step, mx.nd.waitall, sum(int(np.prod(p.shape)) for p in parameters.values()), f'MXNet {mx.__version__}'


def torch_worker(keys: dict, batch: int, threads: int, compiled: bool) -> Worker:
    """PyTorch at its best here: fused AdamW (half of foreach's time), gradients set to None, explicit attention."""
    import torch
    from torch_simmim import build_simmim, parameter_groups

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = build_simmim(**keys)
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(net, DECAY), lr=RATE, fused=True)
    size, grid = keys['img_size'], keys['img_size'] // keys['patch_size']
    image, mask = torch.randn(batch, 3, size, size), torch.randint(0, 2, (batch, grid, grid))
    run = torch.compile(net) if compiled else net

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        run(image, mask).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()

    return step, lambda: None, sum(p.numel() for p in parameters), f'PyTorch {torch.__version__}'


def rows(title: str, batch: int, seconds: Dict[str, List[float]], peaks: Dict[str, float],
         versions: Dict[str, str]) -> List[str]:
    """Lines of the table; the ratio of ours to another's is the median of the turns' ratios."""
    lines = []
    for side, name in SIDES.items():
        median = statistics.median(seconds[side])
        ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds['mxsimmim'], seconds[side]))
        versus = '' if side == 'mxsimmim' else f'{ratio:.2f} of its'
        lines.append(f'| {title} | {name} ({versions[side]}) | {batch / median:.2f} | {median:.2f} | {versus} '
                     f'| {peaks[side]:.1f} |')
    return lines


if __name__ == '__main__':
    main()
