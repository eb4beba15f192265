"""What is relied on of MXNet's servers, as any role of a job of 2 workers and 1 server: private_servers.py FOLDER."""
import os
import sys
import time
from pathlib import Path

from mxsimmim.runtime import mxnet_private

folder, role = Path(sys.argv[1]), os.environ.pop('DMLC_ROLE')
import mxnet as mx  # noqa: E402, under no role, or its own server would start

os.environ['DMLC_ROLE'] = role
store = mx.kv.create('dist_async' if role == 'worker' else 'dist')


def control(head, body, _):
    """A server's: the first command sets the updater."""
    with open(folder / 'commands', 'a') as file:
        file.write(f'{head} {body.decode()}\n')

    def update(key, pushed, stored):
        stored[:] = 10 * pushed + key
    mxnet_private.set_updater(store, update)


if role != 'worker':
    mxnet_private.run_server(store, control)
    sys.exit()
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
