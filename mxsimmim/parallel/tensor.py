"""Tensor parallelism: a network whose half blocks are computed in parts, each on a device of its own.

Shoeybi et al. 2019 (arXiv:1909.08053). It is no placement: it changes what a block computes, under a placement. Where
the tokens enter a half block each device gets a copy of them; where they leave it the terms of all devices are added
up. Backward it is the other way round: the gradient of the sum is copied, and those of the copies are added up.

A cached graph has one context, so neither can stand inside of one. Each half block is a graph of its own, and autograd
records what lies between like any operator, copies from one context to another included. A step stays one graph of
MXNet's: its engine waits for what must be waited for and nothing else, and Python is far ahead. An `autograd.Function`
would be called back in the middle of the backward pass and hold it up until Python has answered.
"""
from typing import Dict, List, Sequence, Set, Union

import mxnet as mx
from mxnet.gluon import HybridBlock, Parameter

from ..models import Network, SimMIM
from ..models.division import divide
from ..models.segments import Half, PipelineStage, Segment
from ..models.shards import Shard


def copies(x: mx.nd.NDArray, group: Sequence[mx.Context]) -> List[mx.nd.NDArray]:
    """Return x on each context of a group; the gradient of x is the sum of theirs."""
    return [x.as_in_context(context) for context in group]


def reduced(terms: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
    """Return the sum of arrays of one shape, on the first one's context; each gets a copy of the gradient."""
    first, *others = terms
    return mx.nd.add_n(first, *(term.as_in_context(first.context) for term in others)) if others else first


class TensorParallel:
    """A network over groups of contexts. It is called as the network is, with inputs on the first context of a group.

    Half blocks are computed by all contexts of a group; embedding, merging and head, which cost little, by the first
    alone. A parameter lies where it is used. Of norms and gammas all contexts have a copy, and each of these a term of
    the gradient: the sum over copies, which update rules make anyway, is the gradient. Of what is cut each context has
    its part, and of everything else the first has the only copy: both have whole gradients.
    """

    def __init__(self, net: Network, groups: Sequence[Sequence[mx.Context]]):
        """Cut the network, with the weights that it has, over groups of equal size; see `division.divide`."""
        self.net, self._groups = net, {group[0]: group for group in groups}
        parts = divide(net, [Shard(index, len(groups[0])) for index in range(len(groups[0]))])

        def stages(piece: Union[Half, Segment]) -> List[PipelineStage]:
            """A stage for each context that takes part."""
            segments = [piece.of(modules) for modules in zip(*(parts[id(first)] for first in piece.modules))] \
                if isinstance(piece, Half) else [piece]
            return [PipelineStage([each], piece is embedding) for each in segments]
        embedding, *segments, head = net.segments()
        (self._embedding,), (self._head,) = stages(embedding), stages(head)
        self._pieces = [stages(piece) for segment in segments for piece in segment.pieces]
        self._shared = sorted({name for each in self._pieces if len(each) > 1 for name in each[0].inputs})
        self.graphs: List[HybridBlock] = [self._embedding, self._head, *(s for each in self._pieces for s in each)]
        self._place(groups)

    def __call__(self, image: mx.nd.NDArray, *more: mx.nd.NDArray) -> mx.nd.NDArray:
        """As the network: the loss (1,), or a classifier's answer to an image alone."""
        names = ['keep' if name == 'uniform' else name for name in self.net.inputs]
        given = dict(zip(names, (image, *more)))
        x = self._through(given)
        return _run(self._head, x, given) if more else self.net.answer(x, image)

    def reconstruct(self, image: mx.nd.NDArray, mask: mx.nd.NDArray) -> mx.nd.NDArray:
        """As the network's, in masked cells; native operators leave out the others in the last block."""
        assert isinstance(self.net, SimMIM)
        return self.net.answer(self._through({'image': image, 'mask': mask}), image)

    def _through(self, given: Dict[str, mx.nd.NDArray]) -> mx.nd.NDArray:
        """What the last block computes, on the first context of the group where the inputs are."""
        image, config = given['image'], self.net.config
        group = self._groups[image.context]
        if config.drop_path and 'keep' not in given:
            given = {**given, 'keep': mx.nd.ones((len(image), 2 * config.blocks), ctx=image.context)}
        everywhere = [given, *({name: given[name].as_in_context(context) for name in self._shared}
                               for context in group[1:])]
        x = self._embedding(*(given[name] for name in self._embedding.inputs))
        for stages in self._pieces:
            x = reduced([_run(*each) for each in zip(stages, copies(x, group), everywhere)])
        return x

    def _place(self, groups: Sequence[Sequence[mx.Context]]) -> None:
        """Put each parameter on the contexts that use it; one that none uses on the first."""
        used: Dict[str, Set[int]] = {}
        parameters: Dict[str, Parameter] = dict(self.net.collect_params().items())
        for stages in (*self._pieces, [self._embedding], [self._head]):
            for number, stage in enumerate(stages):
                parameters.update(stage.collect_params().items())
                for name in stage.collect_params():
                    used.setdefault(name, set()).add(number)
        for name, parameter in parameters.items():
            parameter.reset_ctx([group[number] for group in groups for number in sorted(used.get(name, {0}))])


def _run(stage: PipelineStage, x: mx.nd.NDArray, given: Dict[str, mx.nd.NDArray]) -> mx.nd.NDArray:
    return stage(x, *(given[name] for name in stage.inputs))
