"""What `mxsimmim plan` prints: the best layouts, what is expected of each, and the command that runs it."""
import json
import math
import shlex
from typing import Any, Dict, List, Optional, Sequence

from ..config import Config, ConfigError
from .cluster import Cluster, quantity
from .costs import Layout, Prediction, form_of
from .model import parameters, segments
from .search import search

Given = Dict[str, Optional[str]]  # options of `cluster.UNITS` as they were typed


def plan(config: Config, words: Sequence[str], hosts: int, devices: int, given: Given, measure: bool, best: int,
         as_json: bool) -> str:
    """Return the text of a plan; `words` are the configuration's file and overrides as they were typed.

    Raises:
        ConfigError: a size that is missing or has no meaning.
        ValueError: there is no layout to run, see `search`; a measurement that failed.
    """
    for name, number in (('hosts', hosts), ('devices', devices), ('best', best)):
        if number < 1:
            raise ConfigError(f'--{name} {number} must be at least 1')
    cluster = cluster_of(config, hosts, devices, given, measure)
    found = search(config, cluster)[:best]
    commands = [command_line(words, cluster, each.layout) for each in found]
    if as_json:
        numbers = {name: None if value == math.inf else value for name, value in cluster._asdict().items()}
        return json.dumps({'cluster': {**numbers, 'rates': [[*key, rate] for key, rate in cluster.rates]},
                           'plans': [as_dict(each, command) for each, command in zip(found, commands)]}, indent=2)
    assumed = [] if measure else [name for name in ('speed', 'latency', 'local-bandwidth') if not given.get(name)]
    lines = [describe_cluster(cluster, assumed), describe_model(config, cluster), '', *table(found), '']
    lines += [f'{number}: {command}' for number, command in enumerate(commands, 1)]
    if hosts > 1:
        most = max(each.layout.workers for each in found) // hosts
        lines += ['', f'hosts: a file of {hosts} lines, HOST' + (f' slots={most}' if most > 1 else '')]
    return '\n'.join(lines)


def cluster_of(config: Config, hosts: int, devices: int, given: Given, measure: bool) -> Cluster:
    """Return what the options describe, with measured numbers where `measure` asks for them.

    What a network carries between hosts cannot be measured on one of them, and a limit of memory stays one.

    Raises:
        ConfigError: a size without which nothing can be said is missing.
    """
    stated: Dict[str, Any] = {name.replace('-', '_'): quantity(name, text) for name, text in given.items()
                              if text is not None}
    if hosts > 1 and 'bandwidth' not in stated:
        raise ConfigError(f'--bandwidth is missing, of the network between {hosts} hosts: add --bandwidth 100Gb')
    if measure:
        from .calibrate import calibrate
        stated.pop('speed', None)
        stated.pop('local_bandwidth', None)
        return calibrate(config, devices)._replace(hosts=hosts, **stated)
    if 'memory' not in stated:
        raise ConfigError("--memory is missing, a device's: add --memory 40GB, or --calibrate on such a machine")
    cpu = config.devices != 'auto' and config.devices[0].startswith('cpu')
    return Cluster(hosts=hosts, devices=devices, kind='cpu' if cpu else 'gpu', **stated)


def command_line(words: Sequence[str], cluster: Cluster, layout: Layout) -> str:
    """Return the command that trains so, to be typed on one of the hosts."""
    command = ['mxsimmim', 'pretrain', *words]
    if layout.pipeline > 1:
        command += [f'parallel.pipeline={layout.pipeline}', f'parallel.micro_batches={layout.micro_batches}',
                    'train.accumulate=1']
    elif layout.micro_batches > 1 or any(word.startswith('train.accumulate=') for word in words):
        command += [f'train.accumulate={layout.micro_batches}']
    command += [f'parallel.tensor={layout.tensor}'] if layout.tensor > 1 else []
    command += ['parallel.shard_optimizer=true'] if layout.shard_optimizer else []
    command += [f'train.compression={layout.compression}'] if layout.compression != 'none' else []
    command += ['model.recompute=true'] if layout.recompute else []
    if layout.workers == 1:
        return shlex.join(command)
    launch = ['tools/launch.py', '-n', str(layout.workers)]
    launch += ['--horovod'] if layout.store == 'horovod' else ['-s', str(layout.servers)]
    launch += ['-H', 'hosts'] if cluster.hosts > 1 else []
    launch += ['--devices', 'gpu'] if cluster.kind == 'gpu' else []
    return shlex.join([*launch, '--', *command])


def as_dict(found: Prediction, command: str) -> Dict[str, Any]:
    """Return a prediction for JSON."""
    return {'layout': found.layout._asdict(), 'step_seconds': found.step, 'images_per_second': found.images,
            'efficiency': found.efficiency, 'memory_bytes': found.memory, 'bottleneck': found.bottleneck,
            'parts_seconds': found.parts, 'command': command}


def describe_cluster(cluster: Cluster, assumed: Sequence[str]) -> str:
    """Describe the machines on one line."""
    text = (f'{cluster.hosts} x {cluster.devices} {cluster.kind.upper()} devices, {cluster.memory / 1e9:.1f} GB and '
            f'{cluster.speed / 1e12:.3g} TFLOP/s each')
    if cluster.hosts > 1:
        text += f'; between hosts {cluster.bandwidth * 8 / 1e9:.3g} Gb/s, {cluster.latency * 1e6:.3g} us'
    if cluster.devices > 1:
        text += f'; within one {cluster.local_bandwidth / 1e9:.3g} GB/s'
    return text + (f" (assumed: {', '.join(assumed)})" if assumed else '')


def describe_model(config: Config, cluster: Cluster) -> str:
    """Describe the network and its batch on one line."""
    model = config.model
    count = parameters(segments(model, config.mask, form_of(config, cluster)))
    return (f'{model.type} of {count / 1e6:,.1f} million parameters, {model.blocks} blocks, '
            f'{config.train.batch_size:,} images a step')


def table(found: Sequence[Prediction]) -> List[str]:
    """Return the lines of a table, a layout a line."""
    rows = [['', 'data', 'pipeline', 'tensor', 'micro-batches', 'store', 'compression', 'also', 's/step', 'images/s',
             'efficiency', 'GB', 'bottleneck']]
    for number, each in enumerate(found, 1):
        layout = each.layout
        also = [name for name, there in (('recompute', layout.recompute), ('shard', layout.shard_optimizer)) if there]
        rows.append([f'{number}:', *map(str, layout[:4]), layout.store, layout.compression, '+'.join(also) or '-',
                     f'{each.step:.3g}', f'{each.images:,.4g}', f'{each.efficiency:.1%}', f'{each.memory / 1e9:.1f}',
                     each.bottleneck])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
