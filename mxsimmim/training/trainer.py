"""The loop of pre-training and fine-tuning, and what it does besides updating."""
import contextlib
import functools
import math
import platform
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np

from ..config import Config, configfile
from ..data.batch_split import BatchSplit
from ..data.loader import Batch, Loader
from ..data.sampling import batch_at, data_step
from ..interop import official
from ..models import parameter_specs
from ..optim import learning_rates
from ..parallel.asynchronous import AsynchronousUpdate
from ..parallel.average import WeightAverage
from ..parallel.parts import ModelParts
from ..parallel.placement import Placement
from ..parallel.replicas import compare
from ..parallel.updates import SynchronousUpdate
from ..runtime import report, watchdog
from ..system.arrays import Arrays, Gathered
from ..system.points import reach
from ..system.text import encode, one_line
from ..tasks.task import Task
from . import checkpoint, restore
from .plateau import PlateauTracker
from .run_folder import Stop, folder_of, second_folder, versions
from .run_logger import Quiet, RunLogger
from .saver import Saver, SecondPlace
from .status import stragglers, to_name
from .step_metrics import LossSpike, Row, StepMetrics, TooManyBadSteps
from .timetable import Alarm, Timetable

UpdateRule = Union[SynchronousUpdate, AsynchronousUpdate]
SHOWN = 8  # samples that an error names


class Trainer:
    """Trains a network from batches to updates; `build.build_trainer` makes one of a configuration.

    Attributes:
        step: updates done so far.
        placement: holds the network, `placement.net`.
        update_rule: how the workers of the job agree on an update.
        parts: the workers that hold one model together; None where each holds a whole one.
        split: which part of each batch is this worker's.
        hosts: of all workers, by rank.
        saver: writes checkpoints; its `wait` returns when the one under way is written.
        skipped_batches: which of the data's order were left out after spikes of the loss, as `data_step` takes them.
    """

    def __init__(self, config: Config, timetable: Timetable, task: Task, placement: Placement,
                 update_rule: UpdateRule, split: BatchSplit, average: Optional[WeightAverage] = None,
                 logger: Union[RunLogger, Quiet, None] = None, step: int = 0,
                 state: Optional[Mapping[str, Any]] = None, parts: Optional[ModelParts] = None):
        """Keep the parts; `average` is that of train.ema, `state` what `state_dict` returned after `step` updates."""
        state = state or {}
        self.config, self.timetable, self.task, self.step = config, timetable, task, step
        self.placement, self.update_rule, self.split, self.average = placement, update_rule, split, average
        self.logger, self.parts = logger or Quiet(), parts
        self.control = update_rule.workers.control
        self.loader = Loader(task.source, task.transform(), self.samples, config.seed, config.data.threads,
                             config.data.prefetch, config.data.max_broken, self.logger.message, placement.inputs)
        self.metrics = self._metrics(state)
        self.skipped_batches = restore.skipped_batches(state)
        self.evaluator = task.evaluator(self.control)
        self.plateau = PlateauTracker(config.train, state.get('progress'))
        self._rate = learning_rates(config.optim, config.train, timetable.per_epoch, timetable.total)
        self._on_micro_batch = None
        self.hosts: List[str] = self.control.all_gather('hosts', platform.node())
        self._slow: List[int] = []  # ranks of the last record's stragglers
        self._named: Dict[int, float] = {}  # when each was named last
        second, keep = second_folder(config), config.checkpoint.keep
        self.saver = Saver(self.logger.message, SecondPlace(second, keep, timetable.keep_every, self.logger.message)
                           if second and self.control.rank == 0 else None)
        self._alarm = Alarm(timetable.save_seconds if self.control.rank == 0 else None)
        if config.optim.recipe == 'reference' and config.train.accumulate > 1:
            assert isinstance(update_rule, SynchronousUpdate)
            self._on_micro_batch = update_rule.clip_partial

    def fit(self, stop: Optional[Stop] = None) -> int:
        """Train to the end of the timetable; return 0, or the number of the signal that ended it before.

        The first of many workers that `stop` has told of a signal stops all of them, after the same step.

        Raises:
            TooManyBadSteps: naming the samples of the last one.
            ValueError: what a user can mend: replicas that differ, images that cannot be read, a full disk.
        """
        stop = stop or Stop()
        with self.saver:
            if self.step == 0 and self.config.train.rollback:
                self.save()  # so that there is always a checkpoint before a spike
            while True:
                try:
                    return self._fit(stop)
                except LossSpike as found:
                    spike = found
                self.saver.wait()
                self.roll_back(spike)

    def _fit(self, stop: Stop) -> int:
        """As `fit`, but a spike of the loss ends it."""
        if self.plateau.ended:  # before this process began
            return 0
        try:
            stop_at = self._train(stop)
        except TooManyBadSteps as error:
            raise TooManyBadSteps(f'{error}. {self._name_samples(error.step)}', error.step) from None
        if stop_at is None:
            return 0
        self.logger.message(
            f'stopped by signal {stop.signal}: step {self.step} is saved, the same command goes on from it'
            if stop.signal else f'stopped at step {self.step}, which is saved, because another worker was')
        return stop.signal or signal.SIGTERM

    def _train(self, stop: Stop) -> Optional[int]:
        """Make the updates that are left, and what is due between them; return the step at which `stop` ended this."""
        if self.step == 0 and self.config.validation.at_start:
            self.validate()
        for batch in self.metrics.clock.watch(self._batches()):
            with watchdog.doing(watchdog.EXCHANGE, together=True):
                self.train_step(batch)
                self.saver.check()
                validating, saving = self._is_due(self.timetable.validate), self._is_due(self.timetable.save)
                agreed = self.update_rule.poll(self.step, bool(stop.signal), self._alarm.rings(), validating or saving)
                self.check_replicas()
            if validating:
                with watchdog.doing('validation', together=True):
                    self.validate()
            ending = self.step in (agreed.stop_at, self.timetable.total) or self.plateau.ended
            if saving or agreed.save or ending:
                with watchdog.doing(f'the checkpoint of step {self.step}', together=self.control.rank > 0):
                    self.save(wait=ending)
            if ending:
                return agreed.stop_at
        return None

    def train_step(self, batch: Batch) -> mx.nd.NDArray:
        """Make the next update from this worker's part of a batch; nothing here waits for the device but what logs.

        Returns (3,) on the first device: loss, gradient norm before clipping, 1 if the update was applied.
        """
        done = self.step + 1
        timed = self.metrics.clock if self._is_timed(done) else None
        if timed:
            timed.start()
        divisor = self.update_rule.loss_divisor(len(batch.index))
        loss = self.placement.forward_backward(batch, divisor, self._on_micro_batch)
        self.log()  # the updates before, while the device works on this one
        lr, floor = (self._rate(self.step, scale) * self.plateau.factor for scale in (1, 0))
        reach('update.before')
        stats = self.update_rule.step(self.step, lr, loss, timed, floor)
        reach('update.after')
        self.metrics.add(done, lr, stats)
        if self.average:
            self.average.update(done)
        self.step = done
        return stats

    def log(self) -> None:
        """Write down the updates since the last record, if a record is due after those done so far."""
        if not self._is_due(self.config.log.every) or not self.metrics.pending:
            return
        values = self.metrics.summary()
        values['images_per_second'] = values.pop('steps_per_second') * self.config.train.batch_size
        times = ('data_seconds', 'compute_seconds', 'communication_seconds')
        own = self.loader.broken if self.control.mesh.begins else 0  # others read the same images, or none
        (*seconds, broken), more = self.update_rule.observed([values[name] for name in times] + [own])
        values.update(zip(times, seconds), broken_images=round(broken * self.control.size), **more)
        per_second = values['images_per_second'] / self.config.train.batch_size
        watchdog.measured(per_second, self.config.log.every)
        # data_seconds are of every step, compute_seconds of a timed one: what a worker needs by itself.
        steps = [row[0] + row[1] for row in self.update_rule.by_worker]
        self._write(values, steps_per_second=per_second,
                    workers=[{'host': host, 'seconds': each} for host, each in zip(self.hosts, steps)])
        self._name_stragglers(steps)

    def validate(self) -> Dict[str, float]:
        """Measure and draw on the held-out images, keep the best weights if the task is to.

        Returns the values; {} without held-out images.
        """
        if not self.evaluator:
            return {}
        with self._other_work(), self.consolidated_model():
            values = self.evaluator.evaluate(self.placement)
            self._write(values)
            best = self.plateau.observe(self.evaluator.metric.score(values))
            if self.control.rank == 0:
                self.logger.extra('a picture', self._draw)
            elif self.parts and self.control.mesh.coordinate('data') == 0:
                self._draw()  # rank 0 has but a part of the network
            if best and self.task.keeps_best:
                arrays = self._whole(weights=self._weights)
                if self.control.rank == 0:
                    checkpoint.save(folder_of(self.config) / 'best', self.step, arrays, self.state_dict(), keep=1)
        return values

    def save(self, wait: bool = True) -> None:
        """Write a checkpoint: everything that the rest of the run depends on.

        With `wait` it is there when this returns. Otherwise only its arrays have been taken, and a thread writes them
        while training goes on; where several workers have them, rank 0 writes them as they come, and the thread does
        what then takes longer, flushing and checksums.

        Raises:
            CheckpointError: this one, or the one before, could not be written.
        """
        with self._other_work(), self.update_rule.consolidated_weights():
            self.saver.wait_for_turn()
            own = self.update_rule.own_state()  # of each worker, who speak to each other here
            moments = self.update_rule.state_dict()  # to which every worker contributes
            averaged = {'ema': self.average.arrays} if self.average else {}
            arrays = self._whole(weights=self._weights, optimizer=lambda: moments, **averaged)
            if own:
                arrays['workers'] = own.gathered()
            if self.control.rank == 0:
                fill = functools.partial(checkpoint.fill, folder_of(self.config) / 'checkpoints', self.step, arrays,
                                         self.state_dict())
                gathered = any(isinstance(named, Gathered) for named in arrays.values())
                write = functools.partial(self._publish, fill() if gathered else None, fill, self.step)
                if wait:
                    self.saver.run(write)
                else:
                    self.saver.start(write)

    def roll_back(self, found: LossSpike) -> None:
        """Go on from the newest checkpoint, which is before this spike, with the batches after the spike's.

        Updates, and the learning rate with them, count on from the checkpoint's step. All workers do this at once.

        Raises:
            ValueError: see `restore.before_spike`.
        """
        saved, told = restore.before_spike(self.config, found, self.control, self.logger.message)
        restore.load_weights(self.placement.net, saved.arrays.get('weights'), self.parts)
        restore.load_state(self.update_rule, self.average, self.parts, saved, self.logger.message)
        self.skipped_batches = [*restore.skipped_batches(saved.state), (saved.step, found.step - saved.step)]
        self.step, self.metrics = saved.step, self._metrics(saved.state)
        self.plateau = PlateauTracker(self.config.train, saved.state['progress'])
        if self.control.rank == 0:
            for name in ('checkpoints', 'best'):
                checkpoint.discard_after(folder_of(self.config) / name, self.step)
        self.logger.rewind(self.step)
        self.logger.event(self.step, 'rollback', spike_step=found.step, **found.spike._asdict())
        self.logger.message(f'warning: {told}: back to the checkpoint of step {self.step}, without the '
                            f'{found.step - self.step} batches since then')
        self.save()  # that these batches are left out

    def state_dict(self) -> Dict[str, Any]:
        """Return what a checkpoint holds besides arrays, JSON-ready."""
        epoch, step = divmod(self.step, self.timetable.per_epoch)
        return {'config': configfile.to_dict(self.config), 'samples': len(self.task.source), 'versions': versions(),
                'epoch': epoch, 'step_in_epoch': step, 'images': list(self.split.images),
                'meter': self.metrics.state(), 'progress': self.plateau.state(),
                'skipped_batches': [list(each) for each in self.skipped_batches], **self.task.state()}

    def check_replicas(self) -> None:
        """Compare the weights of all replicas, if a comparison is due and they must be equal now.

        Raises:
            ReplicasDiffer: see `replicas.compare`.
        """
        check = self.timetable.check
        if check and self.step % check == 0 and self.update_rule.in_sync(self.step):
            with self.update_rule.consolidated_weights():
                compare(parameter_specs(self.placement.net), self.control, self.step)

    @contextlib.contextmanager
    def consolidated_model(self) -> Iterator[None]:
        """Hold in the network, while entered, what the run would hand out now: of all workers, averaged if so set."""
        with self.update_rule.consolidated_weights():
            with self.average.applied() if self.average else contextlib.nullcontext():
                yield

    def samples(self, step: int) -> Tuple[int, np.ndarray]:
        """Return the epoch of update number `step`, counted from 0, and the indices (B,) of this worker's samples."""
        epoch, index = batch_at(data_step(step, self.skipped_batches), len(self.task.source),
                                self.config.train.batch_size, self.config.seed)
        return epoch, index[self.split.part]

    def _batches(self) -> Iterator[Batch]:
        """This worker's parts of the batches that are left."""
        start, per_epoch, total = self.step, self.timetable.per_epoch, self.timetable.total
        follow_speed = self.config.data.worker_weights == 'auto'
        while start < total:
            end = min((start // per_epoch + 1) * per_epoch, total) if follow_speed else total
            for _, batch in self.loader.iterate(start, end):
                yield batch
            if follow_speed:
                self._rebalance()
            start = end

    def _metrics(self, state: Mapping[str, Any]) -> StepMetrics:
        """Return metrics that go on from a checkpoint's state."""
        def on_skip(row: Row) -> None:
            self.logger.event(row.step, 'skipped', cause='gradient' if math.isfinite(row.loss) else 'loss')
        train = self.config.train
        return StepMetrics(train.max_bad_steps, state.get('meter'), self.update_rule.combine,
                           train.spike if train.rollback else None, on_skip)

    def _rebalance(self) -> None:
        """Give each worker images in proportion to how fast it computed those it had."""
        before, steps = self.split.images, self.metrics.clock.steps
        seconds = self.control.all_gather('speed', np.median(steps))
        steps.clear()
        if self.split.rebalance(seconds):
            self.logger.message(f'images a step, by measured speed: {list(self.split.images)} (before: {list(before)})')

    def _is_due(self, period: int) -> bool:
        return self.step % period == 0 or self.step == self.timetable.total

    def _is_timed(self, done: int) -> bool:
        """Whether to measure where a step's time goes: the last of each log record and of each epoch."""
        return (done % self.config.log.every == 0 or done % self.timetable.per_epoch == 0
                or done == self.timetable.total)

    @contextlib.contextmanager
    def _other_work(self) -> Iterator[None]:
        """While entered, time does not count as training's; what was noted before is logged or read first."""
        self.log()
        self.metrics.read()
        began = time.monotonic()
        yield
        self.metrics.pause(time.monotonic() - began)

    def _write(self, values: Mapping[str, float], **status: Any) -> None:
        self.logger.write(self.step, {'epoch': self.step / self.timetable.per_epoch, **values}, **status)

    def _name_stragglers(self, seconds: Sequence[float]) -> None:
        """Say which workers, that need so many seconds a step, are much slower than the others."""
        slow, now = stragglers(seconds), time.monotonic()
        for rank in to_name(slow, self._slow, self._named, now):
            self._named[rank] = now
            self.logger.message(f'warning: rank {rank} on {self.hosts[rank]} needs {seconds[rank]:.3g} s a step, over '
                                f'twice the median of {len(seconds)} workers, and all wait for it: '
                                'data.worker_weights=auto gives it fewer images')
        self._slow = slow

    def _draw(self) -> None:
        """The picture of a validation, if there is to be one."""
        assert self.evaluator
        picture = self.evaluator.picture(self.placement)
        if picture is not None:
            self.logger.picture(self.step, self.evaluator.drawn, picture)

    def _whole(self, **groups: Callable[[], Union[Arrays, Gathered]]) -> Dict[str, Union[Arrays, Gathered]]:
        """On rank 0 the arrays of the whole model; every worker calls this, and others that hold parts send these."""
        if self.parts:
            return dict(self.parts.gather({name: make() for name, make in groups.items()}))
        return {name: make() for name, make in groups.items()} if self.control.rank == 0 else {}

    def _publish(self, filled: Optional[checkpoint.Filled], fill: Callable[[], checkpoint.Filled], step: int) -> Path:
        """Finish a checkpoint, in whatever thread, and tell the launcher of it."""
        with watchdog.doing(f'the checkpoint of step {step}'):
            path = checkpoint.publish(filled or fill(), self.config.checkpoint.keep, self.timetable.keep_every)
        report.tell(checkpoint=step)
        return path

    def _weights(self) -> Dict[str, np.ndarray]:
        return official.export_weights(self.placement.net)

    def _name_samples(self, step: int) -> str:
        """Say which samples this worker had in update number `step`, counted from 1; list all in a file of its own."""
        names = [one_line(self.task.source.name(int(i))) for i in self.samples(step - 1)[1]]
        rank, size = self.control.rank, self.control.size
        listed = folder_of(self.config) / (f'bad-samples-{rank}.txt' if size > 1 else 'bad-samples.txt')
        text = f'Samples of step {step}{f" that rank {rank} had" if size > 1 else ""}: {", ".join(names[:SHOWN])}'
        if len(names) > SHOWN:
            text += f' and {len(names) - SHOWN} more, all in {listed}'
        try:
            listed.parent.mkdir(parents=True, exist_ok=True)
            listed.write_bytes(encode('\n'.join(names) + '\n'))
        except OSError as error:  # a full disk must not hide what went wrong first
            text += f' (which cannot be written: {error.strerror})'
        return text
