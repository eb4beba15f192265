"""What the machines of a job are, and sizes as users write them."""
import math
import re
from statistics import NormalDist
from typing import Dict, Mapping, NamedTuple, Tuple

from ..config import ConfigError

PREFIXES = {'': 1.0, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'G': 1e9, 'T': 1e12, 'P': 1e15}
BINARY = {'Ki': 2.0 ** 10, 'Mi': 2.0 ** 20, 'Gi': 2.0 ** 30, 'Ti': 2.0 ** 40}


def _with_prefixes(*units: str, scale: float = 1.0, prefixes: Mapping[str, float] = PREFIXES) -> Dict[str, float]:
    return {prefix + unit: scale * factor for prefix, factor in prefixes.items() for unit in units}


MEMORY = _with_prefixes('B', prefixes={**PREFIXES, **BINARY})
BANDWIDTH = {**_with_prefixes('b', 'b/s', 'bit/s', 'bps', scale=1 / 8), **_with_prefixes('B', 'B/s')}
TIME = {'s': 1.0, 'ms': 1e-3, 'us': 1e-6, 'µs': 1e-6, 'ns': 1e-9}
SPEED = _with_prefixes('FLOPs', 'FLOPS', 'FLOP/s')
# option -> its units, and an example of them
UNITS: Dict[str, Tuple[Mapping[str, float], str]] = {
    'memory': (MEMORY, '40GB'), 'bandwidth': (BANDWIDTH, '100Gb (bits a second) or 12GB (bytes)'),
    'local-bandwidth': (BANDWIDTH, '300GB (bytes a second) or 96Gb (bits)'), 'latency': (TIME, '20us'),
    'speed': (SPEED, '100TFLOPs')}


def quantity(option: str, text: str) -> float:
    """Read the value of an option of `UNITS`: in bytes, bytes a second, seconds or FLOP/s.

    Raises:
        ConfigError: no number, no unit or another's, or nothing that could be.
    """
    units, example = UNITS[option]
    match = re.fullmatch(r'\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*(\S*)\s*', text, re.ASCII)
    if not match:
        raise ConfigError(f"--{option} '{text}' is not a number with a unit: write for instance --{option} {example}")
    if match[2] not in units:
        what = f"'{match[2]}' is no unit of it" if match[2] else 'its unit is missing'
        raise ConfigError(f"--{option} '{text}': {what}: write for instance --{option} {example}")
    value = float(match[1]) * units[match[2]]
    if not 0 < value < math.inf:
        raise ConfigError(f"--{option} '{text}' must be more than nothing: write for instance --{option} {example}")
    return value


class Cluster(NamedTuple):
    """Describe hosts that are alike, joined by a network in which all can send at once.

    Rates are what programs reach, not what data sheets say. A device is a GPU or, of a CPU, the cores that one worker
    has. `rates` are measured ones, FLOP/s by (part, width, tensor), see `model.Part`; `speed` stands for the others.
    """
    hosts: int = 1
    devices: int = 1  # of a host
    memory: float = math.inf  # bytes of a device
    speed: float = 100e12  # FLOP/s of a transformer's blocks, what they compute between products included
    bandwidth: float = 1.25e9  # bytes/s that a host sends, and receives at the same time
    latency: float = 20e-6  # seconds of a message between hosts
    local_bandwidth: float = 12e9  # bytes/s from one device to another of its host, through TCP on CPUs
    local_latency: float = 5e-6
    stream: float = 1e12  # bytes/s that a device reads and writes of its memory
    call: float = 3e-6  # seconds of an operator that has nothing to compute
    images: float = math.inf  # a second that a host reads, decodes and crops
    kind: str = 'gpu'  # or 'cpu'
    resident: float = 1.0e9  # bytes of a device that program and libraries take
    share: float = 1.0  # of its cores' time that a device has when all compute: they may be more than the cores
    spread: float = 0.0  # standard deviation of a half block's seconds over their mean
    rates: Tuple[Tuple[Tuple[str, int, int], float], ...] = ()

    @property
    def size(self) -> int:
        """Devices of all hosts."""
        return self.hosts * self.devices

    def rate(self, part: str, width: int, tensor: int) -> float:
        """FLOP/s of a part of a block of this width, one of `tensor` that share it."""
        rates = dict(self.rates)
        return rates.get((part, width, tensor), rates.get((part, width, 1), self.speed))


def ring(size: float, members: int, bandwidth: float, latency: float) -> float:
    """Seconds in which `members` add up `size` bytes each around a ring: 2 (n - 1) messages of size / n.

    Each message takes latency + bytes / bandwidth (Hockney 1994). Patarasuk and Yuan 2009 show that no algorithm sends
    less: 2 (n - 1) / n of the bytes.
    """
    return 2 * (members - 1) * (latency + size / members / bandwidth)


def tree(size: float, members: int, bandwidth: float, latency: float) -> float:
    """Seconds of the same along two binary trees: 2 log2 n messages one after another, and all bytes up and down.

    Sanders, Speck and Traeff 2009; what NCCL takes for small sums among many (Jeaugey 2019).
    """
    return 2 * math.ceil(math.log2(members)) * latency + 2 * size / bandwidth if members > 1 else 0.0


def all_reduce(size: float, members: int, bandwidth: float, latency: float) -> float:
    """Seconds of the faster of `ring` and `tree`."""
    return min(ring(size, members, bandwidth, latency), tree(size, members, bandwidth, latency))


def slowest(members: int) -> float:
    """Return the mean of the largest of so many normal numbers, in standard deviations above theirs; 0 for one.

    As Blom 1958 ("Statistical Estimates and Transformed Beta-Variables") approximates it, to 5 %: 0.59 of two, 1.43 of
    eight.
    """
    return NormalDist().inv_cdf((members - 3 / 8) / (members + 1 / 4))


def server_bytes(size: float, workers: int, servers: int, hosts: int, workers_here: int) -> float:
    """Bytes that the busiest host sends (and receives) for one sum of `size` bytes over parameter servers.

    Each of its workers sends `size`; each of its servers, ceil(servers / hosts) of them, sends workers * size / servers
    back. What stays on the host does not travel: 1 / hosts of it (Li et al. 2014, "Scaling Distributed Machine Learning
    with the Parameter Server").
    """
    here = -(-servers // hosts)
    return (workers_here * size + here * workers * size / servers) * (hosts - 1) / hosts
