"""`mxsimmim checkpoints` and `average`: what a run has kept, whether it is whole, and the mean of the last few."""
import time
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np

from ..system.arrays import Arrays
from .checkpoint import CheckpointError, load, save, saved_steps
from .run_folder import read_config, second_folder, write_config

FOLDERS = 'checkpoints', 'best'


def listing(run: Path) -> Tuple[List[str], bool]:
    """Verify every checkpoint of a run, in its second place as well.

    Returns a line for each, with step, epoch, size and time or with what is wrong with it, and whether all are whole.

    Raises:
        ValueError: this is no run, or it has none.
    """
    second = second_folder(read_config(run))
    folders = [run / name for name in FOLDERS]
    if second and second.absolute() != run.absolute():
        folders.append(second / FOLDERS[0])
    lines, whole = [], True
    for folder in folders:
        for step in saved_steps(folder):
            path = folder / f'step-{step:08d}'
            try:
                saved = load(path)
                epoch = saved.state.get('epoch', 0)
                size = sum(file.stat().st_size for file in path.iterdir())
                written = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime((path / 'manifest.json').stat().st_mtime))
                lines.append(f'{path}: step {step}, epoch {epoch}, {size / 1e6:,.1f} MB, {written}, whole')
            except CheckpointError as error:
                whole = False
                lines.append(f'DAMAGED {error}')
    if not lines:
        raise ValueError(f'{run} has no checkpoint yet: train it first')
    return lines, whole


def average(run: Path, count: int, output: Path) -> str:
    """Make a run whose weights are the mean of the last `count` checkpoints of another; say what was made.

    The plain mean, as of Izmailov et al. 2018 (arXiv:1803.05407), in float64 and rounded once. Buffers such as running
    statistics are averaged as well. Of averaged weights (`train.ema`) and moments nothing is taken.

    Raises:
        ValueError: there are fewer checkpoints, one is damaged, or `output` exists.
    """
    config = read_config(run)
    steps = saved_steps(run / 'checkpoints')
    if count < 1 or len(steps) < count:
        raise ValueError(f'{run} has {len(steps)} checkpoints, and -k {count} asks for the mean of {count}: train with '
                         'checkpoint.keep or checkpoint.keep_every for more, or lower -k')
    if output.exists():
        raise ValueError(f'{output} exists already: give a new folder with -o')
    found = [load(run / 'checkpoints' / f'step-{step:08d}') for step in steps[-count:]]
    last = found[-1]
    output.mkdir(parents=True)
    write_config(output, config.model_copy(update={'name': output.name, 'output': str(output.parent)}))
    save(output / 'checkpoints', last.step, {'weights': mean([each.arrays['weights'] for each in found])}, last.state,
         keep=1)
    return (f'{output}: the mean of {count} checkpoints of {run}, steps {", ".join(map(str, steps[-count:]))}; use it '
            'as any run')


def mean(groups: Sequence[Arrays]) -> Dict[str, np.ndarray]:
    """Return the mean of arrays of the same names, each of its own type.

    Raises:
        ValueError: the names or shapes differ.
    """
    first = groups[0]
    shapes = [{name: array.shape for name, array in group.items()} for group in groups]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ValueError('these checkpoints are not of one network: their weights differ in names or shapes')
    return {name: np.mean([group[name] for group in groups], axis=0, dtype='float64').astype(first[name].dtype)
            for name in first}
