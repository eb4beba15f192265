"""Which store and which aggregation a process uses, and which combinations cannot work. Nothing here imports mxnet."""
from typing import Dict, NamedTuple

from ..config import Config
from ..runtime.process import ProcessInfo

DIST = ('dist_sync', 'dist_device_sync', 'dist_async')


class Strategy(NamedTuple):
    """`train.store` and `train.aggregation` without 'auto'."""
    store: str
    aggregation: str


def horovod_settings(step: float) -> Dict[str, str]:
    """Return Horovod's environment where its thread shares CPU cores with the computation, for steps of `step` seconds.

    A look of its background thread at what is to be done costs half a millisecond of a core, and what becomes ready
    waits for the next: every hundredth of the step. Copying gradients into a common buffer and out again costs more
    than it saves from 2 MiB on.
    """
    return {'HOROVOD_CYCLE_TIME': f'{min(max(10 * step, 1.0), 50.0):.1f}', 'HOROVOD_FUSION_THRESHOLD': str(2 << 20)}


def strategy_of(config: Config, process: ProcessInfo) -> Strategy:
    """Choose the strategy of this process.

    Raises:
        ValueError: naming the keys that do not go together, and what to use instead.
    """
    train = config.train
    store: str = train.store
    if store == 'auto':
        store = {'ps': 'dist_sync', 'horovod': 'horovod', None: 'device'}[process.transport]
    aggregation = train.aggregation
    if aggregation == 'auto':
        aggregation = 'async' if store == 'dist_async' else 'sync'
    for wrong, message in _transport(store, process) + _aggregation(store, aggregation, config, process) + _compression(
            store, aggregation, config, process):
        if wrong:
            raise ValueError(message)
    return Strategy(store, aggregation)


def _transport(store: str, process: ProcessInfo) -> list:
    started = {'ps': 'with parameter servers', 'horovod': 'as Horovod ranks', None: 'alone'}[process.transport]
    return [
        (store in DIST and process.transport != 'ps',
         f'train.store={store} needs parameter servers, and this process was started {started}: '
         'tools/launch.py -n 2 -s 1 -- mxsimmim pretrain …'),
        (store in DIST and process.servers == 0,
         f'train.store={store} needs a server, and the job has none: tools/launch.py -s 1'),
        (store == 'horovod' and process.transport != 'horovod',
         f'train.store=horovod needs Horovod ranks, and this process was started {started}: '
         'tools/launch.py -n 2 --horovod -- mxsimmim pretrain …'),
        (store in ('local', 'device', 'nccl') and process.transport is not None,
         f'train.store={store} adds up the devices of one process, and this is one of {process.size} started {started}'
         ': leave train.store=auto, or start mxsimmim without a launcher'),
        (process.p3 and store not in ('dist_sync', 'dist_device_sync'),
         f'--p3 works with train.store=dist_sync or dist_device_sync, not {store}: leave one of the two out'),
    ]


def _aggregation(store: str, aggregation: str, config: Config, process: ProcessInfo) -> list:
    train, optim, weights = config.train, config.optim, config.data.worker_weights
    alone = aggregation in ('local_sgd', 'elastic')
    asynchronous = aggregation == 'async'
    return [
        (asynchronous != (store == 'dist_async'),
         f'train.aggregation={aggregation} does not go with train.store={store}: servers that update at once are '
         'train.store=dist_async with train.aggregation=async; all else needs dist_sync, dist_device_sync or horovod'),
        (alone and process.size == 1,
         f'train.aggregation={aggregation} needs several workers, and there is one: tools/launch.py -n 2'),
        (train.ema > 0 and aggregation != 'sync',
         f'train.ema={train.ema} averages weights that all workers share after each update, which '
         f'train.aggregation={aggregation} does not have: set train.ema=0, or train.aggregation=sync'),
        (train.lr_on_plateau < 1 and asynchronous,
         f'train.lr_on_plateau={train.lr_on_plateau} cannot work with train.store=dist_async, whose servers keep their '
         'own schedule: set train.lr_on_plateau=1, or train.store=dist_sync'),
        (asynchronous and optim.clip_grad is not None,
         f'optim.clip_grad={optim.clip_grad} cannot work with train.store=dist_async: a server never sees the whole '
         'gradient, so it has no global norm: set optim.clip_grad=null, or train.store=dist_sync'),
        (asynchronous and train.accumulate > 1,
         f'train.accumulate={train.accumulate} cannot work with train.store=dist_async: a server updates with each '
         'push: set train.accumulate=1 and a smaller train.batch_size, or train.store=dist_sync'),
        (asynchronous and optim.type != 'adamw',
         f'optim.type={optim.type} cannot work with train.store=dist_async, whose servers run adamw: set '
         'optim.type=adamw'),
        (asynchronous and weights == 'auto',
         'data.worker_weights=auto needs workers that wait for each other, which train.store=dist_async spares them: '
         'leave data.worker_weights=equal, or give weights such as [3, 1]'),
        (not isinstance(weights, str) and len(weights) != process.size,
         f'data.worker_weights={list(weights)} has {len(weights)} weights for {process.size} workers: one a worker'),
    ]


def _compression(store: str, aggregation: str, config: Config, process: ProcessInfo) -> list:
    kind = config.train.compression
    return [
        (kind != 'none' and process.size == 1,
         f'train.compression={kind} is for several workers, and there is one: set train.compression=none'),
        (kind != 'none' and aggregation == 'async',
         f'train.compression={kind} cannot work with train.store=dist_async: what comes back are weights, which '
         'must be whole: set train.compression=none, or train.store=dist_sync'),
        (kind != 'none' and aggregation in ('local_sgd', 'elastic'),
         f'train.compression={kind} is for gradients, and train.aggregation={aggregation} sends weights: set '
         'train.compression=none and a larger train.local_steps'),
        (kind == 'fp16' and store != 'horovod',
         'train.compression=fp16 works with train.store=horovod: with parameter servers take train.compression=2bit'),
        (kind != 'none' and process.p3,
         f'--p3 cannot work with train.compression={kind}: P3 cuts dense arrays into slices: leave one of the two out'),
    ]
