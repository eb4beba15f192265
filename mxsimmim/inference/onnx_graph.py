"""Our graphs in ONNX (operator set 17).

MXNet's own exporter has no rsqrt and wants the batch size; of the two hundred operators it knows ours are these few.
"""
import ast
import json
import math
from typing import Any, Callable, Dict, List

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import onnx_boxes
from .graph import Graph
from .onnx_writer import END, OF_BATCH, Writer, shapes_of

OPSET, IR_VERSION = 17, 8


def _fully_connected(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    if a.get('flatten', True) and len(w.shapes[inputs[0]]) > 2:
        raise ValueError(f'{name}: FullyConnected with flatten=True has no translation to ONNX here')
    rows = w.add('Transpose', inputs[1:2], f'{name}.transposed', perm=[1, 0])
    if len(inputs) == 2:
        return w.add('MatMul', [inputs[0], rows], name)
    return w.add('Add', [w.add('MatMul', [inputs[0], rows], f'{name}.product'), inputs[2]], name)


def _gelu(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    if a['act_type'] != 'gelu':
        raise ValueError(f"{name}: LeakyReLU of type {a['act_type']} has no translation to ONNX here")
    x, = inputs
    erf = w.add('Erf', [w.add('Mul', [x, w.constant(1 / math.sqrt(2))], f'{name}.scaled')], f'{name}.erf')
    half = w.add('Mul', [x, w.constant(0.5)], f'{name}.half')
    return w.add('Mul', [half, w.add('Add', [erf, w.constant(1)], f'{name}.gate')], name)


def _relu(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    if a['act_type'] != 'relu':
        raise ValueError(f"{name}: Activation of type {a['act_type']} has no translation to ONNX here")
    return w.add('Relu', inputs, name)


def _batch_dot(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    sides = [w.add('Transpose', [x], f'{name}.{key}', perm=[0, 2, 1]) if a.get(key) else x
             for x, key in zip(inputs, ('transpose_a', 'transpose_b'))]
    return w.add('MatMul', sides, name)


def _reshape(w: Writer, name: str, inputs: List[str], _: Dict[str, Any]) -> str:
    return w.reshaped(inputs[0], name, w.shapes[name])


def _slice(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    end = END if a['end'] is None else a['end']
    return w.add('Slice', inputs + [w.constant([v], 'int64') for v in (a['begin'], end, a['axis'])], name)


def _broadcast_like(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    """A parameter (1, …) repeated for each image of the second input; or what each image has, along other axes."""
    assert a['lhs_axes'] == a['rhs_axes'], name
    given, wanted = w.shapes[inputs[0]], w.shapes[name]
    if a['lhs_axes'] != (0,):
        sides = [1 if side == OF_BATCH else side for side in wanted]  # 1: as it is
        return w.add('Expand', [inputs[0], w.constant(sides, 'int64')], name)
    batch = w.add('Shape', inputs[1:], f'{name}.batch', start=0, end=1)
    ones = w.constant([1] * (len(given) - 1), 'int64')
    return w.add('Expand', [inputs[0], w.add('Concat', [batch, ones], f'{name}.shape', axis=0)], name)


def _take(w: Writer, name: str, inputs: List[str], _: Dict[str, Any]) -> str:
    index = w.add('Cast', inputs[1:], f'{name}.index', to=TensorProto.INT64)  # Gluon keeps constants as floats
    return w.add('Gather', [inputs[0], index], name, axis=0)


def _filled(value: float) -> Callable[..., str]:
    tensor = numpy_helper.from_array(np.array([value], 'float32'))
    return lambda w, name, inputs, _: w.add('ConstantOfShape', [w.add('Shape', inputs, f'{name}.shape')], name,
                                            value=tensor)


def _same(op: str) -> Callable[..., str]:
    return lambda w, name, inputs, _: w.add(op, inputs, name)


def _scalar(op: str) -> Callable[..., str]:
    return lambda w, name, inputs, a: w.add(op, inputs + [w.constant(a['scalar'])], name)


def _reduction(op: str) -> Callable[..., str]:
    def write(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
        axes = a['axis'] if isinstance(a['axis'], tuple) else (a['axis'],)
        keep = int(a.get('keepdims', False))
        if op == 'ReduceSum':  # of these alone operator set 17 has the axes as an input
            return w.add(op, inputs + [w.constant(axes, 'int64')], name, keepdims=keep)
        return w.add(op, inputs, name, axes=axes, keepdims=keep)
    return write


def _pair(value: Any, otherwise: int) -> List[int]:
    return list(value) or [otherwise] * 2


def _convolution(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    return w.add('Conv', inputs, name, kernel_shape=a['kernel'], strides=_pair(a.get('stride', ()), 1),
                 pads=2 * _pair(a.get('pad', ()), 0))


def _pooling(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    if a.get('pool_type', 'max') != 'max':
        raise ValueError(f"{name}: Pooling of type {a['pool_type']} has no translation to ONNX here")
    return w.add('MaxPool', inputs, name, kernel_shape=a['kernel'], strides=_pair(a.get('stride', ()), 1))


def _group_norm(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    x, gamma, beta = inputs  # a number a group
    groups = w.add('Reshape', [x, w.constant([0, a['num_groups'], -1], 'int64')], f'{name}.groups')
    norm = w.add('InstanceNormalization', [groups, gamma, beta], f'{name}.norm', epsilon=float(a['eps']))
    return w.add('Reshape', [norm, w.add('Shape', [x], f'{name}.shape')], name)


def _adaptive_pooling(w: Writer, name: str, inputs: List[str], a: Dict[str, Any]) -> str:
    """Means over a grid of cells, which may overlap, as a product with a matrix."""
    cells = a['output_size'] if isinstance(a['output_size'], int) else a['output_size'][0]
    down, across = (_means(side, cells) for side in w.shapes[inputs[0]][2:])
    matrix = np.kron(down, across).T                                                          # (h * w, cells^2)
    rows = w.add('Reshape', [*inputs, w.constant([0, 0, -1], 'int64')], f'{name}.rows')
    w.constants[f'{name}.matrix'] = numpy_helper.from_array(matrix.astype('float32'), f'{name}.matrix')
    means = w.add('MatMul', [rows, f'{name}.matrix'], f'{name}.means')
    return w.add('Reshape', [means, w.constant([0, 0, cells, cells], 'int64')], name)


def _means(side: int, cells: int) -> np.ndarray:
    """The matrix (cells, side) whose rows average what PyTorch's AdaptiveAvgPool2d does."""
    rows = np.zeros((cells, side))
    for cell in range(cells):
        part = slice(cell * side // cells, -(-(cell + 1) * side // cells))
        rows[cell, part] = 1 / (part.stop - part.start)
    return rows


TRANSLATIONS: Dict[str, Callable[..., str]] = {  # MXNet's operator -> (writer, name, inputs, attributes) -> output
    'FullyConnected': _fully_connected,
    'Convolution': _convolution, 'Pooling': _pooling,
    'GroupNorm': _group_norm,
    '_contrib_AdaptiveAvgPooling2D': _adaptive_pooling,
    'LeakyReLU': _gelu,
    'Activation': _relu,
    'batch_dot': _batch_dot,
    'slice_axis': _slice,
    'broadcast_like': _broadcast_like,
    'Reshape': _reshape, 'reshape_like': _reshape,
    'transpose': lambda w, name, inputs, a: w.add('Transpose', inputs, name,
                                                  **({'perm': a['axes']} if a.get('axes') else {})),
    'Concat': lambda w, name, inputs, a: w.add('Concat', inputs, name, axis=a['dim']),
    'depth_to_space': lambda w, name, inputs, a: w.add('DepthToSpace', inputs, name, blocksize=a['block_size']),
    'SliceChannel': lambda w, name, inputs, a: w.add('Split', inputs, name, a['num_outputs'], axis=a['axis']),
    'softmax': lambda w, name, inputs, a: w.add('Softmax', inputs, name, axis=a['axis']),
    'take': _take,
    'Cast': lambda w, name, inputs, a: w.add('Cast', inputs, name, to=TensorProto.FLOAT),
    'mean': _reduction('ReduceMean'), 'sum': _reduction('ReduceSum'),
    'min': _reduction('ReduceMin'), 'prod': _reduction('ReduceProd'),
    'rsqrt': lambda w, name, inputs, a: w.add('Reciprocal', [w.add('Sqrt', inputs, f'{name}.root')], name),
    'square': lambda w, name, inputs, a: w.add('Mul', inputs * 2, name),
    '_rminus_scalar': lambda w, name, inputs, a: w.add('Sub', [w.constant(a['scalar'])] + inputs, name),
    'ones_like': _filled(1.0), 'zeros_like': _filled(0.0),
    'exp': _same('Exp'), 'sigmoid': _same('Sigmoid'),
    'sqrt': _same('Sqrt'), 'relu': _same('Relu'), 'negative': _same('Neg'),
    'BlockGrad': _same('Identity'), '_copy': _same('Identity'),
    **{f'{kind}_{end}': _same(op) for kind in ('elemwise', 'broadcast')
       for end, op in (('add', 'Add'), ('sub', 'Sub'), ('mul', 'Mul'), ('div', 'Div'))},
    '_plus_scalar': _scalar('Add'), '_minus_scalar': _scalar('Sub'), '_mul_scalar': _scalar('Mul'),
    '_div_scalar': _scalar('Div'), '_minimum_scalar': _scalar('Min'), '_maximum_scalar': _scalar('Max'),
    **onnx_boxes.TRANSLATIONS,
}


def to_onnx(graph: Graph) -> onnx.ModelProto:
    """Translates a graph to ONNX, with a batch of any size.

    Raises:
        ValueError: an operator that has no translation here.
    """
    content = json.loads(graph.symbol.tojson())
    writer = Writer(shapes_of(graph.symbol, graph.inputs))
    for node in content['nodes']:
        if node['op'] == 'null':
            continue
        if node['op'] not in TRANSLATIONS:
            raise ValueError(f"{node['name']}: MXNet's operator {node['op']} has no translation to ONNX here")
        inputs = [content['nodes'][source]['name'] + (f'.{output}' if output else '')
                  for source, output, *_ in node['inputs']]
        attributes = {key: _value(text) for key, text in node.get('attrs', {}).items()}
        TRANSLATIONS[node['op']](writer, node['name'], inputs, attributes)
    weights = [numpy_helper.from_array(array.asnumpy(), name) for name, array in graph.arrays.items()]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ['batch', *shape])
              for name, shape in graph.inputs.items()]
    output = helper.make_tensor_value_info(graph.output, TensorProto.FLOAT,
                                           ['batch', *writer.shapes[graph.output][1:]])
    built = helper.make_graph(writer.nodes, 'mxsimmim', inputs, [output], weights + list(writer.constants.values()))
    return helper.make_model(built, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION,
                             producer_name='mxsimmim')


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
