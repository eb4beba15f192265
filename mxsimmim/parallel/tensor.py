"""Tensor parallelism: a network whose half blocks are computed in parts, each on a device of its own.

Shoeybi et al. 2019 (arXiv:1909.08053). It is no placement: it changes what a block computes, under a placement. Where
the tokens enter a half block each device gets a copy of them; where they leave it the terms of all devices are added
up. Backward it is the other way round: the gradient of the sum is copied, and those of the copies are added up.

A cached graph has one context, so neither can stand inside of one. Each half block is a graph of its own, and autograd
records what lies between like any operator, copies from one context to another included. A step stays one graph of
MXNet's: its engine waits for what must be waited for and nothing else, and Python is far ahead.
"""
from typing import Dict, List, Mapping, Optional, Protocol, Sequence, Tuple, Union

import mxnet as mx
from mxnet.gluon import HybridBlock, Parameter

from ..models import Cut, Network, SimMIM
from ..models.division import divide, own_parts
from ..models.layers import Divisible
from ..models.segments import Half, PipelineStage, Segment
from ..models.shards import Shard

Parts = Mapping[int, List[Divisible]]  # of each module, see `division.divide`


class Group(Protocol):
    """Devices that compute half blocks together."""

    @property
    def contexts(self) -> Sequence[mx.Context]:
        """Those of this worker, each with a part, in the order of parts."""

    def begin(self) -> None:
        """Prepare for another pass through half blocks."""

    def copies(self, x: mx.nd.NDArray) -> List[mx.nd.NDArray]:
        """Return x, of the first context, on each; its gradient is the sum of those of all copies of the group."""

    def reduced(self, terms: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
        """Return the sum of all terms of the group, on the first context; each gets the sum's gradient."""


class DeviceGroup:
    """Devices of one worker."""

    def __init__(self, contexts: Sequence[mx.Context]):
        self.contexts = contexts

    def begin(self) -> None:
        """Prepare nothing."""

    def copies(self, x: mx.nd.NDArray) -> List[mx.nd.NDArray]:
        """See `Group`."""
        return [x.as_in_context(context) for context in self.contexts]

    def reduced(self, terms: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
        """See `Group`."""
        first, *others = terms
        return mx.nd.add_n(first, *(term.as_in_context(first.context) for term in others))


def groups_of(contexts: Sequence[mx.Context], size: int) -> List[Group]:
    """Divide contexts into groups of neighbours."""
    return [DeviceGroup(contexts[first:first + size]) for first in range(0, len(contexts), size)]


def divide_evenly(net: Network, count: int) -> Parts:
    """Cut a network, with the weights that it has, for groups of `count` devices of one worker."""
    return divide(net, [Shard(index, count) for index in range(count)])


def grouped(net: Network, contexts: Sequence[mx.Context], size: int, group: Optional[Group] = None
            ) -> Tuple[Parts, List[Group]]:
    """Return the parts of a network and the groups that compute them; no parts where a device computes whole blocks.

    The network is cut now for groups of `size` contexts. Of one that other workers compute, too, this one already has
    its part alone, and `group` is theirs.
    """
    if group:
        return own_parts(net), [group]
    return divide_evenly(net, size) if size > 1 else {}, groups_of(contexts, size)


class TensorStage:
    """Consecutive segments of a network whose half blocks a group of contexts computes together.

    It is called as a `PipelineStage` is, on the first context of a group. That one alone computes embedding, merging
    and head, which cost little.
    """

    def __init__(self, segments: Sequence[Segment], first: bool, parts: Parts, groups: Sequence[Group]):
        """`first`: the network begins here. `parts`: those of the network to which the segments belong."""
        self._groups, self._first = {group.contexts[0]: group for group in groups}, first
        self.inputs = tuple(dict.fromkeys(name for segment in segments for name in segment.inputs))

        def graphs(piece: Union[Half, Segment], begins: bool) -> List[PipelineStage]:
            """One for each context that takes part."""
            if isinstance(piece, Segment):
                return [PipelineStage([piece], begins)]
            modules = zip(*(parts[id(module)] for module in piece.modules))
            return [PipelineStage([piece.of(own)], begins) for own in modules]
        pieces = [piece for segment in segments for piece in segment.pieces or [segment]]
        self._pieces = [(isinstance(piece, Half), graphs(piece, first and number == 0))
                        for number, piece in enumerate(pieces)]
        self._shared = sorted({name for half, each in self._pieces if half for name in each[0].inputs})

    @property
    def graphs(self) -> List[HybridBlock]:
        """The blocks to hybridize."""
        return [graph for _, each in self._pieces for graph in each]

    @property
    def parameters(self) -> List[Dict[str, Parameter]]:
        """The parameters, by MXNet's name, that each context of a group uses."""
        used: List[Dict[str, Parameter]] = [{} for _ in max((each for _, each in self._pieces), key=len)]
        for _, each in self._pieces:
            for graph, own in zip(each, used):
                own.update(graph.collect_params().items())
        return used

    @property
    def without_gradient(self) -> List[Parameter]:
        """Its constants and buffers."""
        return list({id(p): p for graph in self.graphs for p in graph.collect_params().values()
                     if p.grad_req == 'null'}.values())

    def __call__(self, x: mx.nd.NDArray, *inputs: mx.nd.NDArray) -> mx.nd.NDArray:
        """Compute on the group where x is; the result is on its first context."""
        group = self._groups[x.context]
        given = dict(zip(self.inputs, (x, *inputs) if self._first else inputs))
        everywhere = [given, *({name: given[name].as_in_context(context) for name in self._shared}
                               for context in group.contexts[1:])]
        group.begin()
        for number, (half, graphs) in enumerate(self._pieces):
            if half:
                given['residual'] = x
                x = group.reduced([_run(*each) for each in zip(graphs, group.copies(x), everywhere)])
            elif number == 0 and self._first:
                x = graphs[0](*(given[name] for name in graphs[0].inputs))
            else:
                x = _run(graphs[0], x, given)
        return x


class TensorParallel:
    """A network over groups of devices, called as the network is, with inputs on the first context of a group."""

    def __init__(self, net: Cut, parts: Parts, groups: Sequence[Group]):
        """Place the network, whose modules have been divided into `parts`."""
        self._net = net
        *segments, head = net.segments()
        self._trunk, self._head = TensorStage(segments, True, parts, groups), PipelineStage([head], False)
        self.graphs = [*self._trunk.graphs, self._head]
        place(net, [self._trunk, self._head], [[group, group] for group in groups])

    def __call__(self, image: mx.nd.NDArray, *more: mx.nd.NDArray) -> mx.nd.NDArray:
        """As the network: the loss (1,), or a classifier's answer to an image alone."""
        names = ['keep' if name == 'uniform' else name for name in self._net.inputs]
        given = dict(zip(names, (image, *more)))
        x = self._tokens(given)
        return _run(self._head, x, given) if more else self._net.answer(x, image)

    def reconstruct(self, image: mx.nd.NDArray, mask: mx.nd.NDArray) -> mx.nd.NDArray:
        """As the network's, in masked cells; native operators leave out the others in the last block."""
        assert isinstance(self._net, SimMIM)
        return self._net.answer(self._tokens({'image': image, 'mask': mask}), image)

    def _tokens(self, given: Dict[str, mx.nd.NDArray]) -> mx.nd.NDArray:
        """What the last block computes; nothing is dropped where `keep` is not given."""
        image, config = given['image'], self._net.config
        if config.drop_path and 'keep' not in given:
            given = {**given, 'keep': mx.nd.ones((len(image), 2 * config.blocks), ctx=image.context)}
        return self._trunk(*(given[name] for name in self._trunk.inputs))


def place(net: Network, stages: Sequence[Union[TensorStage, PipelineStage]], replicas: Sequence[Sequence[Group]]
          ) -> None:
    """Put each parameter where stages use it, stage s on the group number s of each replica.

    Of norms and gammas all contexts of a group have a copy, and each copy has a term of the gradient: the sum over
    copies, which update rules make anyway, is the gradient. Of what is cut each context has its part, of the rest the
    first has the only copy: their gradients are whole. What no stage uses lies with the last. What other workers hold
    is left alone.
    """
    used: Dict[str, List[Tuple[int, int]]] = {}  # the (stage, number of the context) that use it
    parameters: Dict[str, Parameter] = dict(net.collect_params().items())
    for number, stage in enumerate(stages):
        each = stage.parameters if isinstance(stage, TensorStage) else [dict(stage.collect_params().items())]
        for context, own in enumerate(each):
            parameters.update(own)
            for name in own:
                used.setdefault(name, []).append((number, context))
    for name, parameter in parameters.items():
        if name in net.elsewhere:
            continue
        contexts = [groups[stage].contexts[context] for groups in replicas
                    for stage, context in used.get(name, [(len(stages) - 1, 0)])]
        parameter.reset_ctx(list(dict.fromkeys(contexts)))


def _run(graph: PipelineStage, x: mx.nd.NDArray, given: Mapping[str, mx.nd.NDArray]) -> mx.nd.NDArray:
    return graph(x, *(given[name] for name in graph.inputs))
