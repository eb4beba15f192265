"""Networks as files for other programs: MXNet's symbol and parameters, or ONNX; checked before they are there."""
import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import mxnet as mx

from ..system.guards import unusable
from ..system.text import drawn
from .graph import Graph, answer, compare, compare_chosen, load_symbol, random_inputs, save_symbol, trace
from .trained import Trained, load_run

EXACT, ONNX = 1e-5, 1e-4  # largest differences from the network
NOTHING = 'note: the network finds nothing in the random images that it was compared on: compare on some of your own'
ONE_FILE = 2 ** 31 - 2 ** 26  # bytes of weights; a protobuf ends at 2 GiB, and the graph takes some of it


def export(run: Union[str, Path], file: Union[str, Path], format: str, int8: bool = False,
           images: Optional[str] = None, max_drop: float = 1.0) -> str:
    """Writes a run's network, compares what was written with it, and says what is where.

    Args:
        run: folder of a run.
        file: 'symbol': a prefix, for PREFIX-symbol.json, PREFIX-0000.params and PREFIX.json; 'onnx': the file, and
            beside it one that ends in .json; weights of 2 GiB and more are in FILE.data, which belongs to it.
        format: 'symbol' or 'onnx'.
        int8: quantise the classifier's linear maps to 8 bits; of 'symbol' alone.
        images: labelled images that int8 is calibrated and measured with, a path or 'digits'; None: the run's own.
        max_drop: percentage points of accuracy that int8 may cost.

    Raises:
        ValueError: no such run, a network that comes out different, too great a loss of accuracy, a place that cannot
            be written. Nothing is written then.
    """
    if format not in ('symbol', 'onnx'):
        raise ValueError(f"format '{format}' is not known: write symbol or onnx")
    if int8 and format != 'symbol':
        raise ValueError(f'int8 is of --format symbol only (asked for: {format}): its operators are oneDNN\'s, inside '
                         'MXNet')
    file = Path(file)
    if format == 'onnx' and file.suffix == '.json':
        raise ValueError(f'{file}: a description of the network goes there: name the model {file.stem}.onnx')
    trained = load_run(Path(run))
    graph = trace(trained)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _drafts(file.parent) as folder:
            draft = folder / drawn(file.name)
            if format == 'onnx':
                files, report = _onnx(trained, graph, draft)
            elif int8:
                from .quantise import quantised
                files, report = quantised(trained, graph, draft, images, max_drop)
            else:
                files, report = _symbol(trained, graph, draft), ''
            described = draft.with_suffix('.json') if format == 'onnx' else Path(f'{draft}.json')
            described.write_text(json.dumps(description(trained, graph), indent=1) + '\n', encoding='utf-8')
            final = [file.parent / (file.stem + path.name[len(draft.stem):]) for path in files + [described]]
            for path, place in zip(files + [described], final):
                os.replace(path, place)
    except OSError as error:
        raise ValueError(f'{file}: cannot be written: {error.strerror or error}: choose another place') from None
    return '\n'.join(([report] if report else []) + [str(place) for place in final])


@contextlib.contextmanager
def _drafts(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that goes in the end, under a name that is UTF-8, as MXNet and ONNX want it."""
    with tempfile.TemporaryDirectory(dir=str(parent), prefix='.export-') as folder:
        if drawn(folder) == folder:
            yield Path(folder)
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            yield Path(f'/proc/self/fd/{descriptor}')
        finally:
            os.close(descriptor)


def description(trained: Trained, graph: Graph) -> Dict[str, Any]:
    """Describes what a program needs to know to feed the network and to understand its answer."""
    data = trained.config.data
    return {'inputs': {name: ['batch', *shape] for name, shape in graph.inputs.items()}, 'output': graph.output,
            'classes': list(trained.predictor.classes), 'size': trained.config.model.img_size, 'channels': 'RGB',
            'mean': list(data.mean), 'std': list(data.std), 'step': trained.step}


def _symbol(trained: Trained, graph: Graph, prefix: Path) -> List[Path]:
    files = save_symbol(graph, prefix)
    inputs = random_inputs(trained)
    found = load_symbol(files, graph)(*map(mx.nd.array, inputs)).asnumpy()
    compare(answer(trained, inputs), found, EXACT, 'the symbol')
    return files


def _onnx(trained: Trained, graph: Graph, file: Path) -> Tuple[List[Path], str]:
    try:
        import onnx
        import onnxruntime
    except Exception as error:  # a broken package raises anything
        raise unusable('ONNX', error) from None
    from .onnx_graph import to_onnx
    files = [file]
    if sum(4 * array.size for array in graph.arrays.values()) > ONE_FILE:
        files.append(file.with_name(f'{file.name}.data'))
    onnx.save(to_onnx(graph), str(file), save_as_external_data=len(files) > 1, location=files[-1].name)
    onnx.checker.check_model(str(file), full_check=True)
    inputs, score, rows = random_inputs(trained), trained.predictor.score, 0
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    expected = answer(trained, inputs)
    for part in (slice(0, None), slice(0, 1)):  # the batch may have any size
        found, = session.run(None, dict(zip(graph.inputs, (array[part] for array in inputs))))
        if score is None:
            compare(expected[part], found, ONNX, 'the ONNX model')
        else:
            rows += compare_chosen(expected[part], found, score, ONNX, 'the ONNX model')
    return files, '' if score is None or rows else NOTHING
