"""Gradients as they are exchanged: large ones by themselves, small ones together."""
from itertools import accumulate
from typing import Dict, List, Sequence, Tuple

import mxnet as mx
from mxnet.gluon import Parameter

from ..ops import OpBackend
from ..runtime import mxnet_private
from .communicators import Communicator, Copies

SMALL = 1 << 20  # bytes
LINE = 16  # float32 of a cache line, where each gradient begins


def exchanged(parameters: Sequence[Parameter], communicator: Communicator, backend: OpBackend) -> List[Copies]:
    """Return the gradients as arrays to exchange: one with all small ones, one after another, then each large one.

    From now on the parameters' gradients lie in arrays that the communicator allocated. A transformer has three times
    as many small parameters as large ones, with a hundredth of the numbers, and a message of theirs costs as much as
    another. MXNet may also leave the small ones' last operators, such as the one that takes a bias table's gradient
    apart, for the very end of the backward pass; the large ones must not wait for these. Nothing may reallocate
    gradients after this, as `Parameter.cast` and `reset_ctx` do.
    """
    groups: Dict[Tuple[mx.Context, ...], List[Parameter]] = {}
    for p in parameters:
        groups.setdefault(tuple(p.list_ctx()), []).append(p)
    return [array for contexts, group in groups.items()
            for array in _on_contexts(group, contexts, communicator, backend)]


def _on_contexts(parameters: Sequence[Parameter], contexts: Sequence[mx.Context], communicator: Communicator,
                 backend: OpBackend) -> List[Copies]:
    """`exchanged` for parameters that lie on the same contexts."""
    sizes = {p: p.data(contexts[0]).size for p in parameters}
    small, large = ([p for p in parameters if (4 * sizes[p] < SMALL) == kind] for kind in (True, False))
    firsts = list(accumulate([0] + [-(-sizes[p] // LINE) * LINE for p in small]))
    arrays = communicator.allocate(firsts[-1:] * bool(small) + [sizes[p] for p in large], contexts, backend)
    for p, first in zip(small, firsts):
        mxnet_private.set_gradients(p, [array[first:first + sizes[p]].reshape(p.shape) for array in arrays[0]])
    for p, copies in zip(large, arrays[bool(small):]):
        mxnet_private.set_gradients(p, [array.reshape(p.shape) for array in copies])
    return arrays
