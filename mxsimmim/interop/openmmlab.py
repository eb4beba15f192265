"""mmdetection's and mmsegmentation's names of the weights of Swin, ViT and BEiT, to the reference's names.

Only patch merging is laid out in another way: its four neighbours are interleaved channel by channel there, and come in
another order.
"""
import re
from typing import Callable, Dict, Mapping

import numpy as np

HEADS = re.compile(r'(neck|rpn_head|roi_head|bbox_head|mask_head|decode_head|auxiliary_head)\.')
NAMES = (  # of a part of a name, and what it is here
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^stages\.', 'layers.'),
    (r'^layers\.(\d+)\.(?!blocks\.|downsample\.)', r'blocks.\1.'),  # of ViT and BEiT
    (r'^ln1\.', 'norm.'),
    (r'\.ln([12])\.', r'.norm\1.'),
    (r'\.attn\.w_msa\.', '.attn.'),
    (r'\.attn\.attn\.in_proj_', '.attn.qkv.'),
    (r'\.attn\.attn\.out_proj\.', '.attn.proj.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
)


def is_openmmlab(arrays: Mapping[str, np.ndarray]) -> bool:
    """Tell whether these names are of a backbone there, or of a detector or segmenter with one."""
    return any(re.fullmatch(r'(backbone\.)?patch_embed\.projection\.weight', name) for name in arrays)


def from_openmmlab(arrays: Mapping[str, np.ndarray], log: Callable[[str], None]) -> Dict[str, np.ndarray]:
    """Rename a backbone's weights, its norms norm0 to norm3 with it. `log` is told what is left out: heads."""
    whole = any(name.startswith('backbone.') for name in arrays)
    heads = [name for name in arrays if HEADS.match(name)]
    if heads:
        log(f'left out: {len(heads)} tensors of heads ({heads[0]}, …)')
    found = {}
    for name, value in arrays.items():
        if HEADS.match(name):
            continue
        name = name[len('backbone.'):] if whole and name.startswith('backbone.') else name
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        found[name] = merged(value) if re.search(r'\.downsample\.(reduction|norm)\.', name) else value
    return found


def merged(value: np.ndarray) -> np.ndarray:
    """A merging's values (…, 4C), ordered (channel, y, x) as `unfold` does, in the order (x, y, channel)."""
    parts = value.reshape(*value.shape[:-1], -1, 2, 2)
    return np.ascontiguousarray(np.moveaxis(parts.swapaxes(-1, -2), -3, -1)).reshape(value.shape)
