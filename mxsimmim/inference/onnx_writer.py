"""An ONNX graph under construction: nodes, constants and what is known of shapes."""
from typing import Any, Dict, List, Sequence, Tuple

import mxnet as mx
import numpy as np
from onnx import helper, numpy_helper

Shape = Tuple[int, ...]
OF_BATCH = -1  # the length of an axis that depends on the batch
END = np.iinfo(np.int64).max  # of a slice that goes to the end


class Writer:
    """Nodes and constants of the ONNX graph under construction.

    Attributes:
        shapes: by the name of a node with one output, of a parameter or of an input.
    """

    def __init__(self, shapes: Dict[str, Shape]) -> None:
        self.nodes: List[Any] = []
        self.constants: Dict[str, Any] = {}
        self.shapes = shapes

    def add(self, op: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        """Appends an operator called `name`; returns its first output, which is called the same."""
        names = [name] + [f'{name}.{number}' for number in range(1, outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: str = 'float32') -> str:
        """Returns the name of a constant, shared by all who use the same."""
        array = np.asarray(value, dtype)
        name = f'constant.{dtype}.{"x".join(map(str, array.shape))}.{array.reshape(-1).tolist()}'
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def part(self, x: str, name: str, axis: int, begin: int, end: int) -> str:
        """Appends the slice `begin` to `end` of an axis."""
        return self.add('Slice', [x, *(self.constant([value], 'int64') for value in (begin, end, axis))], name)

    def reshaped(self, x: str, name: str, shape: Sequence[int]) -> str:
        """Appends a change of shape, of which one axis may be as long as is left: -1."""
        assert list(shape).count(-1) < 2, f'{name}: {shape}'
        return self.add('Reshape', [x, self.constant(shape, 'int64')], name)


def shapes_of(symbol: mx.sym.Symbol, inputs: Dict[str, Shape]) -> Dict[str, Shape]:
    """Returns the shapes of all that a symbol computes and takes, as in `Writer`: what two batches have in common.

    inputs are the shapes of its inputs without the batch.
    """
    inside = symbol.get_internals()
    one, two = (inside.infer_shape(**{name: (batch, *shape) for name, shape in inputs.items()})[1]
                for batch in (1, 2))
    suffix = '_output'
    return {name[:-len(suffix)] if name.endswith(suffix) else name:
            tuple(side if side == other else OF_BATCH for side, other in zip(*shapes))
            for name, *shapes in zip(inside.list_outputs(), one, two)}
