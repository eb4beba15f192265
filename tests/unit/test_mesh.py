"""Coordinates and groups, written down."""
import random
import re

import pytest

from mxsimmim.config import ParallelConfig
from mxsimmim.parallel.mesh import AXES, Mesh, mesh_of, seated
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
    mesh = mesh_of(ProcessInfo(rank=rank, size=size), ParallelConfig(), 1)
    assert mesh == Mesh(1, size, 1, rank) and mesh.size == size
    assert mesh.coordinate('data') == rank and mesh.group('data') == tuple(range(size))
    assert mesh.coordinate('pipeline') == mesh.coordinate('tensor') == 0 and mesh.group('tensor') == (rank,)
    assert mesh_of(ALONE, ParallelConfig(), 1) == Mesh()


def test_a_rank_beyond_the_job_is_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        Mesh(1, 2, 1, 2).coordinate('data')


def test_groups_and_values_of_all_ranks():
    mesh = Mesh(2, 2, 1, 3)
    assert mesh.groups('data') == [(0, 1), (2, 3)] and mesh.groups('pipeline') == [(0, 2), (1, 3)]
    assert mesh.by_data('abcd') == [['a', 'c'], ['b', 'd']]
    assert [mesh._replace(rank=rank).reports for rank in range(4)] == [False, False, True, True]
    assert [mesh._replace(rank=rank).begins for rank in range(4)] == [True, True, False, False]
    parts = Mesh(2, 1, 2)
    assert [parts._replace(rank=rank).reports for rank in range(4)] == [False, False, True, False]
    assert [parts._replace(rank=rank).begins for rank in range(4)] == [True, False, False, False]


JOB = ProcessInfo(rank=5, size=8, transport='horovod')


@pytest.mark.parametrize('process, stages, devices, expected', [
    (ALONE, 2, 2, Mesh()),  # within the worker
    (ALONE, 2, 4, Mesh()),
    (JOB, 1, 1, Mesh(data=8, rank=5)),
    (JOB, 2, 4, Mesh(data=8, rank=5)),
    (JOB, 2, 1, Mesh(2, 4, 1, 5)),
    (JOB, 8, 1, Mesh(8, 1, 1, 5)),
    (JOB._replace(transport='ps'), 2, 2, Mesh(data=8, rank=5)),
])
def test_mesh_of_a_job(process, stages, devices, expected):
    assert mesh_of(process, ParallelConfig(pipeline=stages), devices) == expected


@pytest.mark.parametrize('axes, expected', [
    (('data', 'tensor'), (6, 7, 8, 9, 10, 11)), (('pipeline', 'data'), (1, 3, 5, 7, 9, 11)),
    (('tensor', 'pipeline'), (2, 3, 8, 9)), (AXES, tuple(range(12))), ((), (9,))])
def test_groups_along_several_axes(axes, expected):
    assert Mesh(2, 3, 2, expected[-1]).group(*axes) == expected
    assert Mesh(2, 3, 2).groups(*axes)[0][0] == 0 and sum(map(len, Mesh(2, 3, 2).groups(*axes))) == 12


def test_tensor_parallelism_within_a_worker_and_over_workers():
    parallel = ParallelConfig(pipeline=2, tensor=2)
    assert mesh_of(JOB, parallel, 4) == mesh_of(JOB, parallel, 8) == Mesh(data=8, rank=5)
    assert mesh_of(JOB, parallel, 1) == Mesh(2, 2, 2, 5)
    assert mesh_of(JOB, parallel, 2) == Mesh(2, 4, 1, 5)  # a group in each worker
    assert mesh_of(JOB, ParallelConfig(tensor=8), 1) == Mesh(1, 1, 8, 5)
    for process, devices, message in [
            (JOB, 3, 'needs 4 devices a worker, or a multiple, and here are 3: '),
            (ALONE, 2, 'needs 4 devices a worker, or a multiple, and here are 2: '),
            (JOB._replace(size=7), 2, 'does not divide the 7 workers: start a multiple of 2'),
            (ALONE, 1, 'needs 4 devices a worker, or a multiple, and here is 1: .* tools/launch.py --horovod -n 4'),
            (JOB._replace(size=6), 1, 'does not divide the 6 workers: start a multiple of 4'),
            (JOB._replace(transport='ps'), 1, 'a parameter server waits for the same gradients of all: ')]:
        with pytest.raises(ValueError, match=f'^parallel.pipeline=2 x parallel.tensor=2 .*{message}'):
            mesh_of(process, parallel, devices)


@pytest.mark.parametrize('process, stages, devices, message', [
    (ALONE, 2, 1, 'needs 2 devices a worker, or a multiple, and here is 1: .* tools/launch.py --horovod -n 2'),
    (ALONE, 2, 3, 'needs 2 devices a worker, or a multiple, and here are 3: name more of them with devices='),
    (JOB, 4, 2, 'needs 4 devices a worker, or a multiple, and here are 2'),
    (JOB, 3, 1, 'parallel.pipeline=3 does not divide the 8 workers'),
    (JOB._replace(transport='ps'), 2, 1, 'a parameter server waits for the same gradients of all: .* --horovod'),
])
def test_stages_that_fit_nothing_are_refused(process, stages, devices, message):
    with pytest.raises(ValueError, match=f'^parallel.pipeline={stages} ') as told:
        mesh_of(process, ParallelConfig(pipeline=stages), devices)
    assert re.search(message, str(told.value)), told.value


@pytest.mark.parametrize('hosts, sizes, expected', [
    ('aabb', (1, 2, 2), [(0, 1), (2, 3)]),
    ('aaab', (1, 2, 2), [(0, 1), (2, 3)]),  # one group has to be on both
    ('abbb', (1, 2, 2), [(0, 3), (1, 2)]),
    ('aaabbbcc', (1, 4, 2), [(0, 1), (2, 5), (3, 4), (6, 7)]),
    ('abbcc', (1, 5, 1), [(0,), (1,), (2,), (3,), (4,)]),
    ('aabbbbbcc', (1, 3, 3), [(0, 1, 5), (2, 3, 4), (6, 7, 8)]),
    ('abcd', (1, 2, 2), [(0, 1), (2, 3)]),
    ('abbb', (2, 1, 2), [(0, 3), (1, 2)]),
    ('aaaabbbb', (2, 2, 2), [(0, 1), (2, 3), (4, 5), (6, 7)]),
    # The second stage: a neighbour on the same host, where there is one.
    ('aabbbc', (2, 3, 1), [(0,), (1,), (2,), (4,), (5,), (3,)]),
    ('aaabbb', (3, 2, 1), [(0,), (1,), (2,), (3,), (5,), (4,)]),
    ('aaaa', (4, 1, 1), [(0,), (1,), (2,), (3,)]),
])
def test_who_sits_where(hosts, sizes, expected):
    """Tensor groups, one after another along `data`, then `pipeline`."""
    assert seated(hosts, *sizes) == tuple(rank for group in expected for rank in group)


@pytest.mark.parametrize('seed', range(20))
def test_no_more_tensor_groups_are_divided_than_must_be(seed):
    rng = random.Random(seed)
    print('seed', seed)
    pipeline, data, tensor = (rng.randint(1, 4) for _ in range(3))
    hosts = sorted(rng.choices(range(5), k=pipeline * data * tensor))
    seats = seated(hosts, pipeline, data, tensor)
    assert sorted(seats) == list(range(len(hosts))) and seats[0] == 0
    mesh = Mesh(pipeline, data, tensor, seats=seats)
    whole = sum(len({hosts[rank] for rank in group}) == 1 for group in mesh.groups('tensor'))
    assert whole >= sum(hosts.count(host) // tensor for host in set(hosts))


def test_a_mesh_with_seats():
    """2 x 2 x 2 over hosts of one, three and four slots."""
    process = JOB._replace(rank=3, firsts=(0, 1, 4))
    mesh = mesh_of(process, ParallelConfig(pipeline=2, tensor=2), 1)
    assert mesh == Mesh(2, 2, 2, 3, seats=(0, 3, 1, 2, 4, 5, 6, 7))
    assert tuple(map(mesh.coordinate, AXES)) == (0, 0, 1)
    assert mesh.group('tensor') == (0, 3) and mesh.group('pipeline') == (3, 5) and mesh.group('data') == (3, 2)
    assert mesh.groups('tensor') == [(0, 3), (1, 2), (4, 5), (6, 7)] and mesh.groups('data')[:2] == [(0, 1), (3, 2)]
    assert mesh.group('data', 'tensor') == (0, 3, 1, 2) and mesh.group(*AXES) == mesh.seats
    assert mesh.by_data('abcdefgh') == [list('adef'), list('bcgh')]
    assert [mesh._replace(rank=rank).reports for rank in range(8)] == [rank in (4, 6) for rank in range(8)]
    assert [mesh._replace(rank=rank).begins for rank in range(8)] == [rank in (0, 1) for rank in range(8)]
    assert mesh_of(process, ParallelConfig(), 1) == Mesh(data=8, rank=3)
