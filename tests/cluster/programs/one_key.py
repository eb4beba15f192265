"""Sums several arrays under one key, one right after the other: one_key.py STORE."""
import os
import sys

import mxnet as mx

from mxsimmim.parallel.communicators import make_communicator
from mxsimmim.parallel.control import connect
from mxsimmim.runtime.process import process_info

process = process_info(os.environ)
control = connect(process, os.environ)
communicator = make_communicator(sys.argv[1], process, control)
sizes = (10, 300, 70_000, 1_500_000)  # the last is spread over servers
handle = communicator.register([[mx.nd.zeros((size,))] for size in sizes])
for _ in range(10):
    rounds = [[[mx.nd.full((size,), factor * (process.rank + 1))] for size in sizes] for factor in (1, 2, 3)]
    for arrays in rounds:
        communicator.all_reduce(handle.with_arrays(arrays))
    for factor, arrays in enumerate(rounds, 1):
        for array, in arrays:
            assert (array == 3 * factor).asnumpy().all(), (factor, array)
numbers = control.all_gather('numbers', [process.rank + 0.1, float('nan') if process.rank else 7])
assert [row[0] for row in numbers] == [0.1, 1.1] and numbers[0][1] == 7 and numbers[1][1] != numbers[1][1]
said = {'text': 'ä', 'numbers': [1, None]}
assert control.broadcast_object('text', lambda: said) == said
array = mx.nd.full((10,), process.rank + 5)
communicator.broadcast(handle.part(0, 1).with_arrays([[array]]))
assert (array == 5).asnumpy().all()
