"""The placement of a network as a pipeline over devices of one worker."""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import autograd

from ..data.loader import Batch
from ..data.sampling import split
from ..models import Network, SimMIM, parameter_specs
from ..models.segments import PipelineStage, cut
from ..runtime import mxnet_private
from .channels import LocalChannel, local_channel
from .placement import Inputs, hybridize, whole, within
from .schedules import FORWARD, SCHEDULES, in_order
from .tensor import TensorStage, divide_evenly, groups_of, place

Stage = Union[PipelineStage, TensorStage]
Ends = Tuple[LocalChannel, LocalChannel]  # of the channel between two neighbours, the earlier stage's first


class Pipeline:
    """Stages of a network, one a context; a batch passes through them in micro-batches.

    Of more contexts than stages each run of neighbours is a replica: contexts 0 to S - 1, S to 2 S - 1, and so on. With
    `tensor` so many neighbours, a group, take the place of one context and compute the half blocks of a stage together.
    The gradient and the loss are those of `Replicated`: each image counts alike, however the batch is cut. A parameter
    that several stages use lies on the contexts of all of them, and its gradient is the sum over these.
    """

    def __init__(self, net: Network, contexts: Sequence[mx.Context], parts: Sequence[slice], micro_batches: int,
                 schedule: str = '1f1b', accumulate: int = 1, tensor: int = 1):
        """Place the network's segments number `parts[s]` on the context of stage s; see `Network.segments`."""
        self.net, self.contexts, self._micro_batches = net, list(contexts), micro_batches
        self._schedule, self._accumulate, self._inputs = SCHEDULES[schedule], accumulate, Inputs(net)
        divided = divide_evenly(net, tensor) if tensor > 1 else {}
        segments, groups, count = net.segments(), groups_of(self.contexts, tensor), len(parts)
        *trunk, last = parts
        assert last.stop == len(segments) and len(groups) % count == 0
        replicas = [groups[first:first + count] for first in range(0, len(groups), count)]
        # The head, the last segment, is a block of its own, as evaluation ends before it.
        self._head, = cut(segments, [slice(last.stop - 1, last.stop)])
        trunk.append(slice(last.start, last.stop - 1))
        self._stages: Sequence[Stage] = [
            TensorStage(segments[part], part.start == 0, divided, of_stage)
            for part, of_stage in zip(trunk, zip(*replicas))] if divided else cut(segments, trunk)
        self._replicas = [[group.contexts[0] for group in replica] for replica in replicas]
        self._channels: List[List[Ends]] = [[local_channel(*pair) for pair in zip(replica, replica[1:])]
                                            for replica in self._replicas]
        self._parameters = [spec.parameter for spec in parameter_specs(net) if spec.trainable]
        place(net, [*self._stages, self._head], [[*replica, replica[-1]] for replica in replicas])
        if micro_batches * accumulate > 1:
            for parameter in self._parameters:
                parameter.grad_req = 'add'
        for stage in (*self._stages, self._head):
            for graph in stage.graphs if isinstance(stage, TensorStage) else [stage]:
                hybridize(graph, net.backend)

    def forward_backward(self, batch: Batch, total: int, on_micro_batch: Optional[Any] = None) -> mx.nd.NDArray:
        """As `Replicated.forward_backward`; `on_micro_batch` is called between two accumulated parts."""
        if self._parameters[0].grad_req == 'add':
            for parameter in self._parameters:
                parameter.zero_grad()
        losses: List[mx.nd.NDArray] = []
        for number, part in enumerate(split(len(batch.index), self._accumulate)):
            if number and on_micro_batch:
                on_micro_batch()
            for replica, own in self._of_replicas(part):
                losses += self._train(replica, batch, within(own, self._micro_batches), total)
        return mx.nd.add_n(*(loss.as_in_context(self.contexts[0]) for loss in losses))

    def _train(self, replica: int, batch: Batch, micro_batches: Sequence[slice], total: int) -> List[mx.nd.NDArray]:
        """Add a replica's gradients; return each micro-batch's part of the mean loss (1,), on the last stage."""
        contexts, channels, last = self._replicas[replica], self._channels[replica], len(self._stages) - 1
        kept: Dict[Tuple[int, int], Tuple[Optional[mx.nd.NDArray], mx.nd.NDArray]] = {}  # (input, output)
        losses = []
        for stage, (direction, number) in in_order(self._schedule(last + 1, len(micro_batches))):
            part = micro_batches[number]
            weight = (part.stop - part.start) / total
            if direction == FORWARD:
                x = channels[stage - 1][1].receive() if stage else None
                if x is not None:
                    x.attach_grad()
                with autograd.record():
                    y = self._call(self._stages[stage], x, batch, part, contexts[stage])
                    if stage == last:
                        y = self._call(self._head, y, batch, part, contexts[stage])
                if stage == last:
                    losses.append(y * weight)
                else:
                    channels[stage][0].send(y)
                kept[stage, number] = x, y
            else:
                x, y = kept.pop((stage, number))
                gradient = mx.nd.full((1,), weight, ctx=contexts[stage]) if stage == last else \
                    channels[stage][0].receive()
                autograd.backward([y], [gradient])
                if x is not None:
                    assert x.grad is not None
                    channels[stage - 1][1].send(x.grad)
        return losses

    def loss(self, batch: Batch) -> mx.nd.NDArray:
        """Sum over the batch's images of their losses (1,), on the first context; no gradient."""
        return mx.nd.add_n(*(
            self._call(self._head, self._through(replica, batch, part), batch, part, self._replicas[replica][-1])
            .as_in_context(self.contexts[0]) * (part.stop - part.start)
            for replica, part in self._of_replicas(whole(batch))))

    def outputs(self, batch: Batch) -> np.ndarray:
        """The network's answer to each image alone (B, classes)."""
        answers = [self._answer(replica, batch, part) for replica, part in self._of_replicas(whole(batch))]
        return np.concatenate([answer.asnumpy() for answer in answers])

    def reconstruct(self, batch: Batch) -> np.ndarray:
        """The network's images (B, 3, H, W), normalised, computed by the first replica."""
        assert isinstance(self.net, SimMIM)
        return self._answer(0, batch, whole(batch)).asnumpy()

    def _answer(self, replica: int, batch: Batch, part: slice) -> mx.nd.NDArray:
        image, = self._inputs.take(batch, part, ('image',), self._replicas[replica][-1])
        return self.net.answer(self._through(replica, batch, part), image)

    def _through(self, replica: int, batch: Batch, part: slice) -> mx.nd.NDArray:
        """What the last block computes."""
        first, *stages = zip(self._stages, self._replicas[replica])
        x = self._call(first[0], None, batch, part, first[1])
        for stage, context in stages:
            x = self._call(stage, x.as_in_context(context), batch, part, context)
        return x

    def _call(self, stage: Stage, x: Optional[mx.nd.NDArray], batch: Batch, part: slice, context: mx.Context
              ) -> mx.nd.NDArray:
        inputs = self._inputs.of_stage(batch, part, stage.inputs, context)
        if autograd.is_recording():
            for parameter in stage.without_gradient:  # which other micro-batches have recorded, too
                mxnet_private.renew(parameter)
        return stage(*inputs) if x is None else stage(x, *inputs)

    def _of_replicas(self, part: slice) -> List[Tuple[int, slice]]:
        """(number, images) of each replica that gets any."""
        return list(enumerate(within(part, len(self._replicas))))
