#!/usr/bin/env python
"""How far training scales by the planner's cost model: our networks on paper, and published curves beside it.

    python tools/bench/scaling.py docs/scaling.png

Prints the tables of docs/scaling.md and draws its picture. Nothing is measured. Takes some seconds.
"""
import argparse
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

from mxsimmim.config import Config, MaskConfig, ModelConfig
from mxsimmim.planner import costs, search
from mxsimmim.planner.cluster import Cluster, all_reduce
from mxsimmim.planner.costs import Layout, Prediction

# A host with 8 GPUs of 80 GB: 100 TFLOP/s each is a third of an A100's peak in bfloat16, two thirds in TF32.
HOST = dict(devices=8, memory=80e9, speed=100e12, bandwidth=400e9 / 8, latency=20e-6, local_bandwidth=250e9,
            local_latency=5e-6, stream=1.5e12)
SIZES = (1, 8, 64, 512, 4096)
# network -> images a device, keys of its model, side of a masked cell
NETWORKS: Dict[str, Tuple[int, Dict[str, Any], int]] = {
    'ViT-B/16': (64, dict(embed_dim=768, depth=12, num_heads=12), 32),
    'ViT-L/16': (64, dict(embed_dim=1024, depth=24, num_heads=16), 32),
    'Swin-L': (64, dict(type='swin', img_size=192, patch_size=4, embed_dim=192, depths=(2, 2, 18, 2),
                        num_heads=(6, 12, 24, 48), window_size=12), 32),
    'ViT-22B/14': (4, dict(patch_size=14, embed_dim=6144, depth=48, num_heads=48, use_shared_rpb=False), 28),
}
FIXED = 4096  # images a step where the batch does not grow


class Published(NamedTuple):
    """A curve of data parallelism: what one device did alone, and what was published of many."""
    name: str
    cluster: Cluster
    layout: Layout
    parameters: int
    images: float  # a second, of one device
    batch: int  # images a device
    efficiency: float


def p2(hosts: int) -> Cluster:
    """AWS P2.16xlarge: 16 GPUs (8 K80) that share 10 GB/s of PCI Express, and 20 Gb/s of network."""
    return Cluster(hosts, 16, bandwidth=20e9 / 8, latency=50e-6, local_bandwidth=10e9 / 16)


def servers(hosts: int) -> Layout:
    return Layout(16 * hosts, store='dist_sync', servers=hosts, contexts=16)


PASCAL = Cluster(128, 4, bandwidth=25e9 / 8, latency=10e-6, local_bandwidth=10e9)
RANKS = Layout(512, store='horovod')
PUBLISHED = (
    *(Published(f'MXNet, ResNet-152, {16 * hosts} GPUs', p2(hosts), servers(hosts), 60_000_000, 20.08, 32, images /
                (16 * hosts * 20.08)) for hosts, images in ((2, 595.53), (4, 1179.86), (16, 4630.42))),
    *(Published(f'MXNet, Inception-v3, {16 * hosts} GPUs', p2(hosts), servers(hosts), 23_750_000, 30.4, 32, images /
                (16 * hosts * 30.4)) for hosts, images in ((2, 882.57), (16, 6660.98))),
    Published('MXNet, AlexNet, 256 GPUs', p2(16), servers(16), 50_750_000, 457.07, 512, 61938.36 / (256 * 457.07)),
    Published('Horovod, Inception V3, 512 GPUs', PASCAL, RANKS, 23_850_000, 142, 64, 0.90),
    Published('Horovod, VGG-16, 512 GPUs', PASCAL, RANKS, 138_360_000, 154, 64, 0.68),
)
MESSAGES = 50  # in which such a network's gradient leaves, evenly over the backward pass: two thirds of a step


class Wide(NamedTuple):
    """A row of Megatron-LM's weak scaling: layers of GPT-2 on so many V100."""
    gpus: int
    width: int
    layers: int
    efficiency: float


MEGATRON = (Wide(2, 1920, 54, 0.95), Wide(4, 2304, 64, 0.82), Wide(8, 3072, 72, 0.77))
V100 = Cluster(1, 16, speed=39e12, local_bandwidth=150e9, local_latency=5e-6)  # what one reached; NVSwitch, a direction
TOKENS, IMAGES = 1024, 8  # of a sequence; sequences a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('picture', nargs='?', default='scaling.png', metavar='PNG', help='picture to write (default: '
                        'scaling.png)')
    args = parser.parse_args()
    for lines in tables():
        print('\n'.join([*lines, '']))
    draw(args.picture)


def tables() -> Iterator[List[str]]:
    """Yield the tables of the page."""
    yield scaling_table(grows=True)
    yield scaling_table(grows=False)
    yield published_table()
    yield tensor_table()


def configured(name: str, images: int) -> Config:
    """Return a configuration that trains this network with so many images a step."""
    _, keys, cell = NETWORKS[name]
    return Config(model=ModelConfig(**keys), mask=MaskConfig(patch_size=cell),
                  data={'path': 'digits'}, optim={'recipe': 'fixed'}, train={'batch_size': images})


def machines(devices: int) -> Cluster:
    """Return so many devices, in hosts of `HOST`."""
    here = min(devices, int(HOST['devices']))
    return Cluster(**{**HOST, 'hosts': devices // here, 'devices': here})  # type: ignore[arg-type]


def predicted(name: str, devices: int, images: int) -> Prediction:
    """Return the best layout of `search.choose`: none that rounds gradients.

    Raises:
        ValueError: there is none.
    """
    config, cluster = configured(name, images), machines(devices)
    layout, _ = search.choose(config, cluster, lambda _: True)  # also what this version does not run yet
    return costs.predict(config, cluster, layout)


def scaling_table(grows: bool) -> List[str]:
    """Return lines of predictions, a network and number of devices a line; the batch grows with these or is fixed."""
    lines = ['| network | devices | images a step | data x pipeline x tensor | micro-batches | store | images/s '
             '| of linear | GB | bottleneck |', '|---|--:|--:|---|--:|---|--:|--:|--:|---|']
    for name, (each, *_) in NETWORKS.items():
        for devices in SIZES:
            images = each * devices if grows else FIXED
            start = f'| {name} | {devices:,} | {images:,} |'
            try:
                found = predicted(name, devices, images)
            except ValueError:
                lines.append(f'{start} does not fit | | | | | | |')
                continue
            layout = found.layout
            lines.append(f"{start} {' x '.join(map(str, layout[:3]))} | {layout.micro_batches} | {layout.store}"
                         f"{', sharded' * layout.shard_optimizer} | {found.images:,.0f} "
                         f'| {linear(name, devices, found, grows):.1%} | {found.memory / 1e9:.0f} '
                         f'| {found.bottleneck} |')
    return lines


def linear(name: str, devices: int, found: Prediction, grows: bool) -> float:
    """Return images/s over `devices` times those of one device that has all the memory it wants.

    That one computes as many images as each of them or, where the batch is fixed, the whole batch.
    """
    images = NETWORKS[name][0] if grows else FIXED
    one = images / costs.alone(configured(name, images), machines(1))
    return found.images / (devices * one)


def published_table() -> List[str]:
    """Return lines of published efficiencies of data parallelism beside the model's."""
    lines = ['| curve | MB of gradients | s/step of one | exchange, s | published | model, hidden '
             '| model, not hidden |', '|---|--:|--:|--:|--:|--:|--:|']
    for row in PUBLISHED:
        alone, wire, late = data_parallel(row)
        lines.append(f'| {row.name} | {4 * row.parameters / 1e6:.0f} | {alone:.3f} | {wire:.3f} | {row.efficiency:.1%} '
                     f'| {alone / (alone + late):.1%} | {alone / (alone + wire):.1%} |')
    return lines


def data_parallel(row: Published) -> Tuple[float, float, float]:
    """Return seconds: a step of one device; the exchange of all gradients; what of it the backward pass leaves over."""
    alone = row.batch / row.images
    wire, _ = costs.exchange(row.cluster, row.layout, row.parameters)
    return alone, wire, costs.exposed([2 / 3 * alone / MESSAGES] * MESSAGES, [wire / MESSAGES] * MESSAGES)


def tensor_table() -> List[str]:
    """Return lines of Megatron-LM's published weak scaling beside the model's.

    A layer's products are 24 b s h^2 (1 + s / 6 h) operations forward (Narayanan et al. 2021, appendix); the backward
    pass takes twice that, and computes the forward pass again, with its two sums.
    """
    lines = ['| GPUs of a tensor group | width | layers | compute, s | sums, s | published | model |',
             '|--:|--:|--:|--:|--:|--:|--:|']
    for row in MEGATRON:
        forward = 24 * IMAGES * TOKENS * row.width ** 2 * (1 + TOKENS / (6 * row.width))
        compute = row.layers * 4 * forward / row.gpus / V100.speed
        size = 2 * IMAGES * TOKENS * row.width
        sums = row.layers * 6 * all_reduce(size, row.gpus, V100.local_bandwidth, V100.local_latency)
        lines.append(f'| {row.gpus} | {row.width:,} | {row.layers} | {compute:.2f} | {sums:.2f} | {row.efficiency:.0%} '
                     f'| {compute / (compute + sums):.0%} |')
    return lines


def draw(path: str) -> None:
    """Draw efficiency against devices: the batch growing with them, and fixed."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.2), layout='constrained')
    sizes = [2 ** power for power in range(13)]
    for axes, grows in zip(figure.subplots(1, 2, sharey=True), (True, False)):
        for (name, (each, *_)), marker in zip(NETWORKS.items(), 'os^D'):
            points = []
            for devices in sizes:
                try:
                    found = predicted(name, devices, each * devices if grows else FIXED)
                    points.append((devices, 100 * linear(name, devices, found, grows)))
                except ValueError:
                    continue
            axes.plot(*zip(*points), marker=marker, markersize=4, label=name)
        axes.set_xscale('log', base=2)
        axes.set_xticks(sizes[::2], [f'{size:,}' for size in sizes[::2]])
        axes.set_xlabel('devices')
        axes.set_title('a batch that grows with the devices' if grows else f'{FIXED:,} images a step')
        axes.grid(alpha=0.3)
        axes.set_ylim(0, 105)
    figure.axes[0].set_ylabel('predicted efficiency, % of linear')
    figure.axes[0].legend(frameon=False, loc='lower left')
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    main()
