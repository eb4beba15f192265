"""A trained network as a graph of operators, and MXNet's files of it."""
import json
import warnings
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import mxnet as mx
import numpy as np
from mxnet.gluon import SymbolBlock

from ..ops import REFERENCE
from ..runtime.mxnet_private import structural_parameters
from .trained import Trained

BATCH = 3  # images a written model is compared on
SEED = 0
CLOSE_CALLS = 0.02  # share of rows chosen by their scores that may be others: rounding decides between close ones


class Graph(NamedTuple):
    """What infers: images to logits or detections, or images and masks to reconstructions; the batch is of any size."""
    symbol: mx.sym.Symbol
    arrays: Dict[str, mx.nd.NDArray]  # by the reference's names
    inputs: Dict[str, Tuple[int, ...]]  # name -> shape without the batch, float32
    output: str


def trace(trained: Trained) -> Graph:
    """Return what the run's predictor computes, as a graph.

    That is image (B, 3, H, W) to logits, (B, K) or of pixels (B, K, h, w), or to detections (B, 100, columns); or image
    and mask (B, h, w) to reconstruction (B, 3, H, W). Images are normalised; 1 in a mask is hidden.

    The graph is for programs that do not have our library: the network must compute with reference operators, as
    `load_run` makes it.
    """
    assert trained.net.backend == REFERENCE, trained.net.backend
    predictor = trained.predictor
    symbol = predictor.call(*map(mx.sym.var, predictor.inputs))
    parameters = structural_parameters(trained.net)
    names = {p.name: name for name, p in parameters.items()}
    content = json.loads(symbol.tojson())
    for number, node in enumerate(content['nodes']):
        # Copies are for gradients; oneDNN's partitioning for int8 loses the input of the third copy of one array.
        node['inputs'] = [_uncopied(content['nodes'], source) for source in node['inputs']]
        if node['op'] == 'null':
            node['name'] = names.get(node['name'], node['name'])
        else:
            node['name'] += f'_{number}'  # a layer that is used several times gives each use the same name
    content['nodes'][content['heads'][0][0]]['name'] = predictor.output
    symbol = mx.sym.load_json(json.dumps(content))
    used = set(symbol.list_inputs())
    return Graph(symbol, {name: p.data() for name, p in parameters.items() if name in used}, predictor.inputs,
                 predictor.output)


def _uncopied(nodes: List[Dict[str, Any]], source: List[int]) -> List[int]:
    """What a node's input [node, output, …] is a copy of; itself, where it is none. Earlier nodes must be done."""
    return nodes[source[0]]['inputs'][0] if nodes[source[0]]['op'] == '_copy' else source


def random_inputs(trained: Trained) -> List[np.ndarray]:
    """Returns a few normalised images, and masks for them after pre-training."""
    return trained.predictor.random_inputs(np.random.default_rng(SEED), BATCH)


def answer(trained: Trained, inputs: List[np.ndarray]) -> np.ndarray:
    """Returns what the network itself makes of them."""
    return trained.predictor.call(*map(mx.nd.array, inputs)).asnumpy()


def compare(expected: np.ndarray, found: np.ndarray, tolerance: float, what: str) -> None:
    """Compares answers.

    Raises:
        ValueError: they differ by more than `tolerance` of the largest value, or of 1.
    """
    difference = float(np.abs(expected - found).max())
    limit = tolerance * max(1.0, float(np.abs(expected).max()))
    if not difference <= limit:
        raise ValueError(f'{what} differs from the network by {difference:.2g} on random images, more than '
                         f'{limit:.2g}: nothing was written; `mxsimmim doctor` shows what to put into a bug report')


def compare_chosen(expected: np.ndarray, found: np.ndarray, score: int, tolerance: float, what: str) -> int:
    """Compares answers (B, n, columns) of rows chosen by their score, in whatever order: 0 in column `score` is none.

    Returns how many rows there are.

    Raises:
        ValueError: of too many rows the others have none that differs in each column by at most `tolerance` of its
            largest value, or of 1.
    """
    limits = tolerance * np.maximum(1.0, np.abs(expected).max(axis=(0, 1)))
    other = rows = 0
    for ours, theirs in zip(expected / limits, found / limits):
        ours, theirs = (each[each[:, score] > 0] for each in (ours, theirs))
        same = np.array([(np.abs(theirs - row) <= 1).all(axis=1) for row in ours]).reshape(len(ours), len(theirs))
        other += int((~same.any(axis=1)).sum() + (~same.any(axis=0)).sum())
        rows += len(ours) + len(theirs)
    if other > CLOSE_CALLS * rows:
        raise ValueError(f'{what} differs from the network in {other / rows:.0%} of what both find in random images, '
                         f'by more than {tolerance:g}: nothing was written; `mxsimmim doctor` shows what to put into a '
                         'bug report')
    return rows


def save_symbol(graph: Graph, prefix: Path) -> List[Path]:
    """Writes PREFIX-symbol.json and PREFIX-0000.params."""
    files = [Path(f'{prefix}-symbol.json'), Path(f'{prefix}-0000.params')]
    graph.symbol.save(str(files[0]))
    auxiliary = set(graph.symbol.list_auxiliary_states())
    mx.nd.save(str(files[1]), {('aux:' if name in auxiliary else 'arg:') + name: array
                               for name, array in graph.arrays.items()})
    return files


def load_symbol(files: List[Path], graph: Graph) -> SymbolBlock:
    """Loads the network that the two files describe, as any MXNet program does."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # that it cannot tell the inputs' type: float32, its default
        net = SymbolBlock.imports(str(files[0]), list(graph.inputs), str(files[1]))
    # Without static_shape int8 quantises its weights anew in each call: 94 ms instead of 45 for an image through ViT-S.
    net.hybridize(static_alloc=True, static_shape=True)
    return net
