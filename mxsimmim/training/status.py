"""How a run is doing: what rank 0 writes into RUN/status.json, and what `mxsimmim status` makes of it anywhere.

Rank 0 writes it anew with each log record, in one go, so that whoever sees the folder can read it at any moment.
"""
import contextlib
import json
import os
import platform
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from ..system.files import alive
from .checkpoint import saved_steps
from .run_folder import read_config

FILE = 'status.json'
PATIENCE, LEAST = 5.0, 60.0  # a run is silent after so many times its longest pause so far, and so many seconds
SLOW = 2.0  # times the median step is a straggler's
WATCHED = 2.0  # seconds between two looks


class StatusFile:
    """What one process writes; where the disk does not take it, nothing, as a run can do without."""

    def __init__(self, run: Path, total: int, step: int):
        self._path, now = Path(run) / FILE, time.time()
        self._told: Dict[str, Any] = {'state': 'training', 'step': step, 'total': total, 'started': now, 'time': now,
                                      'pause': 0.0, 'host': platform.node(), 'pid': os.getpid(),
                                      'restarts': []}
        self.tell()

    def tell(self, **values: Any) -> None:
        """Add values, which JSON can hold, and write all."""
        now = time.time()
        self._told.update(values, time=now, pause=max(self._told['pause'], now - self._told['time']))
        with contextlib.suppress(OSError):
            beside = self._path.with_name(f'.{FILE}.tmp')
            beside.write_text(json.dumps(self._told), encoding='utf-8')
            os.replace(beside, self._path)


def stragglers(seconds: List[float]) -> List[int]:
    """Return the ranks of workers whose steps take over `SLOW` times the median, the lower one of an even number."""
    median = sorted(seconds)[(len(seconds) - 1) // 2] if seconds else 0
    return [rank for rank, each in enumerate(seconds) if each > SLOW * median > 0]


def read(run: Path, now: Optional[float] = None) -> Dict[str, Any]:
    """Return how a run is doing, JSON-ready.

    That is what its rank 0 told last and, besides, `age` (seconds since then), `checkpoint` (step of the newest, whose
    files are there in full size; None if there is none), `left` (seconds to its end at this speed, None if unknown),
    and a `state` that holds now: training, ended, stopped, failed, killed (its process is gone) or silent.

    Raises:
        ValueError: this is no run, or one of an earlier version.
    """
    read_config(run)
    try:
        told: Dict[str, Any] = json.loads((run / FILE).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise ValueError(f'{run} has no {FILE}: it has not trained yet, or an earlier version trained it') from None
    except (OSError, ValueError) as error:
        raise ValueError(f'{run / FILE}: cannot be read: {error}') from None
    age = max((time.time() if now is None else now) - told['time'], 0.0)
    gone = told['host'] == platform.node() and not alive(told['pid'])
    told.update(age=age, state=state_now(told, age, gone), checkpoint=newest_whole(run / 'checkpoints'))
    speed = told.get('steps_per_second') or 0
    told['left'] = (told['total'] - told['step']) / speed if speed and told['state'] == 'training' else None
    return told


def state_now(told: Mapping[str, Any], age: float, gone: bool) -> str:
    """Return the state of a run that told this `age` seconds ago; `gone`: its process is known to run no more."""
    if told['state'] != 'training':
        return str(told['state'])
    if gone:
        return 'killed'
    return 'silent' if age > max(LEAST, PATIENCE * told['pause']) else 'training'


def newest_whole(folder: Path) -> Optional[int]:
    """Return the step of the newest checkpoint whose files have the sizes that its manifest says."""
    for step in reversed(saved_steps(folder)):
        path = folder / f'step-{step:08d}'
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            files = json.loads((path / 'manifest.json').read_text(encoding='utf-8'))['files']
            if all((path / name).stat().st_size == entry['bytes'] for name, entry in files.items()):
                return step
    return None


def text(run: Path, told: Mapping[str, Any]) -> str:
    """Write what `read` returned in lines for a terminal."""
    fields = [f'{run}: {told["state"]}', f'step {told["step"]:,} of {told["total"]:,}']
    fields += [f'{name} {told[name]:.4g}' for name in ('epoch', 'loss', 'val_loss') if told.get(name) is not None]
    if told.get('images_per_second'):
        fields.append(f'{told["images_per_second"]:.3g} images/s')
    if told['left'] is not None:
        fields.append(f'left {duration(told["left"])}')
    lines = [', '.join(fields),
             f'  heard of {duration(told["age"])} ago, from process {told["pid"]} on {told["host"]}',
             '  newest whole checkpoint: ' + ('none' if told['checkpoint'] is None else f'step {told["checkpoint"]:,}')]
    if told.get('error'):
        lines.append(f'  error: {told["error"]}')
    lines += [f'  restarted {stamp(when)}: {why}' for when, why in told['restarts']]
    workers = told.get('workers') or []
    slow = stragglers([worker['seconds'] for worker in workers])
    lines += [f'  rank {rank} on {worker["host"]}: {worker["seconds"]:.3g} s a step'
              + (', over twice the median' if rank in slow else '') for rank, worker in enumerate(workers)]
    return '\n'.join(lines)


def duration(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def stamp(seconds: float) -> str:
    """Write unix seconds as local time."""
    return time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))


def show(run: Path, as_json: bool, watch: bool) -> None:
    """Print how a run is doing; with `watch` again and again, until it trains no more.

    Raises:
        ValueError: as `read`.
    """
    clear = '\x1b[2J\x1b[H' if watch and sys.stdout.isatty() and not as_json else ''
    while True:
        told = read(run)
        print(clear + (json.dumps(told) if as_json else text(run, told)), flush=True)
        if not watch or told['state'] not in ('training', 'silent'):
            return
        time.sleep(WATCHED)
