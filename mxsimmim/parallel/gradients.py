"""Gradients as they are exchanged: large ones by themselves, small ones together."""
from typing import List, Sequence

import mxnet as mx
from mxnet import autograd
from mxnet.gluon import Parameter

from .stores import Copies

SMALL = 1 << 20  # bytes
LINE = 16  # float32 of a cache line, where each gradient begins


def exchanged(parameters: Sequence[Parameter]) -> List[Copies]:
    """The parameters' gradients: first one array that holds all small ones, one after another, then the large ones.

    From now on the small parameters' gradients are views of the first array. A transformer has three times as many
    small parameters as large ones, with a hundredth of the numbers, and a message of theirs costs as much as another.
    MXNet may also leave the small ones' last operators, such as the one that takes a bias table's gradient apart, for
    the very end of the backward pass; the large ones must not wait for these. Nothing may reallocate gradients after
    this, as `Parameter.cast` and `reset_ctx` do.
    """
    contexts = parameters[0].list_ctx()
    sizes = {p.name: p.data(contexts[0]).size for p in parameters}
    small = [p for p in parameters if 4 * sizes[p.name] < SMALL]
    large = [p.list_grad() for p in parameters if 4 * sizes[p.name] >= SMALL]
    if not small:
        return large
    ends, end = {}, 0
    for p in small:
        ends[p.name] = end + sizes[p.name]
        end += -(-sizes[p.name] // LINE) * LINE
    together = [mx.nd.zeros((end,), ctx=ctx) for ctx in contexts]
    for p in small:
        first, last = ends[p.name] - sizes[p.name], ends[p.name]
        # What Parameter._init_grad does, with our arrays.
        p._grad = [array[first:last].reshape(p.shape) for array in together]
        autograd.mark_variables(p.list_data(), p._grad, p.grad_req)
    return [together] + large
