"""Room for the checkpoints of a run, looked at before it starts."""
from pathlib import Path

import numpy as np

from ..config import Config
from ..optim import OPTIMIZERS
from ..system import files
from ..tasks.task import Task
from . import checkpoint


def checkpoint_bytes(config: Config, task: Task, replicas: int = 1) -> int:
    """Counts the bytes of a checkpoint's arrays.

    These are weights, moments of the optimizer, averaged weights, and what each worker has of its own: in all so many
    replicas of the model.
    """
    train, moments = config.train, len(OPTIMIZERS[config.optim.type].MOMENTS)
    own = (train.compression == '2bit') + (train.aggregation == 'elastic') * (1 + moments) + (
        train.aggregation == 'local_sgd' and not train.average_moments) * moments
    weights = sum(int(np.prod(shape)) for shape in task.shapes().values())
    return 4 * weights * (1 + moments + bool(train.ema) + (train.store == 'dist_async') + replicas * own)


def check_room(config: Config, task: Task, folder: Path, last: int, replicas: int = 1) -> None:
    """See that the checkpoints of a run of so many replicas of the model have room.

    Raises:
        ValueError: there is no room in the folder of a run for the checkpoints up to step `last`.
    """
    saved = checkpoint.saved_steps(folder / 'checkpoints')
    if not saved or saved[-1] < last:
        files.check_room(folder, checkpoint_bytes(config, task, replicas), len(saved))
