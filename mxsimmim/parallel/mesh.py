"""Where a process stands among those of its job."""
from typing import NamedTuple, Tuple

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

    def group(self, axis: str) -> Tuple[int, ...]:
        """Return the ranks that differ from this one along `axis` alone, ascending; this one is among them."""
        stride = self._stride(axis)
        first = self.rank - self.coordinate(axis) * stride
        return tuple(range(first, first + getattr(self, axis) * stride, stride))

    def _stride(self, axis: str) -> int:
        """Return the distance between the ranks of neighbours along `axis`."""
        return {'pipeline': self.data * self.tensor, 'data': self.tensor, 'tensor': 1}[axis]


def mesh_of(process: ProcessInfo) -> Mesh:
    """Return the mesh of a job whose workers all hold a whole model: its data axis alone is larger than one."""
    return Mesh(data=process.size, rank=process.rank)
