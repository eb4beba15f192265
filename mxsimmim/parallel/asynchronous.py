"""AsynchronousUpdate: parameter servers that update with whatever gradient comes, when it comes."""
import contextlib
import os
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np

from ..config import Config, configfile
from ..models import ParameterSpec
from ..ops import REFERENCE, OpBackend
from ..runtime import mxnet_private
from ..runtime.process import ProcessInfo
from . import protocol
from .clock import Clock
from .communicators import Communicator
from .control import ControlPlane
from .updates import Agreed, global_norm

KINDS = ('mean', 'var', 'weight')  # what the servers hold for each parameter, besides what workers compute with
AHEAD = 'ahead'  # the latter: where the weights are predicted to be


class WeightServers(Communicator):
    """dist_async: what is pushed goes to the server's rule for that key. Nothing is reduced."""

    def __init__(self, name: str, process: ProcessInfo, control: Optional[ControlPlane] = None):
        super().__init__(name, process, control)
        self.servers = process.servers
        self._number = time.time_ns()  # of commands; grows from process to process, too
        if self.rank == 0:
            self.command({})  # from now on the servers have a rule for what is pushed
        self.meet()

    def init(self, keys: List[int], arrays: Sequence[mx.nd.NDArray]) -> None:
        """Give new keys rank 0's values."""
        self._store.init(keys, list(arrays))
        self.meet()

    def push(self, key: int, array: mx.nd.NDArray) -> None:
        """Send; `array` must not be used again before it is overwritten: pulls of the key may go through it."""
        self._store.push(key, array, priority=-key)

    def pull(self, key: int, copies: List[mx.nd.NDArray]) -> None:
        """Fetch, after what this worker pushed to the key before."""
        self._store.pull(key, out=copies, priority=-key)

    def meet(self) -> None:
        """Wait until every worker's pushes and pulls are done."""
        mx.nd.waitall()
        mxnet_private.barrier(self._store)

    def command(self, content: Dict[str, Any]) -> None:
        """Send a signed command to every server and wait until it was carried out."""
        self._number += 1
        mxnet_private.send_command(self._store, protocol.HEAD,
                                   protocol.sign(content, self._number, protocol.job_key(os.environ)))


class AsynchronousUpdate:
    """Each worker pushes its gradient, the mean over its own images, and takes back what the weights will soon be.

    Dean et al. 2012 (Downpour SGD) with AdamW on the servers. There, one update is one worker's push: the schedule of
    a job of n workers counts n of them as one step, and applies each at an n-th of the rate, which is for the whole
    batch. Of a push with a loss or gradient that is not finite nothing is applied, on any server. Buffers are each
    worker's own, and rank 0's are saved.
    """

    def __init__(self, specs: Sequence[ParameterSpec], store: WeightServers, config: Config, per_epoch: int,
                 total: int, backend: OpBackend = REFERENCE):
        weights = [spec for spec in specs if spec.trainable]
        self.workers, self._backend = store, backend
        self._names, self._parameters = [spec.name for spec in weights], [spec.parameter for spec in weights]
        self._local = Communicator('device')
        self._gradients = self._local.register([p.list_grad() for p in self._parameters])
        self._layout = protocol.Layout(len(weights), len(KINDS), store.servers)
        self._boards = [mx.nd.zeros(protocol.BOARD_SHAPE) for _ in range(2)]
        self._reported, self._time = np.zeros(protocol.FIELDS), time.monotonic()
        self._stop_at: Optional[int] = None
        self._save_at, self._saves = 0, 0  # what was agreed on last; how often it was
        self._images = 0
        firsts = [p.list_data()[0] for p in self._parameters]
        keys = list(range(len(firsts)))
        store.init(keys, firsts)
        for kind in range(self._layout.moments):
            store.init([self._moment(kind, key) for key in keys], [mx.nd.zeros_like(first) for first in firsts])
        store.init([self._layout.board], self._boards[:1])
        self._settings = {'config': configfile.to_dict(config), 'layout': list(self._layout),
                          'decays': [spec.decay for spec in weights], 'workers': store.size,
                          'scales': [spec.lr_scale for spec in weights],
                          'per_epoch': per_epoch, 'total': total}
        self.load_state_dict(None, 0)

    def load_state_dict(self, moments: Optional[Mapping[str, Any]], update: int) -> None:
        """Give the servers rank 0's parameters and moments, None for zeros, and take what workers compute with."""
        if self.workers.rank == 0:
            self.workers.command({**self._settings, 'updates': update * self.workers.size})
            for key, (name, p) in enumerate(zip(self._names, self._parameters)):
                for kind, moment in enumerate(KINDS[:2]):
                    value = mx.nd.array(moments[f'{moment}.{name}']) if moments else mx.nd.zeros(p.shape)
                    self.workers.push(self._moment(kind, key), value)
                self.workers.push(self._moment(2, key), p.list_data()[0].copy())
                ahead = (moments or {}).get(f'{AHEAD}.{name}')  # earlier versions saved none
                self.workers.push(key, p.list_data()[0].copy() if ahead is None else mx.nd.array(ahead))
        self.workers.meet()
        self._pull()
        self.workers.meet()

    def loss_divisor(self, images: int) -> int:
        """Return the number of images over which the gradient is a mean: the worker's own."""
        self._images = images
        return images

    def step(self, update: int, lr: float, loss: mx.nd.NDArray, clock: Optional[Clock] = None,
             floor: float = 0.0) -> mx.nd.NDArray:
        """Send the gradients, take new weights; return as `SynchronousUpdate.step`, of this worker alone."""
        self._local.all_reduce(self._gradients)
        norm = global_norm(self._gradients.arrays, self._backend)
        stats = mx.nd.concat(loss, norm, mx.nd.contrib.isfinite(norm) * mx.nd.contrib.isfinite(loss), dim=0)
        if not stats.asnumpy()[2]:  # servers see a parameter each: let it spoil all of them
            for first, *_ in self._gradients.arrays:
                first[:] = float('nan')
        if clock:
            clock.computed()
        for key, (first, *_) in enumerate(self._gradients.arrays):
            self.workers.push(key, first)
        mine = np.zeros(protocol.BOARD_SHAPE, 'float32')
        mine[0, protocol.UPDATES], mine[0, protocol.IMAGES] = 1, self._images
        row = mx.nd.array(mine)
        row[0, protocol.LOSS] = loss.as_in_context(mx.cpu()) * self._images
        row[:, protocol.STALENESS] = self._boards[0][:, protocol.UPDATES]
        self.workers.push(self._layout.board, row)
        self._pull()
        if clock:
            clock.communicated()
        return stats

    def poll(self, step: int, stopping: bool, saving: bool = False, due: bool = False) -> Agreed:
        """As `SynchronousUpdate.poll`. Workers are at different steps: all go on to the furthest one's.

        They meet when one of them says so on the board, and, `due`, where they will meet anyway.
        """
        if self._stop_at is None and step > self._save_at:  # on the way to a save they have met
            for wanted, field in ((stopping, protocol.STOP), (saving, protocol.SAVE)):
                if wanted:
                    self._write(field, [1])
            board = self._boards[1].asnumpy()[0]
            stopping = stopping or bool(board[protocol.STOP] > 0)
            saving = saving or bool(board[protocol.SAVE] > self._saves)
            if stopping or saving or due:
                steps, stops, saves = zip(*self.workers.control.all_gather('votes to stop', [step, stopping, saving]))
                self._stop_at = max(steps) if any(stops) else None
                if any(saves):
                    self._save_at, self._saves = max(steps), self._saves + 1
        return Agreed(self._stop_at, step == self._save_at)

    @contextlib.contextmanager
    def consolidated_weights(self) -> Iterator[None]:
        """Show the servers' parameters: while entered, all workers wait and hold them."""
        self.workers.meet()
        for key, p in enumerate(self._parameters):
            self.workers.pull(self._moment(2, key), p.list_data())
        self.workers.meet()
        yield
        self.workers.meet()
        self._pull()

    def in_sync(self, _step: int) -> bool:
        """Return False: each worker has the weights of its own last pull."""
        return False

    def combine(self, rows: np.ndarray) -> np.ndarray:
        """Return this worker's rows: asking for the others' would keep it waiting."""
        return rows

    by_worker: Sequence[Sequence[float]] = ()  # of workers that do not wait for each other nobody has them all

    def observed(self, noted: Sequence[float]) -> Tuple[List[float], Dict[str, float]]:
        """As `SynchronousUpdate.observed`, from the board; besides loss, images/s and staleness since the last call."""
        self._write(protocol.NOTES, [1, *noted])
        self.workers.pull(self._layout.board, [self._boards[0]])
        board, now = self._boards[0].asnumpy().astype('float64').sum(axis=0), time.monotonic()
        new, seconds = board - self._reported, now - self._time
        self._reported, self._time = board, now
        updates = max(new[protocol.UPDATES], 1)
        means = new[protocol.NOTES + 1:] / max(new[protocol.NOTES], 1)
        return list(means), {'loss': new[protocol.LOSS] / max(new[protocol.IMAGES], 1),
                             'images_per_second': new[protocol.IMAGES] / seconds,
                             'staleness': new[protocol.STALENESS] / updates}

    def state_dict(self) -> Dict[str, Any]:
        """Return the servers' moments, and what workers compute with; inside `consolidated_weights`."""
        arrays = {}
        for kind, moment in enumerate([AHEAD, *KINDS[:2]], -1):
            for key, (name, p) in enumerate(zip(self._names, self._parameters)):
                arrays[f'{moment}.{name}'] = mx.nd.zeros(p.shape)
                self.workers.pull(self._moment(kind, key), [arrays[f'{moment}.{name}']])
        return {name: array.asnumpy() for name, array in arrays.items()}

    def own_state(self) -> None:
        """Return None: workers have nothing of their own."""

    def _moment(self, kind: int, key: int) -> int:
        """Return the key of one of KINDS, or with -1 of what workers compute with."""
        return (1 + kind) * self._layout.stride + key

    def _write(self, first: int, values: Sequence[float]) -> None:
        """Adds to the fields of the board from `first` on."""
        row = np.zeros(protocol.BOARD_SHAPE, 'float32')
        row[0, first:first + len(values)] = values
        self.workers.push(self._layout.board, mx.nd.array(row))

    def _pull(self) -> None:
        """Weights, and how many updates they have seen."""
        self._boards.reverse()  # the other one, of the step before, can be read without waiting
        self.workers.pull(self._layout.board, [self._boards[0]])
        for key, p in enumerate(self._parameters):
            self.workers.pull(key, p.list_data())
