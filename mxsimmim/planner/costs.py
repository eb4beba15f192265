"""What a layout costs: seconds of a step and bytes of a device, from a configuration and a cluster. Pure functions.

A step is the passes of all micro-batches, the sum of the gradients as far as the last backward pass does not hide it,
and the update. The pieces are those of Narayanan et al. 2021 (arXiv:2104.04473), sections 2 and 3.
"""
import math
from functools import lru_cache
from typing import Dict, List, NamedTuple, Sequence, Tuple

from ..config import Config, MaskConfig, ModelConfig, ParallelConfig
from ..parallel.schedules import stages_of
from .cluster import Cluster, all_reduce, ring, server_bytes, slowest
from .model import FLOAT, NATIVE_WORK, Form, Part, Segment, multiply_adds, parameters, segments, shared_table

CALLS = {True: 6, False: 40}  # operators of a part in one direction, native or not
FUSED = 64 << 20  # bytes that Horovod sends together on GPUs
PACK, HALVE = 8e-9, 11e-9  # seconds a number takes a CPU core to be packed in two bits, in float16 (measured)
MOVED = 6  # times that a worker on a CPU reads or writes a sum of tokens: into shared memory, there, and back
COMPILER = 0.08e9  # bytes of a process that packs in two bits, for numba (measured)
SLACK = 1.0  # of the weights, what a process keeps of arrays that are gone, unless it is sharded (measured)
MOMENTS = {'adamw': 2, 'sgd': 0}
COMPUTE, BUBBLE, GRADIENTS, ACTIVATIONS, TENSOR, UPDATE, INPUT = PARTS = (
    'compute', 'pipeline bubble', 'gradients', 'activations', 'tensor reduce', 'update', 'input')


class Layout(NamedTuple):
    """How a job divides its work over devices: data * pipeline * tensor of them, `contexts` a worker."""
    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    micro_batches: int = 1  # of a pipeline; without one, the parts of train.accumulate
    store: str = 'device'  # or dist_sync, horovod
    servers: int = 0
    compression: str = 'none'
    recompute: bool = False
    shard_optimizer: bool = False
    contexts: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.pipeline * self.tensor

    @property
    def workers(self) -> int:
        """Processes that compute."""
        return self.size // self.contexts

    @property
    def inside(self) -> int:
        """Replicas of the model in a worker; one where it holds a part of one."""
        return max(1, self.contexts // (self.pipeline * self.tensor))


class Prediction(NamedTuple):
    """What is expected of a layout; `parts` are the seconds of a step by `PARTS`."""
    layout: Layout
    step: float  # seconds
    images: float  # a second
    efficiency: float  # images/s over those of one device times their number
    memory: float  # bytes of a device
    parts: Dict[str, float]

    @property
    def bottleneck(self) -> str:
        """What takes most of a step beside computing, or computing where nothing else takes a tenth."""
        name = max(PARTS[1:], key=lambda part: self.parts[part])
        return name if self.parts[name] >= 0.1 * self.step else COMPUTE


class Stage(NamedTuple):
    """A stage of the pipeline, on one device of its tensor group; seconds are of that device."""
    forward: float  # seconds an image
    backward: float
    fixed: float  # seconds a micro-batch takes in each direction, however small
    gradients: Tuple[Tuple[float, float, int], ...]  # of each segment: backward, fixed, parameters
    parameters: int
    kept: float  # bytes an image, from its forward to its backward pass
    planned: float  # that a cached graph plans for a backward pass, and which each micro-batch in flight has
    work: float  # of a backward pass beside these, once
    blocks: int
    stream: float  # numbers of the residual stream an image, of all its blocks
    output: float  # numbers an image that go to the next stage


def form_of(config: Config, cluster: Cluster) -> Form:
    """Return the form of the operators: native ones are for CPUs."""
    return Form(cluster.kind == 'cpu', config.runtime.precision == 'bf16')


def predict(config: Config, cluster: Cluster, layout: Layout) -> Prediction:
    """Predict a step of `config` on `cluster`, whose devices the layout uses all."""
    stages = stages_for(config, cluster, layout)
    images = -(-config.train.batch_size // layout.data) / layout.micro_batches  # of a micro-batch, on average
    parts = _passes(cluster, layout, stages, images)
    parts[GRADIENTS] = _exposed_gradients(config, cluster, layout, stages, images)
    parts[UPDATE] = max(update_seconds(cluster, stage.parameters, layout.data if layout.shard_optimizer else 1)
                        for stage in stages)
    # Each device of a host reads its images, also those of a tensor group, which all read the same.
    needed = config.train.batch_size / layout.data * cluster.devices / cluster.images
    # Reading takes CPUs the cores that they compute with; beside GPUs it has its own.
    parts[INPUT] = needed if cluster.kind == 'cpu' else max(0.0, needed - sum(parts.values()))
    step = sum(parts.values())
    return Prediction(layout, step, config.train.batch_size / step, alone(config, cluster) / (layout.size * step),
                      memory_of(config, cluster, layout, stages), {part: parts[part] for part in PARTS})


def alone(config: Config, cluster: Cluster) -> float:
    """Seconds of the same step on one device that has all the memory it wants."""
    stage, = stages_for(config, cluster, Layout())
    return (config.train.batch_size * (stage.forward + stage.backward) + 2 * stage.fixed
            + update_seconds(cluster, stage.parameters, 1))


def stages_for(config: Config, cluster: Cluster, layout: Layout) -> List[Stage]:
    """Return the stages, cut as `parallel.split` says if it is for as many, else so that the costliest costs least."""
    split = config.parallel.split if len(config.parallel.split) == layout.pipeline else ()
    return _stages(config.model, config.mask, form_of(config, cluster), cluster,
                   ParallelConfig(pipeline=layout.pipeline, split=split), layout.tensor, layout.recompute,
                   layout.micro_batches > 1)


@lru_cache(maxsize=4096)
def _stages(model: ModelConfig, mask: MaskConfig, form: Form, cluster: Cluster, parallel: ParallelConfig, tensor: int,
            recompute: bool, adds: bool) -> List[Stage]:
    parts, counted = segments(model, mask, form), segments(model, mask, Form(native=False))
    cuts = stages_of(parallel, [multiply_adds(segment) for segment in counted])
    table = shared_table(model)
    return [_stage(parts[cut], cluster, form, tensor, recompute, adds, table if cut.start else 0) for cut in cuts]


def _stage(found: Sequence[Segment], cluster: Cluster, form: Form, tensor: int, recompute: bool, adds: bool,
           table: int) -> Stage:
    """Sum up segments; `adds` if gradients add up over micro-batches, `table` the parameters that it has besides."""
    forward = backward = fixed = 0.0
    gradients = []
    for segment in found:
        own, own_fixed = 0.0, 0.0
        for part in segment:
            seconds = _seconds(part, cluster, tensor)
            forward += seconds * part.forward
            own += seconds * (part.backward + (part.again if recompute else 0))
            own_fixed += CALLS[form.native] * cluster.call + weight_bytes(part, tensor, adds) / cluster.stream
        backward += own
        fixed += own_fixed
        gradients.append((own, own_fixed, parameters([segment], tensor)))
    flat = [part for segment in found for part in segment]
    blocks = [part for part in flat if part.is_divided]
    # A graph's gradient of what came in is there as soon as its backward pass is issued, and all are issued at once.
    issued = FLOAT * sum(part.output for part in blocks) if tensor > 1 else 0.0
    work = max(part.work(tensor) for part in flat)
    planned = work / NATIVE_WORK if form.native else work  # the rest are oneDNN's layouts
    return Stage(forward, backward, fixed, tuple(gradients), parameters(found, tensor) + table,
                 sum(part.kept(tensor, recompute) + part.between(tensor) for part in flat), planned,
                 work - planned + issued, len(blocks) // 2, sum(part.output for part in blocks) / 2, flat[-1].output)


def _seconds(part: Part, cluster: Cluster, tensor: int) -> float:
    """Seconds of a multiply-add, two operations, on one of the devices that share the part."""
    divided = tensor if part.is_divided else 1
    return 2 / divided / cluster.rate(part.kind if part.is_divided else 'mlp', part.width, divided)


def weight_bytes(part: Part, tensor: int, adds: bool) -> float:
    """Bytes that a pass of any number of images moves for a part's weights, on average of both directions.

    Each product brings them into its own layout (read, write, read), once forward and once backward; the gradient is
    written. Where gradients add up, it is read again, and added to what is read and written.
    """
    return FLOAT * part.parameters(tensor) * (7 + (3 if adds else 0)) / 2


def _is_serial(cluster: Cluster, layout: Layout) -> bool:
    """Whether a worker's devices compute one after another, each with the cores of all: MXNet's CPU contexts."""
    return cluster.kind == 'cpu' and layout.contexts > 1


def _passes(cluster: Cluster, layout: Layout, stages: Sequence[Stage], images: float) -> Dict[str, float]:
    """Seconds of all micro-batches forward and backward.

    With S stages and M micro-batches of equal cost that is M + S - 1 turns, of which S - 1 are the bubble: a share of
    (S - 1) / (M + S - 1) (Huang et al. 2019, arXiv:1811.06965). Unequal stages wait for the slowest of them. Where
    devices are more than the cores, one that waits leaves its core to another: the passes take as long as all work
    does on all cores, or as they would with a core for each device, whichever is longer. A tensor group adds up two
    arrays a block in each direction (Shoeybi et al. 2019, arXiv:1909.08053), and waits for the slowest each time.
    """
    count, micro_batches = len(stages), layout.micro_batches
    computed = [images * (stage.forward + stage.backward) + 2 * stage.fixed for stage in stages]
    reduced = [_sums(cluster, layout, stage, images) for stage in stages]
    if not _is_serial(cluster, layout):
        waits = cluster.spread * slowest(layout.tensor)
        reduced = [sums + waits * seconds for sums, seconds in zip(reduced, computed)]
    turns = [a + b for a, b in zip(computed, reduced)]
    compute, tensor = micro_batches * sum(computed) / count, micro_batches * sum(reduced) / count
    if _is_serial(cluster, layout):
        return {COMPUTE: compute, TENSOR: tensor, BUBBLE: 0.0, ACTIVATIONS: 0.0}
    bandwidth, latency = neighbours(cluster, layout)
    hops = [2 * (latency + FLOAT * images * stage.output / bandwidth) for stage in stages[:-1]]
    late = sum(hops) + (micro_batches - 1) * max(0.0, max(hops, default=0.0) - max(turns))
    through = cluster.share * ((micro_batches - 1) * max(turns) + sum(turns))
    return {COMPUTE: compute, TENSOR: tensor, BUBBLE: max(through - compute - tensor, 0.0), ACTIVATIONS: late}


def _sums(cluster: Cluster, layout: Layout, stage: Stage, images: float) -> float:
    """Seconds of a tensor group's sums for a micro-batch: two a block in each direction."""
    size, count = FLOAT * images * stage.stream / max(stage.blocks, 1), 4 * stage.blocks
    if cluster.kind == 'cpu' and layout.tensor > 1 and not _is_serial(cluster, layout):
        return count * (MOVED * size / cluster.stream + cluster.local_latency)
    return count * all_reduce(size, layout.tensor, cluster.local_bandwidth, cluster.local_latency)


def neighbours(cluster: Cluster, layout: Layout) -> Tuple[float, float]:
    """Return bytes/s and latency between two stages, whose ranks are data * tensor apart; hosts' links are divided."""
    apart = layout.data * layout.tensor
    if layout.size <= cluster.devices or layout.contexts > 1:
        return cluster.local_bandwidth, cluster.local_latency
    return cluster.bandwidth / min(apart, cluster.devices), cluster.latency


class Exchange(NamedTuple):
    """Seconds of a sum of gradients: on the wire, and of the cores that compute, which nothing hides."""
    wire: float = 0.0
    cores: float = 0.0


def exchange(cluster: Cluster, layout: Layout, count: int) -> Exchange:
    """Return what the sum of `count` numbers' gradients over the replicas takes, if it is all that is done."""
    wire = cores = 0.0
    inside = layout.inside
    if inside > 1 and cluster.kind == 'cpu':  # read all, write one, copy it to all
        cores = FLOAT * count * (3 * inside + 1) / (cluster.stream * layout.contexts)
    elif inside > 1:
        wire = all_reduce(FLOAT * count, inside, cluster.local_bandwidth, cluster.local_latency)
    if layout.data > inside:
        cores += count * {'none': 0.0, '2bit': PACK, 'fp16': HALVE * (cluster.kind == 'cpu')}[layout.compression]
        between = _servers if layout.store == 'dist_sync' else _ranks
        more = between(cluster, layout, FLOAT * count * compressed(layout))
        wire, cores = wire + more.wire, cores + more.cores
    return Exchange(wire, cores)


def compressed(layout: Layout) -> float:
    """Bytes on the wire over those of float32; of two bits as `TwoBit` packs them for the sum of all workers."""
    digits = int(24 / math.log2(2 * layout.workers + 1))
    return {'none': 1.0, 'fp16': 0.5, '2bit': 1 / max(1, digits)}[layout.compression]


def _servers(cluster: Cluster, layout: Layout, size: float) -> Exchange:
    """Return what `size` bytes of each stage take over servers; the stages of a worker share its host's link.

    On CPUs, who sends or receives a byte copies it, and servers read two numbers and write one to add them.
    """
    here, whole = cluster.devices // layout.contexts, size * layout.pipeline
    sent = server_bytes(whole, layout.workers, layout.servers, cluster.hosts, here)
    wire = sent / cluster.bandwidth + 4 * cluster.latency * (cluster.hosts > 1)
    if cluster.kind != 'cpu':
        return Exchange(wire)
    back = -(-layout.servers // cluster.hosts) * layout.workers * whole / layout.servers
    return Exchange(wire, (2 * (here * whole + back) / cluster.local_bandwidth + 3 * back / cluster.stream) / here)


def _ranks(cluster: Cluster, layout: Layout, size: float) -> Exchange:
    """Return what `size` bytes take over Horovod; groups that have ranks on one host share its link.

    On CPUs the ranks of a host first add up in shared memory, each its part of all, and one of them sends the sum.
    """
    together = min(layout.data, max(1, cluster.devices // layout.tensor))  # ranks of a group, on a host
    groups, hosts = cluster.devices // together, -(-layout.data // together)
    if cluster.kind == 'cpu':
        cores = 2 * size / cluster.stream * (together > 1) + 4 * (hosts - 1) / hosts * size / cluster.local_bandwidth
        return Exchange(ring(size, hosts, cluster.bandwidth / groups, cluster.latency), cores)
    link = min(cluster.local_bandwidth, cluster.bandwidth / groups if hosts > 1 else math.inf)
    latency, messages = cluster.latency if hosts > 1 else cluster.local_latency, math.ceil(size / FUSED)
    return Exchange(messages * all_reduce(size / messages, layout.data, link, latency))


def exposed(backward: Sequence[float], messages: Sequence[float]) -> float:
    """Seconds by which messages outlast the backward pass.

    Message i can begin after backward[0] + … + backward[i], and after message i - 1 has ended.
    """
    now = sent = 0.0
    for seconds, message in zip(backward, messages):
        now += seconds
        sent = max(sent, now) + message
    return sent - now


def _exposed_gradients(config: Config, cluster: Cluster, layout: Layout, stages: Sequence[Stage], images: float
                       ) -> float:
    """Seconds of the exchange that the last micro-batch's backward pass does not hide.

    An earlier stage ends its backward pass later, so a later one has more time. With `parallel.shard_optimizer` another
    sum follows the update, of the new weights. The reference's recipe sums after each accumulated part, to clip it.
    """
    late, slack = 0.0, 0.0
    for stage in stages:
        wire, cores = exchange(cluster, layout, stage.parameters)
        if layout.compression == '2bit' or _is_serial(cluster, layout):
            own = wire
        else:
            order = stage.gradients[::-1]
            sizes = [wire * count / max(1, stage.parameters) for *_, count in order]
            own = exposed([images * seconds + fixed for seconds, fixed, _ in order], sizes)
        late = max(late, own + cores - slack)
        slack += images * stage.backward + stage.fixed
    clips = config.optim.recipe == 'reference' and config.optim.clip_grad is not None and layout.pipeline == 1
    late *= layout.micro_batches if clips else 1
    if layout.shard_optimizer:
        plain = layout._replace(compression='none')
        late += max(sum(exchange(cluster, plain, stage.parameters)) for stage in stages)
    return late


def update_seconds(cluster: Cluster, count: int, shards: int) -> float:
    """Seconds of the norm, which reads gradients, and of AdamW, which reads four arrays and writes three.

    An owner then copies its weights into the gradients' arrays; the others write these twice, and copy from them.
    """
    copied = (2 + 5 * (shards - 1)) / shards if shards > 1 else 0
    return FLOAT * count * (1 + 7 / shards + copied) / cluster.stream


def in_flight(layout: Layout, stage: int, schedule: str = '1f1b') -> int:
    """Return the micro-batches whose activations a stage keeps at a time: see `schedules.in_flight`."""
    if layout.pipeline == 1:
        return 1
    return layout.micro_batches if schedule == 'gpipe' else min(layout.pipeline - stage, layout.micro_batches)


def memory_of(config: Config, cluster: Cluster, layout: Layout, stages: Sequence[Stage]) -> float:
    """Bytes of a device: weights, gradients, moments, activations of the micro-batches in flight, what is exchanged.

    Contexts of a worker on CPUs are in one process: a device then counts as its part of that.
    """
    images = math.ceil(-(-config.train.batch_size // layout.data) / layout.micro_batches)
    own = [_stage_bytes(config, cluster, layout, stage, in_flight(layout, number, config.parallel.schedule), images)
           for number, stage in enumerate(stages)]
    pixels = 3 * math.prod(config.model.size) + math.prod(config.model.patches)
    loaded = (config.data.prefetch + 2) * -(-config.train.batch_size // layout.data) * pixels
    if cluster.kind != 'cpu':
        return max(own) + cluster.resident
    if _is_serial(cluster, layout):
        inside = layout.inside * layout.tensor
        return (sum(own) * inside + loaded * inside + cluster.resident) / layout.contexts
    return max(own) + loaded + cluster.resident + COMPILER * (layout.compression == '2bit')


def server_memory(cluster: Cluster, layout: Layout, stages: Sequence[Stage]) -> float:
    """Bytes that the servers of a host take: of its part of the weights each keeps a sum and what it has sent."""
    count = sum(stage.parameters for stage in stages)
    return -(-layout.servers // cluster.hosts) * (cluster.resident + 2 * FLOAT * count / max(1, layout.servers))


def _stage_bytes(config: Config, cluster: Cluster, layout: Layout, stage: Stage, passing: int, images: int) -> float:
    count, ema = stage.parameters, bool(config.train.ema)
    moments = MOMENTS[config.optim.type] / (layout.data if layout.shard_optimizer else 1)
    copies = SLACK if cluster.kind == 'cpu' and not layout.shard_optimizer else 0.0
    if layout.inside > 1:
        copies += 1 / layout.contexts  # the store's own sum
    if layout.workers > 1:
        copies += layout.store == 'dist_sync'  # what servers send is received
        copies += {'none': 0.0, 'fp16': 0.5, '2bit': 1 + compressed(layout)}[layout.compression]
    hop = 2 * FLOAT * images * stage.output * (layout.pipeline > 1)
    return (FLOAT * count * (2 + moments + ema + copies) + passing * images * (stage.kept + stage.planned)
            + images * stage.work + hop)
