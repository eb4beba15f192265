"""Schedules of a pipeline as tables, and how a network is cut into stages."""
import itertools

import pytest

from mxsimmim.config import ConfigError, ModelConfig, ParallelConfig, configfile
from mxsimmim.models.cost import multiply_adds, segment_costs
from mxsimmim.parallel.schedules import BACKWARD, FORWARD, SCHEDULES, Pass, in_flight, in_order, partition, stages_of


def table(schedule):
    """A line for each stage: F0 is micro-batch 0 forward, B0 backward."""
    return [' '.join(direction[0].upper() + str(number) for direction, number in passes) for passes in schedule]


@pytest.mark.parametrize('name, stages, micro_batches, expected', [
    ('gpipe', 2, 3, ['F0 F1 F2 B0 B1 B2', 'F0 F1 F2 B0 B1 B2']),
    ('1f1b', 1, 2, ['F0 B0 F1 B1']),
    ('1f1b', 2, 3, ['F0 F1 B0 F2 B1 B2', 'F0 B0 F1 B1 F2 B2']),
    ('1f1b', 3, 1, ['F0 B0', 'F0 B0', 'F0 B0']),
    ('1f1b', 3, 4, ['F0 F1 F2 B0 F3 B1 B2 B3', 'F0 F1 B0 F2 B1 F3 B2 B3', 'F0 B0 F1 B1 F2 B2 F3 B3']),
])
def test_tables(name, stages, micro_batches, expected):
    assert table(SCHEDULES[name](stages, micro_batches)) == expected


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('stages, micro_batches', itertools.product([1, 2, 3, 5], [1, 2, 4, 9]))
def test_every_pass_once_in_an_order_that_can_be(name, stages, micro_batches):
    """Micro-batches in their order each way; forward from the first stage to the last, and backward after that."""
    schedule = SCHEDULES[name](stages, micro_batches)
    for passes in schedule:
        for direction in (FORWARD, BACKWARD):
            assert [number for each, number in passes if each == direction] == list(range(micro_batches))
    order = in_order(schedule)
    assert [[each for stage, each in order if stage == own] for own in range(stages)] == schedule
    when = {item: position for position, item in enumerate(order)}
    for stage, number in itertools.product(range(stages), range(micro_batches)):
        chain = [(s, Pass(FORWARD, number)) for s in range(stage + 1)]
        assert [when[item] for item in chain] == sorted(when[item] for item in chain)
        assert when[stage, Pass(BACKWARD, number)] > when[stages - 1, Pass(FORWARD, number)]
        assert stage == 0 or when[stage - 1, Pass(BACKWARD, number)] > when[stage, Pass(BACKWARD, number)]
    kept = [in_flight(passes) for passes in schedule]
    assert kept == ([micro_batches] * stages if name == 'gpipe' else
                    [min(stages - stage, micro_batches) for stage in range(stages)])


def sums(costs, stages):
    return [sum(costs[part]) for part in partition(costs, stages)]


@pytest.mark.parametrize('costs, stages, expected', [
    ([1] * 12, 2, [6, 6]), ([1] * 14, 4, [4, 4, 4, 2]), ([5, 1, 1, 1, 4], 2, [6, 6]), ([9, 1, 1, 1], 3, [9, 2, 1]),
    ([1, 2, 3, 4, 5, 6, 7], 3, [10, 11, 7]), ([3], 1, [3])])
def test_partition(costs, stages, expected):
    assert sums(costs, stages) == expected


def test_partition_is_the_best_there_is():
    for costs in itertools.product([1, 2, 5], repeat=6):
        for stages in (2, 3, 4):
            ways = [[sum(costs[a:b]) for a, b in zip((0, *cuts), (*cuts, 6))]
                    for cuts in itertools.combinations(range(1, 6), stages - 1)]
            assert max(sums(costs, stages)) == min(map(max, ways))


VIT = ModelConfig(img_size=32, patch_size=8, embed_dim=16, depth=5, num_heads=2)
SWIN = ModelConfig(type='swin', img_size=32, patch_size=2, embed_dim=12, depths=[2, 2, 1], num_heads=[1, 2, 4],
                   window_size=4)


@pytest.mark.parametrize('model', [VIT, SWIN])
def test_costs_of_segments(model):
    costs = segment_costs(model)
    assert len(costs) == 2 + model.blocks and sum(costs) == multiply_adds(model)
    assert segment_costs(model, decoder=False) == [*costs[:-1], 0]


def blocks_of(parts):
    """Of each stage, without embedding and head, which are with the first and the last block."""
    sizes = [part.stop - part.start for part in parts]
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]] and parts[0].start == 0
    sizes[0] -= 1
    sizes[-1] -= 1
    return sizes


def test_stages():
    costs = segment_costs(VIT)
    assert blocks_of(stages_of(ParallelConfig(pipeline=2), costs)) == [3, 2]
    assert blocks_of(stages_of(ParallelConfig(pipeline=5), costs)) == [1] * 5
    assert blocks_of(stages_of(ParallelConfig(pipeline=3, split=[1, 3, 1]), costs)) == [1, 3, 1]
    assert blocks_of(stages_of(ParallelConfig(pipeline=2), [9, 1, 1, 1, 1, 0])) == [1, 3]
    assert blocks_of(stages_of(ParallelConfig(), costs)) == [5]


@pytest.mark.parametrize('keys, told', [
    (['parallel.pipeline=13'], "parallel.pipeline=13 is more stages than the network has blocks, 12: lower it"),
    (['parallel.pipeline=2', 'parallel.split=[3]'], 'split=[3] must give each of the 2 stages'),
    (['parallel.pipeline=2', 'parallel.split=[12, 0]'], 'split=[12, 0] must give each of the 2 stages'),
    (['parallel.pipeline=2', 'parallel.split=[3, 4]'], 'divides 7 blocks, and the network has 12'),
    (['parallel.pipeline=2', 'train.batch_size=4'], 'train.batch_size=4 is less than parallel.micro_batches=8'),
    (['parallel.pipeline=2', 'devices=[cpu(0),cpu(1),cpu(2),cpu(3)]', 'train.batch_size=8', 'train.accumulate=8',
      'parallel.micro_batches=1'], 'train.batch_size=8 is less than 2 groups of devices x train.accumulate=8'),
    (['parallel.pipeline=2', 'devices=[cpu(0),cpu(1),cpu(2)]'], 'names 3: name more of them with devices=[…]'),
])
def test_what_cannot_work_is_told(tmp_path, keys, told):
    (tmp_path / 'a.yaml').write_text('{}')
    with pytest.raises(ConfigError) as error:
        configfile.load(tmp_path / 'a.yaml', keys)
    assert told in str(error.value) and len(str(error.value).splitlines()) == 1
