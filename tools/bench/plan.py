#!/usr/bin/env python
"""What `mxsimmim plan` predicts of a step, beside what it takes: seconds, and memory of a worker.

Each case runs as a job of its own, on random images. In the middle of its steps each of its workers measures what
`--calibrate` does, at the same time as the others: a machine that others share has another speed a minute later, by a
third. All this happens in several rounds; of each number, and of each ratio, the median counts. A layout that can run
is a line of `LAYOUTS`.

    python tools/bench/plan.py --layouts alone horovod

Prints a table for docs/scaling.md. Takes a quarter of an hour a round. Ends with 1 where a prediction is too far off.
"""
import argparse
import json
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Sequence, Tuple

from common import memory, random_batch, step_config
from scale import job, join

if TYPE_CHECKING:
    from mxsimmim.config import Config
    from mxsimmim.planner.cluster import Cluster
    from mxsimmim.planner.costs import Layout

TIME, MEMORY = 0.20, 0.10  # how far off a prediction may be
NETWORKS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'narrow': ('ViT, width 192, 12 blocks', dict(img_size=224, embed_dim=192, depth=12, num_heads=3)),
    'small': ('ViT, width 384, 12 blocks', dict(img_size=224, embed_dim=384, depth=12, num_heads=6)),
    'other': ('ViT, width 512, 8 blocks', dict(img_size=224, embed_dim=512, depth=8, num_heads=8)),  # never fitted to
    'wide': ('ViT, width 768, 4 blocks', dict(img_size=224, embed_dim=768, depth=4, num_heads=12)),
    'swin': ('Swin, width 96, 12 blocks', dict(type='swin', img_size=192, patch_size=4, embed_dim=96,
                                               depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=6)),
}
FOUR = ['-n', '4', '--horovod']
# name -> title, the launcher's options or None, the layout; one that is not built yet is left out
LAYOUTS: Dict[str, Tuple[str, Any, Dict[str, Any]]] = {
    'alone': ('1 worker', None, {}),
    'accumulate': ('1 worker, 2 accumulated parts', None, dict(micro_batches=2)),
    'recompute': ('1 worker, recompute', None, dict(recompute=True)),
    'contexts': ('2 contexts, data', None, dict(data=2, contexts=2)),
    'pipeline': ('2 contexts, pipeline, 4 micro-batches', None, dict(pipeline=2, micro_batches=4, contexts=2)),
    'tensor': ('2 contexts, tensor', None, dict(tensor=2, contexts=2)),
    'stages': ('2 workers, pipeline, 4 micro-batches', ['--horovod'], dict(pipeline=2, micro_batches=4,
                                                                           store='horovod')),
    'horovod': ('2 workers, Horovod', ['--horovod'], dict(data=2, store='horovod')),
    'servers': ('2 workers, 1 server', ['-s', '1'], dict(data=2, store='dist_sync', servers=1)),
    '2bit': ('2 workers, Horovod, 2bit', ['--horovod'], dict(data=2, store='horovod', compression='2bit')),
    'sharded': ('2 workers, Horovod, sharded optimiser', ['--horovod'], dict(data=2, store='horovod',
                                                                             shard_optimizer=True)),
    'group': ('2 workers, tensor', ['--horovod'], dict(tensor=2, store='horovod')),
    'four-stages': ('4 workers, pipeline, 4 micro-batches', FOUR, dict(pipeline=4, micro_batches=4, store='horovod')),
    'data-tensor': ('4 workers, data 2 x tensor 2', FOUR, dict(data=2, tensor=2, store='horovod')),
    'pipeline-tensor': ('4 workers, pipeline 2 x tensor 2, 4 micro-batches', FOUR,
                        dict(pipeline=2, tensor=2, micro_batches=4, store='horovod')),
}
Case = Tuple[str, int, str]  # network, images a step, layout
CASES: List[Case] = [('small', 4, layout) for layout in LAYOUTS] + [('small', 16, 'alone')] + [
    (network, batch, layout) for network, batch in (('narrow', 8), ('other', 6), ('wide', 4), ('swin', 4))
    for layout in ('alone', 'pipeline', 'stages', 'horovod', 'servers')]


class Numbers(NamedTuple):
    """Of a layout, predicted or measured: seconds of a step, bytes of a worker at most."""
    step: float
    memory: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layouts', choices=LAYOUTS, nargs='+', default=list(LAYOUTS), metavar='LAYOUT',
                        help=f'of {", ".join(LAYOUTS)} (default: all)')
    parser.add_argument('--networks', choices=NETWORKS, nargs='+', default=list(NETWORKS), metavar='NETWORK',
                        help=f'of {", ".join(NETWORKS)} (default: all)')
    parser.add_argument('--precision', choices=['float32', 'bf16'], default='float32', help='of products '
                        '(default: float32)')
    parser.add_argument('--turns', type=int, default=8, help='measured steps a round (default: 8)')
    parser.add_argument('--rounds', type=int, default=3, help='measurements of everything (default: 3)')
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        network, batch, name = args.worker.split(',')
        return work((network, int(batch), name), args.turns, args.precision)
    from mxsimmim.planner.search import is_built
    chosen = [case for case in CASES if case[0] in args.networks and case[2] in args.layouts
              and is_built(layout_of(case[2]))]
    found: Dict[Case, List[Tuple[Numbers, Numbers]]] = {case: [] for case in chosen}
    for turn in range(args.rounds):
        print(f'round {turn + 1} of {args.rounds}', file=sys.stderr, flush=True)
        for case in chosen:
            answer = job([sys.executable, __file__, '--worker', ','.join(map(str, case)), '--turns', str(args.turns),
                          '--precision', args.precision], LAYOUTS[case[2]][1])
            found[case].append((Numbers(answer['expected_step'], answer['expected_memory']),
                                Numbers(answer['step'], answer['memory'])))
            print(row(case, found[case])[0], file=sys.stderr, flush=True)
    print('| network, images | layout | s/step, predicted | measured | off | GB, predicted | measured | off |\n'
          '|---|---|--:|--:|--:|--:|--:|--:|')
    rows = [row(case, pairs) for case, pairs in found.items()]
    print('\n'.join(line for line, _ in rows))
    far = sum(not near for _, near in rows)
    print(f'{far} of {len(rows)} are further off than {TIME:.0%} or {MEMORY:.0%}', file=sys.stderr)
    sys.exit(bool(far))


def row(case: Case, pairs: Sequence[Tuple[Numbers, Numbers]]) -> Tuple[str, bool]:
    """Return a line of the table, and whether the predictions are as near as they should be."""
    expected, measured = (Numbers(*map(statistics.median, zip(*each))) for each in zip(*pairs))
    off = Numbers(*(statistics.median(one[i] / other[i] for one, other in pairs) - 1 for i in (0, 1)))
    return (f'| {NETWORKS[case[0]][0]}, {case[1]} | {LAYOUTS[case[2]][0]} | {expected.step:.3f} | {measured.step:.3f} '
            f'| {off.step:+.0%} | {expected.memory / 1e9:.2f} | {measured.memory / 1e9:.2f} | {off.memory:+.0%} |',
            abs(off.step) <= TIME and abs(off.memory) <= MEMORY)


def divided(machine: 'Cluster', contexts: int) -> 'Cluster':
    """Return a machine that was measured as one device as `contexts` of these, each with its part of the cores."""
    rates = tuple((key, rate / contexts) for key, rate in machine.rates)
    return machine._replace(devices=machine.devices * contexts, memory=machine.memory / contexts,
                            speed=machine.speed / contexts, stream=machine.stream / contexts, rates=rates)


def layout_of(name: str) -> 'Layout':
    from mxsimmim.planner.costs import Layout
    return Layout(**LAYOUTS[name][2])


def configured(network: str, batch: int, name: str, precision: str) -> 'Config':
    """Return the configuration that trains a network so."""
    layout = layout_of(name)
    config = step_config({'drop_path': 0.1, **NETWORKS[network][1], 'recompute': layout.recompute}, batch,
                         'local' if layout.store == 'device' else layout.store)
    part = 'micro_batches' if layout.pipeline > 1 else None
    parallel = config.parallel.model_copy(update={
        'pipeline': layout.pipeline, 'tensor': layout.tensor, **({part: layout.micro_batches} if part else {}),
        **({'shard_optimizer': True} if layout.shard_optimizer else {})})
    train = config.train.model_copy(update={'compression': layout.compression,
                                            'accumulate': 1 if part else layout.micro_batches})
    devices = tuple(f'cpu({number})' for number in range(layout.contexts))
    return config.model_copy(update={'parallel': parallel, 'train': train, 'devices': devices,
                                     'data': config.data.model_copy(update={'prefetch': 1}),
                                     'runtime': config.runtime.model_copy(update={'precision': precision})})


def work(case: Case, turns: int, precision: str) -> None:
    """A process of a job: rank 0 prints what it measured."""
    layout = layout_of(case[2])
    process = join(threads=0 if layout.workers == 1 else 1)
    import mxnet as mx
    import numpy as np

    from mxsimmim.data.masks import random_mask
    from mxsimmim.parallel.control import connect
    from mxsimmim.parallel.mesh import mesh_of
    from mxsimmim.parallel.strategies import horovod_settings, strategy_of
    from mxsimmim.planner import calibrate
    from mxsimmim.planner.costs import predict
    from mxsimmim.training.build import build_communicator, build_trainer
    from mxsimmim.training.timetable import expected_step

    config, resident = configured(*case, precision), calibrate.resident()
    os.environ.update({**horovod_settings(expected_step(config, process)), **os.environ})  # as training.start does
    control = connect(process, os.environ, mesh_of(process, config.parallel, len(config.devices)))
    trainer = build_trainer(config, process,
                            communicator=build_communicator(strategy_of(config, process), process, control))
    model, part, replica = config.model, trainer.split.part, control.mesh.coordinate('data')
    own, rng = part.stop - part.start, np.random.default_rng(replica)
    images = random_batch(model, np.array([random_mask(rng, model.side, config.mask.patch_size, config.mask.ratio,
                                                       model.patch_size) for _ in range(own)], np.uint8), replica)

    def step() -> float:
        mx.nd.waitall()
        control.barrier('turn')
        began = time.perf_counter()
        trainer.train_step(images)
        mx.nd.waitall()
        control.barrier('turn')
        return time.perf_counter() - began
    step(), step()
    seconds = [step() for _ in range(turns // 2)]
    most = 1e9 * max(control.all_gather('memory', memory('VmHWM')))
    machine = calibrate.machine(control.all_gather('speeds', calibrate.measure(config)), os.cpu_count() or 1)
    seconds += [step() for _ in range(turns - turns // 2)]
    if process.rank == 0:
        expected = predict(config, divided(machine._replace(resident=resident), layout.contexts), layout)
        print(json.dumps({'expected_step': expected.step, 'expected_memory': expected.memory * layout.contexts,
                          'step': statistics.median(seconds), 'memory': most}), flush=True)


if __name__ == '__main__':
    main()
