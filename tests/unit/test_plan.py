"""How a batch is divided among workers, by table."""
from types import SimpleNamespace

import pytest

from mxsimmim.training.timetable import split_batch


def task(group):
    return SimpleNamespace(transform=lambda: SimpleNamespace(group=group))


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
    parts = split_batch(task(group), images, weights, least)
    assert parts == expected and sum(parts) == images
    assert all(part % group == 0 for part in parts[:-1]) and all(p >= n for p, n in zip(parts, least))


@pytest.mark.parametrize('images, least, needed', [(2, [1, 1], '2, 2'), (6, [3, 3], '4, 4'), (2, [3], '4')])
def test_too_few_pairs(images, least, needed):
    with pytest.raises(ValueError, match=f'train.batch_size={images} is too small: .* the workers need {needed} of th'):
        split_batch(task(2), images, [1] * len(least), least)
