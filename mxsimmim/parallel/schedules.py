"""Schedules of a pipeline, and how a network is cut into its stages. Pure functions.

A schedule lists for each stage what it does, in order: passes of the micro-batches forward and backward. In all of them
each stage takes micro-batches in their order, forward and backward, so that gradients add up in the same order.
"""
from itertools import accumulate
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

from ..config import ParallelConfig

FORWARD, BACKWARD = 'forward', 'backward'


class Pass(NamedTuple):
    """One micro-batch through one stage."""
    direction: str
    micro_batch: int


def gpipe(stages: int, micro_batches: int) -> List[List[Pass]]:
    """All micro-batches forward, then all backward: Huang et al. 2019 (arXiv:1811.06965).

    A stage keeps the activations of all of them.
    """
    return [[Pass(direction, m) for direction in (FORWARD, BACKWARD) for m in range(micro_batches)]
            for _ in range(stages)]


def one_forward_one_backward(stages: int, micro_batches: int) -> List[List[Pass]]:
    """As soon as a micro-batch can go back, it does: Narayanan et al. 2019 (PipeDream), flushed after each batch.

    Stage s keeps the activations of at most `stages` - s micro-batches, and takes as long as `gpipe`.
    """
    schedule = []
    for stage in range(stages):
        ahead = min(stages - 1 - stage, micro_batches)
        passes = [Pass(FORWARD, m) for m in range(ahead)]
        for m in range(micro_batches):
            passes += [Pass(FORWARD, m + ahead)] * (m + ahead < micro_batches) + [Pass(BACKWARD, m)]
        schedule.append(passes)
    return schedule


SCHEDULES: Dict[str, Callable[[int, int], List[List[Pass]]]] = {'1f1b': one_forward_one_backward, 'gpipe': gpipe}


def in_order(schedule: Sequence[Sequence[Pass]]) -> List[Tuple[int, Pass]]:
    """Return (stage, pass) of all stages in an order in which one process can begin them, each after what it needs.

    That of a clock: whoever can begin at a tick does, the last stage first.
    """
    order: List[Tuple[int, Pass]] = []
    done: Dict[Tuple[int, Pass], int] = {}  # when
    last, left = len(schedule) - 1, [list(passes) for passes in schedule]
    tick = 0
    while any(left):
        tick += 1
        for stage in reversed(range(len(left))):
            if not left[stage]:
                continue
            direction, m = left[stage][0]
            backward = direction == BACKWARD
            before = (stage, Pass(FORWARD, m)) if backward and stage == last else \
                (stage + 1 if backward else stage - 1, left[stage][0])
            if before[0] < 0 or done.get(before, tick) < tick:
                done[stage, left[stage][0]] = tick
                order.append((stage, left[stage].pop(0)))
    return order


def in_flight(passes: Sequence[Pass]) -> int:
    """Return the most micro-batches whose activations a stage keeps at a time."""
    return max(accumulate(1 if direction == FORWARD else -1 for direction, _ in passes))


def partition(costs: Sequence[float], stages: int) -> List[slice]:
    """Cut a sequence of segments into consecutive stages, none empty, whose largest sum of costs is the least possible.

    Of several such ways that in which the last stages are smallest: they keep the fewest micro-batches, but also wait
    for the loss. `stages` is at most the number of segments.
    """
    assert 0 < stages <= len(costs)
    sums = [0.0, *accumulate(costs)]
    # best[n]: (largest sum, cuts) of the first n segments in the stages so far
    best: List[Tuple[float, Tuple[int, ...]]] = [(total, (0,)) for total in sums]
    for stage in range(1, stages):
        best = [min(((max(best[cut][0], sums[n] - sums[cut]), (*best[cut][1], cut)) for cut in range(stage, n)),
                    key=lambda way: (way[0], -way[1][-1]), default=(float('inf'), ())) for n in range(len(sums))]
    cuts = [*best[-1][1], len(costs)]
    return [slice(start, stop) for start, stop in zip(cuts, cuts[1:])]


def stages_of(parallel: ParallelConfig, costs: Sequence[float]) -> List[slice]:
    """Return the segments of each stage: as `parallel.split` says of the blocks, else of equal cost, as far as it goes.

    `costs` are those of the network's segments: embedding, blocks, head.
    """
    if not parallel.split:
        # Embedding and head stay with a block, as a stage of one of them alone has next to nothing to do.
        first, *middle, last = costs
        middle[0], middle[-1] = middle[0] + first, middle[-1] + last
        blocks = [part.stop - part.start for part in partition(middle, parallel.pipeline)]
    else:
        blocks = list(parallel.split)
    ends = [1 + end for end in accumulate(blocks)]
    return [slice(start, stop) for start, stop in zip([0, *ends[:-1]], [*ends[:-1], ends[-1] + 1])]
