"""How a run is doing: what rank 0 writes into RUN/status.json, and what `mxsimmim status` makes of it anywhere.

Rank 0 writes it anew with each log record, in one go, so that whoever sees the folder can read it at any moment. When
the job fails, its launcher adds what it knows (`cluster.run_status`).
"""
import contextlib
import json
import os
import platform
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence

from ..cluster.run_status import FILE, write
from ..system.files import alive
from .checkpoint import saved_steps
from .run_folder import read_config

PATIENCE, LEAST = 5.0, 60.0  # a run is silent after so many times its longest pause so far, and so many seconds
SLOW = 2.0  # times the median step is a straggler's
AGAIN = 3600.0  # seconds until the log names the same straggler again
WATCHED = 2.0  # seconds between two looks
SETTLED = 5  # looks after which a run that failed is not started again by its launcher, or was already
LIVE = 'training', 'silent', 'restarting'  # states of a run that has not ended


class StatusFile:
    """What one process writes; where the disk does not take it, nothing, as a run can do without."""

    def __init__(self, run: Path, total: int, step: int):
        self._path, now = Path(run) / FILE, time.time()
        self.told: Dict[str, Any] = {'state': 'training', 'step': step, 'total': total, 'started': now, 'time': now,
                                     'pause': 0.0, 'host': platform.node(), 'pid': os.getpid(), 'restarts': []}
        self.tell()

    def tell(self, **values: Any) -> None:
        """Add values, which JSON can hold, and write all."""
        now = time.time()
        # Another dict: whoever looks at the one before, in another thread, sees all of it.
        self.told = {**self.told, **values, 'time': now, 'pause': max(self.told['pause'], now - self.told['time'])}
        with contextlib.suppress(OSError):
            write(self._path, self.told)


def stragglers(seconds: Sequence[float]) -> List[int]:
    """Return the ranks of workers whose steps take over `SLOW` times the median, the lower one of an even number."""
    median = sorted(seconds)[(len(seconds) - 1) // 2] if seconds else 0
    return [rank for rank, each in enumerate(seconds) if each > SLOW * median > 0]


def to_name(slow: Collection[int], before: Collection[int], named: Mapping[int, float], now: float) -> List[int]:
    """Return the ranks of stragglers to name now: those of two records in a row that were not named for a while.

    Args:
        slow: those of this record.
        before: those of the one before.
        named: when each of them was named last, in seconds, as `now`.
    """
    return [rank for rank in slow if rank in before and (rank not in named or now - named[rank] >= AGAIN)]


def workers(told: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Return of each worker known, by rank: `rank`, `host`, `seconds` a step that it needs by itself, `state`.

    The state is the run's, but slow for a straggler of a run that trains, and how the worker ended, such as "was killed
    by SIGKILL", for one that ended by itself. Where rank 0 was killed and nobody says more, of others nothing is known.
    """
    named = told.get('workers') or []
    slow = stragglers([worker['seconds'] or 0 for worker in named])
    found = {rank: {'rank': rank, **worker, 'state': told['state']} for rank, worker in enumerate(named)}
    for rank, worker in found.items():
        if told['state'] == 'training' and rank in slow:
            worker['state'] = 'slow'
        elif told['state'] == 'killed' and rank:
            worker['state'] = 'unknown'
    for gone in told.get('gone') or []:
        host = found.get(gone['rank'], gone)['host']
        seconds = found.get(gone['rank'], {}).get('seconds')
        found[gone['rank']] = {'rank': gone['rank'], 'host': host, 'seconds': seconds, 'state': gone['why']}
    return [found[rank] for rank in sorted(found)]


def read(run: Path, now: Optional[float] = None) -> Dict[str, Any]:
    """Return how a run is doing, as `look`.

    Raises:
        ValueError: this is no run, or one of an earlier version.
    """
    read_config(run)
    return look(run, now)


def look(run: Path, now: Optional[float] = None) -> Dict[str, Any]:
    """Return how a run is doing, JSON-ready, by the status file in its folder.

    That is what its rank 0 told last and, besides, `age` (seconds since then), `checkpoint` (step of the newest, whose
    files are there in full size; None if there is none), `left` (seconds to its end at this speed, None if unknown),
    and a `state` that holds now: training, restarting, ended, stopped, failed, killed (its process is gone) or silent.
    `workers` are those of the function of that name.

    Raises:
        ValueError: there is no status file, or it cannot be read.
    """
    try:
        told: Dict[str, Any] = json.loads((run / FILE).read_text(encoding='utf-8'), parse_constant=lambda _: None)
    except FileNotFoundError:
        raise ValueError(f'{run} has no {FILE}: it has not trained yet, or an earlier version trained it') from None
    except (OSError, ValueError) as error:
        raise ValueError(f'{run / FILE}: cannot be read: {error}') from None
    age = max((time.time() if now is None else now) - told['time'], 0.0)
    gone = told['host'] == platform.node() and not alive(told['pid'])
    told.update(age=age, state=state_now(told, age, gone), checkpoint=newest_whole(run / 'checkpoints'))
    return {**told, 'left': left(told) if told['state'] == 'training' else None, 'workers': workers(told)}


def left(told: Mapping[str, Any]) -> Optional[float]:
    """Return the seconds to the end of a run at its present speed; None if that is unknown."""
    speed = told.get('steps_per_second')
    return (told['total'] - told['step']) / speed if speed else None


def state_now(told: Mapping[str, Any], age: float, gone: bool) -> str:
    """Return the state of a run that told this `age` seconds ago; `gone`: its process is known to run no more."""
    if told['state'] not in LIVE:
        return str(told['state'])
    if gone and told['state'] == 'training':
        return 'killed'
    return 'silent' if age > max(LEAST, PATIENCE * told['pause']) else str(told['state'])


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
    lines += [f'  {cause}' for cause in told.get('causes') or []]
    lines += [f'  restarted {stamp(when)}: {why}' for when, why in told['restarts']]
    return '\n'.join(lines + [_line(worker, told['state']) for worker in told['workers']])


def _line(worker: Mapping[str, Any], state: str) -> str:
    own = {state: '', 'slow': 'over twice the median'}.get(worker['state'], worker['state'])
    seconds = '' if worker['seconds'] is None else f'{worker["seconds"]:.3g} s a step'
    return f'  rank {worker["rank"]} on {worker["host"]}: {", ".join(filter(None, (seconds, own))) or "not known"}'


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
    clear, dead = '\x1b[2J\x1b[H' if watch and sys.stdout.isatty() and not as_json else '', 0
    while True:
        told = read(run)
        print(clear + (json.dumps(told) if as_json else text(run, told)), flush=True)
        dead = 0 if told['state'] in LIVE else dead + 1
        if not watch or told['state'] in ('ended', 'stopped') or dead > SETTLED:
            return
        time.sleep(WATCHED)
