"""`mxsimmim pretrain --check` and `finetune --check`: tries all that a run needs, trains nothing and leaves nothing."""
import functools
import math
import os
from pathlib import Path
from typing import Any, Callable, List, Mapping, Optional, Tuple

import mxnet as mx
import numpy as np

from ..config import Config, Duration, ParallelConfig
from ..config.schedule import fitted
from ..data.batch_split import split_batch
from ..data.loader import Batch, Loader
from ..data.sampling import steps_per_epoch
from ..data.transforms import decode
from ..models import Network, parameter_specs
from ..ops import OpBackend
from ..parallel.control import ControlPlane
from ..parallel.mesh import mesh_of
from ..parallel.placement import Placement, contexts_of
from ..parallel.strategies import strategy_of
from ..runtime import facts, memory, watchdog
from ..runtime.process import ProcessInfo, process_info
from ..system import files
from ..system.text import one_line
from ..tasks.registry import TASKS
from ..tasks.task import Task
from .build import build_placement, least_images
from .pretrained import load_encoder
from .room import check_room, checkpoint_bytes
from .run_folder import checkpoint_folders, checkpoint_to_resume, folder_of
from .start import agree_on_backend, watched
from .timetable import timetable_of

IMAGES = 8  # of each source that are read


def check(config: Config, written: Mapping[str, Duration]) -> int:
    """Prints a line for each part of a run, and what is wrong with it; returns 1 if anything is, else 0.

    Args:
        written: as for `schedule.fitted`.
    """
    process = process_info(os.environ)
    return watched(config, process, functools.partial(_check, config, written, process))


def _check(config: Config, written: Mapping[str, Duration], process: ProcessInfo, _: watchdog.Watch) -> int:
    failed = []

    def part(name: str, function: Callable[..., Tuple[str, Any]], *needed: Any) -> Any:
        """What a part makes, None if it fails or something that it needs has."""
        if any(item is None for item in needed):
            return None
        try:
            with watchdog.doing(f'the check of {name}'):
                text, made = function(*needed)
        except (ValueError, OSError, MemoryError, mx.MXNetError) as error:
            line = next(iter(str(error).strip().splitlines()), '') or type(error).__name__
            failed.append(name)
            text, made = f'NOT GOOD: {line}', None
        print(f'{name:<10} {text}', flush=True)
        return made

    devices = part('devices', _devices, config, process)
    contexts, backend = devices or (None, None)
    if config.parallel.auto:
        config = part('layout', _layout, config, process, contexts, backend) or config
    task = part('data', _data, config)
    planned = part('schedule', _schedule, config, written, process, task, contexts)
    config = planned or config
    net = part('model', _model, config, task, backend)
    placement = part('forward', _forward, config, task, net, contexts)
    part('memory', _memory, config, task, process, placement)
    part('places', lambda: _places(config, process, task, planned, contexts))
    print(f'not good: {", ".join(failed)}' if failed else 'all good: without --check, the same command trains')
    return 1 if failed else 0


def _devices(config: Config, process: ProcessInfo) -> Tuple[str, Tuple[List[mx.Context], OpBackend]]:
    contexts = contexts_of(config.devices, process)
    strategy = strategy_of(config, process, len(contexts))
    backend = agree_on_backend(config, contexts, ControlPlane(), print)
    text = f'{", ".join(map(str, contexts))}; {strategy.aggregation} over {strategy.store}; {backend.describe()}'
    return text, (contexts, backend)


def _layout(config: Config, process: ProcessInfo, contexts: List[mx.Context], backend: OpBackend) -> Tuple[str, Config]:
    """What `parallel.auto` chooses, if all workers of the job are as this one; the network is not measured."""
    from ..planner.automatic import keys_for, machine_of, with_keys
    machines = [machine_of(contexts, str(rank // process.local_size)) for rank in range(process.size)]
    keys, why = keys_for(config, process, machines, backend.is_native)
    return why, with_keys(config, keys)


def _data(config: Config) -> Tuple[str, Task]:
    task = TASKS[config.task](config)
    text = ', '.join([f'{len(task.source):,} training images', f'{len(task.held_out or ()):,} held out', *task.facts()])
    read, broken = 0, []
    for source in filter(None, (task.source, task.held_out)):
        for index in np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(int)).tolist():
            try:
                with watchdog.doing(f'image {one_line(source.name(index))}'):
                    decode(source.read(index), source.name(index))
                read += 1
            except (ValueError, OSError) as error:
                broken.append(str(error))
    if not read or len(broken) > config.data.max_broken:
        raise ValueError(f'{len(broken)} of {read + len(broken)} images cannot be read; the last: {broken[-1]}')
    return text + f'; {read} read' + (f', {len(broken)} cannot be: {broken[-1]}' if broken else ''), task


def _schedule(config: Config, written: Mapping[str, Duration], process: ProcessInfo, task: Task,
              contexts: List[mx.Context]) -> Tuple[str, Config]:
    config, notes = fitted(config, written, steps_per_epoch(len(task.source), config.train.batch_size))
    per_epoch, total, _, save, *_ = timetable_of(config, len(task.source), strategy_of(config, process))
    replicas = mesh_of(process, config.parallel, len(contexts)).data
    split_batch(config.train.batch_size, [1] * replicas, [least_images(config, contexts)] * replicas,
                task.transform().group)
    every = config.checkpoint.every if config.checkpoint.every.unit == 'minutes' else f'{save:,}'
    text = (f'{total:,} steps of {config.train.batch_size:,} images, {per_epoch:,} an epoch; warm-up '
            f'{config.optim.warmup.steps(per_epoch, total):,}; every {every} a checkpoint')
    return '; '.join([text] + notes), config


def _model(config: Config, task: Task, backend: OpBackend) -> Tuple[str, Any]:
    net = task.build_network(True, backend)
    told = load_encoder(net, config.model.pretrained) if task.takes_encoder and config.model.pretrained else ''
    text = f'{config.model.type}, {_count(net):,} parameters, '
    text += f'{task.multiply_adds() / 1e9:.2f} GFLOPs an image'
    return text + (f'; {told}' if told else ''), net


def _count(net: Network) -> int:
    return sum(math.prod(spec.parameter.shape) for spec in parameter_specs(net) if spec.trainable)


def _batch(config: Config, task: Task, images: int) -> Batch:
    """The first training images, repeated where there are fewer."""
    index = np.arange(images) % len(task.source)
    loader = Loader(task.source, task.transform(), lambda step: (0, index), config.seed, 2, 1, len(task.source),
                    lambda text: None)
    return next(batch for _, batch in list(loader.iterate(0, 1)))


def _forward(config: Config, task: Task, net: Network, contexts: List[mx.Context]) -> Tuple[str, Placement]:
    # A worker that is to hold a part tries the whole network: the others are not there.
    one = config.parallel.devices > len(contexts)
    placement = build_placement(ParallelConfig() if one else config.parallel, net, contexts)
    images = 2 * least_images(config, contexts) // config.train.accumulate
    loss = float(placement.loss(_batch(config, task, images)).asscalar()) / images
    if not np.isfinite(loss):
        raise ValueError(f'the loss of {images} images is {loss}: are the weights of model.pretrained whole?')
    return f'loss {loss:.4f} of {images} images', placement


def _memory(config: Config, task: Task, process: ProcessInfo, placement: Placement) -> Tuple[str, float]:
    """Compares what a step needs, by what steps of few images take, with what there is, on CPUs."""
    devices, replicas = len(placement.contexts), max(1, len(placement.contexts) // config.parallel.devices)
    groups = mesh_of(process, config.parallel, devices).data
    part = -(-config.train.batch_size // groups // config.train.accumulate)  # images computed at once
    few, more = (min(part, n * devices) for n in (2, 6))
    taken = []
    for images in (few, more):
        placement.forward_backward(_batch(config, task, images), images)
        mx.nd.waitall()
        taken.append(memory.resident())
    each = max(0, taken[1] - taken[0]) / max(1, more - few)
    weights = 4 * _count(placement.net)
    moments = {'adamw': 2, 'sgd': 0}[config.optim.type] * replicas / (groups if config.parallel.shard_optimizer else 1)
    moments += 1 if config.train.ema else 0
    each_loaded = sum(array.nbytes for array in task.transform().allocate(1).values())
    loaded = (config.data.prefetch + 2) * config.train.batch_size / process.size * each_loaded
    needed = taken[1] + each * max(0, part - more) + weights * moments + loaded
    total, free = (gib * facts.GIB for gib in facts._memory())
    there = (free + memory.resident()) / process.local_size
    text = (f'about {needed / facts.GIB:.1f} GiB for {part:,} images at once, {each / 2 ** 20:.1f} MiB each; '
            f'{there / facts.GIB:.1f} GiB are there')
    if placement.contexts[0].device_type == 'gpu':
        return 'of GPUs is not estimated: if it is too small, raise train.accumulate', 0.0
    if needed > there:
        raise ValueError(f'{text}: raise train.accumulate={config.train.accumulate}, or lower train.batch_size='
                         f'{config.train.batch_size}')
    return text, needed


def _places(config: Config, process: ProcessInfo, task: Optional[Task], planned: Optional[Config],
            contexts: Optional[List[mx.Context]]) -> Tuple[str, Path]:
    """`planned` is the configuration whose schedule is good, if it is."""
    folder = folder_of(config)
    notes = files.try_place(folder)
    said = [f'{folder}: can be written to']
    if task and planned and contexts:
        timetable = timetable_of(planned, len(task.source), strategy_of(config, process))
        replicas = mesh_of(process, config.parallel, len(contexts)).data
        check_room(config, task, folder, timetable.total, replicas)
        size, free = checkpoint_bytes(config, task, replicas), files.free(folder)
        said[0] += f', checkpoints of {size / facts.GIB:.2f} GiB' + (
            '' if free is None else f', {free / facts.GIB:.1f} GiB free')
        if any(place.is_dir() for place in checkpoint_folders(config)):
            saved = checkpoint_to_resume(config, task, notes.append)
            said += [f'goes on from step {saved.step:,}'] if saved else []
    return '; '.join(said + notes), folder
