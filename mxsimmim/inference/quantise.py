"""A classifier whose linear maps compute in 8 bits: oneDNN's post-training quantisation, measured beside float32."""
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import mxnet as mx
import numpy as np
from mxnet.contrib.quantization import quantize_model

from ..data.labels import labelled_source, open_labelled
from ..data.loader import Batch, every_image
from ..data.sampling import generator
from ..data.sources import Source, Subset, notes_of, tell
from ..data.transforms import ClassifyEvalTransform, normalise
from ..models import Classifier
from .graph import Graph, load_symbol, save_symbol
from .trained import Trained

CALIBRATION = 256  # images whose activations set the scales
LATENCY_BATCHES = (1, 32)
REPEATS = 15  # alternating runs of which the median is taken
BACKEND = 'MKLDNN_QUANTIZE'  # oneDNN's fusion, before and after the scales are known
FUSED = '_sg_mkldnn_fully_connected'


class Measured(NamedTuple):
    """One precision's figures."""
    accuracy: float  # of the held-out images, per cent
    latency: Dict[int, float]  # images a batch -> milliseconds a batch


def quantised(trained: Trained, graph: Graph, prefix: Path, images: Optional[str],
              max_drop: float) -> Tuple[List[Path], str]:
    """Writes the quantised graph as `save_symbol` does; returns its files and a table of accuracy and latency.

    Raises:
        ValueError: not a classifier, too few or wrong images, no oneDNN, or more than `max_drop` points of accuracy
            lost.
    """
    predictor = trained.predictor
    if not isinstance(trained.net, Classifier):
        raise ValueError(f'int8 is for classifiers, whose accuracy tells what it costs: this run is {predictor.kind}')
    if not mx.runtime.Features().is_enabled('MKLDNN'):
        raise ValueError('int8 needs an MXNet built with oneDNN: `mxsimmim doctor` shows what this one has')
    calibration, held_out, labels = _images(trained, images)
    pixels = np.concatenate([_normalised(trained, batch) for batch in _batches(trained, calibration)])
    files = save_symbol(quantise(graph, pixels), prefix)
    plain = load_symbol(save_symbol(graph, Path(f'{prefix}-float32')), graph)
    nets = {'float32': plain, 'int8': load_symbol(files, graph)}
    accuracy = _accuracy(trained, nets, held_out, labels)
    latency = _latency(nets, graph.inputs['image'])
    measured = {name: Measured(accuracy[name], latency[name]) for name in nets}
    drop = accuracy['float32'] - accuracy['int8']
    if drop > max_drop:
        raise ValueError(f"int8 costs {drop:.2f} points of accuracy on {len(labels):,} held-out images "
                         f"({accuracy['float32']:.2f} to {accuracy['int8']:.2f} %), more than --max-drop={max_drop:g}: "
                         'nothing was written; raise it, or export without --int8')
    return files, table(measured, len(labels), len(pixels))


def quantise(graph: Graph, calibration: np.ndarray) -> Graph:
    """Puts a graph's products with parameters into int8, their scales from normalised images (N, 3, S, S).

    Everything else stays in float32: norms, softmax, GELU, attention's own products and SwinV2's network of positions,
    and also our row sums and outer products, which are matrix products only in form. Weights have a scale an output,
    activations one a layer, the largest value met; weights are stored in float32 and quantised when the network is
    first used, to 7 bits (`narrow`).
    """
    fused = graph.symbol.get_backend_symbol(BACKEND)
    nodes = json.loads(fused.tojson())['nodes']
    products = {node['name'] for node in nodes if node['op'] == FUSED
                and nodes[node['inputs'][1][0]]['name'] in graph.arrays
                and '.cpb_mlp.' not in nodes[node['inputs'][1][0]]['name']}
    others = [node['name'] for node in nodes if node['op'] != 'null' and node['name'] not in products]
    auxiliary: Set[str] = set(fused.list_auxiliary_states())
    arguments = {name: array for name, array in graph.arrays.items() if name not in auxiliary}
    states = {name: array for name, array in graph.arrays.items() if name in auxiliary}
    batch = min(32, len(calibration))
    with _without_remarks():
        symbol, arguments, states = quantize_model(
            fused, arguments, states, data_names=('image',), label_names=None, ctx=mx.cpu(), excluded_sym_names=others,
            calib_mode='naive', calib_data=mx.io.NDArrayIter({'image': calibration}, batch_size=batch),
            quantized_dtype='int8', quantize_mode='full', quantize_granularity='channel-wise')
        symbol = symbol.get_backend_symbol(BACKEND)
    return narrow(graph._replace(symbol=symbol, arrays={**arguments, **states}))


def narrow(graph: Graph) -> Graph:
    """Limits a quantised graph's weights to -64 .. 64, whose products come out right on every CPU.

    Without VNNI oneDNN adds products of activations, which it shifts to 0 .. 255, and weights in pairs, and keeps the
    sum in 16 bits: 2 * 255 * 127 saturates there, 2 * 255 * 64 does not. The exported file does not know where it will
    run. MXNet gives the largest weight of each output 127, and takes no other scale; so each output gets one weight
    more, of twice that size, for an activation more, which is 0.
    """
    content, arrays = json.loads(graph.symbol.tojson()), dict(graph.arrays)
    parts = graph.symbol.get_internals()
    shapes = dict(zip(parts.list_outputs(), parts.infer_shape(image=(1, *graph.inputs['image']))[1]))
    nodes: List[Dict[str, Any]] = []
    places: List[int] = []  # of the old nodes among the new
    zeros: Dict[Tuple[int, ...], int] = {}  # by their shape but for the last axis

    def add(op: str, name: str, inputs: List[List[int]], **attrs: Any) -> int:
        nodes.append({'op': op, 'name': name, 'attrs': {k: str(v) for k, v in attrs.items()}, 'inputs': inputs})
        return len(nodes) - 1

    for node in content['nodes']:
        node['inputs'] = [[places[place], *rest] for place, *rest in node['inputs']]
        if node['op'] == FUSED and node.get('attrs', {}).get('quantized') in ('True', '1'):
            (data, weight, *others), name = node['inputs'], node['name']
            before, ranges = shapes[f'{name}_output'][:-1], others[-2:]
            if before not in zeros:
                first = add('slice_axis', f'{name}_first', [data], axis=-1, begin=0, end=1)
                zeros[before] = add('zeros_like', f'{name}_zero', [[first, 0, 0]])
            wider = add('_contrib_quantized_concat', f'{name}_wider', [data, [zeros[before], 0, 0], *ranges * 2],
                        dim=len(before), num_args=2)
            node['inputs'] = [[wider, 0, 0], weight, *others]
            own = nodes[weight[0]]['name']
            largest = mx.nd.max(mx.nd.abs(arrays[own]), axis=1, keepdims=True)
            arrays[own] = mx.nd.concat(arrays[own], 2 * largest + (largest == 0), dim=1)
        nodes.append(node)
        places.append(len(nodes) - 1)
    content = {'nodes': nodes, 'arg_nodes': [place for place, node in enumerate(nodes) if node['op'] == 'null'],
               'heads': [[places[place], *rest] for place, *rest in content['heads']], 'attrs': content['attrs']}
    return graph._replace(symbol=mx.sym.load_json(json.dumps(content)), arrays=arrays)


def table(measured: Dict[str, Measured], images: int, calibration: int) -> str:
    """Formats accuracy and latency of each precision, one a row, and what int8 changes."""
    plain, int8 = measured['float32'], measured['int8']
    head = ''.join(f'{f"batch {batch}":>14}' for batch in plain.latency)
    lines = [f'{"":<9}{"accuracy":>10}{head}    ({images:,} held-out images, {calibration:,} for calibration)']
    for name, row in measured.items():
        times = ''.join(f'{f"{ms:.2f} ms":>14}' for ms in row.latency.values())
        lines.append(f'{name:<9}{f"{row.accuracy:.2f} %":>10}{times}')
    gains = ''.join(f'{_speed(plain.latency[b] / int8.latency[b]):>14}' for b in plain.latency)
    lines.append(f'{"change":<9}{f"{int8.accuracy - plain.accuracy:+.2f}":>10}{gains}')
    return '\n'.join(lines + ['of networks loaded with SymbolBlock.imports and hybridized with static_alloc and '
                              'static_shape, as int8 needs'])


def _speed(ratio: float) -> str:
    return f'{ratio:.2f}x faster' if ratio >= 1 else f'{1 / ratio:.2f}x slower'


def _images(trained: Trained, images: Optional[str]) -> Tuple[Source, Source, np.ndarray]:
    """(calibration, held-out, labels of the latter); of images given, a part calibrates and the others are held out."""
    data, classes = trained.config.data, trained.predictor.classes
    if images is None or images == data.path:
        try:
            own = open_labelled(data, trained.config.seed)
        except ValueError as error:  # it speaks of keys, which an export does not take
            raise ValueError(f'the images of the run cannot be had here ({error}): name labelled images with --images'
                             ) from None
        tell(notes_of(own.train, own.held_out))
        if own.classes != classes:
            raise ValueError(f'{data.path} has {len(own.classes)} classes ({", ".join(own.classes[:3])}, …), the run '
                             f'{len(classes)} ({", ".join(classes[:3])}, …): name the right images '
                             'with --images')
        if own.held_out is None or own.held_out_labels is None:
            raise ValueError('the run held out no images that could tell what int8 costs: name '
                             f'{"others" if images else "some"} with --images')
        order = generator(0).permutation(len(own.train))[:CALIBRATION]
        return Subset(own.train, order), own.held_out, own.held_out_labels
    table = data.val_labels if images == data.val_path else ''
    source, labels, _ = labelled_source(images, classes, table, 'data.val_labels' if table else '')
    tell(source.notes)
    if len(source) < 2:
        raise ValueError(f'{images} has {len(source)} image: int8 needs some to calibrate and others to measure with')
    order = generator(0).permutation(len(source))
    count = min(CALIBRATION, len(source) // 2)
    return Subset(source, order[:count]), Subset(source, order[count:]), labels[order[count:]]


def _batches(trained: Trained, source: Source) -> Iterator[Batch]:
    data = trained.config.data
    transform = ClassifyEvalTransform(data, trained.config.model)
    return every_image(source, transform, 32, data.threads)


def _normalised(trained: Trained, batch: Batch) -> np.ndarray:
    data = trained.config.data
    return np.stack([normalise(image, data.mean, data.std) for image in batch.fields['image']])


def _accuracy(trained: Trained, nets: Dict[str, Any], source: Source, labels: np.ndarray) -> Dict[str, float]:
    right = dict.fromkeys(nets, 0)
    for batch in _batches(trained, source):
        image = mx.nd.array(_normalised(trained, batch))
        for name, net in nets.items():
            right[name] += int((net(image).asnumpy().argmax(1) == labels[batch.index]).sum())
    return {name: 100 * count / len(labels) for name, count in right.items()}


def _latency(nets: Dict[str, Any], shape: Sequence[int]) -> Dict[str, Dict[int, float]]:
    """Milliseconds a batch, by precision and batch size: medians of runs that take turns."""
    result: Dict[str, Dict[int, float]] = {name: {} for name in nets}
    for count in LATENCY_BATCHES:
        image = mx.nd.random.normal(shape=(count, *shape))
        times: Dict[str, List[float]] = {name: [] for name in nets}
        for _ in range(1 + REPEATS):  # the first allocates and quantises the weights
            for name, net in nets.items():
                began = time.perf_counter()
                net(image).wait_to_read()
                times[name].append(time.perf_counter() - began)
        for name in nets:
            result[name][count] = 1e3 * float(np.median(times[name][1:]))
    return result


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """MXNet's quantiser writes three lines an operator that it leaves alone, past sys.stderr. Its errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
