"""What the rest needs to know of a network's parameters, whatever the network."""
from typing import Container, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from mxnet.gluon import Block, HybridBlock, Parameter
from mxnet.gluon.parameter import Constant

from ..runtime.mxnet_private import structural_parameters
from .shards import WHOLE, Shard, gradient_axes, join, part_of, whole_shape

WEIGHT, BUFFER = 'weight', 'buffer'


class ParameterSpec(NamedTuple):
    """A parameter and what is done with it.

    A `weight` is trained. A `buffer` is what the network itself computes in training and uses later, such as running
    statistics: it has no gradient; replicas, which have seen different images, agree on its mean where they agree on
    the weights; checkpoints and averaged weights hold it as it is.
    """
    name: str  # the reference's; all parts of a parameter that is cut have it
    parameter: Parameter  # its copies may lie on other contexts than those of other parameters
    role: str = WEIGHT
    decay: float = 0.0  # weight decay
    lr_scale: float = 1.0  # its learning rate relative to the schedule's
    axes: Tuple[str, ...] = ('data',)  # of the mesh, over which its gradient is summed
    shard: Shard = WHOLE  # which part of the whole it is
    is_term: bool = False  # in a tensor group each worker has a term of its gradient

    @property
    def trainable(self) -> bool:
        """Whether the optimiser updates it."""
        return self.role == WEIGHT

    @property
    def key(self) -> str:
        """A name that no other specification of the network has."""
        return self.name if self.shard.count == 1 else f'{self.name}[{self.shard.index}]'

    @property
    def whole_shape(self) -> Tuple[int, ...]:
        """The shape of the whole of which this is a part."""
        return whole_shape(self.name, self.parameter.shape, self.shard)

    def part_of(self, whole: np.ndarray) -> np.ndarray:
        """Return what belongs to this parameter of an array that belongs to the whole."""
        return part_of(self.name, whole, self.shard)


def parameter_specs(net: HybridBlock, groups: Optional[Mapping[str, Tuple[float, float]]] = None
                    ) -> List[ParameterSpec]:
    """Lists the weights and buffers of a network in its own order; constants, which it makes again, are left out.

    So is what other workers hold, see `initial.begin`. Of a parameter that has been cut, all parts, one after another,
    see `division.divide`.

    Args:
        groups: (lr_scale, weight_decay) of each weight, as `optim.parameter_groups` returns it.
    """
    groups, shards = groups or {}, getattr(net, 'shards', {})
    post_norm = getattr(getattr(net, 'config', None), 'type', '') == 'swinv2'
    specs: List[ParameterSpec] = []
    for name, parameter in structural_parameters(net).items():
        if isinstance(parameter, Constant) or parameter.name in getattr(net, 'elsewhere', ()):
            continue
        scale, decay = groups.get(name, (1.0, 0.0))
        role = WEIGHT if parameter.grad_req != 'null' else BUFFER
        is_term = 'tensor' in gradient_axes(name, post_norm)
        specs += [ParameterSpec(name, part, role, decay, scale, shard=shard, is_term=is_term)
                  for shard, part in shards.get(name, [(WHOLE, parameter)])]
    return specs


def joined(specs: Sequence[ParameterSpec], values: Sequence[np.ndarray]) -> Dict[str, np.ndarray]:
    """Return whole arrays by name from one of each parameter: its weights, its gradient, a moment."""
    parts: Dict[str, List[np.ndarray]] = {}
    for spec, value in zip(specs, values):
        parts.setdefault(spec.name, []).append(value)
    return {name: join(name, found) for name, found in parts.items()}


def names_without(unnamed: Container[str], blocks: Mapping[str, Block], prefix: str = '') -> Dict[str, Parameter]:
    """Return the parameters of blocks by name, as Gluon does, but of those `unnamed` without the block's own."""
    found: Dict[str, Parameter] = {}
    for name, block in blocks.items():
        path = prefix if name in unnamed else f'{prefix}.{name}' if prefix else name
        found.update(structural_parameters(block, path))
    return found


def named_parameters(net: HybridBlock) -> Dict[str, Parameter]:
    """The trained parameters by structural name, the reference's; of one that has been cut one of its parts."""
    return {spec.name: spec.parameter for spec in parameter_specs(net) if spec.trainable}
