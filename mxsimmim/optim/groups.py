"""Which parameters decay, and the learning rate of each relative to the schedule's."""
from typing import Dict, Mapping, Tuple

from mxnet.gluon import Parameter

from ..models import Network, named_parameters

# Parameters, besides vectors and biases, that a recipe does not decay. The reference decays ViT's mask token and every
# relative position table in pre-training, and what SwinV2 has instead, because its name test misses the `encoder.`
# prefix.
NO_DECAY = {
    ('reference', 'vit'): ('pos_embed', 'cls_token'),
    ('reference', 'swin'): ('absolute_pos_embed', 'mask_token'),
    ('reference', 'swinv2'): ('absolute_pos_embed', 'mask_token'),
    ('fixed', 'vit'): ('pos_embed', 'cls_token', 'mask_token', 'relative_position_bias_table'),
    ('fixed', 'swin'): ('absolute_pos_embed', 'mask_token', 'relative_position_bias_table'),
    ('fixed', 'swinv2'): ('absolute_pos_embed', 'mask_token', 'logit_scale', 'cpb_mlp.0.weight', 'cpb_mlp.2.weight'),
}


def weight_decays(parameters: Mapping[str, Parameter], recipe: str, kind: str, decay: float) -> Dict[str, float]:
    """Weight decay of each parameter by name; `kind` is the model's type."""
    exempt = NO_DECAY[recipe, kind]
    return {name: 0.0 if len(p.shape) == 1 or name.endswith(('.bias',) + exempt) else decay
            for name, p in parameters.items()}


def parameter_groups(net: Network, layer_decay: float, weight_decay: float,
                     recipe: str = 'reference') -> Dict[str, Tuple[float, float]]:
    """(lr_scale, weight_decay) of each of a classifier's parameters, by official name.

    A block's rate is layer_decay times that of the block after it (Clark et al. 2020, arXiv:2003.10555; Bao et al.
    2022, arXiv:2106.08254): embeddings come first, what follows the last block has the full rate. In fine-tuning the
    reference recognises Swin's position tables, and what SwinV2 has instead, and does not decay them; ViT's it still
    does.
    """
    config = net.config
    last = config.blocks + 1
    fixed = recipe if config.type == 'vit' else 'fixed'
    decays = weight_decays(named_parameters(net), fixed, config.type, weight_decay)
    return {name: (layer_decay ** (last - _layer(name, config.depths, last)), decay) for name, decay in decays.items()}


def _layer(name: str, depths: Tuple[int, ...], last: int) -> int:
    """0 for embeddings, 1 to the number of blocks for these, `last` for the rest."""
    parts = name.split('.')
    if parts[0] in ('cls_token', 'pos_embed', 'absolute_pos_embed', 'patch_embed'):
        return 0
    if parts[0] == 'blocks':
        return 1 + int(parts[1])
    if parts[0] == 'layers':  # merging belongs to the last block of its stage
        before, stage = sum(depths[:int(parts[1])]), depths[int(parts[1])]
        return before + (1 + int(parts[3]) if parts[2] == 'blocks' else stage)
    return last
