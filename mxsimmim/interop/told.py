"""What weights tell of the network that they belong to, as keys of the configuration."""
import json
import math
import re
from typing import Any, Dict, List, Mapping, Tuple

import numpy as np

from ..config import MaskConfig, ModelConfig

ASSUMED_SIDE = 224  # of the images of a ViT whose weights do not tell
ASSUMED_WINDOW = 8  # of a SwinV2 whose weights do not tell


def model_keys(raw: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> Tuple[Dict[str, Any],
                                                                                         Dict[str, Any]]:
    """Configuration keys, ``model.…`` and ``mask.patch_size``, of weights: those they tell, and those assumed.

    Args:
        raw: as in the file, with the buffers.
        arrays: under the reference's names, from `names.to_official`.
    """
    bare = {name[8:] if name.startswith('encoder.') else name: value for name, value in arrays.items()}
    width, _, patch, _ = bare['patch_embed.proj.weight'].shape
    told: Dict[str, Any] = {'patch_size': patch, 'embed_dim': width}
    assumed: Dict[str, Any] = {}
    swin = any(name.startswith('layers.') for name in bare)
    (_swin_keys if swin else _vit_keys)(raw, bare, told, assumed)
    keys = {**told, **assumed}
    default, side = MaskConfig().patch_size, keys['img_size']
    cells = default, patch * 2 ** (len(keys.get('depths', [1])) - 1), patch
    cell = next((cell for cell in cells if side % cell == 0 and cell % patch == 0 and side > cell), patch)
    if 'decoder.0.weight' in arrays and cell != default:
        assumed['mask.patch_size'] = cell
    return ({f'model.{key}': value for key, value in told.items()},
            {key if '.' in key else f'model.{key}': value for key, value in assumed.items()})


def _swin_keys(raw: Mapping[str, np.ndarray], bare: Mapping[str, np.ndarray], told: Dict[str, Any],
               assumed: Dict[str, Any]) -> None:
    stages = len({name.split('.')[1] for name in bare if name.startswith('layers.')})
    if 'layers.0.blocks.0.attn.logit_scale' in bare:
        scales = _of_stages(bare, stages, 'logit_scale')
        told.update(type='swinv2', depths=[len(scale) for scale in scales],
                    num_heads=[len(scale[0]) for scale in scales])
        windows = _windows_v2(raw, stages, told, assumed)
    else:
        tables = _of_stages(bare, stages, 'relative_position_bias_table')
        windows = [(math.isqrt(table[0].shape[0]) + 1) // 2 for table in tables]
        told.update(type='swin', depths=[len(table) for table in tables],
                    num_heads=[table[0].shape[1] for table in tables], window_size=max(windows))
    window, patch = max(windows), told['patch_size']
    told.update(mlp_ratio=ratio(bare['layers.0.blocks.0.mlp.fc1.weight']),
                use_ape='absolute_pos_embed' in bare)
    masks = [value for name, value in raw.items() if name.endswith('layers.0.blocks.1.attn_mask')]
    if 'absolute_pos_embed' in bare:
        told['img_size'] = math.isqrt(bare['absolute_pos_embed'].shape[1]) * patch
    elif masks:  # (windows, N, N)
        told['img_size'] = math.isqrt(len(masks[0])) * window * patch
    elif min(windows) < window:  # a stage smaller than a window is one window
        stage = next(stage for stage, side in enumerate(windows) if side < window)
        told['img_size'] = (windows[stage] << stage) * patch
    else:  # as published: the last stage is one window
        assumed['img_size'] = (window << len(windows) - 1) * patch


def _of_stages(arrays: Mapping[str, np.ndarray], stages: int, leaf: str) -> List[List[np.ndarray]]:
    """Of each stage, what its blocks' attention has under this name."""
    return [[value for name, value in arrays.items()
             if re.fullmatch(rf'(?:.*\.)?layers\.{stage}\.blocks\.\d+\.attn\.{leaf}', name)]
            for stage in range(stages)]


def _windows_v2(raw: Mapping[str, np.ndarray], stages: int, told: Dict[str, Any], assumed: Dict[str, Any]) -> List[int]:
    """The windows of a SwinV2's stages, which only the offsets among its buffers tell, as those in pre-training."""
    tables = _of_stages(raw, stages, 'relative_coords_table')  # (1, 2 * window - 1, 2 * window - 1, 2), log-spaced
    if not all(tables):
        assumed['window_size'] = ASSUMED_WINDOW
        return [ASSUMED_WINDOW] * stages
    windows = [(table[0].shape[1] + 1) // 2 for table in tables]
    # The last offset is log2(8 * (window - 1) / (reach - 1) + 1) / 3.
    reaches = [round(8 * (window - 1) / (2 ** (3 * float(table[0].max())) - 1)) + 1 if window > 1 else 0
               for window, table in zip(windows, tables)]
    told['window_size'] = max(windows)
    if reaches != windows:
        told['pretrained_window_sizes'] = reaches
    return windows


def _vit_keys(raw: Mapping[str, np.ndarray], bare: Mapping[str, np.ndarray], told: Dict[str, Any],
              assumed: Dict[str, Any]) -> None:
    table = 'blocks.0.attn.relative_position_bias_table'
    shared = 'rel_pos_bias.relative_position_bias_table'
    told.update(type='vit', depth=len({name.split('.')[1] for name in bare if name.startswith('blocks.')}),
                mlp_ratio=ratio(bare['blocks.0.mlp.fc1.weight']),
                init_values=0.1 if 'blocks.0.gamma_1' in bare else None, use_ape='pos_embed' in bare,
                use_rpb=table in bare, use_shared_rpb=shared in bare, use_mean_pooling='norm.weight' not in bare)
    if table in bare or shared in bare:
        rows, told['num_heads'] = bare[table if table in bare else shared].shape
        told['img_size'] = (math.isqrt(rows - 3) + 1) // 2 * told['patch_size']
    else:
        assumed['num_heads'] = max(1, told['embed_dim'] // 64)
    if 'pos_embed' in bare:
        told['img_size'] = math.isqrt(bare['pos_embed'].shape[1] - 1) * told['patch_size']
    elif 'img_size' not in told:
        assumed['img_size'] = ASSUMED_SIDE // told['patch_size'] * told['patch_size']


def ratio(weight: np.ndarray) -> float:
    """A ratio of hidden width to width that, times the width, does not round to below the hidden width."""
    hidden, width = weight.shape
    return hidden / width if int(hidden / width * width) == hidden else float(np.nextafter(hidden / width, math.inf))


def changes(model: ModelConfig, arrays: Mapping[str, np.ndarray]) -> List[str]:
    """The ``model.key=value`` that a classifier of `model` would need to take an encoder's weights.

    Position tables are resized and a table of all blocks is given to each, so these need no change. Nothing where the
    weights are not of a whole ViT or Swin.
    """
    try:
        told = {key[6:]: value for key, value in model_keys(arrays, arrays)[0].items()}
    except (KeyError, IndexError, ValueError, AttributeError):
        return []
    own = model.model_dump(mode='json')
    for key in ('img_size', 'window_size', 'pretrained_window_sizes'):
        told.pop(key, None)
    if told['type'] == model.type == 'vit':
        if (told['init_values'] is None) == (model.init_values is None):
            del told['init_values']
        told['use_mean_pooling'] = told['use_mean_pooling'] or model.use_mean_pooling
        in_blocks = told['use_shared_rpb'] and model.use_rpb or told['use_rpb']
        told['use_shared_rpb'] = told['use_shared_rpb'] and (model.use_shared_rpb or not in_blocks)
        told['use_rpb'] = in_blocks
        if told['embed_dim'] != model.embed_dim and told['embed_dim'] % 64 == 0:
            told.setdefault('num_heads', told['embed_dim'] // 64)  # of all published ones; plain weights do not tell
    if int(model.embed_dim * model.mlp_ratio) == int(model.embed_dim * told['mlp_ratio']):
        del told['mlp_ratio']
    return [f'model.{key}=' + (value if isinstance(value, str) else json.dumps(value, separators=(',', ':')))
            for key, value in told.items() if own[key] != value]
