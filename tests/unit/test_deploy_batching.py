"""Who gets which answer when several ask at once."""
import threading

import pytest

from mxsimmim.inference.batching import Batcher

DEADLINE = 20


def blocked(largest):
    """A batcher whose computation waits for `go`; returns it, `go`, `begun` and the sizes of its batches."""
    go, begun, sizes = threading.Event(), threading.Event(), []

    def compute(items):
        begun.set()
        assert go.wait(DEADLINE)
        if 'bad' in items:
            raise ZeroDivisionError('bad')
        return [10 * item for item in items]
    return Batcher(compute, largest, sizes.append), go, begun, sizes


def test_what_waits_is_computed_together_and_each_gets_its_own():
    batcher, go, begun, sizes = blocked(4)
    first = batcher.put(0)
    assert begun.wait(DEADLINE)
    others = [batcher.put(item) for item in range(1, 10)]
    assert len(batcher) == 9
    go.set()
    assert [future.result(DEADLINE) for future in [first] + others] == [10 * item for item in range(10)]
    assert sizes == [1, 4, 4, 1]
    batcher.close()


def test_close_answers_what_is_queued():
    batcher, go, begun, sizes = blocked(2)
    futures = [batcher.put(item) for item in range(5)]
    assert begun.wait(DEADLINE)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    go.set()
    closing.join(DEADLINE)
    assert not closing.is_alive()
    assert [future.result(0) for future in futures] == [0, 10, 20, 30, 40] and sum(sizes) == 5


def test_a_failure_reaches_its_batch_and_no_other():
    batcher, go, begun, _ = blocked(2)
    first = batcher.put(1)
    assert begun.wait(DEADLINE)
    bad = [batcher.put('bad'), batcher.put(2)]
    after = batcher.put(3)
    go.set()
    assert first.result(DEADLINE) == 10 and after.result(DEADLINE) == 30
    for future in bad:
        with pytest.raises(ZeroDivisionError):
            future.result(DEADLINE)
    batcher.close()


def test_who_went_away_is_not_computed():
    batcher, go, begun, sizes = blocked(8)
    first = batcher.put(1)
    assert begun.wait(DEADLINE)
    gone, stays = batcher.put(2), batcher.put(3)
    assert gone.cancel()
    go.set()
    assert first.result(DEADLINE) == 10 and stays.result(DEADLINE) == 30
    batcher.close()
    assert sizes == [1, 1]
