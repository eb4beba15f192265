"""`parallel.auto`: divides a job over its devices as `mxsimmim plan` would, by what its workers tell of their machines.

Every worker calls `lay_out` with the same job; rank 0 chooses. What the network carries is measured, in a fraction of a
second; what a device computes is assumed, as a measurement that differs from start to start would choose differently.
"""
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Dict, NamedTuple, Sequence, Tuple

from ..config import Config, configfile
from ..parallel.mesh import Mesh
from ..parallel.strategies import strategy_of
from ..runtime import facts
from ..runtime.process import ProcessInfo
from .calibrate import RESIDENT
from .cluster import Cluster
from .costs import Layout, predict
from .search import SYNCHRONOUS, choose, is_built

if TYPE_CHECKING:
    import mxnet as mx

    from ..parallel.control import ControlPlane

ROOM = 0.9  # of the memory: predictions are right within a tenth
SENT, TURNS = 4 << 20, 3  # bytes that each worker sends to the next one, how often: the fastest counts
SPEED, STREAM = 100e9, 8e9  # FLOP/s and bytes/s of a core of a server's CPU (measured)
CALL = 17e-6  # seconds that it takes to call an operator


class Machine(NamedTuple):
    """What a worker knows of the machine that it runs on."""
    host: str  # the same for all workers of a host
    kind: str  # cpu or gpu
    devices: int  # of this worker
    memory: float  # bytes of the smallest device; on CPUs of the host
    threads: int = 1  # of this worker
    bandwidth: float = 0.0  # bytes/s at which arrays of the worker before arrive here; 0 where there is none


def lay_out(config: Config, process: ProcessInfo, contexts: Sequence['mx.Context'], native: bool,
            control: 'ControlPlane') -> Tuple[Config, str]:
    """Return the configuration with a layout in it, and a line that says which and why; all workers call this at once.

    `native` says whether operators are. The keys that may differ are `parallel.auto`, `parallel.pipeline`,
    `parallel.tensor`, `parallel.micro_batches` and `model.recompute`.

    Raises:
        ValueError: no layout fits, or the workers are not alike; on rank 0.
    """
    machine = machine_of(contexts, control.address, measured_bandwidth(control))
    machines = [Machine(*each) for each in control.all_gather('machines', machine)]
    keys, why = control.broadcast_object('layout', lambda: keys_for(config, process, machines, native))
    return with_keys(config, keys), why


def machine_of(contexts: Sequence['mx.Context'], host: str, bandwidth: float = 0.0) -> Machine:
    """Describe this worker's machine."""
    import mxnet as mx
    kind = contexts[0].device_type
    memory = min(mx.context.gpu_memory_info(each.device_id)[1] for each in contexts) if kind == 'gpu' else (
        facts._memory()[0] * facts.GIB)
    return Machine(host, kind, len(contexts), memory, int(os.environ.get('OMP_NUM_THREADS') or 1), bandwidth)


def measured_bandwidth(control: 'ControlPlane') -> float:
    """Return bytes/s that come from the worker of the rank before, while all send to the next; 0 on rank 0."""
    if control.size == 1:
        return 0.0
    import mxnet as mx

    from ..parallel.channels import pipeline_channels
    mesh, control.mesh = control.mesh, Mesh(pipeline=control.size, rank=control.rank)
    before, after = pipeline_channels(control, mx.cpu())
    control.mesh = mesh
    array, seconds = mx.nd.zeros((SENT,), dtype='uint8'), []
    for turn in range(TURNS):
        array.wait_to_read()
        control.barrier(f'turn {turn} of the network')
        began = time.perf_counter()
        if after:
            after.send(array)
        if before:
            before.receive().wait_to_read()
        seconds.append(time.perf_counter() - began)
    control.barrier('the network has been measured')
    for channel in filter(None, (before, after)):
        channel.close()
    return SENT / min(seconds) if before else 0.0


def keys_for(config: Config, process: ProcessInfo, machines: Sequence[Machine], native: bool
             ) -> Tuple[Dict[str, Any], str]:
    """Choose for a job with these workers, by rank; return the values of the keys, and a line that says why.

    Raises:
        ValueError: as `lay_out`.
    """
    strategy, cluster = strategy_of(config, process), cluster_of(machines)
    if not strategy.aggregation_can.shares_weights:
        return {}, (f'parallel=auto: data {len(machines)}: with train.aggregation={strategy.aggregation} every worker '
                    'has a model of its own')
    config = config.model_copy(update={'train': config.train.model_copy(update={
        'store': strategy.store, 'aggregation': strategy.aggregation})})
    parts, contexts = config.train.accumulate, machines[0].devices
    job = Layout(micro_batches=parts, store=SYNCHRONOUS[strategy.store][0], servers=process.servers, contexts=contexts)

    def runs(layout: Layout) -> bool:
        """Whether a layout changes no number, and the job would not refuse it."""
        if not is_built(layout) or layout.pipeline == 1 and layout.micro_batches != parts or (
                layout.recompute and not native):
            return False
        return _accepts(config, process, contexts, layout)
    try:
        layout, why = choose(config, cluster, runs, job)
    except ValueError as error:
        raise ValueError(f'parallel=auto: {error}; or raise train.accumulate={parts}') from None
    plain = predict(config, cluster, layout._replace(data=cluster.size, pipeline=1, tensor=1, micro_batches=parts,
                                                     recompute=config.model.recompute))
    if plain.memory > cluster.memory:
        why += (f'; a whole model on each device needs {plain.memory / 1e9:.2f} GB, and there are '
                f'{cluster.memory / 1e9:.2f}')
    return keys_of(config, layout), f'parallel=auto: {why}'


def cluster_of(machines: Sequence[Machine]) -> Cluster:
    """Return what the workers of a job run on; of what differs the least.

    Raises:
        ValueError: workers have other devices, or not as many.
    """
    first = machines[0]
    for rank, machine in enumerate(machines):
        if (machine.kind, machine.devices) != (first.kind, first.devices):
            raise ValueError(f'parallel=auto: rank {rank} has {machine.devices} devices ({machine.kind}), and rank 0 '
                             f'{first.devices} ({first.kind}): give all workers the same by devices=[…], or set '
                             'parallel.pipeline')
    here = Counter(machine.host for machine in machines)
    memory = ROOM * min(machine.memory / (here[machine.host] * machine.devices if machine.kind == 'cpu' else 1)
                        for machine in machines)
    pairs = [(before, after) for before, after in zip(machines, machines[1:]) if after.bandwidth]
    between = [after.bandwidth for before, after in pairs if before.host != after.host]
    inside = [after.bandwidth for before, after in pairs if before.host == after.host]
    # Hosts with unlike numbers of workers are taken for as many as there are workers.
    workers = here[first.host] if len(set(here.values())) == 1 else 1
    cluster = Cluster(len(machines) // workers, workers * first.devices, memory, kind=first.kind)
    if first.kind == 'cpu':
        threads = min(machine.threads for machine in machines) / first.devices
        cluster = cluster._replace(speed=threads * SPEED, stream=threads * STREAM, call=CALL, resident=RESIDENT,
                                   local_bandwidth=min(inside, default=1e9))
    return cluster._replace(bandwidth=min(between)) if between else cluster


def keys_of(config: Config, layout: Layout) -> Dict[str, Any]:
    """Return the values of the keys that make a layout, as `configfile.to_dict` has them."""
    micro_batches = layout.micro_batches // config.train.accumulate if layout.pipeline > 1 else (
        config.parallel.micro_batches)
    parallel = {'pipeline': layout.pipeline, 'tensor': layout.tensor, 'micro_batches': micro_batches}
    if layout.shard_optimizer:
        parallel['shard_optimizer'] = True
    return {'parallel': parallel, 'model': {'recompute': layout.recompute}}


def with_keys(config: Config, keys: Dict[str, Any]) -> Config:
    """Return a configuration with these values, and without `parallel.auto`."""
    content = configfile.to_dict(config)
    for section, values in {'parallel': {}, **keys}.items():
        content[section].update(values)
    content['parallel']['auto'] = False
    return configfile.from_dict(content, 'parallel=auto')


def _accepts(config: Config, process: ProcessInfo, contexts: int, layout: Layout) -> bool:
    """Whether the job would start with a layout."""
    parallel = config.parallel.model_copy(update={'auto': False, **keys_of(config, layout)['parallel']})
    try:
        strategy_of(config.model_copy(update={'parallel': parallel}), process, contexts)
    except ValueError:
        return False
    return True
