"""Trains small networks with and without parallel.shard_optimizer; every worker compares all that comes out.

    sharded.py NETWORKS exact|close FROM TO [KEY=VALUE...]

NETWORKS are of `NETWORKS`, with commas; the keys are those of section `parallel`. What comes out must have the same
bits, or be the same to 1e-6. Before that, the newest checkpoint of the run FROM, if it is not `-`, is loaded under
these keys and saved as TO at once; with `-` the runs TO, sharded, and `plain` are saved after the training.
"""
import os
import sys
from pathlib import Path

import numpy as np
from handover import hand_over

from mxsimmim.config import Config, configfile
from mxsimmim.data.loader import Batch
from mxsimmim.interop import official
from mxsimmim.models import parameter_specs
from mxsimmim.parallel.strategies import strategy_of
from mxsimmim.runtime.process import process_info
from mxsimmim.training.build import build_trainer
from mxsimmim.training.run_folder import folder_of, write_config
from mxsimmim.training.start import joined

STEPS, IMAGES = 10, 8
APPLIED = [number != 5 for number in range(STEPS)]
NETWORKS = {  # all have parameters that are exchanged by themselves, but `narrow`
    'vit': dict(img_size=16, patch_size=4, embed_dim=272, depth=2, num_heads=4, drop_path=0.2),
    'narrow': dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, drop_path=0.2),
    'swin': dict(type='swin', img_size=32, patch_size=4, embed_dim=136, depths=(1, 1), num_heads=(2, 4), window_size=4)}
CHANGES = {'vit': (dict(recipe='reference', clip_grad=0.5), dict(accumulate=2, ema=0.9)),
           'narrow': (dict(recipe='reference', clip_grad=0.5), dict(ema=0.9)),
           'swin': (dict(recipe='fixed', clip_grad=None), {})}


def configured(network, name, parallel):
    optim, train = CHANGES[network]
    return Config(name=name, model=NETWORKS[network], mask=dict(patch_size=8), data=dict(path='digits', val_fraction=0),
                  parallel=parallel, devices=['cpu(0)'], runtime=dict(threads=1), log=dict(every=2),
                  optim=dict(warmup=0, schedule='constant', base_lr=1e-2, **optim),
                  train=dict(batch_size=IMAGES, length=100, **train))


def trained(trainer):
    """Weights of this worker and their average after ten steps, of which the sixth is skipped."""
    rng, rows, model = np.random.default_rng(7), [], trainer.config.model
    for applied in APPLIED:
        image = rng.random((IMAGES, 3, model.img_size, model.img_size), 'float32')
        image[3] *= 1 if applied else np.nan
        fields = {'image': image, 'mask': (rng.random((IMAGES, model.grid, model.grid)) < 0.5).astype('uint8'),
                  'uniform': rng.random((IMAGES, 2 * model.blocks), 'float32')}
        part = trainer.split.part
        rows.append(trainer.train_step(Batch({key: value[part] for key, value in fields.items()}, 0,
                                             np.arange(IMAGES)[part])).asnumpy())
        trainer.check_replicas()
    assert [row[2] for row in rows] == APPLIED, rows
    averaged = trainer.average.arrays() if trainer.average else {}
    return {**official.export_weights(trainer.placement.net), **{f'ema.{key}': averaged[key] for key in averaged}}


def own_moments(trainer):
    """How many of the numbers of its network's moments this worker has."""
    whole = sum(spec.parameter.list_data()[0].size for spec in parameter_specs(trainer.placement.net))
    return sum(copies[0].size for copies in trainer.update_rule.optimizer.moments.values()) / (2 * whole)


def main():
    networks, equality, source, target, *words = sys.argv[1:]
    process = process_info(os.environ)
    keys = dict(word.split('=') for word in words)
    config = configured('vit', target, keys)
    with joined(config, strategy_of(config, process, 1), process) as communicator:
        if source != '-':
            words = [f'parallel.{word}' for word in words] + [f'name={target}']
            hand_over(source, configfile.load(Path(source) / 'config.yaml', words), process, communicator)
        for network in networks.split(','):
            results = []
            for name, sharded in (('plain', False), (target, True)):
                config = configured(network, name, {**keys, 'shard_optimizer': sharded})
                trainer = build_trainer(config, process, communicator=communicator)
                results.append(trained(trainer))
                if source == '-' and network == networks.split(',')[0]:
                    trainer.save()
                    if process.rank == 0:
                        write_config(folder_of(config), config)
            plain, ours = results
            fraction, expected = own_moments(trainer), 1 / communicator.size
            print('rank', process.rank, network, 'moments', fraction, flush=True)
            assert abs(fraction - expected) < 0.02, fraction
            assert set(ours) == set(plain)
            for key, value in plain.items():
                if equality == 'exact':
                    assert value.tobytes() == ours[key].tobytes(), f'{network} {key}'
                difference = np.linalg.norm(ours[key] - value) / max(np.linalg.norm(value), 1e-3)
                assert difference < 1e-6, f'{network} {key} {difference}'
    print('rank', process.rank, 'is done', flush=True)


if __name__ == '__main__':
    main()
