"""What the rest needs to know of a network's parameters, whatever the network."""
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from mxnet.gluon import HybridBlock, Parameter
from mxnet.gluon.parameter import Constant

from ..runtime.mxnet_private import structural_parameters

WEIGHT, BUFFER = 'weight', 'buffer'


class ParameterSpec(NamedTuple):
    """A parameter and what is done with it.

    A `weight` is trained. A `buffer` is what the network itself computes in training and uses later, such as running
    statistics: it has no gradient; replicas, which have seen different images, agree on its mean where they agree on
    the weights; checkpoints and averaged weights hold it as it is.
    """
    name: str  # the reference's
    parameter: Parameter  # its copies may lie on other contexts than those of other parameters
    role: str = WEIGHT
    decay: float = 0.0  # weight decay
    lr_scale: float = 1.0  # its learning rate relative to the schedule's
    axes: Tuple[str, ...] = ('data',)  # of the mesh, over which its gradient is summed

    @property
    def trainable(self) -> bool:
        """Whether the optimiser updates it."""
        return self.role == WEIGHT


def parameter_specs(net: HybridBlock, groups: Optional[Mapping[str, Tuple[float, float]]] = None
                    ) -> List[ParameterSpec]:
    """Lists the weights and buffers of a network in its own order; constants, which it makes again, are left out.

    So is what other workers hold, see `initial.begin`.

    Args:
        groups: (lr_scale, weight_decay) of each weight, as `optim.parameter_groups` returns it.
    """
    groups = groups or {}
    specs = []
    for name, parameter in structural_parameters(net).items():
        if isinstance(parameter, Constant) or parameter.name in getattr(net, 'elsewhere', ()):
            continue
        scale, decay = groups.get(name, (1.0, 0.0))
        specs.append(ParameterSpec(name, parameter, WEIGHT if parameter.grad_req != 'null' else BUFFER, decay, scale))
    return specs


def named_parameters(net: HybridBlock) -> Dict[str, Parameter]:
    """The trained parameters by structural name, which is the reference's name."""
    return {spec.name: spec.parameter for spec in parameter_specs(net) if spec.trainable}
