"""Where a process stands among those of its job."""
from typing import Any, List, NamedTuple, Sequence, Tuple

from ..config import ConfigError, ParallelConfig
from ..runtime.process import ProcessInfo

AXES = ('pipeline', 'data', 'tensor')


class Mesh(NamedTuple):
    """Sizes of the axes along which a job's workers divide its work, and the rank of one of them.

    `tensor` varies fastest with the rank, so that it stays on a host. Batch parts, images and validation follow the
    `data` coordinate: workers that differ in another one compute the same samples.
    """
    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    rank: int = 0

    @property
    def size(self) -> int:
        """Workers of the job."""
        return self.pipeline * self.data * self.tensor

    def coordinate(self, axis: str) -> int:
        """Return the position along 'pipeline', 'data' or 'tensor', from 0."""
        assert 0 <= self.rank < self.size, self
        return self.rank // self._stride(axis) % getattr(self, axis)

    def group(self, *axes: str) -> Tuple[int, ...]:
        """Return the ranks that differ from this one along `axes` alone, ascending; this one is among them."""
        ranks = [self.rank]
        for axis in axes:
            stride, size = self._stride(axis), getattr(self, axis)
            own = self.coordinate(axis)
            ranks = [rank + (other - own) * stride for rank in ranks for other in range(size)]
        return tuple(sorted(ranks))

    def groups(self, *axes: str) -> List[Tuple[int, ...]]:
        """Return the groups of all ranks along `axes`, in the order of their first ranks."""
        return list(dict.fromkeys(self._replace(rank=rank).group(*axes) for rank in range(self.size)))

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

    def _stride(self, axis: str) -> int:
        """Return the distance between the ranks of neighbours along `axis`."""
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
    return Mesh(parallel.pipeline, process.size // needed, parallel.tensor // devices, process.rank)
