"""timm's and Hugging Face's names of the weights of ViT, BEiT and Swin, to the reference's names and back.

What another library cannot express is folded in exactly, or refused by name. Every layout is the reference's own: only
names differ, and how queries, keys and values are put together.
"""
import logging
import math
import re
from typing import Callable, Dict, List, Mapping, Tuple

import numpy as np

from ..config import ModelConfig
from .openmmlab import from_openmmlab, is_openmmlab

STYLES = ('official', 'timm', 'hf')
BUFFERS = ('relative_position_index', 'attn_mask', 'relative_coords_table')  # in checkpoints, but computed anew
# Hugging Face's names as its files have them; the classes of its version 5 rename them on loading and on saving.
HF_TOP = {
    'patch_embed.proj': 'embeddings.patch_embeddings.projection', 'patch_embed.norm': 'embeddings.norm',
    'pos_embed': 'embeddings.position_embeddings', 'cls_token': 'embeddings.cls_token',
    'mask_token': 'embeddings.mask_token', 'norm': 'layernorm', 'fc_norm': 'pooler.layernorm', 'head': 'classifier',
    'rel_pos_bias': 'encoder.relative_position_bias'}
HF_BLOCK = {
    'norm1': 'layernorm_before', 'norm2': 'layernorm_after', 'mlp.fc1': 'intermediate.dense',
    'mlp.fc2': 'output.dense', 'attn.proj': 'attention.output.dense', 'gamma_1': 'lambda_1', 'gamma_2': 'lambda_2',
    'attn.logit_scale': 'attention.self.logit_scale', 'attn.cpb_mlp': 'attention.self.continuous_position_bias_mlp'}
HF_TABLE = {'swin': 'attention.self.relative_position_bias_table',
            'beit': 'attention.attention.relative_position_bias.relative_position_bias_table'}
HF_5_TOP = {'shared_position_bias': 'rel_pos_bias'}
HF_5_BLOCK = {'attention.o_proj': 'attn.proj', 'relative_position_bias': 'attn',
              'attention.relative_position_bias': 'attn'}
# What other methods pre-train beside the encoder: He et al. 2022 (arXiv:2111.06377), in its own names and Hugging
# Face's; the projections of contrastive and self-distilling methods.
FOREIGN = {"MAE's decoder": re.compile(r'decoder_(embed|pos_embed|blocks|norm|pred)\b|decoder\.(decoder_|mask_token)'),
           'a projection head': re.compile(r'head\.(\d+|mlp|layers|last_layer|projector)\.')}
SPECIAL = re.compile(r'.*(dist|distillation|reg|register)_tokens?')  # tokens that no network here has
# What a network of ours, or of the reference, can hold.
QKV = r'((?:layers\.\d+\.)?blocks\.\d+\.attn\.)qkv\.'
AFFINE = r'\.(weight|bias)'
KNOWN = re.compile(
    r'(encoder\.)?(cls_token|mask_token|pos_embed|absolute_pos_embed|rel_pos_bias\.relative_position_bias_table'
    r'|patch_embed\.(proj|norm)' + AFFINE + r'|(fc_)?norm\d*' + AFFINE +
    r'|(layers\.\d+\.)?blocks\.\d+\.(gamma_[12]|attn\.(q_bias|v_bias|relative_position_bias_table|logit_scale)'
    r'|(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12]|attn\.cpb_mlp\.0)' + AFFINE + r'|attn\.cpb_mlp\.2\.weight)'
    r'|layers\.\d+\.downsample\.(norm' + AFFINE + r'|reduction\.weight))|(head|decoder\.0)' + AFFINE)


def to_official(arrays: Mapping[str, np.ndarray], log: Callable[[str], None] = logging.getLogger(__name__).warning
                ) -> Tuple[Dict[str, np.ndarray], str]:
    """Weights of the reference, timm, Hugging Face or OpenMMLab under the reference's names, and what they are.

    `log` is told of decoders and heads of other methods of pre-training, which are left out.

    Returns:
        The arrays without buffers, and 'pretrain' (names begin with ``encoder.`` and ``decoder.0.``), 'classify' (it
        has ``head.``) or 'encoder' (neither).

    Raises:
        ValueError: weights that ViT or Swin of this program has no place for, the first of them named.
    """
    given = {name.replace('.attn.rpe_mlp.', '.attn.cpb_mlp.'): value  # as the first published SwinV2 had it
             for name, value in arrays.items() if not name.endswith(BUFFERS)}
    for what, pattern in FOREIGN.items():
        foreign = [name for name in given if pattern.match(name)]
        given = {name: value for name, value in given.items() if not pattern.match(name)}
        if foreign:
            log(f'left out: {len(foreign)} tensors of {what} ({foreign[0]}, …)')
    if is_openmmlab(given):
        found = from_openmmlab(given, log)
    elif any(name.endswith('embeddings.patch_embeddings.projection.weight') for name in given):
        found = _from_hf(given)
    elif 'encoder.patch_embed.proj.weight' in given:
        found = {name[8:] if name.startswith('encoder.') else name: value for name, value in given.items()}
    else:
        found = _from_timm(given)
    found = _split_bias(found)
    unknown = [name for name in found if not KNOWN.fullmatch(name)]
    if unknown or 'patch_embed.proj.weight' not in found:
        unknown.sort(key=lambda name: SPECIAL.fullmatch(name) is None)
        named = f'there is no place for {unknown[0]!r}' if unknown else "'patch_embed.proj.weight' is missing"
        raise ValueError(f'these are not weights of a ViT, BEiT or Swin as SimMIM, timm or Hugging Face name them: '
                         f'{named} ({len(unknown)} of {len(found)} names are unknown)')
    if 'decoder.0.weight' in found:
        return {name if name.startswith('decoder.') else f'encoder.{name}': v for name, v in found.items()}, 'pretrain'
    if 'head.weight' in found:
        found.pop('mask_token', None)  # nothing is masked in classification
        return found, 'classify'
    return found, 'encoder'


def from_official(arrays: Mapping[str, np.ndarray], style: str,
                  config: ModelConfig) -> Tuple[Dict[str, np.ndarray], List[str]]:
    """The reference's weights under the names of 'official', 'timm' or 'hf', and which of them are left out.

    ViT goes to timm's VisionTransformer, and to Hugging Face's ViT, where they can express it; with relative position
    tables, without absolute positions, and for 'hf' with layer scale or mean pooling, to BEiT, which has all of these.
    Left out is what only pre-training uses: timm has no mask token, and neither it nor BEiT has SimMIM's decoder.
    Hugging Face's ViT and BEiT compute the same with ``layer_norm_eps=1e-6`` in their configuration.

    Raises:
        ValueError: a weight without counterpart there, named.
    """
    if style == 'official':
        return dict(arrays), []
    bare = {name[8:] if name.startswith('encoder.') else name: value for name, value in arrays.items()}
    if 'absolute_pos_embed' in bare:
        raise ValueError(f"'absolute_pos_embed' has no counterpart in the Swin of {style}: use the official names")
    table = any(name.endswith('relative_position_bias_table') for name in bare)
    plain = config.type == 'vit' and 'pos_embed' in bare and not table
    if style == 'timm':
        kept = {name: value for name, value in bare.items() if not name.startswith(('decoder.', 'mask_token'))}
        return _to_timm(kept, config.type, plain), sorted(bare.keys() - kept.keys())
    plain = plain and config.init_values is None and not config.use_mean_pooling
    family = config.type if config.type != 'vit' else 'vit' if plain else 'beit'
    kept = {name: value for name, value in bare.items() if family != 'beit' or not name.startswith('decoder.')}
    return _to_hf(kept, family), sorted(bare.keys() - kept.keys())


def _rename(name: str, table: Mapping[str, str]) -> str:
    """Replaces the name, or its beginning up to a dot, by what the table has for it."""
    for old, new in table.items():
        if name == old or name.startswith(old + '.'):
            return new + name[len(old):]
    return name


def _split_bias(arrays: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """The attention bias of a ViT or SwinV2 as the reference holds it: q_bias and v_bias.

    A bias b of the keys adds q.b to all scores of a row of the softmax, which does not change by that, so it is dropped
    exactly (Bao et al. 2022, arXiv:2106.08254, have none therefore). A network without any has zeros. SwinV2's keys
    have none anywhere; Swin's have one that stays.
    """
    found = dict(arrays)
    for name, weight in arrays.items():
        match = re.fullmatch(QKV + 'weight', name)
        split = match and (not name.startswith('layers.') or match[1] + 'logit_scale' in arrays)
        if match and split and match[1] + 'q_bias' not in arrays:
            bias = found.pop(match[1] + 'qkv.bias', np.zeros(len(weight), weight.dtype))
            found[match[1] + 'q_bias'], _, found[match[1] + 'v_bias'] = np.split(bias, 3)
    return found


def _whole_bias(arrays: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """The inverse of `_split_bias`: zeros for the keys."""
    found = {}
    for name, value in arrays.items():
        if name.endswith('attn.q_bias'):
            values = arrays[name.replace('q_bias', 'v_bias')]
            found[name.replace('q_bias', 'qkv.bias')] = np.concatenate([value, np.zeros_like(value), values])
        elif not name.endswith('attn.v_bias'):
            found[name] = value
    return found


def _shift_merging(name: str, by: int) -> str:
    """timm counts a stage's patch merging to the stage after it (before its version 0.8, like the reference)."""
    return re.sub(r'^layers\.(\d+)\.downsample', lambda match: f'layers.{int(match[1]) + by}.downsample', name)


def _from_timm(arrays: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """timm's BEiT has the reference's names already; so has what the reference fine-tuned."""
    by = -1 if 'layers.1.downsample.norm.weight' in arrays and 'layers.0.downsample.norm.weight' not in arrays else 0
    found = {}
    for name, value in arrays.items():
        name = re.sub(r'\.ls([12])\.gamma$', r'.gamma_\1', _rename(_shift_merging(name, by), {'head.fc': 'head'}))
        if name == 'pos_embed' and math.isqrt(value.shape[1]) ** 2 == value.shape[1]:  # timm's no_embed_class
            value = np.concatenate([np.zeros_like(value[:, :1]), value], axis=1)
        found[name] = value
    return found


def _to_timm(arrays: Mapping[str, np.ndarray], kind: str, plain: bool) -> Dict[str, np.ndarray]:
    if kind != 'vit':
        return {_shift_merging(_rename(name, {'head': 'head.fc'}), 1): value for name, value in arrays.items()}
    if not plain:
        return dict(arrays)
    return {re.sub(r'\.gamma_([12])$', r'.ls\1.gamma', name): v for name, v in _whole_bias(arrays).items()}


def _from_hf(arrays: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """Of a bare model (its names begin with embeddings., …) or one with a head (vit.embeddings., …)."""
    top = {**HF_5_TOP, **{new: old for old, new in HF_TOP.items()}}
    block = {**HF_5_BLOCK, **{new: old for old, new in HF_BLOCK.items()},
             **{name: 'attn.relative_position_bias_table' for name in HF_TABLE.values()}}
    found: Dict[str, np.ndarray] = {}
    parts: Dict[str, Dict[str, np.ndarray]] = {}  # of a projection: query, key, value
    for name, value in arrays.items():
        name = re.sub(r'^(vit|beit|swin|swinv2)\.', '', name)
        match = re.fullmatch(r'(?:encoder\.)?(layers\.\d+\.blocks|layers?)\.(\d+)\.(?!downsample)(.*)', name)
        prefix = f"{match[1] if 'blocks' in match[1] else 'blocks'}.{match[2]}." if match else ''
        part = match and re.fullmatch(r'attention\.(?:attention\.|self\.)?([qkv])(?:uery|ey|alue|_proj)\.(weight|bias)',
                                      match[3])
        if part:
            parts.setdefault(f'{prefix}attn.qkv.{part[2]}', {})[part[1]] = value
        elif match:
            found[prefix + _rename(match[3], block)] = value
        elif not name.startswith('pooler.dense.'):  # of the tanh pooler, which the tokens do not depend on
            found[re.sub(r'^encoder\.(?=layers\.)', '', _rename(name, top))] = value
    for name, whole in parts.items():
        if not {'q', 'v'} <= whole.keys():
            raise ValueError(f'of the queries, keys and values of {name}, some are missing')
        found[name] = np.concatenate([whole['q'], whole.get('k', np.zeros_like(whole['q'])), whole['v']])  # BEiT: no k
    return found


def _to_hf(arrays: Mapping[str, np.ndarray], family: str) -> Dict[str, np.ndarray]:
    """The prefix is that of the class with the head that the arrays have; BEiT without head is a bare BeitModel."""
    block = {**HF_BLOCK, 'attn.relative_position_bias_table': HF_TABLE.get(family, '')}
    headed = 'head.weight' in arrays or 'decoder.0.weight' in arrays
    projection = 'attention.self' if family.startswith('swin') else 'attention.attention'
    found: Dict[str, np.ndarray] = {}
    for name, value in _whole_bias(arrays).items():
        match = re.fullmatch(r'(layers\.\d+\.)?blocks\.(\d+)\.(.*)', name)
        prefix = f'{family}.' if headed and not name.startswith(('head.', 'decoder.')) else ''
        if match is None:
            found[prefix + ('encoder.' if name.startswith('layers.') else '') + _rename(name, HF_TOP)] = value
            continue
        prefix += f'encoder.{match[1]}blocks.{match[2]}.' if match[1] else f'encoder.layer.{match[2]}.'
        if match[3].startswith('attn.qkv.'):
            for part, rows in zip(('query', 'key', 'value'), np.split(value, 3)):
                if (part, match[3]) != ('key', 'attn.qkv.bias') or family not in ('beit', 'swinv2'):  # without that
                    found[f'{prefix}{projection}.{part}.{match[3][9:]}'] = rows
        else:
            found[prefix + _rename(match[3], block)] = value
    return found
