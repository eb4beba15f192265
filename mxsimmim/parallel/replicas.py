"""Whether all replicas of a model, over devices and workers, are still the same, bit by bit, and which is not."""
import hashlib
import platform
from collections import Counter
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..models import ParameterSpec
from ..models.shards import is_copied
from .control import ControlPlane

Digests = Dict[str, List[str]]  # by the key of a parameter, one of each of its copies in this process
SHOWN = 2  # parameters that an error names


class ReplicasDiffer(ValueError):
    """Weights that should be equal are not."""


class Copy(NamedTuple):
    """Where a copy of a parameter is."""
    rank: int
    host: str
    device: str

    def __str__(self) -> str:
        return f'rank {self.rank} on {self.host}, {self.device}'


def digests(specs: Sequence[ParameterSpec]) -> Digests:
    """Return hashes of the weights that this process has."""
    return {spec.key: [hashlib.blake2b(copy.asnumpy().data, digest_size=16).hexdigest()
                       for copy in spec.parameter.list_data()] for spec in specs if spec.trainable}


def alone(values: Sequence[str]) -> Optional[List[int]]:
    """Return which of some values are not the one that more than half of them have; None if there is no such one."""
    value, count = Counter(values).most_common(1)[0]
    return [number for number, other in enumerate(values) if other != value] if 2 * count > len(values) else None


def compare(specs: Sequence[ParameterSpec], control: ControlPlane, step: int) -> None:
    """Compare the weights of all replicas, in all workers at once.

    Raises:
        ReplicasDiffer: in every worker, naming rank, host and device of the copies that are not as most are, and the
            parameters; without a majority, as of two, the copies that differ.
    """
    held: Dict[str, Digests] = {'data': {}, 'data tensor': {}}  # by the axes along which all workers hold the same
    for spec in specs:
        held['data tensor' if is_copied(spec.name) else 'data'].update(digests([spec]))
    everybody = control.all_gather('comparison of replicas', {axes: summary(found) for axes, found in held.items()})
    summaries = [{everybody[rank][axes] for rank in group} for axes in held
                 for group in control.mesh.groups(*axes.split())]
    if any(len(found) > 1 or '' in found for found in summaries):  # of each parameter only now
        raise ReplicasDiffer(f'after step {step} {_difference(specs, held, control)}: a faulty memory or device, a '
                             'weight changed outside of the optimiser, or different libraries on these machines. '
                             'Checkpoints since the last comparison (train.check_replicas) may be wrong: go on from an '
                             'older one, without such a machine')


def summary(found: Digests) -> str:
    """Return one hash of all parameters; an empty one, which equals none, where copies within this process differ."""
    if any(len(set(values)) > 1 for values in found.values()):
        return ''
    return hashlib.blake2b(' '.join(first for first, *_ in found.values()).encode(), digest_size=16).hexdigest()


def _difference(specs: Sequence[ParameterSpec], held: Mapping[str, Digests], control: ControlPlane) -> str:
    """Say which copies differ; all workers call this."""
    devices = {spec.key: [str(ctx) for ctx in spec.parameter.list_ctx()] for spec in specs}
    everybody = control.all_gather('what differs', [platform.node(), {
        axes: {key: list(zip(devices[key], values)) for key, values in found.items()} for axes, found in held.items()}])
    wrong: Dict[Tuple[Copy, int], List[str]] = {}  # parameters, by a copy that is alone and how many agree against it
    unknown: Dict[Tuple[Copy, ...], List[str]] = {}  # parameters, by the copies of which nobody knows
    for axes in held:
        for group in control.mesh.groups(*axes.split()):
            for key in everybody[group[0]][1][axes]:
                copies, values = zip(*((Copy(rank, everybody[rank][0], device), value) for rank in group
                                       for device, value in everybody[rank][1][axes][key]))
                others = alone(values)
                if others is None:
                    unknown.setdefault(copies, []).append(key)
                for other in others or ():
                    wrong.setdefault((copies[other], len(values) - len(others or ())), []).append(key)
    told = [f'{copy} has other weights than the {most} copies that agree ({_names(keys)})'
            for (copy, most), keys in wrong.items()]
    told += [f'the weights of {" and of ".join(map(str, copies))} differ ({_names(keys)}), and '
             f'{"of two " * (len(copies) == 2)}nobody can tell which are wrong' for copies, keys in unknown.items()]
    return '; '.join(told)


def _names(keys: Sequence[str]) -> str:
    more = f' and {len(keys) - SHOWN} more' if len(keys) > SHOWN else ''
    return ', '.join(keys[:SHOWN]) + more
