"""The folder a run lives in, and the signals that end it."""
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, Optional, Union

from .. import __version__
from ..config import Config, configfile
from ..system import files
from .checkpoint import Checkpoint, load, newest, saved_steps

if TYPE_CHECKING:
    from ..tasks.task import Task

# Keys of the network that change none of its weights: with others the weights of a checkpoint do not fit.
WITHOUT_WEIGHTS = ('model.drop_path', 'model.loss', 'model.norm_targets', 'model.recompute', 'model.pretrained')


def folder_of(config: Config) -> Path:
    """Returns the folder of a run, ``output/name``."""
    return Path(config.output) / config.name


# Seconds until nobody holds a folder any more for a host that was lost: its processes end by themselves within 40, and
# NFS forgets the locks of one that is switched off after 90.
ENDING = 120.0


@contextlib.contextmanager
def locked(folder: Path, log: Callable[[str], None], patience: float = 0.0) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it; `log` hears of a file system that cannot.

    Args:
        patience: seconds to wait for another process to end.

    Raises:
        ValueError: another process trains there, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / '.lock', 'a+', encoding='ascii', errors='replace')
    except OSError as error:
        raise ValueError(f'{folder}: cannot write the run there ({error.strerror}): set output= or name=') from None
    with handle:
        until = time.monotonic() + patience
        while True:
            try:
                missing = files.lock(handle)
                break
            except files.Taken as error:
                if time.monotonic() > until:
                    raise ValueError(f'{folder}: process {error.owner or "?"} is training in this folder: wait for it, '
                                     'stop it, or set name=') from None
            time.sleep(0.1)
        if missing:
            log(f'warning: the file system of {folder} has no locks ({missing.strerror}): nothing keeps another '
                'process from training there, too')
        with contextlib.suppress(OSError):  # a disk that is full by now: the lock holds without
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
        yield


def write_config(folder: Path, config: Config) -> None:
    """Writes the resolved configuration into the folder of its run; ValueError where it cannot."""
    path = folder / 'config.yaml'
    try:
        path.write_text(configfile.to_yaml(config), encoding='utf-8')
    except OSError as error:
        raise ValueError(f'{path}: cannot be written: {error.strerror}: set output= or name=') from None


class Stop:
    """While entered, the first SIGTERM or Ctrl-C is remembered in `signal` for the loop to see; a second one acts."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> 'Stop':
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, _frame: Any) -> None:
        self.signal = number
        signal.signal(number, self._previous[signal.Signals(number)])

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def read_config(folder: Union[str, Path]) -> Config:
    """Reads the resolved configuration of a run.

    Raises:
        ValueError: not the folder of a run.
    """
    path = Path(folder) / 'config.yaml'
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
    checkpoints, samples = folder_of(config) / 'checkpoints', len(task.source)
    if config.resume == 'none':
        if checkpoints.is_dir() and any(checkpoints.iterdir()):
            if restarted:
                return newest(checkpoints, log)
            raise ValueError(f'resume=none, but {checkpoints} has checkpoints: set name= for a new run, '
                             'remove the folder, or resume=auto')
        return None
    if config.resume != 'auto':  # a checkpoint named by hand may start another run than the one it comes from
        named = load(Path(config.resume))
        later = newest(checkpoints, log)
        if later and later.step > named.step:
            if restarted:
                return later
            raise ValueError(f'resume={config.resume} is step {named.step}, but {checkpoints} goes up to step '
                             f'{later.step}: set name= for a new run from there, or resume=auto to go on here')
        task.check_state(named.state, str(named.path),
                         'give data of its classes, or start from its encoder by model.pretrained=')
        for key, old, new in _differences(config, samples, named.state):
            log(f'{key} was {old} at {named.path} and is {new} from here on')
        return named
    saved = newest(checkpoints, log)
    changed = _differences(config, samples, saved.state) if saved else []
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
    return saved


def check_shared(folder: Path, written: int) -> None:
    """Makes sure that this host sees the checkpoint of step `written`, which the job told of, whole or not.

    Raises:
        ValueError: it does not, as where each host has a folder of its own; another host may.
    """
    if max(saved_steps(folder / 'checkpoints'), default=-1) < written:
        raise ValueError(f'{folder} has no checkpoint of step {written} here, which this job has written: with '
                         '--min-workers all hosts must see the same folder, set output= to one'
                         ) from FileNotFoundError(str(folder))


def _differences(config: Config, samples: int, state: Dict[str, Any]) -> list:
    changed = configfile.differences(configfile.from_dict(state['config'], 'checkpoint'), config)
    if state['samples'] != samples:
        changed.append(('the number of training images', state['samples'], samples))
    return changed


def versions() -> Dict[str, str]:
    """Returns what computes a checkpoint, for the one who has to explain its numbers later."""
    import platform

    import mxnet
    import numpy
    return {'mxsimmim': __version__, 'mxnet': mxnet.__version__, 'numpy': numpy.__version__,
            'python': platform.python_version()}
