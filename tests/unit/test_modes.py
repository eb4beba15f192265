"""Which stores and aggregations go together, and that the others are refused with what to do instead."""
from typing import get_args

import pytest

from mxsimmim.config import Config, TrainConfig
from mxsimmim.parallel.strategies import AGGREGATIONS, STORES, horovod_settings, strategy_of
from mxsimmim.runtime.process import ALONE, ProcessInfo

PS = ProcessInfo('worker', 0, 2, servers=1, transport='ps')
P3 = PS._replace(p3=True)
HOROVOD = ProcessInfo('worker', 0, 2, transport='horovod')
NO_CLIP = {'clip_grad': None}
SHARDED = {'shard_optimizer': True}


def config(optim=None, weights='equal', parallel=None, devices='auto', **train):
    return Config(train=train, optim=optim or {}, data={'worker_weights': weights}, parallel=parallel or {},
                  devices=devices)


@pytest.mark.parametrize('process, keys, expected', [
    (ALONE, {}, ('device', 'sync')),
    (PS, {}, ('dist_sync', 'sync')),
    (HOROVOD, {}, ('horovod', 'sync')),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP}, ('dist_async', 'async')),
    (PS, {'store': 'dist_device_sync', 'aggregation': 'local_sgd'}, ('dist_device_sync', 'local_sgd')),
    (HOROVOD, {'aggregation': 'elastic'}, ('horovod', 'elastic')),
    (HOROVOD, {'compression': 'fp16'}, ('horovod', 'sync')),
    (HOROVOD, {'parallel': SHARDED}, ('horovod', 'sync')),
    (HOROVOD._replace(size=4), {'devices': ['cpu(0)'], 'parallel': {'pipeline': 2, **SHARDED}}, ('horovod', 'sync')),
    (PS, {'compression': '2bit', 'accumulate': 4}, ('dist_sync', 'sync')),
    (P3, {}, ('dist_sync', 'sync')),
    (PS, {'weights': (3, 1)}, ('dist_sync', 'sync')),
    (HOROVOD, {'ema': 0.9, 'lr_on_plateau': 0.5}, ('horovod', 'sync')),
    (PS, {'aggregation': 'local_sgd', 'lr_on_plateau': 0.5}, ('dist_sync', 'local_sgd')),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'stop_early': 3}, ('dist_async', 'async')),
])
def test_modes(process, keys, expected):
    assert strategy_of(config(**keys), process) == expected


@pytest.mark.parametrize('process, keys, message', [
    (ALONE, {'store': 'dist_sync'}, r'train.store=dist_sync needs parameter servers.*tools/launch.py -n 2 -s 1'),
    (HOROVOD, {'store': 'dist_sync'}, 'started as Horovod ranks'),
    (PS._replace(servers=0), {}, 'needs a server, and the job has none'),
    (PS, {'store': 'horovod'}, 'train.store=horovod needs Horovod ranks.*--horovod'),
    (PS, {'store': 'device'}, r'one of 2 started with parameter servers: leave train.store=auto'),
    (PS, {'store': 'dist_async'}, r'optim.clip_grad=5.0 cannot work with train.store=dist_async.*clip_grad=null'),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'accumulate': 2}, 'train.accumulate=2 cannot work'),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'parallel': {'pipeline': 2}}, 'parallel.pipeline=2 cannot work'),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'parallel': {'tensor': 2}}, 'parallel.tensor=2 cannot work'),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'compression': '2bit'}, 'compression=2bit cannot work.*dist_async'),
    (PS, {'store': 'dist_async', 'optim': {'clip_grad': None, 'type': 'sgd'}}, 'optim.type=sgd'),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'weights': 'auto'}, 'data.worker_weights=auto'),
    (PS, {'store': 'dist_async', 'aggregation': 'sync'}, 'aggregation=sync does not go with train.store=dist_async'),
    (PS, {'aggregation': 'async'}, 'train.aggregation=async does not go with train.store=dist_sync'),
    (ALONE, {'aggregation': 'local_sgd'}, 'needs several workers, and there is one'),
    (P3, {'store': 'dist_async', 'optim': NO_CLIP}, '--p3 works with'),
    (P3, {'compression': '2bit'}, '--p3 cannot work with train.compression=2bit'),
    (PS, {'compression': 'fp16'}, 'works with train.store=horovod.*2bit'),
    (ALONE, {'compression': '2bit'}, 'compression=2bit is for several workers'),
    (PS, {'compression': '2bit', 'aggregation': 'elastic'}, 'is for gradients'),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'ema': 0.9},
     'train.ema=0.9 averages weights .* train.aggregation=async does not have: set train.ema=0, or train.aggregation='),
    (PS, {'aggregation': 'local_sgd', 'ema': 0.9}, 'train.aggregation=local_sgd does not have: set train.ema=0'),
    (HOROVOD, {'aggregation': 'elastic', 'ema': 0.9}, 'train.aggregation=elastic does not have: set train.ema=0'),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'lr_on_plateau': 0.5},
     'train.lr_on_plateau=0.5 cannot work with train.store=dist_async, .*: set train.lr_on_plateau=1, or train.store='),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'rollback': True},
     'train.rollback=true cannot work with train.store=dist_async, .*: set train.rollback=false, or train.store='),
    (PS, {'parallel': SHARDED}, 'parallel.shard_optimizer=true works with train.store=horovod, not dist_sync: start '
     'the job with tools/launch.py --horovod, or leave it out'),
    (PS, {'store': 'dist_async', 'optim': NO_CLIP, 'parallel': SHARDED}, 'train.store=horovod, not dist_async'),
    (ALONE, {'parallel': SHARDED}, 'works with train.store=horovod, not device'),
    (HOROVOD, {'aggregation': 'local_sgd', 'parallel': SHARDED},
     'same weights after each step, which train.aggregation=local_sgd does not have: set train.aggregation=sync, or'),
    (HOROVOD, {'aggregation': 'elastic', 'parallel': SHARDED}, 'which train.aggregation=elastic does not have'),
    (HOROVOD, {'optim': {'type': 'sgd'}, 'parallel': SHARDED}, "optimiser's moments, and optim.type=sgd has none"),
    (HOROVOD._replace(size=1), {'parallel': SHARDED}, 'here each worker holds weights of its own: start more'),
    (HOROVOD, {'devices': ['cpu(0)'], 'parallel': {'pipeline': 2, **SHARDED}},
     r'here each worker holds weights of its own \(parallel.pipeline=2\): start more of them, or leave it out'),
    (HOROVOD._replace(size=4), {'devices': ['cpu(0)'], 'batch_size': 12, 'parallel': {'pipeline': 2}},
     'train.batch_size=12 is less than 2 replicas of the model x train.accumulate=1 x parallel.micro_batches=8: raise'),
    (PS, {'devices': ['cpu(0)'], 'parallel': {'tensor': 2}}, 'parallel.tensor=2 with one device a worker puts the pa'),
    (HOROVOD, {'devices': ['cpu(0)'], 'aggregation': 'elastic', 'parallel': {'tensor': 2}},
     'train.aggregation=elastic cannot work with parallel.tensor=2 over several workers'),
    (PS, {'batch_size': 3, 'accumulate': 2},
     'train.batch_size=3 is less than 2 replicas of the model x train.accumulate=2: raise it, or lower one of these'),
    (HOROVOD, {'devices': ['cpu(0)'], 'parallel': {'pipeline': 2}, 'compression': '2bit'},
     'train.compression=2bit is for gradients .* parallel.pipeline=2 makes one of the 2 workers: set train.compress'),
    (PS, {'weights': (1, 2, 3)}, r'data.worker_weights=\[1.0, 2.0, 3.0\] has 3 weights for 2 workers'),
])
def test_what_cannot_work_is_refused_by_name(process, keys, message):
    with pytest.raises(ValueError, match=message):
        strategy_of(config(**keys), process)


def test_every_choice_declares_what_it_can():
    for key, declared in ('store', STORES), ('aggregation', AGGREGATIONS):
        assert {'auto', *declared} == set(get_args(TrainConfig.model_fields[key].annotation))
    compressions = {kind for can in STORES.values() for kind in can.compressions}
    assert {'none', *compressions} == set(get_args(TrainConfig.model_fields['compression'].annotation))


@pytest.mark.parametrize('step, milliseconds', [(0.001, 1), (0.5, 5), (2.4, 24), (60, 50)])
def test_horovod_looks_around_a_hundred_times_a_step(step, milliseconds):
    assert float(horovod_settings(step)['HOROVOD_CYCLE_TIME']) == pytest.approx(milliseconds)
