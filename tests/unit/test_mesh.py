"""Coordinates and groups, written down."""
import pytest

from mxsimmim.parallel.mesh import AXES, Mesh, mesh_of
from mxsimmim.runtime.process import ALONE, ProcessInfo

# rank -> coordinates of pipeline, data, tensor in a job of 2 x 3 x 2
TABLE = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1),
         (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (1, 2, 0), (1, 2, 1)]


@pytest.mark.parametrize('rank, expected', enumerate(TABLE))
def test_coordinates(rank, expected):
    mesh = Mesh(2, 3, 2, rank)
    assert mesh.size == 12 and tuple(map(mesh.coordinate, AXES)) == expected


@pytest.mark.parametrize('rank, pipeline, data, tensor', [
    (0, (0, 6), (0, 2, 4), (0, 1)),
    (3, (3, 9), (1, 3, 5), (2, 3)),
    (4, (4, 10), (0, 2, 4), (4, 5)),
    (11, (5, 11), (7, 9, 11), (10, 11)),
])
def test_groups(rank, pipeline, data, tensor):
    mesh = Mesh(2, 3, 2, rank)
    assert tuple(map(mesh.group, AXES)) == (pipeline, data, tensor)


@pytest.mark.parametrize('axis', AXES)
def test_groups_of_an_axis_divide_the_job(axis):
    groups = {Mesh(2, 3, 2, rank).group(axis) for rank in range(12)}
    assert sorted(rank for group in groups for rank in group) == list(range(12))
    assert all(Mesh(2, 3, 2, rank).group(axis) == group for group in groups for rank in group)
    assert all([Mesh(2, 3, 2, rank).coordinate(axis) for rank in group] == list(range(len(group))) for group in groups)


@pytest.mark.parametrize('size, rank', [(1, 0), (4, 2)])
def test_data_alone(size, rank):
    """Where nothing else divides the work, the data coordinate is the rank."""
    mesh = mesh_of(ProcessInfo(rank=rank, size=size))
    assert mesh == Mesh(1, size, 1, rank) and mesh.size == size
    assert mesh.coordinate('data') == rank and mesh.group('data') == tuple(range(size))
    assert mesh.coordinate('pipeline') == mesh.coordinate('tensor') == 0 and mesh.group('tensor') == (rank,)
    assert mesh_of(ALONE) == Mesh()


def test_a_rank_beyond_the_job_is_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        Mesh(1, 2, 1, 2).coordinate('data')
