"""How parameters are cut into shards for tensor parallelism, by their names. Pure functions of NumPy arrays.

Shoeybi et al. 2019 (arXiv:1909.08053): attention is cut by its heads, an MLP by its hidden channels. A shard has the
rows that compute these, and the columns of the projection that takes them; so a half block needs one sum, at its end.
Whatever CUTS does not name is not cut.
"""
from dataclasses import dataclass
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np


@dataclass(frozen=True)
class Shard:
    """One of `count` equal parts; the only one is the whole."""
    index: int = 0
    count: int = 1


WHOLE = Shard()


class Cut(NamedTuple):
    """Along which axis a parameter is cut; `runs` of equal length lie there one after another, and each is cut."""
    axis: int
    runs: int = 1


ROWS, COLUMNS, QKV = Cut(0), Cut(1), Cut(0, 3)
CUTS: Dict[str, Cut] = {  # by the end of the name
    'attn.qkv.weight': QKV, 'attn.qkv.bias': QKV, 'attn.q_bias': ROWS, 'attn.v_bias': ROWS, 'attn.proj.weight': COLUMNS,
    'attn.logit_scale': ROWS, 'attn.cpb_mlp.2.weight': ROWS, 'relative_position_bias_table': COLUMNS,
    'mlp.fc1.weight': ROWS, 'mlp.fc1.bias': ROWS, 'mlp.fc2.weight': COLUMNS,
}
# Of these each shard has a copy, whose gradient is a term of a sum: what it computes follows them.
NORMS = '.norm1.weight', '.norm1.bias', '.norm2.weight', '.norm2.bias'
SHARED = '.gamma_1', '.gamma_2', 'attn.cpb_mlp.0.weight', 'attn.cpb_mlp.0.bias'
FIRST = 'attn.proj.bias', 'mlp.fc2.bias'  # which the first shard has alone, as they are added to the sum


def gradient_axes(name: str, post_norm: bool = False) -> Tuple[str, ...]:
    """Return the axes of a mesh of workers over which this parameter's gradient is summed.

    That of a part is whole where the part is, and so is that of what every shard computes alike, among it the norms of
    blocks that normalise the sum (`post_norm`).
    """
    return ('data', 'tensor') if name.endswith(SHARED if post_norm else SHARED + NORMS) else ('data',)


def is_copied(name: str) -> bool:
    """Tell whether every shard has a copy of this parameter, and of its moments."""
    return cut_of(name) is None and not name.endswith(FIRST)


def cut_of(name: str) -> Optional[Cut]:
    """Return how the parameter of this name is cut; None if it is not."""
    return next((cut for end, cut in CUTS.items() if name.endswith(end)), None)


def part_of(name: str, whole: np.ndarray, shard: Shard) -> np.ndarray:
    """Return a shard's part of a parameter, or of another array of its shape, in C order."""
    cut = cut_of(name)
    if shard.count == 1 or cut is None:
        return whole
    runs = np.split(whole, cut.runs, cut.axis)
    return np.concatenate([np.split(run, shard.count, cut.axis)[shard.index] for run in runs], cut.axis)


def join(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the whole parameter, bit for bit, from the parts of all shards in their order."""
    cut = cut_of(name)
    if len(parts) == 1 or cut is None:
        return parts[0]
    runs = zip(*(np.split(part, cut.runs, cut.axis) for part in parts))
    return np.concatenate([part for run in runs for part in run], cut.axis)


def whole_shape(name: str, shape: Tuple[int, ...], shard: Shard) -> Tuple[int, ...]:
    """Return the shape of the whole parameter of which a shard's part has this shape."""
    cut = cut_of(name)
    return shape if cut is None else (*shape[:cut.axis], shape[cut.axis] * shard.count, *shape[cut.axis + 1:])
