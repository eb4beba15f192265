"""The placement of a network as a pipeline: over devices of one worker, or over workers of one device each."""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np
from mxnet import autograd

from ..data.loader import Batch
from ..data.sampling import split
from ..models import Cut, Network, SimMIM, parameter_specs
from ..models.segments import PipelineStage, cut
from ..runtime import mxnet_private
from .channels import Channel, local_channel
from .parts import ModelParts
from .placement import Inputs, hybridize, whole, within
from .schedules import FORWARD, SCHEDULES, in_order
from .tensor import Group, TensorStage, grouped, place

Stage = Union[PipelineStage, TensorStage]


class Seat(NamedTuple):
    """A stage of a replica in this worker: its number, its first context, channels to the stages before and after."""
    stage: int
    context: mx.Context
    before: Optional[Channel]
    after: Optional[Channel]


class Pipeline:
    """Stages of a network, one a context; a batch passes through them in micro-batches.

    Of more contexts than stages each run of neighbours is a replica: contexts 0 to S - 1, S to 2 S - 1, and so on. With
    `tensor` so many neighbours, a group, take the place of one context and compute the half blocks of a stage together.
    The gradient and the loss are those of `Replicated`: each image counts alike, however the batch is cut. A parameter
    that several stages use lies on the contexts of all of them, and its gradient is the sum over these.

    With `worker` the other stages are in other workers. Then what the last stage computes, losses and answers, is there
    alone; elsewhere losses are 0 and of answers there are none. With `group` each stage is in several workers, which
    compute its half blocks together.
    """

    def __init__(self, net: Cut, contexts: Sequence[mx.Context], parts: Sequence[slice], micro_batches: int,
                 schedule: str = '1f1b', accumulate: int = 1, tensor: int = 1, worker: Optional[ModelParts] = None,
                 group: Optional[Group] = None):
        """Place the network's segments number `parts[s]` on the context of stage s; see its `segments()`."""
        self.net: Network = net
        self._net, self.contexts, self._micro_batches = net, list(contexts), micro_batches
        self._schedule, self._accumulate, self._inputs = SCHEDULES[schedule], accumulate, Inputs(net)
        divided, groups = grouped(net, self.contexts, tensor, group)
        segments = net.segments()
        *trunk, last = parts
        assert last.stop == len(segments) and len(groups) % (1 if worker else len(parts)) == 0
        # The head, the last segment, is a block of its own, as evaluation ends before it.
        head, = cut(segments, [slice(last.stop - 1, last.stop)])
        trunk.append(slice(last.start, last.stop - 1))
        self._last, self._worker = len(parts) - 1, worker
        if worker:
            held, replicas = [worker.own], [groups]
            self._replicas = [[Seat(worker.own, contexts[0], worker.before, worker.after)]]
        else:
            held = list(range(len(parts)))
            replicas = [groups[first:first + len(parts)] for first in range(0, len(groups), len(parts))]
            self._replicas = [_seats([group.contexts[0] for group in replica]) for replica in replicas]
        self._stages: Dict[int, Stage] = {
            stage: TensorStage(segments[trunk[stage]], stage == 0, divided, of_stage) if divided
            else cut(segments, [trunk[stage]])[0] for stage, of_stage in zip(held, zip(*replicas))}
        self._head = head if self._last in held else None
        stages: List[Stage] = [*self._stages.values(), *([head] if self._head else [])]
        # Labels depend on images, as these are mixed. Who has the first stage has both, and sends them to the last.
        self._along = [name for name in head.inputs if name == 'label' and worker]
        own = [name for stage in stages for name in stage.inputs if name not in self._along]
        self.inputs: Sequence[str] = own + (self._along if worker and worker.own == 0 else [])
        place(net, stages, [[*replica, replica[-1]] for replica in replicas])
        self._parameters = [spec.parameter for spec in parameter_specs(net) if spec.trainable]
        if micro_batches * accumulate > 1:
            for parameter in self._parameters:
                parameter.grad_req = 'add'
        for stage in stages:
            for graph in stage.graphs if isinstance(stage, TensorStage) else [stage]:
                hybridize(graph, net.backend, not divided)

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
        return self._sum(losses)

    def _train(self, replica: Sequence[Seat], batch: Batch, micro_batches: Sequence[slice], total: int
               ) -> List[mx.nd.NDArray]:
        """Add a replica's gradients; return each micro-batch's part of the mean loss (1,), on the last stage."""
        seats = {seat.stage: seat for seat in replica}
        kept: Dict[Tuple[int, int], Tuple[Optional[mx.nd.NDArray], mx.nd.NDArray]] = {}  # (input, output)
        losses = []
        for stage, (direction, number) in in_order(self._schedule(self._last + 1, len(micro_batches))):
            if stage not in seats:
                continue
            part, seat = micro_batches[number], seats[stage]
            weight = (part.stop - part.start) / total
            if direction == FORWARD:
                x = seat.before.receive() if seat.before else None
                if x is not None:
                    self._take_along(batch, part)
                    x.attach_grad()
                with autograd.record():
                    y = self._call(self._stages[stage], x, batch, part, seat.context)
                    if self._head and not seat.after:
                        y = self._call(self._head, y, batch, part, seat.context)
                if seat.after:
                    seat.after.send(y)
                    self._send_along(batch, part)
                else:
                    losses.append(y * weight)
                kept[stage, number] = x, y
            else:
                x, y = kept.pop((stage, number))
                gradient = seat.after.receive() if seat.after else mx.nd.full((1,), weight, ctx=seat.context)
                autograd.backward([y], [gradient])
                if seat.before:
                    assert x is not None and x.grad is not None
                    seat.before.send(x.grad)
        return losses

    def _take_along(self, batch: Batch, part: slice) -> None:
        """Complete the batch by what the first stage sends along with a micro-batch."""
        for name in self._along:
            assert self._worker and self._worker.before
            values = self._worker.before.receive_values()
            shape = len(batch.index), *values.shape[1:]
            batch.fields.setdefault(name, np.empty(shape, values.dtype))[part] = values

    def _send_along(self, batch: Batch, part: slice) -> None:
        for name in self._along:
            assert self._worker and self._worker.after
            self._worker.after.send(batch.fields[name][part])

    def loss(self, batch: Batch) -> mx.nd.NDArray:
        """Sum over the batch's images of their losses (1,), on the first context; no gradient."""
        losses = []
        for replica, part in self._evaluated(batch):
            x, seat = self._through(replica, batch, part), replica[-1]
            if x is not None and self._head:
                losses.append(self._call(self._head, x, batch, part, seat.context) * (part.stop - part.start))
        return self._sum(losses)

    def outputs(self, batch: Batch) -> np.ndarray:
        """The network's answer to each image alone (B, classes)."""
        answers = [self._answer(replica, batch, part) for replica, part in self._evaluated(batch)]
        return np.concatenate([answer.asnumpy() for answer in answers if answer is not None] or [np.empty((0, 1))])

    def reconstruct(self, batch: Batch) -> np.ndarray:
        """The network's images (B, 3, H, W), normalised, computed by the first replica; all its workers have them."""
        assert isinstance(self.net, SimMIM)
        answer = self._answer(self._replicas[0], batch, whole(batch))
        if answer is not None:
            images = answer.asnumpy()
        else:
            assert self._worker and self._worker.after
            images = self._worker.after.receive_values()
        if self._worker and self._worker.before:
            self._worker.before.send(images)
        return images

    def _answer(self, replica: Sequence[Seat], batch: Batch, part: slice) -> Optional[mx.nd.NDArray]:
        x = self._through(replica, batch, part)
        if x is None:
            return None
        # A classifier answers without, and its last stage has none.
        return self._net.answer(x, *self._inputs.take(batch, part, ('image',), replica[-1].context))

    def _through(self, replica: Sequence[Seat], batch: Batch, part: slice) -> Optional[mx.nd.NDArray]:
        """What the last block computes; None where the last stage is in another worker."""
        x = None
        for seat in replica:
            x = self._call(self._stages[seat.stage], seat.before.receive() if seat.before else None, batch, part,
                           seat.context)
            if seat.after:
                seat.after.send(x)
                x = None
        return x

    def _sum(self, losses: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
        first = self.contexts[0]
        return mx.nd.add_n(*(loss.as_in_context(first) for loss in losses)) if losses else mx.nd.zeros((1,), ctx=first)

    def _call(self, stage: Stage, x: Optional[mx.nd.NDArray], batch: Batch, part: slice, context: mx.Context
              ) -> mx.nd.NDArray:
        inputs = self._inputs.of_stage(batch, part, stage.inputs, context)
        if autograd.is_recording():
            for parameter in stage.without_gradient:  # which other micro-batches have recorded, too
                mxnet_private.renew(parameter)
        return stage(*inputs) if x is None else stage(x, *inputs)

    def _evaluated(self, batch: Batch) -> List[Tuple[List[Seat], slice]]:
        """Which images each replica gets at a time: micro-batches, so that stages compute at the same time."""
        return [(replica, part) for replica, own in self._of_replicas(whole(batch))
                for part in within(own, self._micro_batches)]

    def _of_replicas(self, part: slice) -> List[Tuple[List[Seat], slice]]:
        """Each replica that gets any images, and which."""
        return list(zip(self._replicas, within(part, len(self._replicas))))


def _seats(contexts: Sequence[mx.Context]) -> List[Seat]:
    """Seat the stages of a replica on devices of this worker."""
    ends = [local_channel(*pair) for pair in zip(contexts, contexts[1:])]
    return [Seat(stage, context, ends[stage - 1][1] if stage else None, ends[stage][0] if stage < len(ends) else None)
            for stage, context in enumerate(contexts)]
