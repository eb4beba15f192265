"""`mxsimmim pretrain` and `finetune`: joins a job, goes on from its last checkpoint, trains, and says how it went."""
import contextlib
import functools
import gc
import os
import platform
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Iterator, List, Mapping, Optional, Union

import mxnet as mx
import numpy as np

from ..config import Config, Duration, configfile
from ..config.schedule import fitted
from ..data.sampling import steps_per_epoch
from ..data.sources import notes_of
from ..models import parameter_specs
from ..ops import REFERENCE, OpBackend, library, select_backend
from ..parallel.communicators import Communicator
from ..parallel.control import ControlPlane, connect
from ..parallel.mesh import mesh_of
from ..parallel.placement import contexts_of
from ..parallel.strategies import Strategy, horovod_settings, strategy_of
from ..runtime import report, watchdog
from ..runtime.process import ProcessInfo, named, process_info
from ..system import files
from ..system.notify import send
from ..tasks.registry import TASKS
from ..tasks.task import Task, check_same_job
from . import exporter
from .build import build_communicator, build_trainer
from .checkpoint import Checkpoint, discard_after
from .restore import in_all_workers
from .room import check_room
from .run_folder import (
    ENDING,
    Stop,
    check_shared,
    check_written,
    checkpoint_to_resume,
    folder_of,
    locked,
    newest_here,
    write_config,
)
from .run_logger import Quiet, RunLogger, read_metrics
from .timetable import expected_step, timetable_of
from .trainer import Trainer

GOODBYE = 30.0  # seconds for workers and servers to end together, all of them being at the end: no step's time
GLOO = 7 * 24 * 3600  # seconds, longer than any deadline


def start(config: Config, written: Mapping[str, Duration] = MappingProxyType({})) -> int:
    """Train until the end, an error or a signal; return the exit status, 128 + its number for a signal.

    Args:
        written: for which train.length parts of the schedule were written, as `schedule.fitted` takes it.

    Raises:
        ValueError: whatever the user can mend; checkpoints written before stay whole.
    """
    process = process_info(os.environ)
    return watched(config, process, functools.partial(_start, config, written, process))


def watched(config: Config, process: ProcessInfo, work: Callable[[watchdog.Watch], int]) -> int:
    """Do a worker's work under the deadline of its configuration; return the exit status that `work` returns."""
    with watchdog.Watch(named(process), config.runtime.deadline, library.show_stacks) as watch:
        status = work(watch)
    if process.transport == 'ps':  # all is saved; a kvstore that is freed waits for the scheduler without a limit
        watchdog.end_within(GOODBYE, status)
        del watch  # which knows the trainer
        gc.collect()
    return status


def _start(config: Config, written: Mapping[str, Duration], process: ProcessInfo, watch: watchdog.Watch) -> int:
    contexts = contexts_of(config.devices, process)
    strategy = strategy_of(config, process, len(contexts))
    folder = folder_of(config)
    notes = files.try_place(folder) if process.rank == 0 else []
    task = TASKS[config.task](config)
    config, fitting = fitted(config, written, steps_per_epoch(len(task.source), config.train.batch_size))
    notes += fitting
    total = timetable_of(config, len(task.source), strategy).total
    if process.rank == 0:
        check_room(config, task, folder, total, mesh_of(process, config.parallel, len(contexts)).data)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        if process.rank == 0:
            # On a host that was lost, this job's own rank 0 of before may still be ending.
            stack.enter_context(locked(folder, notes.append, ENDING if process.restarts else 0))
            check_written(config, process.written)
        control = stack.enter_context(connected(config, strategy, process))
        watch.join(control.peers, control.sign)
        check_same_job(config, task, control)
        backend = agree_on_backend(config, contexts, control, notes.append)
        asked, why = config, ''
        if config.parallel.auto:
            from ..planner.automatic import lay_out
            config, why = lay_out(config, process, contexts, backend.is_native, control)
        control.mesh = mesh_of(process, config.parallel, len(contexts))
        communicator = build_communicator(strategy, process, control)
        checkpoint = find_checkpoint(config, task, control, notes.append, bool(process.restarts))
        logger: Union[RunLogger, Quiet] = Quiet()
        if process.rank == 0:
            first = checkpoint.step if checkpoint else 0
            write_config(folder, asked)  # so that whoever goes on with it chooses again
            discard_after(folder / 'best', first)  # of what this run will do anew
            logger = stack.enter_context(RunLogger(folder, total, first))
            logger.status(restarts=process.restarts)
            report.tell(notify=config.notify.command, run=str(folder))
            exporter.withdraw(folder)  # what it may have left when it was killed
            if config.log.prometheus_port:
                logger.extra(f'log.prometheus_port={config.log.prometheus_port}', exporter.serve, folder, logger.told,
                             config.log.prometheus_host, config.log.prometheus_port)
        for note in [*notes_of(task.source, task.held_out), *notes]:
            logger.message(note)
        trainer = build_trainer(config, process, task, communicator, checkpoint, logger, backend)
        if process.rank == 0:
            table = trainer.parts.table(trainer.hosts) if trainer.parts else ''
            introduce(trainer, checkpoint, strategy, process, '\n'.join(filter(None, (why, table))))
        watch.step, watch.last_words = lambda: trainer.step, functools.partial(tell_failure, trainer)
        with told(trainer):
            stopped = trainer.fit(stop)
        logger.status(state='stopped' if stopped else 'ended', step=trainer.step)
        if process.rank == 0:
            exporter.withdraw(folder)
        conclude(trainer, folder, not stopped)
        notify(trainer, event='end', status=128 + stopped if stopped else 0)
    return 128 + stopped if stopped else 0


@contextlib.contextmanager
def joined(config: Config, strategy: Strategy, process: ProcessInfo, devices: int = 1,
           watch: Optional[watchdog.Watch] = None) -> Iterator[Communicator]:
    """Join the job with so many devices: while entered, this process has its control plane and a communicator.

    `watch`, that of this process, tells the others of it, and asks for them.
    """
    with connected(config, strategy, process) as control:
        if watch:
            watch.join(control.peers, control.sign)
        control.mesh = mesh_of(process, config.parallel, devices)
        yield build_communicator(strategy, process, control)


def connected(config: Config, strategy: Strategy, process: ProcessInfo) -> ControlPlane:
    """Join the control plane of the job, with a mesh in which each worker holds a whole model, until another is set."""
    if strategy.store_can.transport == 'horovod':
        if watchdog.is_on():  # it ends what waits in vain, and Gloo, after 30 s, what would not
            os.environ.setdefault('HOROVOD_GLOO_TIMEOUT_SECONDS', str(GLOO))
        if not mx.context.num_gpus():  # where Horovod's looking around costs a core's time
            os.environ.update({**horovod_settings(expected_step(config, process)), **os.environ})
    return connect(process, os.environ, seconds=watchdog.START * watchdog.TOGETHER * config.runtime.deadline)


@contextlib.contextmanager
def told(trainer: Trainer) -> Iterator[None]:
    """Tell whoever looks at the run, and the launcher, should this end by an error, after how many updates."""
    try:
        yield
    except Exception as error:
        report.tell(step=trainer.step)
        tell_failure(trainer, str(error))
        raise


def tell_failure(trainer: Trainer, why: str) -> None:
    """Tell whoever looks at the run why it ends."""
    text = ' '.join(why.split())[:1000]
    trainer.logger.status(state='failed', step=trainer.step, error=text)
    notify(trainer, event='failure', causes=[text], restart_in=None)


def notify(trainer: Trainer, **event: Any) -> None:
    """Tell `notify.command` of an event, on rank 0 and if no launcher does."""
    command = trainer.config.notify.command
    if command and not isinstance(trainer.logger, Quiet) and report.FILE not in os.environ:
        problem = send(command, {'run': str(folder_of(trainer.config)), 'step': trainer.step, **event})
        if problem:
            trainer.logger.message(f'warning: {problem}')


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


def find_checkpoint(config: Config, task: Task, control: ControlPlane, log: Callable[[str], None],
                    restarted: bool = False) -> Optional[Checkpoint]:
    """Find what this run goes on from, in all workers; only rank 0 reads it, and has its arrays.

    Raises:
        ValueError: see `checkpoint_to_resume`.
    """
    steps, hosts = zip(*control.all_gather('checkpoints', [newest_here(config), platform.node()]))

    def find() -> Optional[Checkpoint]:
        if config.resume == 'auto' or restarted:
            check_shared(config, steps, hosts)
        with watchdog.doing('the checkpoint to go on from'):
            saved = checkpoint_to_resume(config, task, log, restarted)
        if restarted and not saved:
            log(f'warning: this job was restarted, and there is no checkpoint in {folder_of(config)}: it begins anew')
        return saved
    return in_all_workers(find, control)


def introduce(trainer: Trainer, checkpoint: Optional[Checkpoint], strategy: Strategy, process: ProcessInfo,
              table: str = '') -> None:
    """Say what is about to be trained, on what, and from where; `table` says which worker holds what, and why."""
    config, timetable, say = trainer.config, trainer.timetable, trainer.logger.message
    say(configfile.to_yaml(config).rstrip())
    # Of a part of the network the whole is asked for, which is built for that.
    shapes = trainer.task.shapes().values() if trainer.parts else [
        spec.parameter.shape for spec in parameter_specs(trainer.placement.net) if spec.trainable]
    sizes = [int(np.prod(shape)) for shape in shapes]
    operations = trainer.task.multiply_adds() / 1e9
    say(f'{config.model.type}: {sum(sizes):,} parameters, {operations:.2f} GFLOPs an image (multiply-adds of a forward '
        'pass)')
    say(f'{len(trainer.task.source):,} training images, {timetable.per_epoch:,} steps an epoch, {timetable.total:,} in '
        f'all, on {", ".join(map(str, trainer.placement.contexts))}')
    say(trainer.placement.net.backend.describe())
    if process.size > 1:
        servers = f' through {process.servers} server{"s"[:process.servers > 1]}' if process.servers else ''
        say(f'{process.size} workers{servers}, {strategy.aggregation} over {strategy.store}; images a step: '
            f'{list(trainer.split.images)}')
    if table:
        say(table)
    if trainer.evaluator:
        say(f'{trainer.evaluator.images:,} held-out images')
    else:
        say('no validation: set data.val_path or data.val_fraction to measure on held-out images')
    if checkpoint:
        say(f'going on from {checkpoint.path}' if checkpoint.step < timetable.total
            else f'{checkpoint.path} is the end of this run')


def conclude(trainer: Trainer, folder: Path, finished: bool) -> None:
    """Say what a reader wants to know last: how good it got, and where everything is."""
    say, control = trainer.logger.message, trainer.control
    if trainer.plateau.ended:
        say(f'stopped: {trainer.config.train.stop_early} validations without a new best (train.stop_early)')
    evaluator = trainer.evaluator
    rows = control.broadcast_object('validations', lambda: [row for row in read_metrics(folder)
                                                            if evaluator and evaluator.metric.name in row])
    if finished and rows and evaluator:
        with trainer.consolidated_model():
            conclusion = evaluator.conclude(rows, trainer.timetable.total, trainer.placement, folder)
        if conclusion:
            say(conclusion)
    if any((folder / 'pictures').glob('*')):
        say(f'pictures: {folder}/pictures')
    say(f'curves: mxsimmim plot {folder}')
