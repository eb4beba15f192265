"""Trains small networks of which each worker holds a part; what comes out is what one process makes of them.

    layouts.py CASES KEY=VALUE...

CASES are of `CASES`, with commas; the keys are those of section `parallel`, and `devices`, of each worker. Each case is
trained by rank 0 alone as well, and what both have after ten steps is compared there. All workers count the images that
they decode.
"""
import os
import sys
from unittest import mock

import numpy as np

from mxsimmim.config import Config
from mxsimmim.data import loader
from mxsimmim.interop import official
from mxsimmim.parallel.strategies import strategy_of
from mxsimmim.runtime.process import process_info
from mxsimmim.training.build import build_trainer
from mxsimmim.training.checkpoint import newest
from mxsimmim.training.restore import in_all_workers
from mxsimmim.training.run_folder import folder_of
from mxsimmim.training.start import joined

STEPS, IMAGES, SEED = 10, 8, 3
VIT = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, drop_path=0.2)
SWIN = dict(type='swin', img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4,
            drop_path=0.2)
# Pre-training of the one clips what is accumulated after each part; fine-tuning of the other mixes pairs of images.
PRETRAIN = dict(model=SWIN, mask=dict(patch_size=8), train=dict(accumulate=2),
                optim=dict(recipe='reference', clip_grad=0.5))
FINETUNE = dict(task='classify', model=VIT, train=dict(ema=0.5), optim=dict(clip_grad=0.5, layer_decay=0.7),
                augment=dict(mixup=0.8, cutmix=1, rand_ops=2))
CASES = {  # sections; those of one process, or the case before that must have the same bits; how far weights may differ
    'pretrain': (PRETRAIN, PRETRAIN, 1e-5),
    'finetune': (FINETUNE, FINETUNE, 1e-5),
    'sharded': (dict(FINETUNE, parallel=dict(shard_optimizer=True)), 'finetune', 0),
    '2bit': (dict(FINETUNE, train=dict(ema=0.5, compression='2bit', threshold=1e-3),
                  parallel=dict(shard_optimizer=True)), None, 0),  # another run, which is interrupted
    'fp16': (dict(PRETRAIN, train=dict(accumulate=2, compression='fp16')), PRETRAIN, 3e-3),
}


def configured(sections, **parallel):
    """The configuration of a case."""
    devices = int(parallel.pop('devices', 1))
    common = dict(parallel=parallel, devices=[f'cpu({number})' for number in range(devices)], seed=SEED,
                  data=dict(path='digits', val_fraction=0.05, threads=1), runtime=dict(threads=1),
                  train=dict(batch_size=IMAGES, length=1000, check_replicas=5),
                  optim=dict(warmup=0, schedule='constant', base_lr=1e-1), log=dict(every=1000))
    return Config(**{key: {**common.get(key, {}), **value} if isinstance(value, dict) else value
                     for key, value in {**common, **sections}.items()})


def trained(trainer):
    """Whole arrays by group, in rank 0; losses and evaluation of the job; images that this worker decoded in both."""
    counts, losses = [], []
    with mock.patch.object(loader, 'decode', side_effect=loader.decode) as decode:
        for _, batch in trainer.loader.iterate(0, STEPS):
            losses.append(trainer.train_step(batch).asnumpy()[0])
            trainer.check_replicas()
        counts.append(decode.call_count)
        with trainer.consolidated_model():
            values = trainer.evaluator.evaluate(trainer.placement)
        counts.append(decode.call_count - counts[0])
    control = trainer.control
    losses = np.sum(control.all_gather('losses', np.array(losses) * control.mesh.reports), 0)
    values = {key: value for key, value in values.items() if 'second' not in key}
    return arrays_of(trainer), {**values, 'losses': losses}, counts


def arrays_of(trainer):
    """Whole arrays by group, in rank 0."""
    moments = trainer.update_rule.state_dict()
    groups = {'weights': lambda: official.export_weights(trainer.placement.net), 'optimizer': lambda: moments}
    if trainer.average:
        groups['ema'] = trainer.average.arrays
    return {group: dict(arrays) if not hasattr(arrays, 'kinds') else dict(zip(arrays.kinds, arrays.values))
            for group, arrays in trainer._whole(**groups).items()}


def check_counts(trainer, counts):
    """The first stage decodes images, and in pre-training the last one."""
    mesh = trainer.control.mesh
    stages = {0} if trainer.config.task == 'classify' else {0, mesh.pipeline - 1}
    decodes = mesh.coordinate('pipeline') in stages
    trained, evaluated = STEPS * trainer.split.images[mesh.coordinate('data')], trainer.evaluator.images / mesh.data
    assert counts[0] == trained * decodes and abs(counts[1] - evaluated * decodes) < 1, (mesh, counts)


def compare(name, ours, expected, tolerance):
    """Arrays of all groups together, each relative to all of its group; with a tolerance of 0 bit for bit."""
    assert set(ours) == set(expected), name
    for group, arrays in expected.items():
        assert set(ours[group]) == set(arrays), f'{name} {group}'
        if not tolerance:
            assert all(ours[group][key].tobytes() == value.tobytes() for key, value in arrays.items()), name
        one, other = (np.concatenate([found[key].ravel() for key in sorted(arrays)]) for found in (ours[group], arrays))
        difference = np.linalg.norm(one - other) / np.linalg.norm(other)
        print(name, group, difference, flush=True)
        # Moments are of gradients, which differ by more than the weights that they have made.
        assert difference <= tolerance * (10 if group == 'optimizer' else 1), f'{name} {group} {difference}'


def goes_on(configuration, process, communicator):
    """Trains, and again the second half from a checkpoint of the first: the same bits, also of each one's residuals."""
    def steps(trainer, first, last):
        return [trainer.train_step(batch).asnumpy() for _, batch in trainer.loader.iterate(first, last)]

    def residuals(trainer):
        return np.concatenate([residual for exchange in trainer.update_rule._exchanges
                               for residual in exchange.transport.residuals])
    half, control, folder = STEPS // 2, communicator.control, folder_of(configuration) / 'checkpoints'
    whole = build_trainer(configuration, process, communicator=communicator)
    steps(whole, 0, half)
    before = residuals(whole)
    whole.save()
    expected = steps(whole, half, STEPS)
    saved = in_all_workers(lambda: newest(folder, print), control)
    ours = build_trainer(configuration, process, communicator=communicator, checkpoint=saved)
    assert ours.step == half and np.array_equal(residuals(ours), before) and np.mean(before != 0) > 0.5
    assert len(set(control.all_gather('residuals', float(before.sum())))) == control.size
    np.testing.assert_array_equal(steps(ours, half, STEPS), expected)
    np.testing.assert_array_equal(residuals(ours), residuals(whole))
    arrays, others = arrays_of(ours), arrays_of(whole)
    if control.rank == 0:
        compare('2bit', arrays, others, 0)


def main():
    cases, *words = sys.argv[1:]
    process, keys = process_info(os.environ), dict(word.split('=') for word in words)
    config = configured(PRETRAIN, **keys)
    devices = len(config.devices)
    with joined(config, strategy_of(config, process, devices), process, devices) as communicator:
        before = {}
        for name in cases.split(','):
            sections, other, tolerance = CASES[name]
            if other is None:
                goes_on(configured(sections, **keys), process, communicator)
                continue
            trainer = build_trainer(configured(sections, **keys), process, communicator=communicator)
            ours, values, counts = before[name] = trained(trainer)
            check_counts(trainer, counts)
            if process.rank == 0:
                expected = before[other] if isinstance(other, str) else trained(build_trainer(configured(other)))
                compare(name, ours, expected[0], tolerance)
                assert set(values) == set(expected[1])
                for key, value in values.items():
                    np.testing.assert_allclose(value, expected[1][key], rtol=max(tolerance, 1e-5), err_msg=key)
    print('rank', process.rank, 'is done', flush=True)


if __name__ == '__main__':
    main()
