"""Gradients as they are exchanged: large ones by themselves, small ones together."""
from itertools import accumulate
from typing import List, Sequence

from mxnet import autograd
from mxnet.gluon import Parameter

from ..ops import OpBackend
from .communicators import Copies, Communicator

SMALL = 1 << 20  # bytes
LINE = 16  # float32 of a cache line, where each gradient begins


def exchanged(parameters: Sequence[Parameter], store: Communicator, backend: OpBackend) -> List[Copies]:
    """The parameters' gradients: first one array that holds all small ones, one after another, then the large ones.

    From now on the parameters' gradients lie in arrays of the store's. A transformer has three times as many small
    parameters as large ones, with a hundredth of the numbers, and a message of theirs costs as much as another. MXNet
    may also leave the small ones' last operators, such as the one that takes a bias table's gradient apart, for the
    very end of the backward pass; the large ones must not wait for these. Nothing may reallocate gradients after this,
    as `Parameter.cast` and `reset_ctx` do.
    """
    contexts = parameters[0].list_ctx()
    sizes = {p: p.data(contexts[0]).size for p in parameters}
    small, large = ([p for p in parameters if (4 * sizes[p] < SMALL) == kind] for kind in (True, False))
    firsts = list(accumulate([0] + [-(-sizes[p] // LINE) * LINE for p in small]))
    arrays = store.zeros(firsts[-1:] * bool(small) + [sizes[p] for p in large], contexts, backend)
    for p, first in zip(small, firsts):
        _place(p, [array[first:first + sizes[p]] for array in arrays[0]])
    for p, copies in zip(large, arrays[bool(small):]):
        _place(p, copies)
    return arrays


def _place(parameter: Parameter, arrays: Copies) -> None:
    """What Parameter._init_grad does, with our arrays."""
    parameter._grad = [array.reshape(parameter.shape) for array in arrays]
    autograd.mark_variables(parameter.list_data(), parameter._grad, parameter.grad_req)
