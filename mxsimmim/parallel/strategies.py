"""Which store and which aggregation a process uses, and which combinations cannot work. Nothing here imports mxnet.

Each choice declares what it can do, and one checker, `strategy_of`, refuses what does not go together.
"""
import math
from typing import Dict, List, NamedTuple, Optional, Tuple

from ..config import Config, ConfigError
from ..runtime.process import ProcessInfo
from .mesh import Mesh, mesh_of


class Store(NamedTuple):
    """What a `train.store` can do."""
    transport: Optional[str] = None  # what its workers must be started with; None: it reduces one worker's devices
    updates_weights: bool = False  # servers update with each gradient as it arrives, and send back weights
    supports_p3: bool = False
    compressions: Tuple[str, ...] = ()  # of `train.compression`, besides none


class Aggregation(NamedTuple):
    """What a `train.aggregation` can do."""
    needs_workers: bool = False  # nothing to do for a worker alone
    every_step: bool = True  # workers meet after each step, not every `train.local_steps`
    shares_weights: bool = False  # after each update all workers hold the same weights
    updates_on_servers: bool = False  # as the store does: no global norm, no micro-batches, no schedule from outside


STORES: Dict[str, Store] = {
    'local': Store(), 'device': Store(), 'nccl': Store(),
    'dist_sync': Store('ps', supports_p3=True, compressions=('2bit',)),
    'dist_device_sync': Store('ps', supports_p3=True, compressions=('2bit',)),
    'dist_async': Store('ps', updates_weights=True),
    'horovod': Store('horovod', compressions=('fp16', '2bit')),
}
SHARDED = 'parallel.shard_optimizer=true'
AGGREGATIONS: Dict[str, Aggregation] = {
    'sync': Aggregation(shares_weights=True),
    'async': Aggregation(updates_on_servers=True),
    'local_sgd': Aggregation(needs_workers=True, every_step=False),
    'elastic': Aggregation(needs_workers=True, every_step=False),
}


class Strategy(NamedTuple):
    """`train.store` and `train.aggregation` without 'auto'."""
    store: str
    aggregation: str

    @property
    def store_can(self) -> Store:
        """Return what its store can do."""
        return STORES[self.store]

    @property
    def aggregation_can(self) -> Aggregation:
        """Return what its aggregation can do."""
        return AGGREGATIONS[self.aggregation]


def horovod_settings(step: float) -> Dict[str, str]:
    """Return Horovod's environment where its thread shares CPU cores with the computation, for steps of `step` seconds.

    A look of its background thread at what is to be done costs half a millisecond of a core, and what becomes ready
    waits for the next: every hundredth of the step. Copying gradients into a common buffer and out again costs more
    than it saves from 2 MiB on.
    """
    return {'HOROVOD_CYCLE_TIME': f'{min(max(10 * step, 1.0), 50.0):.1f}', 'HOROVOD_FUSION_THRESHOLD': str(2 << 20)}


def strategy_of(config: Config, process: ProcessInfo, devices: Optional[int] = None) -> Strategy:
    """Choose the strategy of this process, which has so many devices; None: as many as `config.devices` names.

    Raises:
        ConfigError: naming the keys that do not go together, and what to use instead.
    """
    train = config.train
    store: str = train.store
    if store == 'auto':
        store = {'ps': 'dist_sync', 'horovod': 'horovod', None: 'device'}[process.transport]
    aggregation = train.aggregation
    if aggregation == 'auto':
        aggregation = 'async' if STORES[store].updates_weights else 'sync'
    strategy = Strategy(store, aggregation)
    for check in (_transport, _aggregation, _compression, _shard_optimizer):
        for wrong, message in check(strategy, config, process):
            if wrong:
                raise ConfigError(message)
    if devices is None and config.devices != 'auto':
        devices = len(config.devices)
    if devices is not None or config.parallel.devices == 1:  # or only the worker itself can tell
        for wrong, message in _mesh(strategy, config, mesh_of(process, config.parallel, devices or 1), devices or 1):
            if wrong:
                raise ConfigError(message)
    return strategy


Refusals = List[Tuple[bool, str]]  # whether it cannot work, and what to do instead


def _transport(strategy: Strategy, config: Config, process: ProcessInfo) -> Refusals:
    store, needed = strategy.store, strategy.store_can.transport
    started = {'ps': 'with parameter servers', 'horovod': 'as Horovod ranks', None: 'alone'}[process.transport]
    return [
        (needed == 'ps' and process.transport != 'ps',
         f'train.store={store} needs parameter servers, and this process was started {started}: '
         'tools/launch.py -n 2 -s 1 -- mxsimmim pretrain …'),
        (needed == 'ps' and process.servers == 0,
         f'train.store={store} needs a server, and the job has none: tools/launch.py -s 1'),
        (needed == 'horovod' and process.transport != 'horovod',
         f'train.store={store} needs Horovod ranks, and this process was started {started}: '
         'tools/launch.py -n 2 --horovod -- mxsimmim pretrain …'),
        (needed is None and process.transport is not None,
         f'train.store={store} adds up the devices of one process, and this is one of {process.size} started {started}'
         ': leave train.store=auto, or start mxsimmim without a launcher'),
        (process.p3 and not strategy.store_can.supports_p3,
         f'--p3 works with {_choices("train.store", [name for name, can in STORES.items() if can.supports_p3])}, '
         f'not {store}: leave one of the two out'),
    ]


def _aggregation(strategy: Strategy, config: Config, process: ProcessInfo) -> Refusals:
    (store, aggregation), can = strategy, strategy.aggregation_can
    train, optim, weights = config.train, config.optim, config.data.worker_weights
    on_servers = can.updates_on_servers
    return [
        (on_servers != strategy.store_can.updates_weights,
         f'train.aggregation={aggregation} does not go with train.store={store}: servers that update at once are '
         'train.store=dist_async with train.aggregation=async; all else needs dist_sync, dist_device_sync or horovod'),
        (can.needs_workers and process.size == 1,
         f'train.aggregation={aggregation} needs several workers, and there is one: tools/launch.py -n 2'),
        (train.ema > 0 and not can.shares_weights,
         f'train.ema={train.ema} averages weights that all workers share after each update, which '
         f'train.aggregation={aggregation} does not have: set train.ema=0, or train.aggregation=sync'),
        (train.lr_on_plateau < 1 and on_servers,
         f'train.lr_on_plateau={train.lr_on_plateau} cannot work with train.store={store}, whose servers keep their '
         'own schedule: set train.lr_on_plateau=1, or train.store=dist_sync'),
        (train.rollback and on_servers,
         f'train.rollback=true cannot work with train.store={store}, whose workers do not wait for each other and see '
         'no loss in common: set train.rollback=false, or train.store=dist_sync'),
        (optim.clip_grad is not None and on_servers,
         f'optim.clip_grad={optim.clip_grad} cannot work with train.store={store}: a server never sees the whole '
         'gradient, so it has no global norm: set optim.clip_grad=null, or train.store=dist_sync'),
        (train.accumulate > 1 and on_servers,
         f'train.accumulate={train.accumulate} cannot work with train.store={store}: a server updates with each '
         'push: set train.accumulate=1 and a smaller train.batch_size, or train.store=dist_sync'),
        (config.parallel.pipeline > 1 and on_servers,
         f'parallel.pipeline={config.parallel.pipeline} cannot work with train.store={store}: a server updates with '
         'each push, and micro-batches push one gradient together: set parallel.pipeline=1, or train.store=dist_sync'),
        (config.parallel.tensor > 1 and on_servers,
         f'parallel.tensor={config.parallel.tensor} cannot work with train.store={store}, whose servers update whole '
         'parameters: set parallel.tensor=1, or train.store=dist_sync'),
        (optim.type != 'adamw' and on_servers,
         f'optim.type={optim.type} cannot work with train.store={store}, whose servers run adamw: set '
         'optim.type=adamw'),
        (weights == 'auto' and on_servers,
         f'data.worker_weights=auto needs workers that wait for each other, which train.store={store} spares them: '
         'leave data.worker_weights=equal, or give weights such as [3, 1]'),
    ]


def _mesh(strategy: Strategy, config: Config, mesh: Mesh, devices: int) -> Refusals:
    several, keys, weights = mesh.data < mesh.size, config.parallel.described, config.data.worker_weights
    replicas, batch = mesh.data * max(1, devices // config.parallel.devices), config.train.batch_size
    parts = {'train.accumulate': config.train.accumulate}
    if config.parallel.pipeline > 1:
        parts['parallel.micro_batches'] = config.parallel.micro_batches
    return [
        (batch < replicas * math.prod(parts.values()),
         ' x '.join([f'train.batch_size={batch} is less than {replicas} replicas of the model',
                     *(f'{key}={value}' for key, value in parts.items())]) + ': raise it, or lower one of these'),
        (not isinstance(weights, str) and len(weights) != mesh.data,
         f'data.worker_weights={list(weights)} has {len(weights)} weights for {mesh.data} '
         + ('replicas of the model: one a replica' if several else 'workers: one a worker')),
        (several and not strategy.aggregation_can.shares_weights,
         f'train.aggregation={strategy.aggregation} cannot work with {keys} over several workers, whose gradients have '
         'one norm together: set train.aggregation=sync, or give each worker a device a part with devices=[…]'),
        (several and weights == 'auto',
         f'data.worker_weights=auto cannot work with {keys} over several workers, of which the slowest of a replica '
         'sets the pace: leave data.worker_weights=equal, or give weights such as [3, 1]'),
        (config.train.compression != 'none' and mesh.data == 1,
         f'train.compression={config.train.compression} is for gradients that replicas of the model add up, and '
         f'{keys} makes one of the {mesh.size} workers: set train.compression=none, or start more of them'),
        (config.parallel.shard_optimizer and mesh.data == 1,
         f'{SHARDED} divides moments among the workers that hold the same weights, and here each worker '
         f'holds weights of its own{f" ({keys})" * several}: start more of them, or leave it out'),
    ]


def _compression(strategy: Strategy, config: Config, process: ProcessInfo) -> Refusals:
    (store, aggregation), kind = strategy, config.train.compression
    if kind == 'none':
        return []
    able = [name for name, can in STORES.items() if kind in can.compressions]
    return [
        (process.size == 1,
         f'train.compression={kind} is for several workers, and there is one: set train.compression=none'),
        (strategy.store_can.updates_weights,
         f'train.compression={kind} cannot work with train.store={store}: what comes back are weights, which '
         'must be whole: set train.compression=none, or train.store=dist_sync'),
        (not strategy.aggregation_can.every_step,
         f'train.compression={kind} is for gradients, and train.aggregation={aggregation} sends weights: set '
         'train.compression=none and a larger train.local_steps'),
        (store not in able,
         f'train.compression={kind} works with {_choices("train.store", able)}: with train.store={store} take '
         f'train.compression={" or ".join(strategy.store_can.compressions)}'),
        (process.p3,
         f'--p3 cannot work with train.compression={kind}: P3 cuts dense arrays into slices: leave one of the two out'),
    ]


def _shard_optimizer(strategy: Strategy, config: Config, process: ProcessInfo) -> Refusals:
    if not config.parallel.shard_optimizer:
        return []
    store, aggregation = strategy
    return [
        (strategy.store_can.transport != 'horovod',
         f'{SHARDED} works with train.store=horovod, not {store}: start the job with tools/launch.py '
         '--horovod, or leave it out'),
        (not strategy.aggregation_can.shares_weights,
         f'{SHARDED} needs workers that hold the same weights after each step, which '
         f'train.aggregation={aggregation} does not have: set train.aggregation=sync, or leave it out'),
        (config.optim.type != 'adamw',
         f'{SHARDED} divides the optimiser\'s moments, and optim.type={config.optim.type} has none: leave it out'),
    ]


def _choices(key: str, names: List[str]) -> str:
    return f'{key}={" or ".join(names)}'
