"""What a run tells: metrics as JSON lines and in TensorBoard, messages in a log file, and a progress bar.

The names of values that this module formats: epoch, loss, val_loss, lr, grad_norm, images_per_second, and the counts
skipped (updates) and broken_images. Others are shown by their name.
"""
import contextlib
import io
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Set, TextIO

import numpy as np

from ..runtime import watchdog
from ..system import files
from ..system.guards import alone
from ..system.text import encode, show, shown
from .status import StatusFile

METRICS, LOG = 'metrics.jsonl', 'logs/rank-0.log'


class RunLogger:
    """Writes metrics, messages and pictures of one process under `run`, and shows progress on a stream.

    A context manager. ``run/metrics.jsonl`` has one JSON object a line: ``{"step": …, "time": unix seconds, …}`` with
    the values given to `write`; one that is not finite is null, as JSON has no name for it. A resumed run (`start` > 0)
    goes on after the records of step `start`; what an interrupted one wrote later is dropped, so that there is neither
    gap nor double. With `start` 0 the file begins anew. TensorBoard is told the same. What `event` is told stands among
    the records.

    Raises (from every method):
        ValueError: an existing metrics.jsonl that is none, or a disk that does not take what is written.
    """

    def __init__(self, run: Path, total: int, start: int = 0, stream: Optional[TextIO] = None) -> None:
        """Opens the files; `total`: steps of the run; `start`: those done before; `stream`: by default stderr."""
        self.run, self.total, self.start = Path(run), total, start
        self.stream = sys.stderr if stream is None else stream
        self._failed: Set[str] = set()
        self._bar, self._events = None, None
        with _writing(self.run):
            (self.run / 'logs').mkdir(parents=True, exist_ok=True)
            _drop_after(self.run / METRICS, start)
            self._metrics = open(self.run / METRICS, 'ab', buffering=0)
            self._log = open(self.run / LOG, 'ab', buffering=0)
        self._events = self.extra('TensorBoard', self._open_events)
        self._bar = self.extra('the progress bar', self._open_bar)
        self._began, self._status = time.monotonic(), StatusFile(self.run, total, start)

    def write(self, step: int, values: Mapping[str, Any], echo: bool = True, **status: Any) -> None:
        """Records `values` after `step` updates and moves the bar there, never back.

        With `echo` they are shown, in the bar if one is a loss, else as a line. Whoever looks at the run is told them,
        and of `status`, as the method of that name does.
        """
        record = {key: value.item() if isinstance(value, (np.generic, np.ndarray)) else value
                  for key, value in values.items()}
        self._move(step)
        finite = {key: value for key, value in record.items() if math.isfinite(value)}
        line = {'step': step, **{key: finite.get(key) for key in record}, 'time': round(time.time(), 3)}
        self._append(METRICS, self._metrics, json.dumps(line) + '\n')
        self._status.tell(**{name: value for name, value in line.items() if name != 'time'}, **status)
        self._summary(step, [{'tag': key, 'simple_value': value} for key, value in finite.items()])
        if echo and self._bar is not None and 'loss' in record:
            text = _text(record, ('loss', 'images_per_second', 'lr', 'grad_norm', 'skipped'))
            self._move(step, '  ' + text.replace('grad_norm', 'grad'))  # all of it in 80 columns
        elif echo:
            shown = sorted((name for name in record if not name.endswith('_seconds')), key=_order)
            text = f'step {step}/{self.total}  {_text(record, shown)}'
            if self._bar is None and 'loss' in record and step > self.start:
                left = (time.monotonic() - self._began) / (step - self.start) * (self.total - step)
                text += f'  left {timedelta(seconds=round(left))}'
            self._show(text)

    def event(self, step: int, event: str, **values: Any) -> None:
        """Records that something happened: ``{"step": …, "event": …, …}``, with values of which none is a metric."""
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
        line = {'step': step, 'event': event, **finite, 'time': round(time.time(), 3)}
        self._append(METRICS, self._metrics, json.dumps(line) + '\n')

    def rewind(self, step: int) -> None:
        """Drops the records after `step`, from which the run goes on, and moves the bar back to it."""
        with _writing(self.run):
            self._metrics.close()
            _drop_after(self.run / METRICS, step)
            self._metrics = open(self.run / METRICS, 'ab', buffering=0)
        if self._events is not None and not self.extra('TensorBoard', self._hide, self._events, step):
            self._events = None
        if self._bar is not None:
            self._bar.n = step

    def status(self, **values: Any) -> None:
        """Tell whoever looks at the run: `state`, `step`, and what `status.text` knows."""
        self._status.tell(**values)

    def told(self) -> Mapping[str, Any]:
        """What `status` and `write` have told last, and when."""
        return self._status.told

    def message(self, text: str) -> None:
        """Shows `text`, above the bar if there is one, and appends it to the log file, each line with the time."""
        self._show(text)
        stamp = time.strftime('%Y-%m-%d %H:%M:%S')
        self._append(LOG, self._log, ''.join(f'{stamp} {line}\n' for line in shown(text).splitlines()))

    def extra(self, what: str, do: Callable[..., Any], *arguments: Any) -> Any:
        """Does what the run can do without; where it fails, None, and one warning about `what`."""
        try:
            return do(*arguments)
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = ' '.join(str(error).split()) or type(error).__name__
                self.message(f'warning: {what} fails, and the run goes on without: {reason}')
            return None

    def picture(self, step: int, name: str, image: np.ndarray) -> Path:
        """Writes `image` (H, W, 3), uint8, as ``pictures/NAME-step.png`` and to TensorBoard; returns the file."""
        from PIL import Image

        png = io.BytesIO()
        Image.fromarray(image).save(png, format='png')
        path = self.run / 'pictures' / f'{name}-{step:08d}.png'
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(png.getvalue())
        height, width, channels = image.shape
        self._summary(step, [{'tag': name, 'image': {'height': height, 'width': width, 'colorspace': channels,
                                                     'encoded_image_string': png.getvalue()}}])
        return path

    def close(self) -> None:
        """Leaves the bar where it is and closes the files; a second call does nothing."""
        for file in (self._bar, self._events):
            with contextlib.suppress(Exception):
                if file is not None:
                    file.close()
        for file in (self._metrics, self._log):
            with contextlib.suppress(OSError, ValueError):  # a full disk, which was reported; closed already
                file.close()

    def __enter__(self) -> 'RunLogger':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _show(self, text: str) -> None:
        if self._bar is not None:
            try:
                return self._bar.write(shown(text), file=self.stream)
            except Exception:
                self._bar = None
        show(text, self.stream)

    def _open_bar(self) -> Any:
        from tqdm import tqdm  # here, as what only reads metrics needs none
        if self.stream is None or self.stream.closed or not self.stream.isatty():
            return None
        return tqdm(total=self.total, initial=self.start, file=self.stream, dynamic_ncols=True, smoothing=0, miniters=1,
                    bar_format='{n_fmt}/{total_fmt} |{bar}| left {remaining}{desc}')  # desc: no comma before it

    def _move(self, step: int, text: Optional[str] = None) -> None:
        """Moves the bar to `step`, or writes behind it."""
        def move() -> bool:
            assert self._bar is not None
            if text is None:
                self._bar.update(max(0, step - self._bar.n))
            else:
                self._bar.set_description_str(text)
            return True
        if self._bar is not None and not self.extra('the progress bar', move):
            self._bar = None

    def _append(self, name: str, file: Any, text: str) -> None:
        """One unbuffered write call, so that a kill leaves whole records."""
        data = encode(text)
        with _writing(self.run / name):
            if file.write(data) != len(data):  # what a disk does that fills up just now
                raise OSError('there is room for a part of it only')

    def _summary(self, step: int, values: List[Dict[str, Any]]) -> None:
        def record() -> bool:
            from tensorboardX.proto.summary_pb2 import Summary
            return self._event(self._events, step=step, summary=Summary(value=[Summary.Value(**v) for v in values]))
        if self._events is not None and not self.extra('TensorBoard', record):
            self._events = None  # behind half an event nothing could be read

    def _open_events(self) -> Any:
        with alone():  # also in other programs: tensorboardX imports PyTorch, in many seconds, and needs none of it
            from tensorboardX.event_file_writer import EventsWriter
        (self.run / 'tensorboard').mkdir(exist_ok=True)
        # Not SummaryWriter: its thread dies of a full disk, and training would hang for ever in its queue.
        events = EventsWriter(str(self.run / 'tensorboard' / 'events'), f'.{os.getpid()}')
        self._hide(events, self.start)
        return events

    def _hide(self, events: Any, step: int) -> bool:
        """Have TensorBoard show nothing that was written before of later steps than this one."""
        from tensorboardX.proto.event_pb2 import SessionLog
        return self._event(events, step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))

    @staticmethod
    def _event(events: Any, **fields: Any) -> bool:
        from tensorboardX.proto.event_pb2 import Event
        events.write_event(Event(wall_time=time.time(), **fields))
        events.flush()
        return True


class Quiet:
    """The logger of every worker but rank 0: messages go to standard error, nothing is recorded."""

    def write(self, step: int, values: Mapping[str, float], echo: bool = True, **status: Any) -> None:
        """Does nothing: rank 0 records."""

    def message(self, text: str) -> None:
        """Shows `text`, which its launcher puts into this worker's own log."""
        show(text, sys.stderr)

    def event(self, step: int, event: str, **values: Any) -> None:
        """Does nothing: rank 0 records."""

    def rewind(self, step: int) -> None:
        """Does nothing: rank 0 records."""

    def status(self, **values: Any) -> None:
        """Does nothing: rank 0 tells."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Does nothing: rank 0 records."""

    def extra(self, what: str, do: Callable[..., Any], *arguments: Any) -> Any:
        """Does nothing: rank 0 records."""

    def __enter__(self) -> 'Quiet':
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def read_metrics(run: Path) -> List[Dict[str, Any]]:
    """Reads the records of a run in the order written; values that were not finite are None.

    Raises:
        ValueError: there is no metrics.jsonl, or it is not one.
    """
    file = Path(run) / METRICS
    if not file.is_file():
        raise ValueError(f'{file}: no such file: give the folder of a run, such as runs/NAME')
    return _records(file)


def _records(file: Path) -> List[Dict[str, Any]]:
    """All but a torn last line, which a crash may leave."""
    records = []
    lines = file.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
            if not isinstance(record['step'], int):
                raise TypeError('step')
            records.append(record)
        except (ValueError, KeyError, TypeError):
            if number < len(lines) or not line.startswith((b'{', b'\0')):
                raise ValueError(f'{file}: line {number} is not a JSON object with a step, as a run writes them: move '
                                 f'the file away if it is not of this run') from None
    return records


def _drop_after(file: Path, start: int) -> None:
    """Rewrites, in one go, without the records after step `start` and without a torn last line.

    Of step 0 only events stay, such as that a run went back to it.
    """
    if file.exists():
        kept = [record for record in _records(file) if record['step'] <= start and (start or 'event' in record)]
        beside = file.with_name(f'.{file.name}.tmp')
        with open(beside, 'w', encoding='utf-8') as stream:
            stream.writelines(json.dumps(record) + '\n' for record in kept)
        files.sync_file(beside)
        os.replace(beside, file)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        with watchdog.doing(f'a write to {path}'):
            yield
    except OSError as error:
        raise ValueError(f'{error.filename or path}: cannot be written: {error.strerror or error}. Make room there or '
                         f'make it writable, and run the same command again') from error


def _order(name: str) -> int:
    known = ('epoch', 'loss', 'val_loss', 'lr', 'grad_norm', 'images_per_second')
    return known.index(name) if name in known else len(known)


def _text(record: Mapping[str, float], names: Iterable[str]) -> str:
    """Those of `names` that the record has, as ``loss 0.4821  lr 1.0e-04``; counts of mishaps only if there are any."""
    formats = {'epoch': '{:.2f}', 'lr': '{:.1e}'}
    fields = []
    for name in names:
        value = record.get(name)
        if value is None or (value == 0 and name in ('skipped', 'broken_images')):
            continue
        if name == 'images_per_second':
            fields.append(f'{_number(value, 3)} images/s')
        elif name in formats:
            fields.append(f'{name} {formats[name].format(value)}')
        else:
            fields.append(f'{name} {_number(value, 3 if name == "grad_norm" else 4)}')
    return '  '.join(fields)


def _number(value: float, digits: int) -> str:
    """With so many significant digits; no exponent for large ones."""
    if isinstance(value, int) or abs(value) >= 10 ** (digits - 1):
        return f'{value:.0f}'
    return f'{value:#.{digits}g}'.rstrip('.')
