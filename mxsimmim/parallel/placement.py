"""Placements: where the model lives and how a batch becomes gradients."""
import os
from typing import Any, List, Optional, Protocol, Sequence, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import autograd
from mxnet.gluon import HybridBlock

from ..data.loader import Batch
from ..data.sampling import split
from ..models import Detector, Network, Segmenter, SimMIM, parameter_specs
from ..models.layers import keep_factors
from ..ops import OpBackend
from ..runtime.process import ALONE, ProcessInfo
from .tensor import Group, TensorParallel, grouped


def contexts_of(devices: Any, process: ProcessInfo = ALONE) -> List[mx.Context]:
    """MXNet contexts for `devices`: 'auto' (every GPU, else cpu(0)) or names such as 'gpu(0)'.

    Processes of one machine that see all of its GPUs divide them under 'auto'.

    Raises:
        ValueError: a GPU that is not there, or that this build of MXNet cannot compute on.
    """
    gpus = mx.context.num_gpus()
    if devices == 'auto':
        own = range(gpus)
        if gpus >= process.local_size > 1 and 'CUDA_VISIBLE_DEVICES' not in os.environ:
            own = own[split(gpus, process.local_size)[process.local_rank]]
        devices = [f'gpu({i})' for i in own] or ['cpu(0)']
    found = [mx.Context(name[:3], int(name[4:-1])) for name in devices]
    missing = [str(ctx) for ctx in found if ctx.device_type == 'gpu' and ctx.device_id >= gpus]
    if missing:
        raise ValueError(f"devices: {', '.join(missing)} asked for, but MXNet sees {gpus} GPUs: "
                         'write devices=auto, or run `mxsimmim doctor` to see why')
    for ctx in found:
        if ctx.device_type == 'gpu':  # now, with a remedy, not with "no kernel image" in the first step
            try:
                (mx.nd.zeros((1,), ctx=ctx) + 1).wait_to_read()
            except mx.MXNetError as error:
                raise ValueError(f'{ctx}: MXNet cannot compute there: {str(error).strip().splitlines()[-1]}; run '
                                 '`mxsimmim doctor` to see what fits, or train on devices=[cpu(0)]') from error
    return found


class Placement(Protocol):
    """Where a model lives and how a batch becomes gradients."""
    net: Network
    contexts: List[mx.Context]
    inputs: Sequence[str]  # the fields of a batch that this worker computes with

    def forward_backward(self, batch: Batch, total: int, on_micro_batch: Optional[Any] = None) -> mx.nd.NDArray:
        """See `Replicated`."""

    def loss(self, batch: Batch) -> mx.nd.NDArray:
        """See `Replicated`."""

    def outputs(self, batch: Batch) -> np.ndarray:
        """See `Replicated`."""

    def reconstruct(self, batch: Batch) -> np.ndarray:
        """See `Replicated`."""


class Inputs:
    """What a network takes of a batch, on a device."""

    def __init__(self, net: Network):
        self._net = net

    def take(self, batch: Batch, part: slice, names: Sequence[str], ctx: mx.Context) -> Tuple[mx.nd.NDArray, ...]:
        """Return those of the named fields that the batch has."""
        return tuple(self._array(name, batch.fields[name][part], ctx) for name in names if name in batch.fields)

    def of_stage(self, batch: Batch, part: slice, names: Sequence[str], ctx: mx.Context) -> List[mx.nd.NDArray]:
        """Return a pipeline stage's inputs; `keep` is of ones where the batch has no draws."""
        found: List[mx.nd.NDArray] = []
        for name in names:
            if name != 'keep':
                found += self.take(batch, part, (name,), ctx)
            else:
                ones = (part.stop - part.start, 2 * self._net.config.blocks)
                found += self.take(batch, part, ('uniform',), ctx) or [mx.nd.ones(ones, ctx=ctx)]
        return found

    def _array(self, name: str, values: np.ndarray, ctx: mx.Context) -> mx.nd.NDArray:
        """What the network takes of a field. Bytes are normalised on the device; float images are already."""
        if name == 'uniform':
            values = keep_factors(values, self._net.config.drop_path)
        array = mx.nd.array(values, ctx=ctx, dtype=values.dtype)
        return self._net.pixels.prepare(array) if name == 'image' else array


class Replicated:
    """The whole network on each context; a batch is split over them, and over `accumulate` parts in time.

    Losses are means over images that count the same, of as many masked pixels, say, so the mean loss of the batch is
    the mean of the slices' losses, each weighted with its images: slices may be uneven. With `tensor` a group of
    contexts takes the place of one, or with `group` that of a context of this worker and one of each of others.
    """

    def __init__(self, net: Network, contexts: Sequence[mx.Context], accumulate: int = 1, tensor: int = 1,
                 group: Optional[Group] = None):
        self.net, self.contexts, self._accumulate, self._inputs = net, list(contexts), accumulate, Inputs(net)
        parts, groups = grouped(net, self.contexts, tensor, group)
        self._firsts = [each.contexts[0] for each in groups]  # of each replica
        self.inputs: Sequence[str] = net.inputs
        self._compute: Union[Network, TensorParallel] = net
        graphs: Sequence[HybridBlock] = [net]
        if parts:
            assert not isinstance(net, (Segmenter, Detector))
            self._compute = TensorParallel(net, parts, groups)
            graphs = self._compute.graphs
        else:
            net.collect_params().reset_ctx(self.contexts)
        self._parameters = [spec.parameter for spec in parameter_specs(net) if spec.trainable]
        if accumulate > 1:
            for parameter in self._parameters:
                parameter.grad_req = 'add'
        for graph in graphs:
            hybridize(graph, net.backend, not parts)

    def forward_backward(self, batch: Batch, total: int, on_micro_batch: Optional[Any] = None) -> mx.nd.NDArray:
        """Leaves in the parameters' gradients, on each context, its part of the mean gradient over `total` images.

        These are the images of the batch, or, where `batch` is one worker's part of it, of all workers.
        `on_micro_batch`, if given, is called between two micro-batches. Returns that part of the mean loss (1,), on the
        first context.
        """
        losses = []
        if self._accumulate > 1:
            for parameter in self._parameters:
                parameter.zero_grad()
        for number, part in enumerate(split(len(batch.index), self._accumulate)):
            if number and on_micro_batch:
                on_micro_batch()
            with autograd.record():
                outputs = [(self._compute(*inputs), weight / total)
                           for weight, inputs in self._slices(batch, part, self.net.inputs)]
            autograd.backward([loss for loss, _ in outputs],
                              [mx.nd.full((1,), weight, ctx=loss.context) for loss, weight in outputs])
            losses += [loss.as_in_context(self.contexts[0]) * weight for loss, weight in outputs]
        return mx.nd.add_n(*losses)

    def loss(self, batch: Batch) -> mx.nd.NDArray:
        """Sum over the batch's images of their losses (1,), on the first context; no gradient."""
        return mx.nd.add_n(*(self._compute(*inputs).as_in_context(self.contexts[0]) * weight
                             for weight, inputs in self._slices(batch, whole(batch), self.net.inputs)))

    def outputs(self, batch: Batch) -> np.ndarray:
        """The network's answer to each image alone: logits (B, classes, …)."""
        parts = [self._compute(*inputs) for _, inputs in self._slices(batch, whole(batch), ('image',))]
        return np.concatenate([part.asnumpy() for part in parts])  # the first is read while the others compute

    def reconstruct(self, batch: Batch) -> np.ndarray:
        """The network's images (B, 3, H, W), normalised, computed on the first context."""
        assert isinstance(self._compute, (SimMIM, TensorParallel))
        return self._compute.reconstruct(*self._inputs.take(batch, whole(batch), ('image', 'mask'), self.contexts[0])
                                    ).asnumpy()

    def _slices(self, batch: Batch, part: slice, names: Sequence[str]
                ) -> List[Tuple[int, Tuple[mx.nd.NDArray, ...]]]:
        """(number of images, inputs) of each context that gets any."""
        return [(s.stop - s.start, self._inputs.take(batch, s, names, ctx))
                for s, ctx in zip(within(part, len(self._firsts)), self._firsts)]


def hybridize(block: HybridBlock, backend: OpBackend, static: bool = True) -> None:
    """Have a block that `backend` computes run as a cached graph.

    Gradients can be exchanged while others are computed, but not those of operators that MXNet runs in one bulk: 15 by
    default, which are 7 blocks where a native operator is half a block. `static` keeps the graph's memory from step to
    step. Of many small graphs each would keep what only one of them needs at a time, such as zeros for the gradients of
    what native operators leave for their backward passes.
    """
    block.hybridize(static_alloc=static, backward_bulk_size=1 if backend.is_native else None)


def within(part: slice, count: int) -> List[slice]:
    """Return `split` of a slice into `count`, without empty ones, which would be the last."""
    return [slice(part.start + s.start, part.start + s.stop) for s in split(part.stop - part.start, count)
            if s.stop > s.start]


def whole(batch: Batch) -> slice:
    """All images of a batch."""
    return slice(0, len(batch.index))
