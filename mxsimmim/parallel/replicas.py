"""Whether all replicas of a model, over devices and workers, are still the same, bit by bit."""
import hashlib
from typing import Any, List, Sequence

from ..models import ParameterSpec
from .control import ControlPlane


class ReplicasDiffer(ValueError):
    """Weights that should be equal are not."""


def fingerprints(specs: Sequence[ParameterSpec]) -> List[str]:
    """Return a hash of the weights of each replica in this process: all first copies, all second ones and so on.

    A parameter of which there are fewer copies, as not all stages of a pipeline have it, counts with its first again.
    """
    weights = [spec.parameter.list_data() for spec in specs if spec.trainable]
    hashes: List[Any] = [hashlib.blake2b(digest_size=16) for _ in range(max(map(len, weights)))]
    for copies in weights:
        values = [copy.asnumpy().data for copy in copies]
        for replica, digest in enumerate(hashes):
            digest.update(values[replica if replica < len(values) else 0])
    return [digest.hexdigest() for digest in hashes]


def compare(specs: Sequence[ParameterSpec], control: ControlPlane, step: int) -> None:
    """Compare the weights of all replicas with those on the first one's first device, in all workers at once.

    Raises:
        ReplicasDiffer: in every worker, naming ranks and devices.
    """
    everybody = control.all_gather('comparison of replicas', fingerprints(specs))
    mesh = control.mesh
    first = {rank: group[0] for group in mesh.groups('data') for rank in group}
    origin = 'rank 0' if mesh.pipeline == 1 else 'the first worker of the same stage'
    different = [f'rank {rank}' + (f' device {device}' if len(row) > 1 else '') for rank, row in
                 enumerate(everybody) for device, own in enumerate(row) if own != everybody[first[rank]][0]]
    if different:
        raise ReplicasDiffer(
            f'after step {step} the weights of {", ".join(different)} differ from those of {origin} device 0: a '
            'faulty memory or device, a weight changed outside of the optimiser, or different libraries on these '
            'machines. Checkpoints since the last comparison (train.check_replicas) may be wrong: go on from an older '
            'one, without these machines')
