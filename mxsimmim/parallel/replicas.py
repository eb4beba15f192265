"""Whether all replicas of a model, over devices and workers, are still the same, bit by bit."""
import hashlib
from typing import Any, Dict, List, Sequence, Tuple

from ..models import ParameterSpec
from ..models.shards import is_copied
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
    mesh = control.mesh
    held: Dict[Tuple[str, ...], List[ParameterSpec]] = {}  # by the axes along which all workers hold the same
    for spec in specs:
        held.setdefault(('data', 'tensor') if mesh.tensor > 1 and is_copied(spec.name) else ('data',), []).append(spec)
    everybody = control.all_gather('comparison of replicas', {
        ' '.join(axes): fingerprints(same) for axes, same in held.items()})
    different: Dict[str, None] = {}
    for axes in held:
        first = {rank: group[0] for group in mesh.groups(*axes) for rank in group}
        rows = [found[' '.join(axes)] for found in everybody]
        different.update({f'rank {rank}' + (f' device {device}' if len(row) > 1 else ''): None
                          for rank, row in enumerate(rows) for device, own in enumerate(row)
                          if own != rows[first[rank]][0]})
    if different:
        origin = 'rank 0' if mesh.data == mesh.size else 'the first worker that has the same'
        raise ReplicasDiffer(
            f'after step {step} the weights of {", ".join(different)} differ from those of {origin} device 0: a '
            'faulty memory or device, a weight changed outside of the optimiser, or different libraries on these '
            'machines. Checkpoints since the last comparison (train.check_replicas) may be wrong: go on from an older '
            'one, without these machines')
