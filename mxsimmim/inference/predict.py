"""Classes of images, printed."""
from pathlib import Path
from typing import List

from ..data.sources import found
from ..data.transforms import BrokenImage
from ..runtime.memory import ran_out
from ..system.text import one_line
from .engine import Engine, Prepared
from .trained import load_run_for

BATCH = 32


def predict(run: Path, images: List[str], top: int) -> None:
    """Prints one line an image: its file and its `top` most probable classes, each with its probability.

    Args:
        run: folder of a classifier's run.
        images: files and folders.
        top: classes a line; all if there are fewer.

    Raises:
        ValueError: not a classifier; or images that could not be read, each named, after all others are done.
    """
    if top < 1:
        raise ValueError(f'--top={top} must be at least 1')
    engine = Engine(load_run_for('predict', run))
    files, problems = found(images)
    width = max((len(one_line(file)) for file in files), default=0)
    for start in range(0, len(files), BATCH):
        names: List[str] = []
        batch: List[Prepared] = []
        for file in files[start:start + BATCH]:
            try:
                batch.append(engine.prepare(Path(file).read_bytes(), file))
                names.append(file)
            except BrokenImage as error:
                if ran_out(error):
                    raise
                problems.append(str(error))
            except OSError as error:
                problems.append(f'{one_line(file)}: cannot be read: {error.strerror}')
        for name, row in zip(names, engine.answer(batch) if batch else ()):
            print(f'{one_line(name):<{width}}   {engine.predictor.line(row, top)}', flush=True)
    if problems:
        raise ValueError('\n'.join(problems))
