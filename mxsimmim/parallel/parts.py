"""A model of which each worker holds a stage: how whole checkpoints come out of it and go into it, array by array."""
import socket
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import mxnet as mx
import numpy as np

from ..system.arrays import Arrays, Gathered, on_the_way
from .channels import pipeline_channels
from .control import ControlPlane
from .mesh import Mesh


def mesh_table(mesh: Mesh, slices: Sequence[slice], hosts: Sequence[str]) -> str:
    """Write a line for each stage: its blocks, and the ranks that hold it, each with its host.

    `slices` are the segments of each stage, embedding and head among them; `hosts` are those of all ranks.
    """
    rows = []
    for stage, part in enumerate(slices):
        first, last = max(part.start - 1, 0), min(part.stop, slices[-1].stop - 1) - 2
        blocks = f'blocks {first} to {last}' if last > first else f'block {first}'
        ranks = mesh._replace(rank=stage * mesh.data * mesh.tensor).group('data')
        rows.append(f'  stage {stage}: {blocks}, ' + ', '.join(f'rank {rank} on {hosts[rank]}' for rank in ranks))
    return '\n'.join([f'{mesh.pipeline} stages x {mesh.data} replica{"s"[:mesh.data > 1]} of the model', *rows])


class ModelParts:
    """The workers that hold a model together, seen from one of them.

    Rank 0 holds the first stage of the first replica. Arrays go to it and come from it along the channels of that
    replica, from neighbour to neighbour; the workers of other replicas only hear which.

    Attributes:
        slices: the network's segments that each stage has.
        own: the number of this worker's stage.
        rank: this worker's.
        before, after: channels to the neighbours, None at the ends.
    """

    def __init__(self, slices: Sequence[slice], control: ControlPlane, context: mx.Context):
        """Open the channels, of which this worker's ends are on `context`; all workers do this at once.

        Raises:
            ControlError: a neighbour cannot be reached.
        """
        mesh = control.mesh
        self.slices, self.own, self.rank = list(slices), mesh.coordinate('pipeline'), mesh.rank
        self._control = control
        self.before, self.after = pipeline_channels(control, context)
        self._stages = mesh._replace(rank=0).group('pipeline')  # of the first replica
        self._first = mesh.rank in self._stages

    def table(self) -> str:
        """Write who holds what, a line a stage; all workers call this."""
        names = self._control.all_gather('hosts', socket.gethostname())
        return mesh_table(self._control.mesh, self.slices, names)

    def gather(self, groups: Mapping[str, Union[Arrays, Gathered]]) -> Dict[str, Gathered]:
        """Hand this worker's arrays to rank 0, where the answer has those of the whole model, elsewhere none.

        What several stages hold comes from the first of them. All workers call this, and rank 0 takes all values, group
        after group, before anything else passes through the channels.
        """
        own = {group: arrays if isinstance(arrays, Gathered) else on_the_way(arrays)
               for group, arrays in groups.items()}
        told = self._control.all_gather('arrays of the whole model',
                                        {group: arrays.kinds for group, arrays in own.items()})
        gathered: Dict[str, Gathered] = {}
        for group in groups:
            kinds: Dict[str, Tuple[str, Tuple[int, ...]]] = {}
            names: List[List[str]] = []  # by stage
            for rank in self._stages:
                names.append([name for name in told[rank][group] if name not in kinds])
                kinds.update((name, (kind, tuple(shape))) for name, (kind, shape) in told[rank][group].items()
                             if name not in kinds)
            values = self._towards_first(own[group], names) if self._first else iter(())
            if self.before and self._first:
                for value in values:
                    self.before.send(value)
                kinds, values = {}, iter(())
            gathered[group] = Gathered(kinds, values)
        return gathered

    def _towards_first(self, arrays: Gathered, names: Sequence[Sequence[str]]) -> Iterator[np.ndarray]:
        """Yield this worker's arrays, then those of the later stages, as the names say."""
        yield from (value for name, value in zip(arrays.kinds, arrays.values) if name in names[self.own])
        for stage in range(self.own + 1, len(names)):
            for _ in names[stage]:
                assert self.after
                yield self.after.receive_values()

    def hand_out(self, wanted: Sequence[str], arrays: Optional[Arrays]) -> Iterator[Tuple[str, np.ndarray]]:
        """Yield the wanted ones of rank 0's arrays, in the first replica, whose workers hand them on to the others.

        All workers call this, and take all of it before anything else passes through the channels.

        Raises:
            ValueError: on rank 0, naming arrays that it does not have.
        """
        told = self._control.all_gather('arrays to hand out', list(wanted))
        if not self._first:
            return
        names = [told[rank] for rank in self._stages]
        if arrays is not None:
            missing = [name for stage in names for name in stage if name not in arrays]
            if missing:
                raise ValueError(f'these weights do not fit the network: missing: {", ".join(missing[:3])}'
                                 f'{" and others" * (len(missing) > 3)}: check the model keys of the configuration')
        for stage in range(self.own, len(names)):
            for name in names[stage]:
                value = self.before.receive_values() if self.before else (arrays or {})[name]
                if stage == self.own:
                    yield name, value
                else:
                    assert self.after
                    self.after.send(value)

    def close(self) -> None:
        """Close the channels."""
        for channel in filter(None, (self.before, self.after)):
            channel.close()
