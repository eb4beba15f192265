"""Pre-training: the loop, and what it does besides updating."""
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import mxnet as mx
import numpy as np

from . import configfile
from .config import Config, Duration
from .checkpoint import Checkpoint, save
from .data.loader import Loader
from .data.sampling import batch_at, steps_per_epoch
from .data.sources import Source, hold_out, open_source
from .data.transforms import PretrainTransform
from .interop import official
from .meter import Meter
from .models import build_simmim, named_parameters
from .models.cost import multiply_adds
from .monitor import Monitor, read_metrics
from .optim import AdamW, learning_rates, weight_decays
from .parallel.aggregate import SyncGradients
from .parallel.placement import Replicated, contexts_of
from .run import Stop, checkpoint_to_resume, folder_of, locked, versions
from .validation import SEED as VALIDATION_SEED, Validation, table


class Plan(NamedTuple):
    """When what happens, in steps."""
    per_epoch: int
    total: int
    validate: int
    save: int
    keep_every: Optional[int]


class Run(NamedTuple):
    """What the loop works with."""
    config: Config
    plan: Plan
    source: Source
    loader: Loader
    placement: Replicated
    aggregation: SyncGradients
    optimizer: AdamW
    meter: Meter
    monitor: Monitor
    validation: Optional[Validation]


def pretrain(config: Config) -> int:
    """Trains until the end, an error or a signal; returns the exit status, 128 + its number for a signal.

    Raises:
        ValueError: whatever the user can mend; checkpoints written before stay whole.
    """
    contexts = contexts_of(config.devices)
    source, held_out = open_data(config)
    plan = plan_of(config, len(source))
    folder = folder_of(config)
    with locked(folder), Stop() as stop:
        notes: List[str] = []
        saved = checkpoint_to_resume(config, len(source), notes.append)
        (folder / 'config.yaml').write_text(configfile.to_yaml(config), encoding='utf-8')
        start = saved.step if saved else 0
        with Monitor(folder, plan.total, start) as monitor:
            for note in notes:
                monitor.message(note)
            run = assemble(config, plan, source, held_out, contexts, saved, monitor)
            introduce(run, saved)
            train(run, start, stop)
            conclude(run, folder, not stop.signal)
    return 128 + stop.signal if stop.signal else 0


def train(run: Run, start: int, stop: Stop) -> None:
    """From disk to update: sampling, loader, placement, aggregation."""
    config, plan = run.config, run.plan
    rate = learning_rates(config.optim, config.train, plan.per_epoch, plan.total)
    between = run.aggregation.clip_partial if config.optim.recipe == 'reference' else None
    if start == 0 and config.validation.at_start:
        validate(run, 0)
    for step, batch in run.loader.iterate(start, plan.total):
        loss = run.placement.forward_backward(batch, between)
        report(run, step)  # on the updates before, while the device works on this one
        run.meter.add(step + 1, rate(step), run.aggregation.step(step, rate(step), loss))
        done = step + 1
        end = done == plan.total or stop.signal
        if done % plan.validate == 0 or done == plan.total:
            validate(run, done)
        if done % plan.save == 0 or end:
            save_checkpoint(run, done)
        if end:
            break
    if stop.signal:
        run.monitor.message(f'stopped by signal {stop.signal}: step {done} is saved, the same command goes on from it')


def open_data(config: Config) -> Tuple[Source, Optional[Source]]:
    """Training images, held-out images or None."""
    source = open_source(config.data.path)
    if config.data.val_path:
        return source, open_source(config.data.val_path)
    if config.data.val_fraction:
        return hold_out(source, config.data.val_fraction, VALIDATION_SEED)
    return source, None


def plan_of(config: Config, samples: int) -> Plan:
    """The plan for this many training images.

    Raises:
        ValueError: the batch is larger than the data, or the warm-up longer than the run.
    """
    per_epoch = steps_per_epoch(samples, config.train.batch_size)
    total = max(1, config.train.length.steps(per_epoch))
    warmup = config.optim.warmup.steps(per_epoch, total)
    if warmup > total:
        raise ValueError(f'optim.warmup={config.optim.warmup} is {warmup} steps, longer than the {total} of '
                         f'train.length={config.train.length}: shorten the warm-up, for instance optim.warmup=5%')

    def period(length: Duration) -> int:
        return max(1, length.steps(per_epoch, total))

    keep_every = config.checkpoint.keep_every
    return Plan(per_epoch, total, period(config.validation.every), period(config.checkpoint.every),
                period(keep_every) if keep_every else None)


def assemble(config: Config, plan: Plan, source: Source, held_out: Optional[Source],
             contexts: List[mx.Context], saved: Optional[Checkpoint], monitor: Monitor) -> Run:
    """Builds everything the loop needs, from initial weights or from a checkpoint."""
    train, optim = config.train, config.optim
    net = build_simmim(config.model, None if saved else config.seed)
    if saved:
        official.assign(net, saved.arrays['weights'])
    placement = Replicated(net, contexts, config.data.mean, config.data.std, train.accumulate)
    parameters = named_parameters(net)
    decays = weight_decays(parameters, optim.recipe, config.model.type, optim.weight_decay)
    optimizer = AdamW(parameters, decays, optim)
    if saved:
        optimizer.load(saved.arrays['optimizer'])
    aggregation = SyncGradients(parameters, optimizer, train.store, optim.clip_grad)

    def batch(step: int) -> Tuple[int, np.ndarray]:
        return batch_at(step, len(source), train.batch_size, config.seed)

    def samples(step: int) -> str:
        names = [source.name(int(i)) for i in batch(step - 1)[1]]
        listed = folder_of(config) / 'bad-samples.txt'
        listed.write_text('\n'.join(names) + '\n', encoding='utf-8')
        return ', '.join(names[:8]) + (f' and {len(names) - 8} more, all in {listed}' if len(names) > 8 else '')

    loader = Loader(source, PretrainTransform(config.data, config.mask, config.model), batch, config.seed,
                    config.data.threads, config.data.prefetch, config.data.max_broken, monitor.message)
    meter = Meter(train.max_bad_steps, samples, saved.state['meter'] if saved else None)
    validation = Validation(config, held_out) if held_out else None
    return Run(config, plan, source, loader, placement, aggregation, optimizer, meter, monitor, validation)


def introduce(run: Run, saved: Optional[Checkpoint]) -> None:
    """Says what is about to be trained, on what, and from where."""
    config, plan, say = run.config, run.plan, run.monitor.message
    say(configfile.to_yaml(config).rstrip())
    sizes = [int(np.prod(p.shape)) for p in named_parameters(run.placement.net).values()]
    say(f'{config.model.type}: {sum(sizes):,} parameters, {multiply_adds(config.model) / 1e9:.2f} GFLOPs an image '
        '(multiply-adds of a forward pass)')
    say(f'{len(run.source):,} training images, {plan.per_epoch:,} steps an epoch, {plan.total:,} in all, on '
        + ', '.join(map(str, run.placement.contexts)))
    if run.validation:
        say(f'{run.validation.images:,} held-out images')
    else:
        say('no validation: set data.val_path or data.val_fraction for a loss on held-out images')
    if saved:
        say(f'going on from {saved.path}' if saved.step < plan.total else f'{saved.path} is the end of this run')


def report(run: Run, done: int) -> None:
    """Writes down the updates since the last record, if a record is due after update number `done`."""
    due = done % run.config.log.every == 0 or done == run.plan.total
    if not due or not run.meter.pending:
        return
    values = run.meter.summary()
    values['images_per_second'] = values.pop('steps_per_second') * run.config.train.batch_size
    values['broken_images'] = run.loader.broken
    run.monitor.write(done, {'epoch': done / run.plan.per_epoch, **values})


def validate(run: Run, done: int) -> None:
    """Loss and pictures on the held-out images, if there are any."""
    if not run.validation:
        return
    report(run, done)
    run.meter.read()
    began = time.monotonic()
    run.monitor.write(done, {'epoch': done / run.plan.per_epoch, **run.validation.measure(run.placement)})
    if run.config.validation.pictures:
        run.monitor.picture(done, 'reconstruction', run.validation.picture(run.placement))
    run.meter.pause(time.monotonic() - began)


def save_checkpoint(run: Run, done: int) -> None:
    """Everything that the rest of the run depends on, after update number `done`."""
    report(run, done)
    run.meter.read()
    began = time.monotonic()
    arrays = {'weights': official.extract(run.placement.net), 'optimizer': run.optimizer.arrays()}
    state = {'config': configfile.to_dict(run.config), 'samples': len(run.source), 'versions': versions(),
             'epoch': done // run.plan.per_epoch, 'step_in_epoch': done % run.plan.per_epoch,
             'meter': run.meter.state()}
    save(folder_of(run.config) / 'checkpoints', done, arrays, state, run.config.checkpoint.keep, run.plan.keep_every)
    run.meter.pause(time.monotonic() - began)


def conclude(run: Run, folder: Path, finished: bool) -> None:
    """What a reader wants to know last: how good it got, and where everything is."""
    losses: Dict[int, float] = {row['step']: row['val_loss'] for row in read_metrics(folder) if 'val_loss' in row}
    last = losses.get(run.plan.total)
    if finished and last is not None and not run.config.model.norm_targets:
        run.monitor.message(table(losses.get(0), last, run.validation.baselines()))
    if losses and run.config.validation.pictures:
        run.monitor.message(f'pictures: {folder}/pictures')
    run.monitor.message(f'curves: mxsimmim plot {folder}')
