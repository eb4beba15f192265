"""Division of a network: attention and MLP of each block in parts, for tensor parallelism."""
import gc
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import mxnet as mx
from mxnet.gluon import Block
from mxnet.gluon.parameter import Constant

from ..runtime.mxnet_private import children, structural_parameters
from .layers import Divisible
from .shards import Shard, cut_of, part_of


def divide(net: Any, shards: Sequence[Shard], weights: bool = True) -> Dict[int, List[Divisible]]:
    """Cut each module of a network that can be, with its weights; the network keeps the parts of the first shard.

    Returns the parts for all `shards`, by the id of the first. `net.shards` then has the parts of each parameter that
    is cut, by name. They are on cpu(0). What a module has besides, the bias of its last product, only shard 0 has.
    Where the network has no weights yet, `weights` is False, and neither have the parts. What other workers hold stays
    as it is.
    """
    divided = dict(_divided(net, shards, weights))
    # A module and its parameters know each other: they would stay until Python looks for such circles.
    gc.collect()
    return divided


def _divided(net: Any, shards: Sequence[Shard], weights: bool) -> Iterator[Tuple[int, List[Divisible]]]:
    """Replace each module that can be cut by its first part; yield that one's id, and all parts."""
    names = {id(parameter): name for name, parameter in structural_parameters(net).items()}
    for parent, attribute, module in list(divisible(net)):
        if not net.elsewhere.isdisjoint(module.collect_params()):
            continue
        parts = [module.part(shard) for shard in shards]
        there = module.collect_params()  # of which parts may share some
        for parameter in [p for part in parts for name, p in part.collect_params().items() if name not in there]:
            if weights:
                parameter.initialize(None, mx.cpu(), mx.init.Zero())
        for end, whole in structural_parameters(module).items():
            if isinstance(whole, Constant):
                continue
            name, value = names[id(whole)], whole.list_data()[0].asnumpy() if weights else None
            for shard, part in zip(shards, parts):
                own = structural_parameters(part).get(end)
                if own is not None and value is not None:
                    own.set_data(part_of(name, value, shard))
                if own is not None and cut_of(name):
                    net.shards.setdefault(name, []).append((shard, own))
        setattr(parent, attribute, parts[0])
        yield id(parts[0]), parts


def own_parts(net: Any) -> Dict[int, List[Divisible]]:
    """Return what `divide` returned for the single shard into which it has cut the network."""
    return {id(module): [module] for _, _, module in divisible(net)}


def divisible(block: Block) -> Iterator[Tuple[Block, str, Divisible]]:
    """Yield (parent, attribute, module) of what can be cut inside a block."""
    for name, child in children(block).items():
        if isinstance(child, Divisible):
            yield block, name, child
        else:
            yield from divisible(child)
