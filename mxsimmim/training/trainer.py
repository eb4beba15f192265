"""The loop of pre-training and fine-tuning, and what it does besides updating."""
import contextlib
import os
import signal
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

import mxnet as mx
import numpy as np

from ..config import configfile
from ..system import files
from .checkpoint import Checkpoint, discard_after, save
from ..config import Config, Duration
from ..data.loader import Batch, Loader
from ..data.sampling import batch_at, part_of, steps_per_epoch
from ..data.sources import notes_of
from ..tasks.evaluation import Evaluation
from ..interop import official
from .step_metrics import StepMetrics
from ..models import named_parameters
from ..models.cost import multiply_adds
from .run_logger import RunLogger, Quiet, read_metrics
from ..ops import REFERENCE, OpBackend, select_backend
from ..optim import OPTIMIZERS, learning_rates
from ..parallel.updates import ElasticAverage, LocalSGD, SynchronousUpdate
from ..parallel.asynchronous import AsynchronousUpdate, WeightServers
from ..parallel.average import WeightAverage
from ..parallel.control import ControlPlane, connect
from ..parallel.strategies import Strategy, horovod_settings, strategy_of
from ..parallel.placement import Replicated, contexts_of
from ..parallel.replicas import compare
from ..parallel.communicators import Communicator, make_communicator
from .timetable import Timetable, expected_step, split_batch, timetable_of
from .plateau import PlateauTracker
from .pretrained import load_encoder
from .room import check_room
from .run_folder import Stop, checkpoint_to_resume, folder_of, locked, versions, write_config
from ..config.schedule import fitted
from ..tasks.registry import TASKS, Task, check_same_job
from ..system.text import encode, one_line
from ..tasks.validation import Validation
from ..runtime.process import ProcessInfo, world


class Run(NamedTuple):
    """What the loop works with."""
    config: Config
    plan: Timetable
    task: Task
    loader: Loader
    placement: Replicated
    aggregation: Union[SynchronousUpdate, AsynchronousUpdate]
    images: List[int]  # of a batch, one a worker; `rebalance` changes it in place
    meter: StepMetrics
    monitor: Union[RunLogger, Quiet]
    validation: Union[Validation, Evaluation, None]
    progress: PlateauTracker
    average: Optional[WeightAverage]


def start(config: Config, written: Mapping[str, Duration] = MappingProxyType({})) -> int:
    """Trains until the end, an error or a signal; returns the exit status, 128 + its number for a signal.

    Args:
        written: for which train.length parts of the schedule were written, as `schedule.fitted` takes it.

    Raises:
        ValueError: whatever the user can mend; checkpoints written before stay whole.
    """
    place = world(os.environ)
    mode = strategy_of(config, place)
    contexts = contexts_of(config.devices, place)
    folder = folder_of(config)
    notes = files.try_place(folder) if place.rank == 0 else []
    task = TASKS[config.task](config)
    config, fitting = fitted(config, written, steps_per_epoch(len(task.source), config.train.batch_size))
    notes += fitting
    plan = timetable_of(config, len(task.source), mode)
    if place.rank == 0:
        check_room(config, task, folder, plan.total)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        if place.rank == 0:
            stack.enter_context(locked(folder, notes.append))
        store = stack.enter_context(joined(config, mode, place))
        check_same_job(config, task, store.control)
        backend = agree_on_backend(config, contexts, store.control, notes.append)
        saved = None
        if place.rank == 0:
            saved = checkpoint_to_resume(config, len(task.source), task.classes, notes.append)
        resumed = store.control.broadcast_object('checkpoint', lambda: saved and {'step': saved.step, **saved.state})
        first = resumed['step'] if resumed else 0
        monitor = Quiet()
        if place.rank == 0:
            write_config(folder, config)
            discard_after(folder / 'best', first)  # of what this run will do anew
            monitor = stack.enter_context(RunLogger(folder, plan.total, first))
        for note in [*notes_of(task.source, task.held_out), *notes]:
            monitor.message(note)
        run = assemble(config, plan, task, contexts, backend, mode, store, saved, resumed, monitor)
        if place.rank == 0:
            introduce(run, saved, mode, place)
        stopped = train(run, first, stop)
        conclude(run, folder, not stopped)
    return 128 + stopped if stopped else 0


def agree_on_backend(config: Config, contexts: List[mx.Context], control: ControlPlane, log: Callable[[str], None]
                     ) -> OpBackend:
    """Select the operators of this worker: native ones, if all workers have them.

    Forms differ in the last bits, also of an update, and all workers must make the same one.

    Raises:
        ValueError: the configuration asks for what only native operators do.
    """
    backend = select_backend(config.runtime.precision, contexts)
    native = control.all_gather('form of the operators', backend.is_native)
    if config.model.recompute and not all(native):
        raise ValueError("key 'model.recompute': only native operators, on CPUs, can compute activations again, and "
                         f'rank {native.index(False)} has none (`mxsimmim doctor` says why): write '
                         'model.recompute=false, and use train.accumulate to need less memory')
    if all(native) or not backend.is_native:
        return backend
    log(f'rank {native.index(False)} computes with reference operators (its log says why): so do all')
    return REFERENCE


@contextlib.contextmanager
def joined(config: Config, mode: Strategy, place: ProcessInfo) -> Iterator[Communicator]:
    """While entered, this process is a part of its job: has its control plane, and what adds up arrays."""
    if mode.store == 'horovod' and not mx.context.num_gpus():  # where Horovod's looking around costs a core's time
        os.environ.update({**horovod_settings(expected_step(config, place)), **os.environ})
    with connect(place, os.environ) as control:
        yield (WeightServers if mode.store == 'dist_async' else make_communicator)(mode.store, place, control)


def train(run: Run, start: int, stop: Stop) -> int:
    """From disk to update: sampling, loader, placement, aggregation. Returns the number of the signal that ended it."""
    config, plan, aggregation, clock = run.config, run.plan, run.aggregation, run.meter.clock
    rate = learning_rates(config.optim, config.train, plan.per_epoch, plan.total)
    clipping = config.optim.recipe == 'reference' and config.train.accumulate > 1
    on_micro_batch = aggregation.clip_partial if clipping else None
    if run.progress.ended:  # before this process began
        return 0
    if start == 0 and config.validation.at_start:
        validate(run, 0)
    stop_at = None
    for step, batch in clock.watch(batches(run, start)):
        timed = clock if is_timed(run, step) else None
        if timed:
            timed.start()
        loss = run.placement.forward_backward(batch, aggregation.loss_divisor(len(batch.image)), on_micro_batch)
        report(run, step)  # on the updates before, while the device works on this one
        lr, floor = (rate(step, scale) * run.progress.factor for scale in (1, 0))
        run.meter.add(step + 1, lr, aggregation.step(step, lr, loss, timed, floor))
        done = step + 1
        if run.average:
            run.average.update(done)
        validating, saving = (done % period == 0 or done == plan.total for period in (plan.validate, plan.save))
        stop_at = aggregation.poll_stop(done, bool(stop.signal), validating or saving)
        if plan.check and done % plan.check == 0 and aggregation.in_sync(done):
            with aggregation.consolidated_weights():
                compare(named_parameters(run.placement.net), aggregation.workers.control, done)
        if validating:
            validate(run, done)
        if saving or done == stop_at or run.progress.ended:
            save_checkpoint(run, done)
        if done == stop_at or run.progress.ended:
            break
    if stop_at is None:
        return 0
    run.monitor.message(f'stopped by signal {stop.signal}: step {done} is saved, the same command goes on from it'
                        if stop.signal else f'stopped at step {done}, which is saved, because another worker was')
    return stop.signal or signal.SIGTERM


def batches(run: Run, start: int) -> Iterator[Tuple[int, Batch]]:
    """This worker's parts of the batches from `start` on."""
    if run.config.data.shares != 'auto':
        yield from run.loader.iterate(start, run.plan.total)
        return
    while start < run.plan.total:
        end = min((start // run.plan.per_epoch + 1) * run.plan.per_epoch, run.plan.total)
        yield from run.loader.iterate(start, end)
        rebalance(run)
        start = end


def rebalance(run: Run) -> None:
    """Gives each worker images in proportion to how fast it computed those it had."""
    workers, seconds = run.aggregation.workers, run.meter.clock.steps
    needed = len(run.placement.contexts) * run.config.train.accumulate
    times, least = zip(*workers.control.all_gather('speed', [np.median(seconds), needed]))
    seconds.clear()
    images = split_batch(run.task, sum(run.images), [n / t for n, t in zip(run.images, times)], least)
    if images != run.images:
        run.monitor.message(f'images a step, by measured speed: {images} (before: {run.images})')
        run.images[:] = images


def is_timed(run: Run, step: int) -> bool:
    """Whether to measure where a step's time goes: the last of each log record and of each epoch."""
    done = step + 1
    return done % run.config.log.every == 0 or done % run.plan.per_epoch == 0 or done == run.plan.total


def assemble(config: Config, plan: Timetable, task: Task, contexts: List[mx.Context], backend: OpBackend,
             mode: Strategy, store: Communicator, saved: Optional[Checkpoint], resumed: Optional[Dict[str, Any]],
             monitor: Union[RunLogger, Quiet]) -> Run:
    """Builds everything the loop needs, from initial weights, an encoder or a checkpoint.

    `saved` is the checkpoint, which rank 0 alone has read; `resumed` is its state, which all have.
    """
    net = task.network(not saved, backend)
    if saved:
        official.load_weights(net, saved.arrays['weights'])
    elif task.takes_encoder and config.model.pretrained and not resumed and store.rank == 0:
        monitor.message(load_encoder(net, config.model.pretrained))
    placement = Replicated(net, contexts, config.train.accumulate)
    images = divide(config, task, store, len(contexts) * config.train.accumulate, resumed)
    aggregation = make_aggregation(config, plan, task, net, mode, store, images)
    if resumed or config.model.pretrained:
        aggregation.load_state_dict(saved and saved.arrays['optimizer'], resumed['step'] if resumed else 0)

    def batch(step: int) -> Tuple[int, np.ndarray]:
        epoch, index = batch_at(step, len(task.source), config.train.batch_size, config.seed)
        return epoch, index[part_of(images, store.control.mesh.coordinate('data'))]

    def samples(step: int) -> str:
        names = [one_line(task.source.name(int(i))) for i in batch(step - 1)[1]]
        listed = folder_of(config) / 'bad-samples.txt'
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_bytes(encode('\n'.join(names) + '\n'))
        return ', '.join(names[:8]) + (f' and {len(names) - 8} more, all in {listed}' if len(names) > 8 else '')

    loader = Loader(task.source, task.transform(), batch, config.seed, config.data.threads, config.data.prefetch,
                    config.data.max_broken, monitor.message)
    meter = StepMetrics(config.train.max_bad_steps, samples, resumed and resumed['meter'], aggregation.combine)
    average = None
    if config.train.ema:
        # All workers hold the same one: rank 0's, of its checkpoint.
        average = WeightAverage(named_parameters(net), config.train.ema, saved and saved.arrays.get('ema'))
        if resumed:
            average.share(store)
    return Run(config, plan, task, loader, placement, aggregation, images, meter, monitor,
               task.validation(store.control), PlateauTracker(config.train, resumed and resumed.get('progress')),
               average)


def divide(config: Config, task: Task, store: Communicator, needed: int, resumed: Optional[Dict[str, Any]]
           ) -> List[int]:
    """Images of a batch for each worker; each needs one for each of its devices and accumulated parts."""
    least = store.control.all_gather('devices and accumulated parts', needed)
    shares = config.data.shares
    if shares == 'auto' and resumed and len(resumed['images']) == store.size:
        return resumed['images']
    weights = [1] * store.control.mesh.data if isinstance(shares, str) else shares
    return split_batch(task, config.train.batch_size, weights, least)


def make_aggregation(config: Config, plan: Timetable, task: Task, net: mx.gluon.Block, mode: Strategy,
                     store: Communicator, images: List[int]) -> Union[SynchronousUpdate, AsynchronousUpdate]:
    """The aggregation that `mode` names."""
    optim, train = config.optim, config.train
    parameters, groups = named_parameters(net), task.groups(net)
    scales, decays = ({name: group[i] for name, group in groups.items()} for i in range(2))
    if mode.aggregation == 'async':
        return AsynchronousUpdate(parameters, decays, store, config, plan.per_epoch, plan.total, scales, net.backend)
    optimizer = OPTIMIZERS[optim.type](parameters, decays, optim, scales, net.backend)
    if mode.aggregation == 'sync':
        return SynchronousUpdate(parameters, optimizer, store, train, optim.clip_grad)
    kind = {'local_sgd': LocalSGD, 'elastic': ElasticAverage}[mode.aggregation]
    return kind(parameters, optimizer, store, train, optim.clip_grad, images, plan.total)


def introduce(run: Run, saved: Optional[Checkpoint], mode: Strategy, place: ProcessInfo) -> None:
    """Says what is about to be trained, on what, and from where."""
    config, plan, say = run.config, run.plan, run.monitor.message
    say(configfile.to_yaml(config).rstrip())
    sizes = [int(np.prod(p.shape)) for p in named_parameters(run.placement.net).values()]
    operations = multiply_adds(config.model, decoder=config.task == 'pretrain') / 1e9
    say(f'{config.model.type}: {sum(sizes):,} parameters, {operations:.2f} GFLOPs an image (multiply-adds of a forward '
        'pass)')
    say(f'{len(run.task.source):,} training images, {plan.per_epoch:,} steps an epoch, {plan.total:,} in all, on '
        + ', '.join(map(str, run.placement.contexts)))
    say(run.placement.net.backend.describe())
    if place.size > 1:
        servers = f' through {place.servers} server{"s"[:place.servers > 1]}' if place.servers else ''
        say(f'{place.size} workers{servers}, {mode.aggregation} over {mode.store}; images a step: {run.images}')
    if run.validation:
        say(f'{run.validation.images:,} held-out images')
    else:
        say('no validation: set data.val_path or data.val_fraction to measure on held-out images')
    if saved:
        say(f'going on from {saved.path}' if saved.step < plan.total else f'{saved.path} is the end of this run')


def report(run: Run, done: int) -> None:
    """Writes down the updates since the last record, if a record is due after update number `done`."""
    due = done % run.config.log.every == 0 or done == run.plan.total
    if not due or not run.meter.pending:
        return
    values = run.meter.summary()
    values['images_per_second'] = values.pop('steps_per_second') * run.config.train.batch_size
    times = ('data_seconds', 'compute_seconds', 'communication_seconds')
    (*seconds, broken), more = run.aggregation.observed([values[name] for name in times] + [run.loader.broken])
    values.update(zip(times, seconds), broken_images=round(broken * run.aggregation.workers.size), **more)
    run.monitor.write(done, {'epoch': done / run.plan.per_epoch, **values})


def validate(run: Run, done: int) -> None:
    """Measures and draws on the held-out images, if there are any; keeps the best classifier."""
    if not run.validation:
        return
    report(run, done)
    run.meter.read()
    began = time.monotonic()
    with model_so_far(run):
        values = run.validation.measure(run.placement)
        run.monitor.write(done, {'epoch': done / run.plan.per_epoch, **values})
        best = run.progress.observe(run.task.score(values))
        if run.aggregation.workers.rank == 0:
            run.monitor.extra('a picture', draw, run, done)
            if best and run.task.classes:
                save(folder_of(run.config) / 'best', done, {'weights': official.export_weights(run.placement.net)},
                     state_of(run, done), keep=1)
    run.meter.pause(time.monotonic() - began)


def draw(run: Run, done: int) -> None:
    """The picture of a validation, if there is to be one."""
    picture = run.task.picture(run.validation, run.placement)
    if picture is not None:
        run.monitor.picture(done, 'reconstruction', picture)


@contextlib.contextmanager
def model_so_far(run: Run) -> Iterator[None]:
    """While entered, the network is what the run would hand out now."""
    with run.aggregation.consolidated_weights(), run.average.applied() if run.average else contextlib.nullcontext():
        yield


def save_checkpoint(run: Run, done: int) -> None:
    """Everything that the rest of the run depends on, after update number `done`."""
    report(run, done)
    run.meter.read()
    began = time.monotonic()
    with run.aggregation.consolidated_weights():
        moments = run.aggregation.state_dict()  # to which every worker contributes
        if run.aggregation.workers.rank == 0:
            arrays = {'weights': official.export_weights(run.placement.net), 'optimizer': moments}
            if run.average:
                arrays['ema'] = run.average.arrays()
            save(folder_of(run.config) / 'checkpoints', done, arrays, state_of(run, done), run.config.checkpoint.keep,
                 run.plan.keep_every)
    run.meter.pause(time.monotonic() - began)


def state_of(run: Run, done: int) -> Dict[str, Any]:
    """What a checkpoint holds besides arrays."""
    return {'config': configfile.to_dict(run.config), 'samples': len(run.task.source), 'versions': versions(),
            'epoch': done // run.plan.per_epoch, 'step_in_epoch': done % run.plan.per_epoch, 'images': run.images,
            'meter': run.meter.state(), 'progress': run.progress.state(), 'classes': list(run.task.classes)}


def conclude(run: Run, folder: Path, finished: bool) -> None:
    """What a reader wants to know last: how good it got, and where everything is."""
    say = run.monitor.message
    if run.progress.ended:
        say(f'stopped: {run.config.train.stop_early} validations without a new best (train.stop_early)')
    control = run.aggregation.workers.control
    rows = control.broadcast_object('validations', lambda: [row for row in read_metrics(folder) if 'val_loss' in row])
    if finished and rows and run.validation:
        with model_so_far(run):
            if run.task.classes or control.rank == 0:  # a classifier is evaluated by all workers
                say(run.task.conclusion(run.validation, rows, run.plan.total, run.placement, folder))
    if any((folder / 'pictures').glob('*')):
        say(f'pictures: {folder}/pictures')
    say(f'curves: mxsimmim plot {folder}')
