"""What a trained network says about images, printed and drawn."""
import json
from pathlib import Path
from typing import List, Set

import numpy as np

from ..data.sources import found
from ..data.transforms import BrokenImage
from ..runtime.memory import ran_out
from ..system.text import one_line
from .engine import Engine, Prepared
from .trained import load_run_for

BATCH = 32


def predict(run: Path, images: List[str], top: int, output: str = '', as_json: bool = False) -> None:
    """Prints one line an image: its file, and its `top` most probable classes or those of most pixels.

    Args:
        run: folder of a classifier's or segmenter's run.
        images: files and folders.
        top: classes a line; all if there are fewer.
        output: folder to which a picture of each image and its answer is written; '': none is.
        as_json: print all classes, as a JSON object a line.

    Raises:
        ValueError: a run that answers otherwise, or draws nothing; or images that could not be read, each named, after
            all others are done.
    """
    if top < 1:
        raise ValueError(f'--top={top} must be at least 1')
    engine = Engine(load_run_for('predict', run))
    predictor = engine.predictor
    files, problems = found(images)
    width = max((len(one_line(file)) for file in files), default=0)
    taken: Set[str] = set()
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
        for name, item, row in zip(names, batch, engine.answer(batch) if batch else ()):
            if output:
                _draw(engine, name, item, row, Path(output) / _free(f'{Path(name).stem}.png', taken))
            print(json.dumps({'file': name, **predictor.record(item.fields, row)}) if as_json else
                  f'{one_line(name):<{width}}   {predictor.line(item.fields, row, top)}', flush=True)
    if problems:
        raise ValueError('\n'.join(problems))


def _draw(engine: Engine, file: str, item: Prepared, answer: np.ndarray, out: Path) -> None:
    """Writes the picture of an image and its answer.

    Raises:
        ValueError: such answers are not drawn, or it cannot be written.
    """
    from PIL import Image
    picture = engine.predictor.drawing(engine.pixels(Path(file).read_bytes(), file), item.fields, answer)
    if picture is None:
        raise ValueError(f'--output={out.parent}: the answers of {engine.predictor.kind.partition(",")[0]} are not '
                         'drawn: leave it out')
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(out)
    except OSError as error:
        raise ValueError(f'{out}: cannot write the picture: {error.strerror or error}') from None


def _free(name: str, taken: Set[str]) -> str:
    """A name that is not taken yet, and now is: a.png, a-2.png, a-3.png."""
    stem, free, number = Path(name).stem, name, 1
    while free in taken:
        number += 1
        free = f'{stem}-{number}.png'
    taken.add(free)
    return free
