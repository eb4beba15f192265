"""Segments: the parts of a network between which it can be cut, for a pipeline to run them on several devices.

And the pieces of a segment, among them half blocks, which several devices can compute together.
"""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

from mxnet.gluon import HybridBlock, Parameter

from ..config import ModelConfig
from .layers import Divisible, values

Run = Callable[[Any, Any, Dict[str, Any]], Any]


class Half(NamedTuple):
    """Half a block, x + f(norm(x)) or f(x), of which each shard of its `modules` computes a term of a sum.

    ``run(F, x, given, *modules)`` is as `Segment.run`, with these modules or their parts; the other fields, too.
    """
    run: Callable[..., Any]
    modules: Sequence[Divisible]
    blocks: Sequence[HybridBlock]  # what else has parameters; all shards share it
    inputs: Tuple[str, ...] = ()
    parameters: Sequence[Optional[Parameter]] = ()

    def of(self, modules: Sequence[Divisible]) -> 'Segment':
        """Return what the parts `modules` compute as a segment."""
        return Segment(lambda F, x, given: self.run(F, x, given, *modules), [*self.blocks, *modules], self.inputs,
                       self.parameters)


class Segment(NamedTuple):
    """A part of a network that follows another: its embedding, one of its blocks, its head.

    ``run(F, x, given)`` computes what the next segment takes, of what the one before has computed (None for the first)
    and of the network's inputs named `inputs` in the dict `given`. There, segments leave what later ones of the same
    stage can use, too. A piece that follows a half finds there as `residual` what that half was given.
    """
    run: Run
    blocks: Sequence[HybridBlock]  # which have its parameters
    inputs: Tuple[str, ...] = ()
    parameters: Sequence[Optional[Parameter]] = ()  # those that none of its blocks has; None where there is none
    pieces: Sequence[Union[Half, 'Segment']] = ()  # which compute the same one after another; none: it is one


class PipelineStage(HybridBlock):
    """Consecutive segments of a network, which share their parameters with it, as a block that can be hybridized.

    ``stage(x, *inputs)``, with x from the stage before and without it where the network begins; `inputs` names the
    others. `without_gradient` are its constants and buffers.
    """

    def __init__(self, segments: Sequence[Segment], first: bool):
        super().__init__(prefix='')
        self._runs, self._first = [segment.run for segment in segments], first
        self.inputs = tuple(dict.fromkeys(name for segment in segments for name in segment.inputs))
        blocks = {id(block): block for segment in segments for block in segment.blocks}
        for number, block in enumerate(blocks.values()):
            self.register_child(block, str(number))
        self.params.update({p.name: p for segment in segments for p in segment.parameters if p is not None})
        self.without_gradient = [p for p in self.collect_params().values() if p.grad_req == 'null']

    def hybrid_forward(self, F: Any, x: Any, *inputs: Any) -> Any:
        given = dict(zip(self.inputs, (x, *inputs) if self._first else inputs))
        x = None if self._first else x
        for run in self._runs:
            x = run(F, x, given)
        return x


def cut(segments: Sequence[Segment], parts: Sequence[slice]) -> List[PipelineStage]:
    """Make a stage of each of these consecutive parts of a network's segments."""
    return [PipelineStage(segments[part], part.start == 0) for part in parts]


def users(net: Any, parts: Sequence[slice]) -> Dict[str, List[int]]:
    """Return, by `Parameter.name`, which of these parts of a network's segments use each of its parameters.

    One that none uses, because the reference has it and does not, counts for the last.
    """
    found: Dict[str, List[int]] = {name: [] for name in net.collect_params()}
    segments = net.segments()
    for number, part in enumerate(parts):
        names = {name for segment in segments[part] for block in segment.blocks for name in block.collect_params()}
        names |= {p.name for segment in segments[part] for p in segment.parameters if p is not None}
        for name in names:
            found[name].append(number)
    return {name: numbers or [len(parts) - 1] for name, numbers in found.items()}


def drawn(config: ModelConfig) -> Tuple[str, ...]:
    """Return the names of the inputs that stochastic depth gives to each block; none where nothing is dropped."""
    return ('keep',) if config.drop_path else ()


def own(F: Any, x: Any, *parameters: Optional[Parameter]) -> List[Any]:
    """Return parameters as hybrid_forward is given those of its block; None stays None."""
    return [p and values(F, x, p)[0] for p in parameters]
