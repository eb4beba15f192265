"""How a batch is divided among workers, by table."""
import pytest

from mxsimmim.data.batch_split import BatchSplit, split_batch, split_by_speed


@pytest.mark.parametrize('group, images, weights, least, expected', [
    (1, 7, [1, 1], [1, 1], [4, 3]),
    (2, 8, [1, 1], [1, 1], [4, 4]),
    (2, 7, [1, 1], [1, 1], [4, 3]),      # three pairs and one that is not mixed
    (2, 32, [4, 1, 2], [1, 1, 1], [18, 4, 10]),
    (2, 32, [1, 100], [3, 1], [4, 28]),  # three devices need two pairs
    (2, 3, [1], [3], [3]),
    (2, 3, [1, 1], [1, 1], [2, 1]),
    (2, 1, [1], [1], [1]),
    (2, 6, [1, 1, 1], [1, 1, 1], [2, 2, 2]),
])
def test_no_part_ends_within_a_pair(group, images, weights, least, expected):
    parts = split_batch(images, weights, least, group)
    assert parts == expected and sum(parts) == images
    assert all(part % group == 0 for part in parts[:-1]) and all(p >= n for p, n in zip(parts, least))


@pytest.mark.parametrize('images, least, needed', [(2, [1, 1], '2, 2'), (6, [3, 3], '4, 4'), (2, [3], '4')])
def test_too_few_pairs(images, least, needed):
    with pytest.raises(ValueError, match=f'train.batch_size={images} is too small: .* the workers need {needed} of th'):
        split_batch(images, [1] * len(least), least, 2)


@pytest.mark.parametrize('images, seconds, least, group, expected', [
    ([16, 16], [1, 3], [1, 1], 1, [24, 8]),
    ([24, 8], [3, 1], [1, 1], 1, [16, 16]),    # equally fast: 8 images a second
    ([16, 16], [1, 99], [1, 4], 1, [28, 4]),   # needs four, however slow
    ([16, 16], [1, 3.3], [1, 1], 2, [24, 8]),  # 24.6 to 7.4, in pairs
])
def test_a_split_by_speed(images, seconds, least, group, expected):
    assert split_by_speed(images, seconds, least, group) == expected


def test_who_holds_a_split_sees_it_change():
    split = BatchSplit([16, 16], 1, [1, 1])
    assert (split.images, split.part, split.fraction) == ((16, 16), slice(16, 32), 0.5)
    assert split.rebalance([1, 3]) and (split.images, split.part, split.fraction) == ((24, 8), slice(24, 32), 0.25)
    assert split.rebalance([3, 1]) and split.images == (16, 16)
    assert not split.rebalance([1, 1])
