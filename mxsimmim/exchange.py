"""Other programs' weights as a run, and a run's weights for other programs."""
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np
from mxnet.gluon import HybridBlock

from . import checkpoint, configfile
from .config import Config, MaskConfig
from .data.labels import read_classes
from .interop import names, official, pth
from .models import build_classifier, build_simmim
from .run import versions
from .trained import load_run

ASSUMED_SIDE = 224  # of the images of a ViT whose weights do not tell


def import_weights(file: Path, run: Path, config: str = '', overrides: Sequence[str] = (), classes: str = '') -> str:
    """Makes a run of a file's weights, as if it had been trained here for 0 steps, and says what was made.

    Args:
        file: of the reference, timm or Hugging Face: .pth, .pt, .bin or .safetensors.
        run: folder to make.
        config: YAML file for the keys that the weights do not tell; '': the most usual values, which are reported.
        overrides: ``key=value`` over all of that.
        classes: of a classifier, a file of class names, one a line; '': numbers.

    Raises:
        ValueError: a file that cannot be read or has no place here, a run that exists, names that do not match.
        ConfigError: a configuration that cannot be.
    """
    file, run = Path(file), Path(run)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f'{run} exists already: give a new folder')
    raw = pth.read_weights(file)
    try:
        arrays, kind = names.to_official(raw)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f'{file}: {error}') from None
    if kind == 'encoder':
        raise ValueError(f'{file} is an encoder without SimMIM decoder or classification head, so it is no run yet: '
                         f'fine-tune from it with mxsimmim finetune CONFIG model.pretrained={file}')
    try:
        told, assumed = model_keys(raw, arrays)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f'{file}: its weights are not those of a whole ViT or Swin: {error!r}') from None
    keys = {**told, 'task': kind, 'name': run.name, 'output': str(run.parent)}
    if not config:
        keys = {**assumed, **keys}
    resolved = configfile.load(config or os.devnull, [f'{key}={_yaml(value)}' for key, value in keys.items()]
                               + list(overrides))
    labels = _labels(file, arrays, classes) if kind == 'classify' else []
    _save(file, run, resolved, arrays, labels)
    lines = [f'{run}: {resolved.model.type}, ' + (f'{len(labels)} classes' if labels else 'pre-trained')
             + f', {sum(array.size for array in arrays.values()):,} weights']
    given = {text.partition('=')[0] for text in overrides}
    lines += [f'assumed {key}={_yaml(value)}, which the weights do not tell: where it is wrong, import again with '
              f'{key}=…' for key, value in ({} if config else assumed).items() if key not in given]
    return '\n'.join(lines)


def export_weights(run: Path, file: Path, style: str) -> str:
    """Writes a run's weights under the names of 'official', 'timm' or 'hf', and says what was written.

    Raises:
        ValueError: no such run, an ending that is none of .pth, .pt, .bin and .safetensors, a weight that has no
            counterpart there, a file that cannot be written.
    """
    file = Path(file)
    if file.suffix not in ('.pth', '.pt', '.bin', '.safetensors'):
        raise ValueError(f'{file}: its ending names no format of weights: use .pth or .safetensors, or give --format')
    trained = load_run(Path(run))
    arrays, left_out = names.from_official(official.extract(trained.net), style, trained.config.model)
    if style == 'official':
        arrays.update(_buffers(trained.net))
    (_write_safetensors if file.suffix == '.safetensors' else pth.write_pth)(file, arrays)
    return '\n'.join([f'{file}: {len(arrays)} arrays under the names of {style}']
                     + [f'left out, since {style} has no counterpart: {name}' for name in left_out])


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
    tables: List[List[np.ndarray]] = []  # of each stage, one a block
    for stage in range(len({name.split('.')[1] for name in bare if name.startswith('layers.')})):
        tables.append([value for name, value in bare.items()
                       if re.fullmatch(rf'layers\.{stage}\.blocks\.\d+\.attn\.relative_position_bias_table', name)])
    windows = [(math.isqrt(table[0].shape[0]) + 1) // 2 for table in tables]
    window, patch = max(windows), told['patch_size']
    told.update(type='swin', depths=[len(table) for table in tables], window_size=window,
                num_heads=[table[0].shape[1] for table in tables],
                mlp_ratio=_ratio(bare['layers.0.blocks.0.mlp.fc1.weight']),
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


def _vit_keys(raw: Mapping[str, np.ndarray], bare: Mapping[str, np.ndarray], told: Dict[str, Any],
              assumed: Dict[str, Any]) -> None:
    table = 'blocks.0.attn.relative_position_bias_table'
    shared = 'rel_pos_bias.relative_position_bias_table'
    told.update(type='vit', depth=len({name.split('.')[1] for name in bare if name.startswith('blocks.')}),
                mlp_ratio=_ratio(bare['blocks.0.mlp.fc1.weight']),
                init_values=0.1 if 'blocks.0.gamma_1' in bare else None, use_ape='pos_embed' in bare,
                use_rpb=table in bare, use_shared_rpb=shared in bare, use_mean_pooling='norm.weight' not in bare)
    if table in bare or shared in bare:
        rows, told['num_heads'] = bare.get(table, bare.get(shared)).shape
        told['img_size'] = (math.isqrt(rows - 3) + 1) // 2 * told['patch_size']
    else:
        assumed['num_heads'] = max(1, told['embed_dim'] // 64)
    if 'pos_embed' in bare:
        told['img_size'] = math.isqrt(bare['pos_embed'].shape[1] - 1) * told['patch_size']
    elif 'img_size' not in told:
        assumed['img_size'] = ASSUMED_SIDE // told['patch_size'] * told['patch_size']


def _ratio(weight: np.ndarray) -> float:
    """A ratio of hidden width to width that, times the width, does not round to below the hidden width."""
    hidden, width = weight.shape
    return hidden / width if int(hidden / width * width) == hidden else float(np.nextafter(hidden / width, math.inf))


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _labels(file: Path, arrays: Mapping[str, np.ndarray], classes: str) -> List[str]:
    count = len(arrays['head.weight'])
    if not classes:
        return [str(number) for number in range(count)]
    labels = list(read_classes(classes))
    if len(labels) != count:
        raise ValueError(f'{classes} names {len(labels)} classes, and {file} has {count}: name each, one a line, in '
                         'the order of its outputs')
    return labels


def _save(file: Path, run: Path, config: Config, arrays: Mapping[str, np.ndarray], labels: List[str]) -> None:
    net = build_classifier(config.model, len(labels), None) if labels else build_simmim(config.model, None)
    try:
        official.assign(net, {name: np.asarray(value, 'float32') for name, value in arrays.items()})
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None
    state = {'config': configfile.to_dict(config), 'samples': 0, 'versions': versions(), 'classes': labels}
    checkpoint.save(run / 'checkpoints', 0, {'weights': official.extract(net)}, state, keep=1)
    (run / 'config.yaml').write_text(configfile.to_yaml(config), encoding='utf-8')


def _buffers(net: HybridBlock) -> Dict[str, np.ndarray]:
    """What the reference's networks hold beside parameters, and miss when they load strictly."""
    found = {}
    for name, parameter in net._collect_params_with_prefix().items():
        if name.endswith('relative_position_index'):
            index = parameter.data().asnumpy().astype('int64')
            found[name] = index.reshape((math.isqrt(index.size),) * 2)
        elif name.endswith('attn_mask'):
            found[name] = parameter.data().asnumpy()[:, 0]  # (windows, N, N)
    return found


def _write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file
    staged = path.with_name(f'.{path.name}.tmp-{os.getpid()}')
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, staged, {'format': 'pt'})
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f'{path}: cannot be written: {getattr(error, "strerror", None) or error}') from None
    finally:
        staged.unlink(missing_ok=True)
