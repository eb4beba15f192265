"""Views of an image at several scales, and the way back."""
import numpy as np
import pytest

from mxsimmim.data.geometry import View
from mxsimmim.data.views import as_numbers, as_view, most_views, returned, views_of

SEED = 4


def shown(views):
    return [(view.whole, view.corner, view.shape) for view in views]


@pytest.mark.parametrize('size, scales, expected', [
    ((60, 90), (1,), [((43, 64), (0, 0), (43, 64))]),
    ((60, 90), (0.5,), [((21, 32), (0, 0), (21, 32))]),
    ((60, 90), (1.25,), [((53, 80), (0, 0), (53, 64)), ((53, 80), (0, 16), (53, 64))]),
    ((64, 64), (2, 1), [((128, 128), (top, left), (64, 64)) for top in (0, 64) for left in (0, 64)]
     + [((64, 64), (0, 0), (64, 64))]),
    ((200, 50), (2.5,), [((160, 40), (top, 0), (64, 40)) for top in (0, 48, 96)])])
def test_views(size, scales, expected):
    assert shown(views_of(size, (64, 64), scales)) == expected
    both = views_of(size, (64, 64), scales, flip=True)
    assert shown(both) == 2 * expected and [view.flip for view in both] == [False] * len(expected) + [True] * len(
        expected)
    assert [as_view(as_numbers(view)) for view in both] == both


def test_parts_cover_the_image_and_are_not_too_many():
    rng = np.random.default_rng(SEED)
    print('seed', SEED)
    for _ in range(200):
        size, canvas = (tuple(int(side) for side in rng.integers(1, 200, 2)) for _ in range(2))
        scale = float(rng.uniform(0.1, 4))
        views = views_of(size, canvas, (scale,))
        seen = np.zeros(size, int)
        for view in views:
            (rows, columns), _ = returned(np.zeros((1, 2, 2), 'float32'), view, size, canvas)
            seen[rows, columns] += 1
        assert seen.min() >= 1 and len(views) <= most_views(canvas, (scale,), False)


@pytest.mark.parametrize('flip', [False, True])
def test_the_way_back(flip):
    """A plane over the image, as it is seen on a canvas of 8 places a side, comes back as it was."""
    size, canvas = (30, 50), (32, 32)
    view = View((45, 75), (7, 20), (32, 32), flip)

    def plane(x, y):
        return 2 * x - 3 * y + 1
    middles = np.stack(np.meshgrid(np.arange(8) * 4 + 2, np.arange(8) * 4 + 2), axis=-1).reshape(-1, 2)
    answer = plane(*view.origin(middles, size).T).reshape(1, 8, 8).astype('float32')
    (rows, columns), found = returned(answer, view, size, canvas)
    assert (rows, columns) == (slice(5, 26), slice(13, 35))  # whose middles are on the canvas: 7 to 39, 20 to 52
    expected = plane(np.arange(50)[None, columns] + 0.5, np.arange(30)[rows, None] + 0.5)
    np.testing.assert_allclose(found[0, 2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-4)
