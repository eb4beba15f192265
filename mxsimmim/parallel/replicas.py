"""Whether all replicas of a model, over devices and workers, are still the same, bit by bit."""
import hashlib
from typing import Mapping

import numpy as np
from mxnet.gluon import Parameter

from .stores import Store


class ReplicasDiffer(ValueError):
    """Weights that should be equal are not."""


def fingerprints(parameters: Mapping[str, Parameter]) -> np.ndarray:
    """48 bits of a hash of all parameters on each device: (devices,), float64, exactly."""
    hashes = [hashlib.blake2b(digest_size=6) for _ in next(iter(parameters.values())).list_ctx()]
    for parameter in parameters.values():
        for digest, copy in zip(hashes, parameter.list_data()):
            digest.update(copy.asnumpy())
    return np.array([int.from_bytes(digest.digest(), 'big') for digest in hashes], 'float64')


def compare(parameters: Mapping[str, Parameter], store: Store, step: int) -> None:
    """Compares all replicas with rank 0's first device, in all workers at once.

    Raises:
        ReplicasDiffer: in every worker, naming ranks and devices.
    """
    own = fingerprints(parameters)
    counts = store.gather([len(own)])[:, 0].astype(int)
    padded = np.full(counts.max(), own[0])
    padded[:len(own)] = own
    everybody = store.gather(padded)
    different = [f'rank {rank}' + (f' device {device}' if counts[rank] > 1 else '') for rank, row in
                 enumerate(everybody) for device in range(counts[rank]) if row[device] != everybody[0, 0]]
    if different:
        raise ReplicasDiffer(
            f'after step {step} the weights of {", ".join(different)} differ from those of rank 0 device 0: a faulty '
            'memory or device, a weight changed outside of the optimiser, or different libraries on these machines. '
            'Checkpoints since the last comparison (train.check_replicas) may be wrong: go on from an older one, '
            'without these machines')
