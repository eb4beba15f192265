"""Other programs' weights as a run, and a run's weights for other programs."""
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np
from mxnet.gluon import HybridBlock

from ..config import Config, configfile
from ..interop import files, names, official, pth
from ..interop.told import model_keys
from ..ops import REFERENCE
from ..runtime.mxnet_private import structural_parameters
from ..tasks.registry import TASKS
from ..tasks.task import Predictor
from ..training import checkpoint
from ..training.run_folder import versions, write_config
from .trained import load_run


def import_weights(file: Path, run: Path, config: str = '', overrides: Sequence[str] = (), classes: str = '') -> str:
    """Makes a run of a file's weights, as if it had been trained here for 0 steps, and says what was made.

    Args:
        file: of the reference, timm or Hugging Face: .pth, .pt, .bin or .safetensors; FILE:KEY for one of several
            networks in it.
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
    notes: List[str] = []
    raw = files.read_weights(file, notes.append)
    try:
        arrays, kind = names.to_official(raw, notes.append)
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f'{file}: {error}') from None
    if kind == 'encoder':
        raise ValueError(f'{file} is an encoder without SimMIM decoder or classification head, so it is no run yet: '
                         f'fine-tune from it with mxsimmim finetune CONFIG model.pretrained={file}')
    try:
        told, assumed = model_keys(raw, arrays)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f'{file}: its weights are not those of a whole ViT or Swin: {error!r}') from None
    keys = {**told, 'name': run.name, 'output': str(run.parent)}
    if not config:
        keys = {**assumed, **keys}
    resolved = configfile.load(config or os.devnull, [f'{key}={_yaml(value)}' for key, value in keys.items()]
                               + list(overrides) + [f'task={kind}'])
    predictor = _save(file, run, resolved, arrays, TASKS[kind].predictor.state_of_weights(arrays, file, classes))
    lines = [f'{run}: {resolved.model.type}, {predictor.summary}, '
             f'{sum(array.size for array in arrays.values()):,} weights'] + notes
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
    arrays, left_out = names.from_official(official.export_weights(trained.net), style, trained.config.model)
    if style == 'official':
        arrays.update(_buffers(trained.net))
    (_write_safetensors if file.suffix == '.safetensors' else pth.write_pth)(file, arrays)
    return '\n'.join([f'{file}: {len(arrays)} arrays under the names of {style}']
                     + [f'left out, since {style} has no counterpart: {name}' for name in left_out])


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _save(file: Path, run: Path, config: Config, arrays: Mapping[str, np.ndarray], own: Mapping[str, Any]
          ) -> Predictor:
    """Writes the run; `own` is what its task records."""
    kind = TASKS[config.task].predictor
    net = kind.build_network(config.model, own, REFERENCE, config.data)
    try:
        official.load_weights(net, {name: np.asarray(value, 'float32') for name, value in arrays.items()})
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None
    state = {'config': configfile.to_dict(config), 'samples': 0, 'versions': versions(), **own}
    try:
        checkpoint.save(run / 'checkpoints', 0, {'weights': official.export_weights(net)}, state, keep=1)
        write_config(run, config)
    except BaseException:  # what remained would be in the way of the same command, given again
        shutil.rmtree(run, ignore_errors=True)
        raise
    return kind(config, net, state)


def _buffers(net: HybridBlock) -> Dict[str, np.ndarray]:
    """What the reference's networks hold beside parameters, and miss when they load strictly."""
    found = {}
    for name, parameter in structural_parameters(net).items():
        if name.endswith('relative_position_index'):
            index = parameter.data().asnumpy().astype('int64')
            found[name] = index.reshape((math.isqrt(index.size),) * 2)
        elif name.endswith('relative_coords_table'):  # (1, 2 * window - 1, 2 * window - 1, 2)
            offsets = parameter.data().asnumpy()
            found[name] = offsets.reshape((1, *(math.isqrt(len(offsets)),) * 2, 2))
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
