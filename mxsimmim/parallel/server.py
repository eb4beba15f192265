"""Our parameter server and scheduler process.

MXNet's own starts inside ``import mxnet`` and unpickles whatever it is sent. This one starts first: it imports mxnet
under no role, gives the process its role back, and runs MXNet's server loop with a controller that opens nothing but
JSON signed with the job's key.
"""
import ctypes
import math
import os
import sys
import traceback
from typing import Any, Callable, Dict, List, Optional

from . import protocol


def serve() -> int:
    """Runs this process's role, server or scheduler, until the workers are done.

    Raises:
        ValueError: there is no job key.
    """
    key = protocol.job_key(os.environ)
    role = os.environ.pop('DMLC_ROLE')
    import mxnet as mx
    os.environ['DMLC_ROLE'] = role
    store = mx.kv.create('dist')
    server = Server(store, key)
    controller = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(server.control)
    mx.base.check_call(mx.base._LIB.MXKVStoreRunServer(store.handle, controller, None))
    return 0


class Server:
    """What our server does with commands and, for asynchronous jobs, with what workers push.

    A synchronous job sends no command: MXNet's loop adds up the pushes of all workers by itself.
    """

    def __init__(self, store: Any, key: bytes):
        self._store, self._key, self._last = store, key, 0
        self._layout = protocol.Layout(0, 0, 1)
        self._moments: Dict[int, Any] = {}  # key -> the array that workers push and pull under it
        self._updates: Dict[int, int] = {}  # key of a weight -> updates so far
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
        self._store._set_updater(lambda *arguments: self._or_die(self._update, *arguments))
        if command:
            self._or_die(self._configure, command)

    def _configure(self, command: Dict[str, Any]) -> None:
        """The optimiser of an asynchronous job: configuration, decay and rate of each key, and how far the job is."""
        import numpy as np

        from .. import configfile
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
        if key < self._layout.weights:
            self._step(key, received, stored)
        elif key == self._layout.board:
            self._post(received, stored)
        else:
            if key < self._layout.board:
                self._moments[key] = stored
            stored[:] = received  # also a row of `gather`

    def _step(self, key: int, gradient: Any, ahead: Any) -> None:
        """Updates the weight and leaves in `ahead`, which workers pull, where it will be when their gradient comes.

        Until then the n - 1 other workers update once each. Adam's next steps go mostly where its last one went: the
        weights are predicted to take n - 1 more of it (Chen et al. 2018, arXiv:1809.02839).
        """
        import mxnet as mx

        from ..optim import adamw_arguments
        update = self._updates.setdefault(key, self._done)
        self._updates[key] += 1
        if not math.isfinite(mx.nd.dot(gradient.reshape((-1,)), gradient.reshape((-1,))).asscalar()):
            return  # counts in the schedule nevertheless, as it does without servers
        # Schedules count updates of the whole batch, and rates are for its images: a worker has one part of them.
        lr = self._rate(update / self._workers, self._scales[key]) / self._workers
        mean, var, weight = (self._moments[key + kind * self._layout.stride] for kind in (1, 2, 3))
        if self._decays[key]:
            weight *= 1 - lr * self._decays[key]
        arguments = adamw_arguments(self._optim, update, lr)
        mx.nd.contrib.adamw_update(weight, gradient, mean, var, mx.nd.ones((1,)), out=weight, **arguments)
        weight.copyto(ahead)
        if self._workers > 1:
            ahead -= (self._workers - 1) * arguments['lr'] * mean / (mx.nd.sqrt(var) + arguments['epsilon'])

    def _post(self, received: Any, board: Any) -> None:
        import numpy as np
        new = received.asnumpy().astype('float64').reshape(protocol.BOARD_SHAPE).sum(axis=0)
        if new[protocol.UPDATES]:
            new[protocol.STALENESS] = self._board[protocol.UPDATES] - new[protocol.STALENESS]
        new[~np.isfinite(new)] = 0  # the loss of a skipped step
        self._board += new
        rounded = self._board.astype('float32')
        board[:] = np.stack([rounded, (self._board - rounded).astype('float32')]).reshape(board.shape)
