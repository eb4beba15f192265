"""A job whose first argument says whose servers it has, MXNet's or ours, and its second what its workers send them.

Workers wait until there is a folder `go`; then their sum must be right.
"""
import os
import sys
import time
from pathlib import Path

servers, body = sys.argv[1:]
if servers == 'ours' and os.environ['DMLC_ROLE'] != 'worker':
    from mxsimmim.parallel.server import serve
    sys.exit(serve())

import mxnet as mx  # noqa: E402  MXNet's own servers never return from it

store = mx.kv.create('dist_sync')
store.init(1, mx.nd.zeros(3))
mx.nd.waitall()
store._barrier()
if body:
    store._send_command_to_servers(0, body)
print('ready', flush=True)
deadline = time.monotonic() + 60
while not Path('go').exists():
    assert time.monotonic() < deadline, 'nobody made the folder `go`'
    time.sleep(0.02)
store.push(1, mx.nd.ones(3) * 5)
out = mx.nd.zeros(3)
store.pull(1, out)
assert out.asnumpy().tolist() == [5 * store.num_workers] * 3
