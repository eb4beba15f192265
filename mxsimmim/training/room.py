"""Room for the checkpoints of a run, looked at before it starts."""
from pathlib import Path

import numpy as np

from ..config import Config
from ..optim import OPTIMIZERS
from ..system import files
from ..tasks.task import Task
from . import checkpoint


def checkpoint_bytes(config: Config, task: Task) -> int:
    """Counts the bytes of a checkpoint's arrays: weights, moments of the optimizer, averaged weights."""
    weights = sum(int(np.prod(shape)) for shape in task.shapes().values())
    return 4 * weights * (1 + len(OPTIMIZERS[config.optim.type].MOMENTS) + bool(config.train.ema))


def check_room(config: Config, task: Task, folder: Path, last: int) -> None:
    """See that the checkpoints of a run have room.

    Raises:
        ValueError: there is no room in the folder of a run for the checkpoints up to step `last`.
    """
    saved = checkpoint.saved_steps(folder / 'checkpoints')
    if not saved or saved[-1] < last:
        files.check_room(folder, checkpoint_bytes(config, task), len(saved))
