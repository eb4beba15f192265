"""`mxsimmim finetune --eval`: measures a trained classifier on held-out images, on all workers of a job."""
import functools
import os
from typing import List, Optional

import mxnet as mx

from ..config import Config, configfile
from ..data.sources import notes_of, tell
from ..interop import official
from ..models import Network, parameter_specs
from ..ops import OpBackend
from ..parallel.communicators import Communicator
from ..parallel.parts import ModelParts
from ..parallel.placement import contexts_of
from ..parallel.strategies import Strategy, strategy_of
from ..runtime import watchdog
from ..runtime.process import ProcessInfo, process_info
from ..system import files
from ..system.arrays import Arrays
from ..tasks.registry import TASKS
from ..tasks.task import Task, check_same_job
from ..training.build import build_group, build_parts, build_placement
from ..training.run_folder import folder_of
from ..training.run_logger import Quiet
from ..training.start import agree_on_backend, joined, watched
from .trained import find_run


def evaluate(config: Config) -> int:
    """Measures a run's classifier on the held-out images, on all workers, and writes its evaluation; returns 0."""
    process = process_info(os.environ)
    return watched(config, process, functools.partial(_join, config, process))


def _join(config: Config, process: ProcessInfo, watch: watchdog.Watch) -> int:
    contexts = contexts_of(config.devices, process)
    strategy = strategy_of(config, process, len(contexts))
    if strategy.store_can.updates_weights:  # its servers update weights: there is nothing to update
        strategy = Strategy('dist_sync', 'sync')
    if process.rank == 0 and folder_of(config).is_dir():
        files.try_place(folder_of(config))  # for the evaluation at the end
    task = TASKS[config.task](config)
    with joined(config, strategy, process, len(contexts), watch) as communicator:
        backend = agree_on_backend(config, contexts, communicator.control, Quiet().message)
        return _evaluate(config, task, contexts, backend, communicator)


def _evaluate(config: Config, task: Task, contexts: List[mx.Context], backend: OpBackend,
              communicator: Communicator) -> int:
    folder = folder_of(config)
    check_same_job(config, task, communicator.control)
    evaluator = task.evaluator(communicator.control)
    if evaluator is None:
        raise ValueError('--eval needs held-out images: set data.val_path or data.val_fraction')
    if communicator.rank == 0:
        tell(notes_of(task.source, task.held_out))
    with watchdog.doing(f'the checkpoint of {folder}', together=communicator.rank > 0):
        saved = find_run(folder, communicator.control)
    task.check_state(saved.state, str(folder), 'give data of its classes')
    for key, old, new in configfile.differences(saved.config, config):
        if key.startswith('model.') and key != 'model.drop_path':
            raise ValueError(f'{folder} was trained with {key}={old}, here it is {new}: evaluate it with its own')
    with watchdog.doing('evaluation', together=True):
        parts = build_parts(config, communicator.control, contexts)
        net = _network(task, backend, saved.weights, communicator, parts)
        group = build_group(config, communicator, contexts, backend, 1)
        placement = build_placement(config.parallel, net, contexts, parts=parts, group=group)
        report = evaluator.report(placement, folder)
    if communicator.control.rank == 0:
        print(f'{folder}, step {saved.step}\n{report}', flush=True)
    return 0


def _network(task: Task, backend: OpBackend, weights: Arrays, communicator: Communicator, parts: Optional[ModelParts]
             ) -> Network:
    """What this worker holds of the network, with rank 0's `weights`."""
    if parts:
        net = task.build_network(False, backend, parts.slices, parts.own, parts.shard)
        parts.load(net, weights)
    else:
        net = task.build_network(False, backend)
        if communicator.rank == 0:
            official.load_weights(net, weights)
    # To the other replicas.
    communicator.broadcast(communicator.register([spec.parameter.list_data() for spec in parameter_specs(net)]))
    return net
