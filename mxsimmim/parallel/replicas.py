"""Whether all replicas of a model, over devices and workers, are still the same, bit by bit."""
import hashlib
from typing import List, Mapping

from mxnet.gluon import Parameter

from .control import ControlPlane


class ReplicasDiffer(ValueError):
    """Weights that should be equal are not."""


def fingerprints(parameters: Mapping[str, Parameter]) -> List[str]:
    """Return a hash of all parameters on each device."""
    hashes = [hashlib.blake2b(digest_size=16) for _ in next(iter(parameters.values())).list_ctx()]
    for parameter in parameters.values():
        for digest, copy in zip(hashes, parameter.list_data()):
            digest.update(copy.asnumpy())
    return [digest.hexdigest() for digest in hashes]


def compare(parameters: Mapping[str, Parameter], control: ControlPlane, step: int) -> None:
    """Compare all replicas with rank 0's first device, in all workers at once.

    Raises:
        ReplicasDiffer: in every worker, naming ranks and devices.
    """
    everybody = control.all_gather('comparison of replicas', fingerprints(parameters))
    different = [f'rank {rank}' + (f' device {device}' if len(row) > 1 else '') for rank, row in
                 enumerate(everybody) for device, own in enumerate(row) if own != everybody[0][0]]
    if different:
        raise ReplicasDiffer(
            f'after step {step} the weights of {", ".join(different)} differ from those of rank 0 device 0: a faulty '
            'memory or device, a weight changed outside of the optimiser, or different libraries on these machines. '
            'Checkpoints since the last comparison (train.check_replicas) may be wrong: go on from an older one, '
            'without these machines')
