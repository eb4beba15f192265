"""Our parameter server and scheduler process.

MXNet's own starts inside ``import mxnet`` and unpickles whatever it is sent. This one loads MXNet's library alone and
runs its server loop with a controller that opens nothing but JSON signed with the job's key.
"""
import contextlib
import ctypes
import faulthandler
import math
import os
import signal
import sys
import traceback
from typing import Any, Callable, Dict, List, Optional, Set

import numpy as np

from ..runtime import mxnet_private
from ..system.compiled import compiled
from . import protocol


def serve() -> int:
    """Run this process's role, server or scheduler, until the workers are done.

    It has no deadline: to wait is its work. The launcher's agent ends it, and whoever ends it with SIGTERM, as if a
    worker has failed, finds in its log where it was.

    Raises:
        ValueError: there is no job key, or no MXNet that can be used.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):  # no standard error
        faulthandler.register(signal.SIGTERM, chain=True)
    key = protocol.job_key(os.environ)
    handle = mxnet_private.create_server()

    def store() -> Any:
        role = os.environ.pop('DMLC_ROLE')  # with it the import would begin a server of its own
        import mxnet as mx
        os.environ['DMLC_ROLE'] = role
        return mx.kv.KVStore(handle)
    mxnet_private.run_server(handle, Server(store, key).control)
    return 0


class Server:
    """What our server does with commands and, for asynchronous jobs, with what workers push.

    A synchronous job sends no command: MXNet's loop adds up the pushes of all workers by itself.

    MXNet's loop carries out one push or pull after the other and waits for us, so that arrays can be read and written
    where they lie, without its engine: most are small, and an operator of MXNet's costs many times what it computes.
    """

    def __init__(self, store: Callable[[], Any], key: bytes):
        """`store` returns MXNet's store of this process, which only asynchronous jobs need."""
        self._make_store, self._key, self._last = store, key, 0
        self._store: Any = None
        self._layout = protocol.Layout(0, 0, 1)
        self._moments: Dict[int, np.ndarray] = {}  # key -> what workers push and pull under it
        self._updates: Dict[int, int] = {}  # key of a weight -> updates so far
        self._unset: Set[int] = set()  # keys of weights of which the next push is not a gradient, but their value
        self._done = 0
        self._board: Any = None  # float64 (FIELDS,); what workers pull has it in two halves

    def control(self, head: int, body: Optional[bytes], _: Any = None) -> None:
        """MXNet's controller callback. A command that is not ours is logged and dropped."""
        body = body or b''
        try:
            self._last, command = protocol.opened(body.decode('utf-8', 'surrogateescape'), self._last, self._key)
        except (ValueError, TypeError) as error:
            print(f'server: dropped a command (head {head}, {len(body)} bytes): {error}', file=sys.stderr, flush=True)
            return
        self._or_die(self._begin)
        if command:
            self._or_die(self._configure, command)

    def _begin(self) -> None:
        """Update with each push from now on."""
        self._store = self._store or self._make_store()
        mxnet_private.set_updater(self._store, lambda *arguments: self._or_die(self._update, *arguments))

    def _configure(self, command: Dict[str, Any]) -> None:
        """The optimiser of an asynchronous job: configuration, decay and rate of each key, and how far the job is."""
        from ..config import configfile
        from ..optim import learning_rates
        self._board = np.zeros(protocol.FIELDS)
        config = configfile.from_dict(command['config'], 'the worker')
        self._optim = config.optim
        self._layout = protocol.Layout(*command['layout'])
        self._decays: List[float] = command['decays']
        self._scales: List[float] = command['scales']
        self._workers: int = command['workers']
        self._rate = learning_rates(config.optim, config.train, command['per_epoch'], command['total'])
        self._done, self._updates = command['updates'], {}
        self._unset = set(range(self._layout.weights))

    @staticmethod
    def _or_die(function: Callable[..., None], *arguments: Any) -> None:
        """ctypes swallows exceptions, and a server that goes on without its update is worse than none."""
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _update(self, key: int, received: Any, stored: Any) -> None:
        """MXNet's updater: what becomes of `stored` when `received`, of the same shape, is pushed."""
        received, stored = _memory(received), _memory(stored)
        if key == self._layout.board:
            self._post(received, stored)
        elif key < self._layout.weights and key not in self._unset:
            self._step(key, received, stored)
        else:
            self._unset.discard(key)
            if self._layout.weights <= key < self._layout.board:
                self._moments[key] = stored
            stored[:] = received

    def _step(self, key: int, gradient: np.ndarray, ahead: np.ndarray) -> None:
        """Updates the weight and leaves in `ahead`, which workers pull, where it will be when their gradient comes.

        Until then the n - 1 other workers update once each. Adam's next steps go mostly where its last one went: the
        weights are predicted to take n - 1 more of it (Chen et al. 2018, arXiv:1809.02839).
        """
        from ..optim import adamw_arguments
        update = self._updates.setdefault(key, self._done)
        self._updates[key] += 1
        if not math.isfinite(np.dot(gradient, gradient)):
            return  # counts in the schedule nevertheless, as it does without servers
        # Schedules count updates of the whole batch, and rates are for its images: a worker has one part of them.
        lr = self._rate(update / self._workers, self._scales[key]) / self._workers
        mean, var, weight = (self._moments[key + kind * self._layout.stride] for kind in (1, 2, 3))
        if len({len(array) for array in (gradient, ahead, mean, var, weight)}) > 1:
            raise ValueError(f'key {key}: a gradient of {len(gradient)} elements for a weight of {len(weight)}')
        arguments = adamw_arguments(self._optim, update, lr)
        rate, beta1, beta2, epsilon = (np.float32(arguments[name]) for name in ('lr', 'beta1', 'beta2', 'epsilon'))
        adamw(weight, gradient, mean, var, ahead, np.float32(1 - lr * self._decays[key]), rate, beta1, beta2, epsilon,
              np.float32(self._workers - 1))

    def _post(self, received: np.ndarray, board: np.ndarray) -> None:
        new = received.astype('float64').reshape(protocol.BOARD_SHAPE).sum(axis=0)
        if new[protocol.UPDATES]:
            new[protocol.STALENESS] = self._board[protocol.UPDATES] - new[protocol.STALENESS]
        new[~np.isfinite(new)] = 0  # the loss of a skipped step
        self._board += new
        rounded = self._board.astype('float32')
        board[:] = np.concatenate([rounded, self._board - rounded])


def _memory(array: Any) -> np.ndarray:
    """The elements (n,) of an MXNet array on a CPU, where they lie."""
    array.wait_to_read()
    kind = np.dtype(array.dtype)
    content = (ctypes.c_char * (array.size * kind.itemsize)).from_address(mxnet_private.data_address(array))
    content.owner = array  # whose memory stays as long as it is used
    return np.frombuffer(content, kind)


@compiled
def adamw(weight: np.ndarray, gradient: np.ndarray, mean: np.ndarray, var: np.ndarray, ahead: np.ndarray,
          kept: np.float32, rate: np.float32, beta1: np.float32, beta2: np.float32, epsilon: np.float32,
          further: np.float32) -> None:
    """Make one update in place of float32 arrays (n,).

    weight *= kept, then weight -= step = rate * mean / (sqrt(var) + epsilon) with the new moments of gradient; ahead =
    weight - further * step. In float32 throughout, as MXNet's adamw_update rounds it: see `optim.adamw_arguments`.
    """
    rest1, rest2 = np.float32(1) - beta1, np.float32(1) - beta2
    for i in range(len(mean)):  # not one loop: LLVM does not vectorise it with five arrays, 5 times as slow
        mean[i] = beta1 * mean[i] + rest1 * gradient[i]
        var[i] = beta2 * var[i] + rest2 * (gradient[i] * gradient[i])
    for i in range(len(weight)):
        step = rate * mean[i] / (np.sqrt(var[i]) + epsilon)
        weight[i] = kept * weight[i] - step
        ahead[i] = weight[i] - further * step
