"""Stores: what adds up arrays that lie on several devices, by MXNet's names."""
from typing import List, Sequence

import mxnet as mx

NAMES = ('local', 'device')


class Store:
    """Sums gradients over the devices of this process, in place, through an MXNet kvstore."""

    def __init__(self, name: str, arrays: Sequence[List[mx.nd.NDArray]]):
        self._store = mx.kv.create(name)
        for key, copies in enumerate(arrays):
            self._store.init(key, mx.nd.zeros_like(copies[0]))

    def sum(self, arrays: Sequence[List[mx.nd.NDArray]]) -> None:
        """Replaces each array's copies, one a device, by their sum; the first arrays have the highest priority."""
        for key, copies in enumerate(arrays):
            # A CPU push keeps the pushed array as its buffer and the pull writes into it: fine, since it is the output.
            self._store.pushpull(key, copies, out=copies, priority=-key)


def make_store(name: str, arrays: Sequence[List[mx.nd.NDArray]]) -> Store:
    """The store for these arrays, given with their copies on each device."""
    assert name in NAMES, name
    return Store(name, arrays)
