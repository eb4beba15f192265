"""The folder a run lives in, and the signals that end it."""
import contextlib
import itertools
import os
import platform
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

from .. import __version__
from ..config import Config, ConfigError, configfile
from ..system import files
from ..system.stored import Stored
from .checkpoint import Checkpoint, load, newest, saved_steps

if TYPE_CHECKING:
    from ..tasks.task import Task

CONFIG, HOLDER = 'config.yaml', '.holder'
TOGETHER = 1.0  # seconds
BEAT = 3.0  # seconds between two signs of life in the folder of a run
# Seconds until nobody holds a folder any more for a host that was lost: its processes end by themselves within 40, and
# NFS forgets the locks of one that is switched off after 90.
ENDING = 120.0
# Keys of the network that change none of its weights: with others the weights of a checkpoint do not fit.
WITHOUT_WEIGHTS = ('model.drop_path', 'model.loss', 'model.norm_targets', 'model.norm_window', 'model.recompute',
                   'model.pretrained')


def folder_of(config: Config) -> Path:
    """Returns the folder of a run, ``output/name``."""
    return Path(config.output) / config.name


def second_folder(config: Config) -> Optional[Path]:
    """Returns the folder of a run's copies, ``checkpoint.copy_to/name``; None where there is none."""
    return Path(config.checkpoint.copy_to) / config.name if config.checkpoint.copy_to else None


def checkpoint_folders(config: Config) -> List[Path]:
    """Returns the folders of a run's checkpoints: its own, and that of their copies, if there is one."""
    return [folder / 'checkpoints' for folder in (folder_of(config), second_folder(config)) if folder]


@contextlib.contextmanager
def locked(folder: Path, log: Callable[[str], None], patience: float = 0.0) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; `log` hears of a file system that cannot.

    Args:
        patience: seconds in which another process that trains there may end.

    Raises:
        ValueError: another process trains there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / '.lock', 'a+', encoding='ascii', errors='replace')
    except OSError as error:
        raise ValueError(f'{folder}: cannot write the run there ({error.strerror}): set output= or name=') from error
    with handle:
        until = time.monotonic() + patience
        while True:
            try:
                missing = files.lock(handle)
                break
            except files.Taken as error:
                if time.monotonic() > until:
                    raise _taken(folder, error.owner or '?') from error
            time.sleep(0.1)
        if missing:
            log(f'warning: the file system of {folder} has no locks ({missing.strerror}): nothing keeps another '
                'process from training there, too')
        with contextlib.suppress(OSError):  # a disk that is full by now: the lock holds without
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        with _held(folder, until):
            yield


@contextlib.contextmanager
def _held(folder: Path, until: float) -> Iterator[None]:
    """Gives signs of life while entered: many file systems keep their locks from other hosts.

    Clocks of hosts differ. So whoever comes to a folder of another host's waits for whether there is another sign.

    Raises:
        ValueError: there is, and it is later than `until`.
    """
    file, node = folder / HOLDER, platform.node()
    found = _holder(file)
    while found[1] not in ('', node):
        time.sleep(3 * BEAT)
        before, found = found, _holder(file)
        if found == before:
            break
        if found[1] and time.monotonic() > until:
            raise _taken(folder, f'{found[0]} on {found[1]}')
    ended, signs = threading.Event(), itertools.count()

    def give() -> None:
        with contextlib.suppress(OSError):  # opened each time, which NFS needs, and never empty, except at first
            with open(file, 'r+b' if file.exists() else 'wb') as stream:
                stream.write(f'{os.getpid()} {node or "?"} {next(signs):012}\n'.encode())
                stream.truncate()

    def beat() -> None:
        while not ended.wait(BEAT):
            give()
    give()
    thread = threading.Thread(target=beat, name='signs of life', daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(BEAT)
        with contextlib.suppress(OSError):
            file.unlink()


def _holder(file: Path) -> Tuple[str, str, str]:
    """The process whose signs of life these are, its host, and their number; '' where there are none."""
    with contextlib.suppress(OSError, ValueError):
        process, node, signs = file.read_text(encoding='utf-8').split()
        return process, node, signs
    return '', '', ''


def _taken(folder: Path, process: str) -> ValueError:
    return ValueError(f'{folder}: process {process} is training in this folder: wait for it, stop it, or set name=')


def write_config(folder: Path, config: Config) -> None:
    """Writes the resolved configuration into the folder of its run; ValueError where it cannot."""
    path = folder / CONFIG
    try:
        path.write_text(configfile.to_yaml(config), encoding='utf-8')
    except OSError as error:
        raise ValueError(f'{path}: cannot be written: {error.strerror}: set output= or name=') from error


class Stop:
    """While entered, the first SIGTERM or Ctrl-C is remembered in `signal` for the loop to see; a second one acts.

    What comes within `TOGETHER` is the first still: a scheduler may signal each process of a job, and its launcher too.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.first: Dict[int, float] = {}  # when each came first

    def __enter__(self) -> 'Stop':
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _frame: Any) -> None:
        self.signal, now = number, time.monotonic()
        if now - self.first.setdefault(number, now) > TOGETHER:
            signal.signal(number, self._previous[signal.Signals(number)])
            os.kill(os.getpid(), number)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def read_config(folder: Union[str, Path]) -> Config:
    """Reads the resolved configuration of a run.

    Raises:
        ValueError: not the folder of a run.
    """
    path = Path(folder) / CONFIG
    try:
        return configfile.recorded(path)
    except OSError as error:
        raise ValueError(f'{folder} is not the folder of a run: {path}: {error.strerror}') from None


def checkpoint_to_resume(config: Config, task: 'Task', log: Callable[[str], None], restarted: bool = False
                         ) -> Optional[Checkpoint]:
    """Reads the checkpoint `resume` asks for, checked against configuration, number of images and task.

    A job that was `restarted` goes on from what it has written since, whatever `resume` says.

    Raises:
        ValueError: it is damaged, or the run it belongs to would not be the one that the configuration describes.
    """
    (checkpoints, *copies), samples = checkpoint_folders(config), len(task.source)
    if config.resume == 'none':
        for place in (checkpoints, *copies):
            if not restarted and place.is_dir() and any(place.iterdir()):
                raise ValueError(f'resume=none, but {place} has checkpoints: set name= for a new run, '
                                 'remove the folder, or resume=auto')
        return newest(checkpoints, log, *copies) if restarted else None
    if config.resume != 'auto':  # a checkpoint named by hand may start another run than the one it comes from
        named = load(Path(config.resume))
        later = newest(checkpoints, log, *copies)
        if later and later.step > named.step:
            if restarted:
                return later
            raise ValueError(f'resume={config.resume} is step {named.step}, but {checkpoints} goes up to step '
                             f'{later.step}: set name= for a new run from there, or resume=auto to go on here')
        task.check_state(named.state, str(named.path),
                         'give data of its classes, or start from its encoder by model.pretrained=')
        changed = _differences(config, samples, named)
        _check_fits(named, task, [key for key in changed if key[0].startswith('model.')])
        for key, old, new in changed:
            log(f'{key} was {old} at {named.path} and is {new} from here on')
        return named
    saved = newest(checkpoints, log, *copies)
    changed = _differences(config, samples, saved) if saved else []
    if saved and changed:
        images = saved.state['samples'] != samples
        fits = not any(key == 'task' or key.startswith('model.') and key not in WITHOUT_WEIGHTS for key, *_ in changed)
        raise ValueError(f'{folder_of(config)} holds a run that differs in '
                         + ', '.join(f'{key} (there {old}, here {new})' for key, old, new in changed)
                         + ' (files came or went, or an earlier version did not read their format: take out what came, '
                           'put back what went)' * images
                         + ': set name= for a new run'
                         + f', or resume={saved.path} to go on from there all the same' * fits)
    if saved:
        task.check_state(saved.state, str(saved.path), 'give data of its classes, or set name= for a new run')
        _check_fits(saved, task, [])
    return saved


def check_shared(config: Config, steps: Sequence[int], hosts: Sequence[str]) -> None:
    """Sees that no worker has newer checkpoints than rank 0, which alone writes and reads them.

    Args:
        steps: of each worker, the newest in its folder of the run, see `newest_here`.
        hosts: of the workers.

    Raises:
        ValueError: one has: the hosts do not share the folder, and rank 0 was elsewhere before.
    """
    known = max((step for folder in checkpoint_folders(config) for step in saved_steps(folder)), default=-1)
    rank = max(range(len(steps)), key=lambda number: steps[number])
    if steps[rank] > known:
        has = f'ends at step {known}' if known >= 0 else 'has none'
        raise ValueError(
            f'{folder_of(config)}: rank {rank} on {hosts[rank]} has the checkpoint of step {steps[rank]} there, and '
            f'rank 0 on {hosts[0]} {has}: the hosts do not share this folder, and rank 0 was on another one: start '
            'with that host first, set output= to a folder that all share, or move its checkpoints')


def check_written(config: Config, written: int) -> None:
    """Sees that rank 0 has the checkpoint of step `written`, which the job has told its launcher of, whole or not.

    Raises:
        ValueError: it has not, as where it was on another host before; with that one it may.
    """
    folders = checkpoint_folders(config)
    if max((step for folder in folders for step in saved_steps(folder)), default=-1) < written:
        raise ValueError(f'{folder_of(config)} has no checkpoint of step {written} here, which this job has written: '
                         'with --min-workers all hosts must see the same folder, set output= or '
                         'checkpoint.copy_to= to one') from FileNotFoundError(str(folders[0]))


def newest_here(config: Config) -> int:
    """Returns the step of the newest checkpoint, whole or not, that this worker sees in the run's folder, or -1."""
    with contextlib.suppress(OSError):
        return max(saved_steps(folder_of(config) / 'checkpoints'), default=-1)
    return -1


def _check_fits(saved: Checkpoint, task: 'Task', changed: List[Tuple[str, Any, Any]]) -> None:
    """Compares the shapes of all weights with those of the task's network; `changed` are its keys that differ.

    Raises:
        ValueError: naming keys and shapes that differ.
    """
    found = saved.arrays.get('weights')
    if not isinstance(found, Stored):
        return
    from ..interop.official import misfits
    problems = misfits(task.shapes(), found.shapes())
    if problems:
        keys = ''.join(f'{key} was {old} and is {new}; ' for key, old, new in changed)
        raise ValueError(f'{saved.path}: of another network, by mxsimmim {_version(saved)} (this is {__version__}): '
                         f'{keys}{problems}: take the model keys of its run, or start from its encoder by '
                         'model.pretrained=')


def _differences(config: Config, samples: int, saved: Checkpoint) -> List[Tuple[str, Any, Any]]:
    state = saved.state
    try:
        before = configfile.from_dict(state['config'], 'checkpoint')
    except ConfigError as error:
        raise ValueError(f'{saved.path}: its configuration is none of this version, {__version__}: mxsimmim '
                         f'{_version(saved)} wrote it: {error}') from None
    changed = configfile.differences(before, config)
    if state['samples'] != samples:
        changed.append(('the number of training images', state['samples'], samples))
    return changed


def _version(saved: Checkpoint) -> str:
    return str(saved.state.get('versions', {}).get('mxsimmim', '?'))


def versions() -> Dict[str, str]:
    """Returns what computes a checkpoint, for the one who has to explain its numbers later."""
    import platform

    import mxnet
    import numpy
    return {'mxsimmim': __version__, 'mxnet': mxnet.__version__, 'numpy': numpy.__version__,
            'python': platform.python_version()}
