"""What is relied on of MXNet's servers, as any role of a job of 2 workers and 1 server: private_servers.py FOLDER."""
import os
import sys
import time
from pathlib import Path

from mxsimmim.runtime import mxnet_private

folder, role = Path(sys.argv[1]), os.environ['DMLC_ROLE']
stores = []


def control(head, body, _):
    """A server's: the first command sets the updater. Until then there is only MXNet's library."""
    assert 'mxnet' not in sys.modules
    with open(folder / 'commands', 'a') as file:
        file.write(f'{head} {body.decode()}\n')
    del os.environ['DMLC_ROLE']  # or the import would begin a server of its own
    import mxnet as mx
    os.environ['DMLC_ROLE'] = role

    def update(key, pushed, stored):
        stored[:] = 10 * pushed + key
    stores.append(mx.kv.KVStore(handle))
    mxnet_private.set_updater(stores[0], update)


if role != 'worker':
    handle = mxnet_private.create_server()
    mxnet_private.run_server(handle, control)
    sys.exit()
import mxnet as mx  # noqa: E402, no server may get here

store = mx.kv.create('dist_async')
rank = int(os.environ['DMLC_WORKER_ID'])
if rank == 0:
    mxnet_private.send_command(store, 0, 'first ä')  # returns when it was carried out
    assert (folder / 'commands').read_text() == '0 first ä\n'
    time.sleep(1)
    (folder / 'told').touch()
mxnet_private.barrier(store)
assert (folder / 'told').exists()
store.init([3, 4], [mx.nd.zeros((2,))] * 2)
mxnet_private.barrier(store)
store.push(3 + rank, mx.nd.array([rank + 1, 5]))
pulled = mx.nd.zeros((2,))
store.pull(3 + rank, out=pulled)
assert pulled.asnumpy().tolist() == [10 * (rank + 1) + 3 + rank, 53 + rank], pulled
mxnet_private.barrier(store)
print('ok', rank, flush=True)
