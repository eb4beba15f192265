"""Builds a trainer of a configuration: network, placement, division of the batch, update rule, averaged weights."""
from typing import List, Optional, Sequence, Tuple, Union

import mxnet as mx

from ..config import Config, ParallelConfig
from ..data.batch_split import BatchSplit, split_batch
from ..models import Detector, Network, ParameterSpec, Segmenter, parameter_specs
from ..models.cost import segment_costs, token_shapes
from ..models.segments import users
from ..models.shards import is_copied
from ..ops import OpBackend, select_backend
from ..optim import OPTIMIZERS, Optimizer
from ..parallel.asynchronous import AsynchronousUpdate, WeightServers
from ..parallel.average import WeightAverage
from ..parallel.communicators import Communicator, make_communicator
from ..parallel.control import ControlPlane
from ..parallel.owners import ShardedUpdate, updated_by
from ..parallel.parts import ModelParts
from ..parallel.periodic import ElasticAverage, LocalSGD
from ..parallel.pipeline import Pipeline
from ..parallel.placement import Placement, Replicated, contexts_of
from ..parallel.schedules import stages_of
from ..parallel.strategies import Strategy, strategy_of
from ..parallel.updates import SynchronousUpdate
from ..parallel.worker_group import WorkerGroup
from ..runtime import watchdog
from ..runtime.memory import give_back, share_heap
from ..runtime.process import ALONE, ProcessInfo
from ..system.arrays import Arrays
from ..tasks.registry import TASKS
from ..tasks.task import Task
from .checkpoint import Checkpoint
from .pretrained import find_encoder, load_encoder
from .restore import load_state, load_weights
from .run_logger import Quiet, RunLogger
from .timetable import Timetable, timetable_of
from .trainer import Trainer, UpdateRule


def build_trainer(config: Config, process: ProcessInfo = ALONE, task: Optional[Task] = None,
                  communicator: Optional[Communicator] = None, checkpoint: Optional[Checkpoint] = None,
                  logger: Union[RunLogger, Quiet, None] = None, backend: Optional[OpBackend] = None) -> Trainer:
    """Build everything that training needs, from initial weights, an encoder or a checkpoint.

    Args:
        process: which of the job's workers this is; all of them build at the same time.
        task: what `config.task` names, if it is there already.
        communicator: reduces arrays over the workers; may be left out where there is only one.
        checkpoint: to go on from. Only rank 0's has arrays; the other workers get them from it.
        logger: hears of everything; by default messages go to standard error and nothing is written.
        backend: computes, the same in all workers; by default the best that this one has, see `select_backend`.

    Raises:
        ValueError: choices that do not go together, images or devices that are not there, an encoder that does not fit.
    """
    task, logger = task or TASKS[config.task](config), logger or Quiet()
    contexts = contexts_of(config.devices, process)
    strategy = strategy_of(config, process, len(contexts))
    timetable = timetable_of(config, len(task.source), strategy)
    backend = backend or select_backend(config.runtime.precision, contexts)
    communicator = communicator or build_communicator(strategy, process)
    parts = build_parts(config, communicator.control, contexts)
    if communicator.control.mesh.tensor > 1:
        share_heap()
    net = build_network(config, process, task, backend, checkpoint, logger, parts)
    split = build_split(config, task, communicator, least_images(config, contexts), checkpoint)
    group = build_group(config, communicator, contexts, backend, max(split.images))
    placement = build_placement(config.parallel, net, contexts, config.train.accumulate, parts, group)
    update_rule = build_update_rule(config, task, net, strategy, communicator, timetable, split, parts=parts)
    if config.model.pretrained and not checkpoint:
        update_rule.load_state_dict(None, 0)
    average = WeightAverage(parameter_specs(net), config.train.ema) if config.train.ema else None
    if checkpoint:
        load_state(update_rule, average, parts, checkpoint, logger.message)
    step, state = (checkpoint.step, checkpoint.state) if checkpoint else (0, {})
    if communicator.control.mesh.tensor > 1 or config.parallel.shard_optimizer:  # where memory is short
        mx.nd.waitall()
        give_back()  # weights as they were drawn and read, gradients' first arrays
    return Trainer(config, timetable, task, placement, update_rule, split, average, logger, step, state, parts)


def build_parts(config: Config, control: ControlPlane, contexts: List[mx.Context]) -> Optional[ModelParts]:
    """Join the workers that hold the parts of a model; None where each holds a whole one."""
    if control.mesh.data == control.mesh.size:
        return None
    return ModelParts(stages_of(config.parallel, segment_costs(config.model)), control, contexts[0])


def build_network(config: Config, process: ProcessInfo, task: Task, backend: OpBackend,
                  checkpoint: Optional[Checkpoint], logger: Union[RunLogger, Quiet],
                  parts: Optional[ModelParts] = None) -> Network:
    """Build the network with the weights it starts from; rank 0's are the ones that count."""
    arrays = checkpoint.arrays if checkpoint else {}
    if parts:
        return _build_part(config, task, backend, checkpoint, logger, parts)
    net = task.build_network(not arrays, backend)
    if arrays:
        load_weights(net, arrays['weights'], None)
    elif task.takes_encoder and config.model.pretrained and not checkpoint and process.rank == 0:
        logger.message(load_encoder(net, config.model.pretrained))
    return net


def _build_part(config: Config, task: Task, backend: OpBackend, checkpoint: Optional[Checkpoint],
                logger: Union[RunLogger, Quiet], parts: ModelParts) -> Network:
    """`build_network` for this worker's part."""
    net = task.build_network(checkpoint is None, backend, parts.slices, parts.own, parts.shard)
    if checkpoint:
        load_weights(net, checkpoint.arrays.get('weights'), parts)
    elif task.takes_encoder and config.model.pretrained:
        encoder = None
        if parts.rank == 0:  # it alone reads the file
            encoder = find_encoder(config.model, task.shapes(), config.model.pretrained)
            logger.message(encoder.told)
        found: Arrays = encoder.arrays if encoder else {}
        parts.load(net, found, parts.control.broadcast_object('arrays of the encoder', lambda: list(found)))
    return net


def build_group(config: Config, communicator: Communicator, contexts: List[mx.Context], backend: OpBackend, images: int
                ) -> Optional[WorkerGroup]:
    """Join the workers that compute blocks together, of `images` at most; None where each computes whole ones."""
    mesh, accumulate = communicator.control.mesh, config.train.accumulate
    if mesh.tensor == 1:
        return None
    micro_batches = config.parallel.micro_batches if mesh.pipeline > 1 else 1
    most = max(images, -(-config.train.batch_size // mesh.data))  # validation has equal parts
    batches = {-(-most // accumulate), -(-images // (accumulate * micro_batches))}
    sizes = {batch * tokens * width for batch in batches for tokens, width in token_shapes(config.model)}
    return WorkerGroup(contexts[0], sorted(sizes), communicator.over(('tensor',)), backend)


def build_placement(parallel: ParallelConfig, net: Network, contexts: List[mx.Context], accumulate: int = 1,
                    parts: Optional[ModelParts] = None, group: Optional[WorkerGroup] = None) -> Placement:
    """Place the network on the devices of this worker, as `parallel` says, for batches of `accumulate` parts.

    The mesh has seen that there are as many devices as one replica needs, or a multiple, unless other workers hold the
    other `parts`, and compute the blocks together with this one as a `group`.
    """
    if parallel.pipeline == 1:
        return Replicated(net, contexts, accumulate, parallel.tensor, group)
    assert not isinstance(net, (Segmenter, Detector))
    slices = parts.slices if parts else stages_of(parallel, segment_costs(net.config))
    return Pipeline(net, contexts, slices, parallel.micro_batches, parallel.schedule, accumulate, parallel.tensor,
                    parts, group)


def least_images(config: Config, contexts: List[mx.Context]) -> int:
    """Return how many images of each batch a worker needs: one for each replica, micro-batch and accumulated part."""
    replicas, parallel = max(1, len(contexts) // config.parallel.devices), config.parallel
    return replicas * (parallel.micro_batches if parallel.pipeline > 1 else 1) * config.train.accumulate


def build_communicator(strategy: Strategy, process: ProcessInfo, control: Optional[ControlPlane] = None
                       ) -> Communicator:
    """Build the communicator over the workers of a job."""
    make = WeightServers if strategy.store_can.updates_weights else make_communicator
    with watchdog.doing(f'a connection to all that {strategy.store} needs', together=True):
        return make(strategy.store, process, control)


def build_split(config: Config, task: Task, communicator: Communicator, needed: int,
                checkpoint: Optional[Checkpoint] = None) -> BatchSplit:
    """Divide the batch among the workers; this one needs an image for each of its devices and micro-batches.

    Raises:
        ValueError: there are not enough images, see `split_batch`.
    """
    mesh = communicator.control.mesh
    least = [max(group) for group in mesh.by_data(communicator.control.all_gather('devices and micro-batches', needed))]
    weights, group = config.data.worker_weights, task.transform().group
    if weights == 'auto' and checkpoint and len(checkpoint.state['images']) == mesh.data:
        images: List[int] = checkpoint.state['images']
    else:
        images = split_batch(config.train.batch_size, [1] * mesh.data if isinstance(weights, str) else weights, least,
                             group)
    return BatchSplit(images, mesh.coordinate('data'), least, group)


def build_update_rule(config: Config, task: Task, net: Network, strategy: Strategy, communicator: Communicator,
                      timetable: Timetable, split: BatchSplit, optimizer: Optional[Optimizer] = None,
                      parts: Optional[ModelParts] = None) -> UpdateRule:
    """Build the update rule that `strategy` names, for a network that has been placed.

    `optimizer` is that of another update rule for the same network, to be shared; by default a new one.
    """
    optim, train = config.optim, config.train
    specs = parameter_specs(net, task.parameter_groups(net))
    if parts:
        specs = [spec._replace(axes=axes) for spec, axes in zip(specs, gradient_groups(net, specs, parts))]
    if strategy.aggregation_can.updates_on_servers:
        assert isinstance(communicator, WeightServers)
        return AsynchronousUpdate(specs, communicator, config, timetable.per_epoch, timetable.total, net.backend)
    sharded = config.parallel.shard_optimizer
    own = updated_by(communicator.rank, specs, communicator.size) if sharded else specs
    optimizer = optimizer or OPTIMIZERS[optim.type](own, optim, net.backend)
    if strategy.aggregation == 'sync':
        return (ShardedUpdate if sharded else SynchronousUpdate)(specs, optimizer, communicator, train, optim.clip_grad)
    kind = {'local_sgd': LocalSGD, 'elastic': ElasticAverage}[strategy.aggregation]
    return kind(specs, optimizer, communicator, train, optim.clip_grad, split, timetable.total)


def gradient_groups(net: Network, specs: Sequence[ParameterSpec], parts: ModelParts) -> List[Tuple[str, ...]]:
    """Return for each parameter the axes of the mesh over which its gradient is summed.

    What several stages use has a gradient in each of them, and what all parts of a stage have a copy of, in each of
    these.
    """
    used = users(net, parts.slices)
    several = {spec.name for spec in specs if len(used.get(spec.parameter.name, ())) > 1}  # with all of their parts
    copied = parts.shard.count > 1
    return [('pipeline', 'data') if spec.name in several
            else ('data', 'tensor') if copied and is_copied(spec.name) else ('data',) for spec in specs]
