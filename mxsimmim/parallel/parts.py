"""A model of which each worker holds a part: how whole checkpoints come out of it and go into it, array by array."""
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np

from ..models import Network, ParameterSpec, parameter_specs
from ..models.shards import Shard, cut_of, join, whole_shape
from ..system.arrays import Arrays, Gathered, on_the_way
from .channels import pipeline_channels
from .control import ControlPlane
from .mesh import Mesh


def mesh_table(mesh: Mesh, slices: Sequence[slice], hosts: Sequence[str]) -> str:
    """Write a line for each stage: its blocks, and the ranks that hold it, each with its host and its part of them.

    `slices` are the segments of each stage, embedding and head among them; `hosts` are those of all ranks.
    """
    def holder(rank: int) -> str:
        part = f' (part {mesh._replace(rank=rank).coordinate("tensor") + 1} of {mesh.tensor})' * (mesh.tensor > 1)
        return f'rank {rank} on {hosts[rank]}{part}'

    rows = []
    for stage, part in enumerate(slices):
        first, last = max(part.start - 1, 0), min(part.stop, slices[-1].stop - 1) - 2
        blocks = f'blocks {first} to {last}' if last > first else f'block {first}'
        ranks = mesh.groups('data', 'tensor')[stage]
        rows.append('  ' + f'stage {stage}: ' * (mesh.pipeline > 1) + ', '.join([blocks, *map(holder, ranks)]))
    sizes = [f'{size} {name}' for size, name in ((mesh.pipeline, 'stages'), (mesh.tensor, 'parts')) if size > 1]
    apart = [group for group in mesh.groups('tensor') if len({hosts[rank] for rank in group}) > 1]
    if apart:
        named = ' and '.join(map(str, apart[0]))
        rows.append(f'  parts of a block are on several hosts (ranks {named}), and every sum of theirs goes over the '
                    f'network: give each host slots that are a multiple of {mesh.tensor}')
    return '\n'.join([' x '.join([*sizes, f'{mesh.data} replica{"s"[:mesh.data > 1]} of the model']), *rows])


class ModelParts:
    """The workers that hold a model together, seen from one of them.

    Rank 0 holds the first part of the first stage of the first replica. Arrays go to it and come from it along the
    channels of that replica, from neighbour to neighbour; the workers of other replicas only hear which. Between stages
    whole arrays travel, which the first of a stage's workers puts together of the parts of all.

    Attributes:
        slices: the network's segments that each stage has.
        own: the number of this worker's stage.
        shard: the part of it that this worker has.
        rank: this worker's.
        control: joins all workers of the job.
        before, after: channels to the stages before and after, None at the ends.
    """

    def __init__(self, slices: Sequence[slice], control: ControlPlane, context: mx.Context):
        """Open the channels, of which this worker's ends are on `context`; all workers do this at once.

        Raises:
            ControlError: a neighbour cannot be reached.
        """
        mesh = control.mesh
        self.slices, self.own, self.rank = list(slices), mesh.coordinate('pipeline'), mesh.rank
        self.control = control
        self.shard = Shard(mesh.coordinate('tensor'), mesh.tensor)
        self.before, self.after = pipeline_channels(control, context)
        self._left, self._right = pipeline_channels(control, context, 'tensor') if mesh.tensor > 1 else (None, None)
        self._firsts = mesh._replace(rank=0).group('pipeline')  # of the first replica's stages, the workers of part 0
        self._sends = mesh.coordinate('data') == 0

    def table(self, hosts: Sequence[str]) -> str:
        """Write who holds what, a line a stage; `hosts` are those of all ranks."""
        return mesh_table(self.control.mesh, self.slices, hosts)

    def gather(self, groups: Mapping[str, Union[Arrays, Gathered]]) -> Dict[str, Gathered]:
        """Hand this worker's arrays to rank 0, where the answer has those of the whole model, elsewhere none.

        What several stages hold comes from the first of them. All workers call this, and rank 0 takes all values, group
        after group, before anything else passes through the channels.
        """
        own = {group: arrays if isinstance(arrays, Gathered) else on_the_way(arrays)
               for group, arrays in groups.items()}
        told = self.control.all_gather('arrays of the whole model',
                                       {group: arrays.kinds for group, arrays in own.items()})
        gathered: Dict[str, Gathered] = {}
        for group in groups:
            kinds: Dict[str, Tuple[str, Tuple[int, ...]]] = {}
            names: List[List[str]] = []  # by stage
            for rank in self._firsts:
                names.append([name for name in told[rank][group] if name not in kinds])
                kinds.update((name, (kind, whole_shape(name, tuple(shape), self.shard)))
                             for name, (kind, shape) in told[rank][group].items() if name not in kinds)
            values: Iterator[np.ndarray] = iter(())
            if self._sends:
                parts = self._parts(own[group], names[self.own])
                values = self._towards_first(parts, names) if not self._left else (
                    part for name, held in parts if cut_of(name) for part in held)
            towards = self._left or self.before
            if towards:
                for value in values:
                    towards.send(value)
                values = iter(())
            gathered[group] = Gathered(kinds if self.rank == 0 else {}, values)
        return gathered

    def _parts(self, own: Gathered, wanted: Sequence[str]) -> Iterator[Tuple[str, List[np.ndarray]]]:
        """Yield those of this worker's arrays that are wanted, each with the parts of the next ones in its stage."""
        for name, value in zip(own.kinds, own.values):
            if name in wanted:
                later = self.shard.count - self.shard.index - 1 if cut_of(name) else 0
                yield name, [value, *(self._right.receive_values() for _ in range(later) if self._right)]

    def _towards_first(self, parts: Iterator[Tuple[str, List[np.ndarray]]], names: Sequence[Sequence[str]]
                       ) -> Iterator[np.ndarray]:
        """Yield this stage's arrays, then those of the later ones, as the names say."""
        yield from (join(name, held) for name, held in parts)
        for stage in range(self.own + 1, len(names)):
            for _ in names[stage]:
                assert self.after
                yield self.after.receive_values()

    def hand_out(self, wanted: Sequence[str], arrays: Optional[Arrays]) -> Iterator[Tuple[str, np.ndarray]]:
        """Yield the wanted ones of rank 0's arrays, whole, in the first replica, whose workers hand them on.

        All workers call this, and take all of it before anything else passes through the channels.

        Raises:
            ValueError: on rank 0, naming arrays that it does not have.
        """
        told = self.control.all_gather('arrays to hand out', list(wanted))
        if not self._sends:
            return
        names = [told[rank] for rank in self._firsts]
        if self.rank == 0:
            missing = [name for stage in names for name in stage if name not in (arrays or {})]
            if missing:
                raise ValueError(f'these weights do not fit the network: missing: {", ".join(missing[:3])}'
                                 f'{" and others" * (len(missing) > 3)}: check the model keys of the configuration')
        source = self._left or self.before
        for stage in range(self.own, self.own + 1 if self._left else len(names)):
            towards = self._right if stage == self.own else self.after
            for name in names[stage]:
                value = source.receive_values() if source else (arrays or {})[name]
                if towards:
                    towards.send(value)
                if stage == self.own and name in wanted:
                    yield name, value

    def load(self, net: Network, arrays: Optional[Arrays], names: Optional[Sequence[str]] = None) -> None:
        """Set what the first replica's workers hold of the network, whole arrays of rank 0, one after another.

        All workers call this. Of a network that `names` do not name whole, the rest stays as it is.

        Raises:
            ValueError: on rank 0, naming arrays that it does not have.
        """
        specs: Dict[str, List[ParameterSpec]] = {}  # of all parts that this worker's devices have
        for spec in parameter_specs(net):
            if names is None or spec.name in names:
                specs.setdefault(spec.name, []).append(spec)
        for name, value in self.hand_out(list(specs), arrays):
            for spec in specs[name]:
                spec.parameter.set_data(mx.nd.array(spec.part_of(value.reshape(spec.whole_shape))))

    def close(self) -> None:
        """Close the channels."""
        for channel in filter(None, (self.before, self.after, self._left, self._right)):
            channel.close()
