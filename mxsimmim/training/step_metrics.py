"""What each step reported, kept until somebody reads it: the only place where the loop waits for the device."""
import math
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional

import mxnet as mx
import numpy as np

from ..parallel.clock import Clock
from ..runtime import watchdog
from .spikes import WINDOW, Spike, spike_of


class Row(NamedTuple):
    """One update: its number counted from 1, its rate, what the device says of it."""
    step: int
    lr: float
    loss: float
    grad_norm: float
    applied: bool


class TooManyBadSteps(ValueError):
    """Nothing but non-finite steps, of which `step`, counted from 1, is the last."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class LossSpike(Exception):
    """The loss of `step`, counted from 1, is a spike."""

    def __init__(self, step: int, spike: Spike):
        super().__init__(f'step {step}: {spike}')
        self.step, self.spike = step, spike


class StepMetrics:
    """Collects steps, sums them up for the log, and ends a run that only skips.

    `combine` reduces this worker's (k, 3) losses, norms and whether applied, of k steps, to those of the job.
    `state` is what an earlier process's `state()` returned, so that a log window cut in two by an interruption is
    summed up as if it had not been. `spike` says how many robust deviations make a loss a spike, None for none;
    `on_skip` is told of each update that was skipped, when it is read.
    """

    def __init__(self, max_bad_steps: int, state: Optional[Dict[str, Any]] = None,
                 combine: Callable[[np.ndarray], np.ndarray] = lambda rows: rows, spike: Optional[float] = None,
                 on_skip: Callable[[Row], None] = lambda row: None):
        self._max_bad_steps, self._combine, self._spike, self._on_skip = max_bad_steps, combine, spike, on_skip
        self._recent: Deque[float] = deque((state or {}).get('recent', ()), WINDOW)  # losses of applied updates
        self.clock = Clock()
        self._waiting: List[Any] = []  # (step, lr, device array of loss, norm, applied)
        self._rows: List[Row] = []
        self.skipped = self._bad_in_a_row = 0
        self._since, self._counted = time.monotonic(), 0
        if state:
            self.skipped, self._bad_in_a_row = state['skipped'], state['bad_in_a_row']
            nan = float('nan')  # JSON has none
            self._rows = [Row(step, lr, nan if loss is None else loss, nan if norm is None else norm, applied)
                          for step, lr, loss, norm, applied in state['rows']]

    def add(self, step: int, lr: float, stats: mx.nd.NDArray) -> None:
        """Notes an update without reading it: stats (3,) as `SynchronousUpdate.step` returns it."""
        self._waiting.append((step, lr, stats))
        self._counted += 1

    @property
    def pending(self) -> bool:
        """Whether there are updates since the last summary."""
        return bool(self._rows or self._waiting)

    def read(self) -> None:
        """Waits for the device and reads all noted updates.

        Raises:
            TooManyBadSteps: max_bad_steps in a row were not finite.
            LossSpike: the first one, in all workers alike; later updates are not looked at.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:  # in all workers alike
            return
        with watchdog.doing(watchdog.EXCHANGE, together=True):
            rows = np.stack([stats.asnumpy().astype('float64') for *_, stats in waiting])
        combined = self._combine(rows)
        for (step, lr, _), (loss, norm, applied) in zip(waiting, combined.tolist()):
            spike = spike_of(self._recent, loss, self._spike) if self._spike and applied else None
            if spike:
                raise LossSpike(step, spike)
            row = Row(step, lr, loss, norm, bool(applied))
            self._rows.append(row)
            if applied:
                self._recent.append(loss)
            else:
                self._on_skip(row)
            self.skipped += not applied
            self._bad_in_a_row = 0 if applied else self._bad_in_a_row + 1
            if self._bad_in_a_row >= self._max_bad_steps:
                raise TooManyBadSteps(
                    f'loss or gradient was not finite in {self._bad_in_a_row} steps in a row '
                    f'(train.max_bad_steps={self._max_bad_steps}), the last one step {step} with learning rate {lr:g}, '
                    f'loss {loss:g}, gradient norm {norm:g}. Lower optim.base_lr or lengthen optim.warmup; the weights '
                    'are those of before', step)

    def summary(self) -> Dict[str, float]:
        """Averages the rows since the last summary, and forgets them; loss and norm over applied updates only."""
        self.read()
        rows, self._rows = self._rows, []
        good = [row for row in rows if row.applied]
        now = time.monotonic()
        speed = self._counted / max(now - self._since, 1e-9)
        clock, timed = self.clock, self.clock.timed or float('nan')
        times = {'data_seconds': clock.data / max(self._counted, 1), 'compute_seconds': clock.compute / timed,
                 'communication_seconds': clock.communication / timed}
        self._since, self._counted = now, 0
        self.clock.reset()
        return {'loss': _mean([row.loss for row in good]), 'grad_norm': _mean([row.grad_norm for row in good]),
                'lr': rows[-1].lr, 'steps_per_second': speed, 'skipped': self.skipped, **times}

    def pause(self, seconds: float) -> None:
        """Takes time spent on other things than training out of the speed."""
        self._since += seconds

    def state(self) -> Dict[str, Any]:
        """Returns what a checkpoint records of it; non-finite numbers, which JSON does not have, become null."""
        self.read()
        return {'skipped': self.skipped, 'bad_in_a_row': self._bad_in_a_row,
                **({'recent': list(self._recent)} if self._spike else {}),
                'rows': [[x if not isinstance(x, float) or math.isfinite(x) else None for x in row]
                         for row in self._rows]}


def _mean(values: List[float]) -> float:
    return math.fsum(values) / len(values) if values else float('nan')
