"""Where a process stands among those of its job."""
from itertools import groupby
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

from ..config import ConfigError, ParallelConfig
from ..runtime.process import ProcessInfo

AXES = ('pipeline', 'data', 'tensor')


class Mesh(NamedTuple):
    """Sizes of the axes along which a job's workers divide its work, and the rank of one of them.

    Places are numbered along `tensor` first, then `data`, then `pipeline`, and ranks sit in this order, or as `seats`
    says. Batch parts, images and validation follow the `data` coordinate: workers that differ in another one compute
    the same samples.
    """
    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    rank: int = 0
    seats: Tuple[int, ...] = ()  # the rank at each place, the first one 0; empty: its number

    @property
    def size(self) -> int:
        """Workers of the job."""
        return self.pipeline * self.data * self.tensor

    def coordinate(self, axis: str) -> int:
        """Return the position along 'pipeline', 'data' or 'tensor', from 0."""
        assert 0 <= self.rank < self.size, self
        return self._place // self._stride(axis) % getattr(self, axis)

    def group(self, *axes: str) -> Tuple[int, ...]:
        """Return the ranks that differ from this one along `axes` alone, by place; this one is among them."""
        places = [self._place]
        for axis in axes:
            stride, size = self._stride(axis), getattr(self, axis)
            own = self.coordinate(axis)
            places = [place + (other - own) * stride for place in places for other in range(size)]
        return tuple(self.seats[place] if self.seats else place for place in sorted(places))

    def groups(self, *axes: str) -> List[Tuple[int, ...]]:
        """Return the groups of all ranks along `axes`, by their first places."""
        ranks = self.seats or range(self.size)
        return list(dict.fromkeys(self._replace(rank=rank).group(*axes) for rank in ranks))

    def by_data(self, values: Sequence[Any]) -> List[List[Any]]:
        """Sort one value a rank by the ranks' data coordinates."""
        found: List[List[Any]] = [[] for _ in range(self.data)]
        for rank, value in enumerate(values):
            found[self._replace(rank=rank).coordinate('data')].append(value)
        return found

    @property
    def reports(self) -> bool:
        """Whether of the workers that compute the same samples this is the one that has their loss and answers."""
        return self.coordinate('pipeline') == self.pipeline - 1 and self.coordinate('tensor') == 0

    @property
    def begins(self) -> bool:
        """Whether of the workers that compute the same samples this is the first, which reads the images."""
        return self.coordinate('pipeline') == 0 and self.coordinate('tensor') == 0

    @property
    def _place(self) -> int:
        return self.seats.index(self.rank) if self.seats else self.rank

    def _stride(self, axis: str) -> int:
        """Return the distance between the places of neighbours along `axis`."""
        return {'pipeline': self.data * self.tensor, 'data': self.tensor, 'tensor': 1}[axis]


def mesh_of(process: ProcessInfo, parallel: ParallelConfig, devices: int) -> Mesh:
    """Return the mesh of a job whose workers have so many devices each.

    The parts of a model lie on the devices of each worker, if it has several; of workers of one device, each holds a
    part. Where the devices of a worker are as many as compute a block together, each worker holds a stage. Data
    parallelism takes what is left.

    Raises:
        ConfigError: the parts do not fit the devices or the workers, or parameter servers are between these.
    """
    needed, keys = parallel.devices, parallel.described
    if devices % needed == 0:
        return Mesh(data=process.size, rank=process.rank)
    if devices > 1 and (devices != parallel.tensor or process.size == 1):
        parallel.check_devices(devices, f'here are {devices}')
    needed //= devices  # workers
    if process.size == 1:
        raise ConfigError(f'{keys} needs {needed} devices a worker, or a multiple, and here is 1: name them with '
                          f'devices=[…], or start as many workers of one device: tools/launch.py --horovod -n {needed}')
    if process.transport != 'horovod':
        have = 'one device' if devices == 1 else f'{devices} devices'
        raise ConfigError(f'{keys} with {have} a worker puts the parts of a model into several workers, and a '
                          'parameter server waits for the same gradients of all: start the job with tools/launch.py '
                          '--horovod, or give each worker a device a part with devices=[…]')
    if process.size % needed:
        raise ConfigError(f'{keys} does not divide the {process.size} workers: start a multiple of {needed}, or change '
                          'it')
    mesh = Mesh(parallel.pipeline, process.size // needed, parallel.tensor // devices, process.rank)
    hosts = [sum(first <= rank for first in process.firsts) for rank in range(process.size)]
    return mesh._replace(seats=seated(hosts, *mesh[:3])) if process.firsts else mesh


def seated(hosts: Sequence[int], pipeline: int, data: int, tensor: int) -> Tuple[int, ...]:
    """Return which rank sits at each place of a mesh; `hosts` are those of the ranks, which go host by host.

    As many tensor groups as possible have a host to themselves, the others what hosts have left. Groups go host by
    host, so that the workers of a stage are near each other: their gradients are more bytes than the activations
    between stages. Of these workers one on the host of its neighbour in the stage before is behind that. Rank 0 comes
    first.
    """
    groups: List[List[int]] = []
    left: List[int] = []
    for _, found in groupby(range(len(hosts)), hosts.__getitem__):
        ranks = list(found)
        whole = len(ranks) // tensor * tensor
        groups += _cut(ranks[:whole], tensor)
        left += ranks[whole:]
    groups = sorted(groups + _cut(left, tensor))
    stages = [groups[first:first + data] for first in range(0, pipeline * data, data)]
    for before, after in zip(stages, stages[1:]):
        after[:] = _beside(after, before, hosts)
    return tuple(rank for stage in stages for group in stage for rank in group)


def _cut(ranks: List[int], size: int) -> List[List[int]]:
    return [ranks[first:first + size] for first in range(0, len(ranks), size)]


def _beside(groups: Sequence[List[int]], before: Sequence[List[int]], hosts: Sequence[int]) -> List[List[int]]:
    """Return groups in an order in which as many as can be are on the host of that of `before` at the same place."""
    left = list(groups)

    def mate(other: List[int]) -> Optional[List[int]]:
        found = next((group for group in left if hosts[group[0]] == hosts[other[0]]), None)
        if found:
            left.remove(found)
        return found
    mates = [mate(other) for other in before]
    return [found or left.pop(0) for found in mates]
