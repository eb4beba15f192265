"""What chooses and pools boxes, and makes feature pyramids, in ONNX: the operators of detectors.

`onnx_graph` has the others. As there, each takes (writer, name, inputs, attributes) and returns the output's name.
Numbers that are indices or truths are floats, as in MXNet.
"""
import math
from typing import Any, Callable, Dict, List

from onnx import TensorProto, helper

from .onnx_writer import END, OF_BATCH, Writer

OUTSIDE = -0.5  # in pixels of a map, of a box's right side: what is interpolated farther left is 0
Attributes = Dict[str, Any]


def _compared(op: str) -> Callable[..., str]:
    def write(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
        truth = w.add(op, inputs + [w.constant(a['scalar'])], f'{name}.truth')
        return w.add('Cast', [truth], name, to=TensorProto.FLOAT)
    return write


def _where(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    truth = w.add('Cast', inputs[:1], f'{name}.truth', to=TensorProto.BOOL)
    return w.add('Where', [truth, *inputs[1:]], name)


def _log2(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    return w.add('Mul', [w.add('Log', inputs, f'{name}.log'), w.constant(1 / math.log(2))], name)


def _clip(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    return w.add('Clip', inputs + [w.constant(a[key]) for key in ('a_min', 'a_max')], name)


def _slice(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    """Some or all axes, those with None from end to end."""
    begin, end = a['begin'], a['end']
    step = a.get('step') or (None,) * len(begin)
    columns = ([0 if value is None else value for value in begin], [END if value is None else value for value in end],
               range(len(begin)), [value or 1 for value in step])
    return w.add('Slice', inputs + [w.constant(list(column), 'int64') for column in columns], name)


def _stack(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    axis = w.constant([a['axis']], 'int64')
    rows = [w.add('Unsqueeze', [x, axis], f'{name}.part{number}') for number, x in enumerate(inputs)]
    return w.add('Concat', rows, name, axis=a['axis'])


def _arange_like(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    count = w.add('Squeeze', [w.add('Shape', inputs, f'{name}.shape', start=a['axis'], end=a['axis'] + 1)],
                  f'{name}.count')
    numbers = w.add('Range', [w.constant(0, 'int64'), count, w.constant(1, 'int64')], f'{name}.numbers')
    return w.add('Cast', [numbers], name, to=TensorProto.FLOAT)


def _topk(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    """The places of the largest, the largest first; of equal ones the first, as it happens to be in MXNet."""
    if a['ret_typ'] != 'indices':
        raise ValueError(f"{name}: topk of type {a['ret_typ']} has no translation to ONNX here")
    w.add('TopK', inputs + [w.constant([a['k']], 'int64')], f'{name}.found', 2, axis=a['axis'])
    return w.add('Cast', [f'{name}.found.1'], name, to=TensorProto.FLOAT)


def _gather_nd(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    array, index = inputs
    axes = len(w.shapes[index])
    last = w.add('Transpose', [index], f'{name}.last', perm=[*range(1, axes), 0])  # the axis of coordinates
    return w.add('GatherND', [array, w.add('Cast', [last], f'{name}.index', to=TensorProto.INT64)], name)


def _up_sampling(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    if a['sample_type'] != 'nearest':
        raise ValueError(f"{name}: UpSampling of type {a['sample_type']} has no translation to ONNX here")
    return w.add('Resize', [*inputs, '', w.constant([1, 1, a['scale'], a['scale']])], name, mode='nearest',
                 coordinate_transformation_mode='asymmetric', nearest_mode='floor')


def _box_decode(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    """Codes (1, N, 4), of shifts of middles and logarithms of sides, and boxes of corners (1, N, 4) to such boxes."""
    assert a['format'] == 'corner', name
    code, boxes = inputs

    def half(x: str, first: int, what: str) -> str:
        return w.part(x, f'{name}.{what}', 2, first, first + 2)
    low = half(boxes, 0, 'low')
    size = w.add('Sub', [half(boxes, 2, 'high'), low], f'{name}.size')
    middle = w.add('Add', [low, w.add('Mul', [size, w.constant(0.5)], f'{name}.radius')], f'{name}.middle')
    scaled = w.add('Mul', [code, w.constant([a[f'std{number}'] for number in range(4)])], f'{name}.scaled')
    shift = w.add('Mul', [half(scaled, 0, 'relative'), size], f'{name}.shift')
    logarithm = w.add('Min', [half(scaled, 2, 'logarithm'), w.constant(a['clip'])], f'{name}.believed')
    wanted = w.add('Mul', [w.add('Exp', [logarithm], f'{name}.ratio'), size], f'{name}.wanted')
    radius = w.add('Mul', [wanted, w.constant(0.5)], f'{name}.new_radius')
    to = w.add('Add', [middle, shift], f'{name}.to')
    corners = [w.add(op, [to, radius], f'{name}.new.{op}') for op in ('Sub', 'Add')]
    return w.add('Concat', corners, name, axis=2)


def _box_nms(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    """Rows (B, N, columns) to those that are kept, the highest score first, and then rows of -1."""
    x, = inputs
    count, first, least = w.shapes[x][1], a['coord_start'], w.constant(a['valid_thresh'])
    score = w.reshaped(w.part(x, f'{name}.column', 2, a['score_index'], a['score_index'] + 1), f'{name}.score',
                       [OF_BATCH, count])
    boxes, scores = w.part(x, f'{name}.boxes', 2, first, first + 4), w.reshaped(score, f'{name}.one', [-1, 1, count])
    if a['id_index'] >= 0:  # boxes of other classes suppress nothing: ONNX has a row of scores for each class
        own = w.reshaped(w.part(x, f'{name}.id', 2, a['id_index'], a['id_index'] + 1), f'{name}.class', [-1, 1, count])
        most = w.add('Add', [w.add('ReduceMax', [own], f'{name}.last', keepdims=0), w.constant(1)], f'{name}.classes')
        numbers = w.reshaped(w.add('Range', [w.constant(0), most, w.constant(1)], f'{name}.range'), f'{name}.numbers',
                             [-1, 1])
        scores = w.add('Where', [w.add('Equal', [own, numbers], f'{name}.is_own'), scores, least], f'{name}.scores')
    found = w.add('NonMaxSuppression', [boxes, scores, w.constant([count], 'int64'),
                                        w.constant([a['overlap_thresh']]), w.constant([a['valid_thresh']])],
                  f'{name}.selected')  # rows of image, class, box
    places = w.add('Gather', [found, w.constant([0, 2], 'int64')], f'{name}.places', axis=1)
    none, all_ = (w.add('ConstantOfShape', [shape], f'{name}.{value}', value=helper.make_tensor(
        'value', TensorProto.BOOL, [1], [value])) for value, shape in (
            (False, w.add('Shape', [score], f'{name}.shape')),
            (True, w.add('Shape', [found], f'{name}.number', start=0, end=1))))
    kept = w.add('ScatterND', [none, places, all_], f'{name}.kept')
    w.add('TopK', [w.add('Where', [kept, score, least], f'{name}.of_kept'), w.constant([count], 'int64')],
          f'{name}.order', 2, axis=1)
    index = w.reshaped(f'{name}.order.1', f'{name}.index', [-1, count, 1])
    rows = w.add('GatherND', [x, index], f'{name}.rows', batch_dims=1)
    there = w.reshaped(w.add('Greater', [f'{name}.order', least], f'{name}.above'), f'{name}.there', [-1, count, 1])
    return w.add('Where', [there, rows, w.constant(-1)], name)


def _roi_align(w: Writer, name: str, inputs: List[str], a: Attributes) -> str:
    """Pools regions (N, 5) of a map; only those that are on it, as of a pyramid's each is on one."""
    assert a['aligned'] and not a.get('position_sensitive'), name
    array, regions = inputs
    right = w.part(regions, f'{name}.right', 1, 3, 4)
    near = w.add('Greater', [right, w.constant(OUTSIDE / a['spatial_scale'])], f'{name}.near')
    places = w.add('Transpose', [w.add('NonZero', [w.reshaped(near, f'{name}.rows', [-1])], f'{name}.nonzero')],
                   f'{name}.places', perm=[1, 0])
    own = w.add('GatherND', [regions, places], f'{name}.own')
    image = w.add('Cast', [w.reshaped(w.part(own, f'{name}.first', 1, 0, 1), f'{name}.number', [-1])],
                  f'{name}.image', to=TensorProto.INT64)
    height, width = a['pooled_size']
    pooled = w.add('RoiAlign', [array, w.part(own, f'{name}.boxes', 1, 1, 5), image], f'{name}.pooled',
                   coordinate_transformation_mode='half_pixel', output_height=height, output_width=width,
                   sampling_ratio=a['sample_ratio'], spatial_scale=a['spatial_scale'])
    count, cells = w.add('Shape', [regions], f'{name}.count', start=0, end=1), [w.shapes[array][1], height, width]
    shape = w.add('Concat', [count, w.constant(cells, 'int64')], f'{name}.shape', axis=0)
    return w.add('ScatterND', [w.add('ConstantOfShape', [shape], f'{name}.zeros'), places, pooled], name)


TRANSLATIONS: Dict[str, Callable[..., str]] = {
    'expand_dims': lambda w, name, inputs, a: w.add('Unsqueeze', inputs + [w.constant([a['axis']], 'int64')], name),
    'stack': _stack, 'slice': _slice, '_contrib_arange_like': _arange_like,
    'where': _where, 'clip': _clip, 'log2': _log2,
    'floor': lambda w, name, inputs, a: w.add('Floor', inputs, name),
    'add_n': lambda w, name, inputs, a: w.add('Sum', inputs, name),
    '_equal_scalar': _compared('Equal'), '_greater_scalar': _compared('Greater'),
    '_greater_equal_scalar': _compared('GreaterOrEqual'),
    'topk': _topk, 'gather_nd': _gather_nd, 'UpSampling': _up_sampling,
    '_contrib_box_decode': _box_decode, '_contrib_box_nms': _box_nms, '_contrib_ROIAlign': _roi_align,
}
