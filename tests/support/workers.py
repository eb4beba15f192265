"""Workers of a job as threads of one process, each with its control plane."""
import socket
import threading

from mxsimmim.parallel.control import ControlPlane, _listen
from mxsimmim.parallel.mesh import Mesh

SECONDS = 60
KEY = b'k' * 32


def each(count, function, keys=(), axis='data', mesh=None):
    """[function(control plane)] of `count` workers at once; an exception in place of a result.

    `keys` are the keys of some ranks that have another one, `axis` is that of the mesh along which the workers lie; or
    `mesh` has the sizes of several.
    """
    results = [None] * count
    listener = _listen('127.0.0.1', 0, count)
    address = listener.getsockname()

    def run(rank):
        try:
            control = ControlPlane((mesh or Mesh(**{axis: count}))._replace(rank=rank), [address],
                                   dict(keys).get(rank, KEY), None if rank else listener)
        except Exception as error:
            results[rank] = error
            return
        try:
            with control:
                results[rank] = function(control)
        except Exception as error:
            results[rank] = error
            if count > 1:  # as the end of a process would
                control._connection.shutdown(socket.SHUT_RDWR)
    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), 'a worker hangs'
    listener.close()
    return results
