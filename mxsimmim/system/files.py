"""What a run asks of a file system, of which some (NFS, Lustre, CIFS, VirtualBox, FUSE) have only a part.

Standard library only.
"""
import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any, Iterator, List, Optional

NOT_HERE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})  # "I have no such operation"
LOST = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT})  # what was written is not on the disk
# Of an earlier start of the same run, and written again.
OWN = ('config.yaml', 'metrics.jsonl', 'logs', 'logs/rank-0.log', 'checkpoints', 'best')


class Taken(BlockingIOError):
    """Another process holds the lock; `owner` is what it wrote into the file."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


def sync_file(path: Path) -> None:
    """Waits until a file's content is on the disk, where the file system can say so.

    Raises:
        OSError: it is not, and never will be.
    """
    descriptor = os.open(path, os.O_RDWR)  # CIFS flushes nothing that was opened to be read
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> Optional[OSError]:
    """Waits until a folder's names are on the disk; returns why they may not be, where the file system has no way.

    Raises:
        OSError: they are not, and never will be.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return error
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in LOST:
            raise
        return error
    finally:
        os.close(descriptor)
    return None


def lock(file: Any) -> Optional[OSError]:
    """Locks an open text file for this process; returns why not, where the file system has no locks.

    Raises:
        Taken: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        # EACCES is what POSIX lets a lock say that is taken, and what AppArmor and SELinux say who allow none.
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) or (
                error.errno == errno.EACCES and owner.isdecimal() and alive(int(owner))):
            raise Taken(owner) from None
        return error
    return None


def alive(pid: int) -> bool:
    """Whether another process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # not ours to signal
        return True
    return pid != os.getpid()


def try_place(folder: Path) -> List[str]:
    """Does in `folder` what a run does there: makes, writes, flushes, renames, deletes. Leaves nothing behind.

    Returns:
        Warnings about what this file system lacks that a run can do without.

    Raises:
        ValueError: what the run needs and cannot have.
    """
    made = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]  # innermost first
    first, second = (folder / f'.try-{os.getpid()}{end}' for end in ('', '.renamed'))
    with _refused(folder, made, first, second) as doing:
        doing('make a folder')
        folder.mkdir(parents=True, exist_ok=True)
        first.mkdir()
        doing('write a file')
        for name in ('new', 'old'):
            (first / name).write_bytes(bytes(1 << 12))
            sync_file(first / name)
        doing('rename a file')
        os.replace(first / 'new', first / 'old')
        doing('rename a folder')
        os.rename(first, second)
        doing('flush a folder to the disk')
        unflushed = sync_directory(second) or sync_directory(folder)
        doing('delete a folder')
        shutil.rmtree(second)
        for name in OWN:
            doing(f'write to {name}, which is there already')
            if os.path.exists(folder / name) and not os.access(folder / name, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return [f'warning: the file system of {folder} does not flush folders to the disk ({unflushed.strerror}): after a '
            'power cut the newest checkpoint may not be there'] if unflushed else []


@contextlib.contextmanager
def _refused(folder: Path, made: List[Path], *probes: Path) -> Iterator[Any]:
    """Turns an error into words for the user, and removes what was made; the function that it gives notes the step."""
    steps = ['']
    try:
        yield steps.append
    except OSError as error:
        way_out = 'make room there, or set output=' if error.errno in LOST else 'set output= or name='
        raise ValueError(f'{folder}: cannot write the run there: cannot {steps[-1]} ({error.strerror or error}): '
                         f'{way_out}') from error
    finally:
        for probe in probes:
            shutil.rmtree(probe, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def free(folder: Path) -> Optional[int]:
    """Bytes that may be written in `folder`, or where it will be; None where the file system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        found = os.statvfs(next(parent for parent in (folder, *folder.absolute().parents) if parent.exists()))
        if found.f_blocks:
            return found.f_bavail * found.f_frsize
    return None


def check_room(folder: Path, size: int, saved: int) -> None:
    """Checks that a folder has room for checkpoints.

    Args:
        folder: of a run.
        size: bytes of a checkpoint.
        saved: how many of them it holds.

    Raises:
        ValueError: there is no room for two, the newest and the one before it, which goes when the newest is whole.
    """
    needed, room = max(1, 2 - saved) * size, free(folder)
    if room is not None and room < needed:
        raise ValueError(f'{folder}: checkpoints need {needed:,} bytes there ({size:,} each), and {room:,} are free: '
                         'make room, or set output=') from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
