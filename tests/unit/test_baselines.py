import numpy as np

from mxsimmim.tasks import baselines


def test_visible_mean_and_its_loss():
    image = np.zeros((1, 3, 2, 2), 'float32')
    image[0, 0] = [[1, 2], [3, 8]]
    pixels = np.array([[[0, 0], [0, 1]]])                      # only the 8 is hidden
    filled = baselines.visible_mean(image, pixels)
    assert np.all(filled[0, 0] == 2) and np.all(filled[0, 1:] == 0)
    assert baselines.masked_loss(image, filled, pixels, 'l1') == [6 / 3]
    assert baselines.masked_loss(image, filled, pixels, 'mse') == [36 / 3]


def test_nearest_visible():
    image = np.arange(5, dtype='float32')[None, None, None].repeat(3, 1)    # (1, 3, 1, 5)
    filled = baselines.nearest_visible(image, np.array([[[0, 1, 1, 1, 0]]]))
    assert filled[0, 0, 0].tolist()[:2] == [0, 0] and filled[0, 2, 0].tolist()[3:] == [4, 4]
