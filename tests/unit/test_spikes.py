"""Which losses are spikes."""
import math

import numpy as np
import pytest
from support.running import rounds

from mxsimmim.training.spikes import FLOOR, LEAST, NORMAL, WINDOW, spike_of

NAN, INF = math.nan, math.inf
FLAT, EVEN = [2.0] * LEAST, [1.0, 3.0] * LEAST  # deviations 2 FLOOR and NORMAL, around 2
SEED = 3


@pytest.mark.parametrize('recent, loss, limit, expected', [
    (EVEN, 2 + 10.1 * NORMAL, 10, 10.1),
    (EVEN, 2 + 9.9 * NORMAL, 10, None),
    (EVEN, 2 + 9.9 * NORMAL, 5, 9.9),
    (EVEN, 2 - 100 * NORMAL, 10, None),  # below is no spike
    ([], 1e9, 10, None), (EVEN[:LEAST - 1], 1e9, 10, None),  # nothing to compare with yet
    (FLAT, 2 + 2 * FLOOR * 10.1, 10, 10.1), (FLAT, 2 + 2 * FLOOR * 9.9, 10, None),  # losses that do not differ
    ([0.0] * LEAST, 1.0, 10, 1e12),
    (EVEN, NAN, 10, None), (EVEN, INF, 10, None),  # a step that is skipped anyhow
    ([NAN, INF] * LEAST + FLAT[:-1], 1e9, 10, None), ([NAN, INF, -INF] + EVEN, 2 + 11 * NORMAL, 10, 11),
    ([1e6] * WINDOW + EVEN * 3, 2 + 11 * NORMAL, 10, 11),  # of long ago
    (EVEN[:24] + [1e6] * 10, 3 + 19.8 * NORMAL, 10, None),  # outliers move median and deviation, but by little
    (EVEN[:24] + [1e6] * 10, 1e3, 10, 336.2),
    ([9 - 0.05 * n for n in range(100)], 9.0, 10, None),  # a loss that falls is far from its median, and so are all
])
def test_spikes(recent, loss, limit, expected):
    found = spike_of(recent, loss, limit)
    if expected is None:
        assert found is None
    else:
        assert found.spike_loss == loss and found.deviations == pytest.approx(expected, rel=1e-3)
        assert found.median in (0, 2, 3)


@pytest.mark.soak
@pytest.mark.unmeasured
def test_noise_is_no_spike():
    """Of 4,000 losses with normal or log-normal noise none is ten deviations away, and one that is is found.

    Of 20,000 in `make soak`.
    """
    print('seed', SEED)
    rng = np.random.default_rng(SEED)
    count = rounds(2_000, 10_000)
    for noise in (rng.normal(0, 0.05, count), rng.lognormal(-3, 0.3, count)):
        losses = [*(0.5 + np.exp(-np.arange(count) / 2000) + noise)]
        found = [n for n in range(count) if spike_of(losses[max(0, n - WINDOW):n], losses[n], 10)]
        assert found == []
        assert spike_of(losses[-WINDOW:], losses[-1] + 2, 10)
