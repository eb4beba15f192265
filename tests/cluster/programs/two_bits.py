"""Compares what arrives with the residual arithmetic of all workers, computed here: two_bits.py STORE."""
import os
import sys

import mxnet as mx
import numpy as np

from mxsimmim.parallel.communicators import make_communicator
from mxsimmim.parallel.compression import TwoBit
from mxsimmim.parallel.control import connect
from mxsimmim.runtime.process import process_info

SEED, THRESHOLD, SHAPES = 11, np.float32(0.5), [(3, 5), (1,), (1000, 77)]
print('seed', SEED)
process = process_info(os.environ)
store = make_communicator(sys.argv[1], process, connect(process, os.environ))
arrays = [[mx.nd.zeros(shape, ctx=mx.cpu(i)) for i in range(2)] for shape in SHAPES]
transport = TwoBit(store, arrays, THRESHOLD)
residuals = [np.zeros((process.size,) + shape, 'float32') for shape in SHAPES]
rng = np.random.default_rng(SEED)
for _ in range(20):
    gradients = [rng.normal(0, 0.4, (process.size, 2) + shape).astype('float32') for shape in SHAPES]
    for copies, gradient in zip(arrays, gradients):
        for device, copy in enumerate(copies):
            copy[:] = gradient[process.rank, device]
    transport.all_reduce()
    for copies, gradient, residual in zip(arrays, gradients, residuals):
        residual += gradient[:, 0] + gradient[:, 1]
        sent = np.where(residual >= THRESHOLD, THRESHOLD, np.where(residual <= -THRESHOLD, -THRESHOLD, np.float32(0)))
        residual -= sent
        for copy in copies:
            np.testing.assert_array_equal(copy.asnumpy(), sent.sum(0))
arrays[0][0][:] = float('nan') if process.rank else 0  # one worker's is not finite: nobody's sum is
transport.all_reduce()
for copy in arrays[0]:
    assert np.isnan(copy.asnumpy()).sum() == 1 and np.isnan(copy.asnumpy()[0, 0])
for copy in arrays[0]:
    copy[:] = 0
transport.all_reduce()
assert np.isfinite(arrays[0][0].asnumpy()).all()
