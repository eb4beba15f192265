"""Which layouts a job can have, and which of them is best. Pure functions."""
import itertools
from typing import Callable, Dict, Iterator, List, Optional, Tuple

from ..config import Config
from ..parallel.strategies import STORES
from .cluster import Cluster
from .costs import MOMENTS, Layout, Prediction, predict, server_memory, stages_for

WORTH = 1.01  # a layout that needs one thing more must be faster by this factor
SYNCHRONOUS = {'auto': ('device', 'dist_sync', 'horovod'), 'device': ('device',), 'local': ('device',),
               'nccl': ('device',), 'dist_sync': ('dist_sync',), 'dist_device_sync': ('dist_sync',),
               'horovod': ('horovod',)}  # by train.store


def refusal(config: Config, cluster: Cluster, layout: Layout) -> str:
    """Return why a layout cannot run, one reason of perhaps several; empty where it can."""
    model, batch, compressions = config.model, config.train.batch_size, STORES[layout.store].compressions
    divided = [heads for heads in (*model.heads, int(model.embed_dim * model.mlp_ratio)) if heads % layout.tensor]
    checks = [
        (layout.size != cluster.size, f'data {layout.data} x pipeline {layout.pipeline} x tensor {layout.tensor} are '
                                      f'not the {cluster.size} devices'),
        (layout.pipeline > model.blocks, f'{layout.pipeline} stages are more than {model.blocks} blocks'),
        (cluster.devices % layout.tensor > 0, f'a tensor group of {layout.tensor} does not fit the {cluster.devices} '
                                              'devices of a host'),
        (bool(divided), f'a tensor group of {layout.tensor} does not divide {divided[:1]} heads or columns'),
        (batch < layout.data * layout.micro_batches, f'train.batch_size={batch} is less than {layout.data} replicas x '
                                                     f'{layout.micro_batches} micro-batches'),
        (layout.store == 'device' and layout.workers > 1, 'train.store=device is for one worker'),
        (layout.store == 'horovod' and layout.contexts > 1 and layout.contexts % (layout.pipeline * layout.tensor) > 0,
         'a worker of several devices holds whole models'),
        (layout.store == 'dist_sync' and layout.contexts % (layout.pipeline * layout.tensor) > 0,
         'with servers each worker holds a whole model'),
        (layout.store == 'dist_sync' and layout.servers < 1, 'there is no server'),
        (layout.compression != 'none' and layout.compression not in compressions,
         f'train.compression={layout.compression} does not go with train.store={layout.store}'),
        (layout.compression != 'none' and layout.data == layout.inside,
         'nothing is exchanged between workers that could be compressed'),
        (layout.recompute and cluster.kind != 'cpu', 'model.recompute needs native operators, on CPUs'),
        (layout.shard_optimizer and (layout.store != 'horovod' or layout.data == 1),
         'parallel.shard_optimizer needs several replicas and Horovod'),
        (layout.shard_optimizer and not MOMENTS[config.optim.type],
         f'parallel.shard_optimizer divides moments, and optim.type={config.optim.type} has none'),
    ]
    return next((reason for wrong, reason in checks if wrong), '')


def is_built(layout: Layout) -> bool:
    """Return whether this version runs a layout: workers of several devices have whole models."""
    return layout.contexts == 1 or layout.contexts % (layout.pipeline * layout.tensor) == 0


def layouts(config: Config, cluster: Cluster) -> Iterator[Layout]:
    """Yield every layout that can run and whose micro-batches are a power of two, of the stores that the job may use.

    GPUs of a host are contexts of one worker under servers, and of the only worker under train.store=device. CPU
    contexts compute one after another (docs/LOG.md), so that there each worker has one.
    """
    for store in SYNCHRONOUS[config.train.store]:
        contexts = cluster.devices if cluster.kind == 'gpu' and store != 'horovod' else 1
        servers = cluster.hosts if store == 'dist_sync' else 0
        yield from layouts_of(config, cluster, Layout(store=store, servers=servers, contexts=contexts))


def layouts_of(config: Config, cluster: Cluster, job: Layout) -> Iterator[Layout]:
    """Yield every layout that can run in a job with this store, these servers and contexts a worker.

    Micro-batches are a power of two times those of `job`.
    """
    model, batch, size, store = config.model, config.train.batch_size, cluster.size, job.store
    recomputes = [model.recompute] if cluster.kind != 'cpu' or model.recompute else [False, True]
    for pipeline, tensor in itertools.product(divisors(size, model.blocks), divisors(size, cluster.devices)):
        whole = job._replace(data=size // (pipeline * tensor), pipeline=pipeline, tensor=tensor)
        if refusal(config, cluster, whole):
            continue
        shards = [shard for shard in (False, True)
                  if not refusal(config, cluster, whole._replace(shard_optimizer=shard))]
        exchanged = whole.data > whole.inside
        for power, compression, recompute, shard in itertools.product(
                range((batch // whole.data // job.micro_batches).bit_length()),
                ('none', *(STORES[store].compressions if exchanged else ())), recomputes, shards):
            yield whole._replace(micro_batches=job.micro_batches * 2 ** power, compression=compression,
                                 recompute=recompute, shard_optimizer=shard)


def divisors(number: int, most: int) -> List[int]:
    """Return the divisors of a number up to `most`, ascending."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def search(config: Config, cluster: Cluster, allowed: Callable[[Layout], bool] = is_built,
           job: Optional[Layout] = None) -> List[Prediction]:
    """Return the best allowed layout that fits of each (pipeline, tensor, store, compression), the best of them first.

    Better is faster; of layouts within a hundredth the simpler, see `rank`. They are those of `layouts`, or, for a
    `job` that has been started, of `layouts_of`.

    Raises:
        ValueError: the job is not synchronous, it has too few images for its devices, or no layout fits into memory;
            the text names the least that any needs.
    """
    if config.train.store not in SYNCHRONOUS or config.train.aggregation not in ('auto', 'sync'):
        raise ValueError(f'train.store={config.train.store} with train.aggregation={config.train.aggregation} is not '
                         'synchronous, and plans are of synchronous jobs: set train.store=auto, train.aggregation=auto')
    best: Dict[Tuple[int, int, str, str], Prediction] = {}
    least: List[Tuple[float, Layout]] = []
    for layout in filter(allowed, layouts_of(config, cluster, job) if job else layouts(config, cluster)):
        found = predict(config, cluster, layout)
        needed = found.memory
        if layout.servers and cluster.kind == 'cpu':  # on the hosts of the workers, and from their memory
            needed += server_memory(cluster, layout, stages_for(config, cluster, layout)) / cluster.devices
        if needed > cluster.memory:
            least = [min([*least, (needed, layout)])]
            continue
        key = layout.pipeline, layout.tensor, layout.store, layout.compression
        if key not in best or rank(found) < rank(best[key]):
            best[key] = found
    if not best:
        raise ValueError(_nothing(config, cluster, least))
    return sorted(best.values(), key=rank)


def rank(found: Prediction) -> float:
    """Seconds of a step times `WORTH` for each thing that makes a layout less simple; what rounds gradients is two."""
    layout = found.layout
    more = ((layout.pipeline > 1) + (layout.tensor > 1) + 2 * (layout.compression != 'none') + layout.recompute
            + layout.shard_optimizer + (layout.micro_batches > 1))
    return found.step * WORTH ** more


def _nothing(config: Config, cluster: Cluster, least: List[Tuple[float, Layout]]) -> str:
    """Say why no layout is left."""
    if not least:
        return (f'no layout gives all of {cluster.size} devices something to do with train.batch_size='
                f'{config.train.batch_size}, {config.model.blocks} blocks and train.store={config.train.store}: take '
                'fewer devices, or raise train.batch_size')
    (needed, layout), = least
    return (f'no layout fits: a device has {cluster.memory / 1e9:.1f} GB, and the least that any needs is '
            f'{needed / 1e9:.1f} GB ({describe(layout)}): take devices with more memory or more of them, or a smaller '
            'model')


def describe(layout: Layout) -> str:
    """Write a layout in words."""
    extra = [name for name, there in (('recompute', layout.recompute), ('shard_optimizer', layout.shard_optimizer),
                                      (layout.compression, layout.compression != 'none')) if there]
    return ', '.join([f'data {layout.data}', f'pipeline {layout.pipeline}', f'tensor {layout.tensor}',
                      f'{layout.micro_batches} micro-batches', layout.store, *extra])


def choose(config: Config, cluster: Cluster, allowed: Callable[[Layout], bool] = is_built,
           job: Optional[Layout] = None) -> Tuple[Layout, str]:
    """Return the best allowed layout that changes nothing but speed and memory, and a line that says why.

    That leaves out gradients that are rounded, unless `train.compression` asks for it. `job` is as for `search`.

    Raises:
        ValueError: as `search`.
    """
    found, *others = search(config, cluster, lambda layout: (
        allowed(layout) and layout.compression == config.train.compression), job)
    why = (f'{describe(found.layout)}: {found.step:.3g} s a step, {found.efficiency:.0%} of {cluster.size} times one '
           f'device, {found.memory / 1e9:.1f} GB a device; bottleneck: {found.bottleneck}')
    return found.layout, why + (f'; next: {describe(others[0].layout)}, {others[0].step:.3g} s' if others else '')
