"""One atomic, checksummed, pickle-free folder a checkpoint.

    checkpoints/step-00001000/weights.safetensors    one file a group of arrays
                              optimizer.safetensors
                              state.json             {"step": …, "state": …}
                              manifest.json          {"format": 1, "files": {name: {"bytes": …, "sha256": …}}}

A folder named ``step-…`` is whole at every moment: it is written under a hidden name, flushed to the disk and renamed.
Hidden names tell what a killed process left behind: ``.step-….tmp-PID`` is unfinished or half deleted, and
``.step-….old-PID`` was moved aside for another of the same step. The next `save` puts that right.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Union,
)

import numpy as np
from safetensors import SafetensorError

from ..runtime import watchdog
from ..runtime.memory import ran_out
from ..system.arrays import Arrays, Gathered, on_the_way
from ..system.files import alive, free, sync_directory, sync_file
from ..system.points import reach
from ..system.stored import Stored, write_arrays

FORMAT = 1
MANIFEST, STATE, ARRAYS = 'manifest.json', 'state.json', '.safetensors'


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; its text is for the user."""


class Checkpoint(NamedTuple):
    """What `load` returns; `arrays` is group -> name -> array, each writable, in C order, and read when asked for."""
    step: int
    arrays: Mapping[str, Arrays]
    state: Dict[str, Any]
    path: Path


class Filled(NamedTuple):
    """A checkpoint that is written, under a hidden name, but perhaps not on the disk yet."""
    step: int
    staged: Path
    final: Path
    nbytes: int  # of its arrays


def save(folder: Path, step: int, arrays: Mapping[str, Union[Arrays, Gathered]], state: Mapping[str, Any], keep: int,
         keep_every: Optional[int] = None) -> Path:
    """Writes ``folder/step-…`` and then deletes the checkpoints that the retention rule does not keep.

    Args:
        folder: of all checkpoints of a run, made if missing; one process writes to it.
        step: number of updates done. An existing checkpoint of the same step is replaced.
        arrays: group -> name -> array, of the types of `system.stored`; a group becomes a file. One whose arrays are
            still to be gathered is written as they come.
        state: what JSON can hold.
        keep: of the checkpoints up to this step, the newest that stay.
        keep_every: multiples of it, in steps, stay as well; None: none do. Checkpoints of later steps always stay.

    Raises:
        CheckpointError: the disk is full, read-only, …; what was there before is untouched.
    """
    return publish(fill(folder, step, arrays, state), keep, keep_every)


def fill(folder: Path, step: int, arrays: Mapping[str, Union[Arrays, Gathered]], state: Mapping[str, Any]) -> Filled:
    """Does the first half of `save`: takes the arrays."""
    assert all(re.fullmatch(r'\w+', group) for group in arrays)
    folder = Path(folder)
    final = folder / f'step-{step:08d}'
    groups = {name: named if isinstance(named, Gathered) else on_the_way(named) for name, named in arrays.items()}
    filled = Filled(step, _hidden(final, 'tmp'), final, sum(named.nbytes for named in groups.values()))
    with _failing(filled):
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        filled.staged.mkdir()
        text = json.dumps({'step': step, 'state': state}, indent=1)
        (filled.staged / STATE).write_text(text, encoding='utf-8')
        for group, named in groups.items():
            write_arrays(filled.staged / (group + ARRAYS), named._replace(values=_one_by_one(named.values)))
        reach('checkpoint.arrays')
    return filled


def publish(filled: Filled, keep: int, keep_every: Optional[int] = None) -> Path:
    """Does the second half of `save`, which takes longer: flushes to the disk, computes checksums, renames, deletes."""
    with _failing(filled):
        entries = {}
        for file in sorted(filled.staged.iterdir()):
            sync_file(file)
            entries[file.name] = {'bytes': file.stat().st_size, 'sha256': _sha256(file)}
        # Last, so that a folder with a manifest has everything else.
        text = json.dumps({'format': FORMAT, 'files': entries}, indent=1)
        (filled.staged / MANIFEST).write_text(text, encoding='utf-8')
        sync_file(filled.staged / MANIFEST)
        reach('checkpoint.written')
        _publish(filled.staged, filled.final)
    _retire(filled.final.parent, filled.step, keep, keep_every)
    return filled.final


def copy(path: Path, folder: Path, keep: int, keep_every: Optional[int] = None) -> Path:
    """Copies the checkpoint `path` into another folder of checkpoints, with the retention rule of `save` there.

    What is written there has been compared with the checksums of the manifest.

    Raises:
        CheckpointError: it is damaged, or cannot be read.
        OSError: it cannot be written there.
    """
    final = Path(folder) / path.name
    staged = _hidden(final, 'tmp')
    files = _manifest(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _tidy(final.parent)
        staged.mkdir()
        for name, entry in files.items():
            with open(staged / name, 'wb') as target:
                _verify(path / name, entry, target)
        shutil.copyfile(path / MANIFEST, staged / MANIFEST)
        for file in staged.iterdir():
            sync_file(file)
        _publish(staged, final)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _retire(final.parent, int(path.name[len('step-'):]), keep, keep_every)
    return final


def saved_steps(folder: Path) -> List[int]:
    """Lists the steps of the checkpoints in `folder`, ascending, whole or not."""
    return sorted(_found(Path(folder)))


def discard_after(folder: Path, step: int) -> None:
    """Deletes the checkpoints in `folder` of later steps than `step`."""
    for other, path in _found(Path(folder)).items():
        if other > step:
            _discard(path)


def kept(steps: Iterable[int], keep: int, keep_every: Optional[int]) -> Set[int]:
    """Applies the retention rule: the newest `keep` of `steps`, and the multiples of `keep_every`."""
    steps = sorted(steps)
    return set(steps[-keep:]) | {step for step in steps if keep_every and step % keep_every == 0}


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint folder after comparing every file with the manifest's size and SHA-256.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    try:
        return _read(Path(path))
    except CheckpointError as error:
        raise CheckpointError(f'{error}; take another checkpoint (resume=auto finds the newest whole one)') from error


def newest(folder: Path, log: Callable[[str], None], *others: Path) -> Optional[Checkpoint]:
    """Reads the newest whole checkpoint in `folder` or, where that has none as new, in `others`.

    Returns None if there are none; `log` hears of those passed over.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    found = [(step, -number, path) for number, place in enumerate([folder, *others])
             for step, path in _found(Path(place)).items()]
    for step, _, path in sorted(found, reverse=True):
        try:
            return _read(path)
        except CheckpointError as error:
            if ran_out(error):  # nothing is wrong with it
                raise
            log(f'passing over the checkpoint of step {step}: {error}')
    if found:
        raise CheckpointError(
            f'{" and ".join(map(str, [folder, *others]))}: none of its {len(found)} checkpoints is whole '
            f'({", ".join(path.name for *_, path in sorted(found))}): restore one from a copy, or delete them all and '
            'train again')
    return None


def _hidden(final: Path, kind: str) -> Path:
    return final.with_name(f'.{final.name}.{kind}-{os.getpid()}')


def _found(folder: Path) -> Dict[int, Path]:
    """Step -> folder. One moved aside counts until another of its step is in place."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():  # '.' sorts before 's': the one in place wins
        match = re.fullmatch(r'step-(\d{8,})|\.step-(\d{8,})\.old-\d+', path.name)
        if match:
            found[int(match[1] or match[2])] = path
    return found


def _tidy(folder: Path) -> None:
    """Undoes what processes that are no more left unfinished."""
    for path in folder.glob('.step-*'):
        match = re.fullmatch(r'\.(step-\d{8,})\.(tmp|old)-(\d+)', path.name)
        if match and not alive(int(match[3])):
            final = folder / match[1]
            if match[2] == 'old' and not final.exists():
                os.rename(path, final)
            else:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _failing(filled: Filled) -> Iterator[None]:
    """Deletes what is hidden where this fails; says what a user can do about a disk that takes nothing."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(filled.staged, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(_failure(filled, error)) from error
        raise


def _retire(folder: Path, step: int, keep: int, keep_every: Optional[int]) -> None:
    """Deletes the checkpoints up to `step` that the retention rule does not keep."""
    steps = [other for other in _found(folder) if other <= step]
    for other in set(steps) - kept(steps, keep, keep_every):
        _discard(folder / f'step-{other:08d}')


def _publish(staged: Path, final: Path) -> None:
    """Flushes names and renames; where `final` exists, it is moved aside first, and back if the second rename fails."""
    sync_directory(staged)
    aside = _hidden(final, 'old')
    replaces = final.exists()
    if replaces:
        os.rename(final, aside)
    try:
        os.rename(staged, final)
    except OSError:
        if replaces:
            os.rename(aside, final)
        raise
    reach('checkpoint.published')
    sync_directory(final.parent)
    sync_directory(final.parent.parent)  # the folder of all checkpoints may be new, too
    shutil.rmtree(aside, ignore_errors=True)


def _discard(path: Path) -> None:
    """Deletes, hidden first, so that half a checkpoint is never found. What cannot be deleted stays: no harm done."""
    try:
        doomed = _hidden(path, 'tmp')
        os.rename(path, doomed)
    except OSError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def _one_by_one(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Arrays that are written one after another: the deadline counts for each."""
    for array in arrays:
        yield array
        watchdog.beat()


def _sha256(file: Path, copy_to: Optional[BinaryIO] = None) -> str:
    """The checksum of a file, which is written to `copy_to` on the way."""
    digest = hashlib.sha256()
    with open(file, 'rb') as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b''):
            digest.update(chunk)
            watchdog.beat()
            if copy_to:
                copy_to.write(chunk)
    return digest.hexdigest()


def _failure(filled: Filled, error: OSError) -> str:
    place = next(path for path in filled.final.absolute().parents if path.exists())
    room = free(place)
    older = _found(filled.final.parent)
    untouched = f'the ones before it are untouched, the newest is step {max(older)}' if older else 'there is none yet'
    return (f'{filled.final}: cannot save this checkpoint: {error.strerror or error}. It needs {filled.nbytes:,} bytes'
            + ('' if room is None else f', and {room:,} are free in {place}')
            + f'; {untouched}. Make room there or make it writable, and run the same command again')


def _read(path: Path) -> Checkpoint:
    files = _manifest(path)
    for name, entry in files.items():
        _verify(path / name, entry)
    try:
        content = json.loads((path / STATE).read_text(encoding='utf-8'))
        arrays = {name[:-len(ARRAYS)]: Stored(path / name) for name in files if name.endswith(ARRAYS)}
        return Checkpoint(content['step'], arrays, content['state'], path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:  # whole, but not what `save` writes
        raise CheckpointError(f'{path}: not a checkpoint of this program: {error!r}') from error


def _manifest(path: Path) -> Dict[str, Dict[str, Any]]:
    """File name -> {'bytes', 'sha256'}."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes().decode('utf-8'))
        if content['format'] not in range(1, FORMAT + 1):
            raise CheckpointError(f'{file}: format {content["format"]!r}, and this version of mxsimmim reads 1 to '
                                  f'{FORMAT}: a newer mxsimmim wrote it, or it is damaged')
        files = content['files']
        for name, entry in files.items():
            if not re.fullmatch(r'\w+\.(json|safetensors)', name) or set(entry) != {'bytes', 'sha256'}:
                raise CheckpointError(f'{file}: damaged: its entry {name!r} is not one that this program writes')
        return files
    except CheckpointError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f'{file}: missing: {path.name} is damaged, or not a checkpoint, which is a folder such '
                              f'as checkpoints/step-00001000') from error
    except OSError as error:
        raise CheckpointError(f'{file}: cannot be read: {error.strerror}') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{file}: damaged: {error!r}') from error


def _verify(file: Path, entry: Mapping[str, Any], copy_to: Optional[BinaryIO] = None) -> None:
    try:
        size = file.stat().st_size
        if size != entry['bytes']:
            raise CheckpointError(f'{file}: {size:,} bytes, and {MANIFEST} says {entry["bytes"]}')
        digest = _sha256(file, copy_to)
    except OSError as error:
        if copy_to:
            raise
        raise CheckpointError(f'{file}: cannot be read: {error.strerror}') from error
    if digest != entry['sha256']:
        raise CheckpointError(f'{file}: damaged: its SHA-256 is {digest}, and {MANIFEST} says {entry["sha256"]}')
