"""Tables of who takes which sample when."""
import time

import numpy as np
import pytest

from mxsimmim.data.sampling import (
    apportion,
    batch_at,
    data_step,
    epoch_order,
    generator,
    part_of,
    split,
    steps_per_epoch,
)

SEED = 3


@pytest.mark.parametrize('count, parts, lengths', [
    (8, 2, [4, 4]), (7, 2, [4, 3]), (10, 4, [3, 3, 2, 2]), (3, 3, [1, 1, 1]), (2, 3, [1, 1, 0]), (0, 2, [0, 0]),
    (5, 1, [5])])
def test_split(count, parts, lengths):
    slices = split(count, parts)
    assert [s.stop - s.start for s in slices] == lengths
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(count))


@pytest.mark.parametrize('samples, batch, steps', [(10, 3, 3), (9, 3, 3), (3, 3, 1), (1_281_167, 2048, 625)])
def test_steps_per_epoch(samples, batch, steps):
    assert steps_per_epoch(samples, batch) == steps


def test_a_batch_that_cannot_be_filled():
    with pytest.raises(ValueError, match='a batch of 32 images cannot be filled from 7: lower train.batch_size to 7'):
        steps_per_epoch(7, 32)
    with pytest.raises(ValueError, match='a batch of 32 images'):
        batch_at(0, 7, 32, seed=0)


@pytest.mark.parametrize('skipped, taken', [
    ([], [0, 1, 2, 3, 4, 5]),
    ([(2, 3)], [0, 1, 5, 6, 7, 8]),  # batches 2 to 4 are left out
    ([(0, 1)], [1, 2, 3, 4, 5, 6]), ([(9, 1)], [0, 1, 2, 3, 4, 5]),
    ([(2, 3), (2, 1)], [0, 1, 6, 7, 8, 9]), ([(1, 1), (4, 2)], [0, 2, 3, 4, 7, 8])])
def test_batches_that_are_left_out(skipped, taken):
    assert [data_step(update, skipped) for update in range(6)] == taken


def test_generator_depends_on_the_whole_key():
    keys = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (1, 2, 3), (3, 2, 1), (1, 2, 3, 0), (2 ** 32 - 1, 0, 0)]
    draws = {generator(*key).integers(2 ** 63) for key in keys}
    assert len(draws) == len(keys)
    assert generator(1, 2, 3).integers(2 ** 63) == generator(1, 2, np.int64(3)).integers(2 ** 63)


def test_generator_stays_the_same():
    """Runs are resumed after upgrades: these draws must never change."""
    assert generator(0, 1, 2).integers(1000, size=5).tolist() == [430, 262, 792, 972, 791]
    assert epoch_order(8, 5, 1).tolist() == [3, 4, 7, 6, 2, 0, 5, 1]


def test_an_epoch_takes_every_sample_once_and_drops_the_remainder():
    samples, batch, seed = 11, 3, 5
    dropped = []
    for epoch in range(4):
        taken = [batch_at(step, samples, batch, seed) for step in range(3 * epoch, 3 * epoch + 3)]
        assert [e for e, _ in taken] == [epoch] * 3
        indices = np.concatenate([i for _, i in taken])
        assert indices.tolist() == epoch_order(samples, seed, epoch)[:9].tolist()
        assert len(set(indices)) == 9
        dropped.append(tuple(sorted(set(range(samples)) - set(indices))))
    assert len(set(dropped)) > 1


def test_orders_differ_between_epochs_and_seeds_and_cannot_be_spoilt():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9 and all(sorted(order) == list(range(50)) for order in orders)
    with pytest.raises(ValueError, match='read-only'):
        epoch_order(50, 0, 0)[0] = 1


def test_a_million_samples_are_ordered_quickly():
    began = time.perf_counter()
    for step in range(1000):
        batch_at(step, 1_000_000, 2048, seed=1)
    assert time.perf_counter() - began < 2  # 3 epochs; a shuffle a step would take half a minute


@pytest.mark.parametrize('count, weights, least, expected', [
    (8, [1, 1], [1, 1], [4, 4]),
    (8, [3, 1], [1, 1], [6, 2]),
    (7, [1, 1], [1, 1], [4, 3]),
    (10, [1, 1, 1], [1, 1, 1], [4, 3, 3]),
    (10, [0.29, 0.71], [1, 1], [3, 7]),
    (5, [100, 1, 1], [1, 1, 1], [3, 1, 1]),
    (6, [100, 1], [1, 4], [2, 4]),
])
def test_apportion(count, weights, least, expected):
    assert apportion(count, weights, least) == expected


def test_apportion_never_loses_an_image():
    print('seed', SEED)
    rng = np.random.default_rng(SEED)
    for _ in range(300):
        workers = int(rng.integers(1, 9))
        least = rng.integers(1, 5, workers).tolist()
        count = int(rng.integers(sum(least), 200))
        parts = apportion(count, rng.uniform(0.1, 10, workers).tolist(), least)
        assert sum(parts) == count and all(p >= low for p, low in zip(parts, least))
        assert [i for n in range(workers) for i in range(count)[part_of(parts, n)]] == list(range(count))


def test_a_batch_too_small_for_the_workers_is_named():
    with pytest.raises(ValueError, match='batch of 3 images is too small for 2 workers that need 2, 2'):
        apportion(3, [1, 1], [2, 2])
