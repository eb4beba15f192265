"""Division of a network: attention and MLP of each block in parts, for tensor parallelism."""
import gc
from typing import Dict, Iterator, List, Sequence, Tuple

import mxnet as mx
from mxnet.gluon import Block
from mxnet.gluon.parameter import Constant

from ..runtime.mxnet_private import children, structural_parameters
from . import Network
from .layers import Divisible
from .shards import Shard, cut_of, part_of


def divide(net: Network, shards: Sequence[Shard]) -> Dict[int, List[Divisible]]:
    """Cut each module of a network that can be, with its weights; the network keeps the parts of the first shard.

    Returns the parts for all `shards`, by the id of the first. `net.shards` then has the parts of each parameter that
    is cut, by name. They are on cpu(0). What a module has besides, the bias of its last product, only shard 0 has.
    """
    divided = dict(_divided(net, shards))
    # A module and its parameters know each other: they would stay until Python looks for such circles.
    gc.collect()
    return divided


def _divided(net: Network, shards: Sequence[Shard]) -> Iterator[Tuple[int, List[Divisible]]]:
    """Replace each module that can be cut by its first part; yield that one's id, and all parts."""
    names = {id(parameter): name for name, parameter in structural_parameters(net).items()}
    for parent, attribute, module in list(divisible(net)):
        parts = [module.part(shard) for shard in shards]
        for part in parts:
            part.initialize(mx.init.Zero(), ctx=mx.cpu())
        for end, whole in structural_parameters(module).items():
            if isinstance(whole, Constant):
                continue
            name, value = names[id(whole)], whole.list_data()[0].asnumpy()
            for shard, part in zip(shards, parts):
                own = structural_parameters(part).get(end)
                if own is not None:
                    own.set_data(part_of(name, value, shard))
                    if cut_of(name):
                        net.shards.setdefault(name, []).append((shard, own))
        setattr(parent, attribute, parts[0])
        yield id(parts[0]), parts


def divisible(block: Block) -> Iterator[Tuple[Block, str, Divisible]]:
    """Yield (parent, attribute, module) of what can be cut inside a block."""
    for name, child in children(block).items():
        if isinstance(child, Divisible):
            yield block, name, child
        else:
            yield from divisible(child)
