"""What file systems refuse: what a run can do without is a warning, what it cannot is an error before it begins."""
import contextlib
import errno
import fcntl
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mxsimmim.system import files
from mxsimmim.training import run_folder
from mxsimmim.training.run_folder import locked


def refuse(monkeypatch, module, name, number, when=lambda *_: True):
    """From here on, `module.name` fails with this errno where `when` says so of its arguments."""
    real = getattr(module, name)

    def fails(*arguments, **keys):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **keys)
    monkeypatch.setattr(module, name, fails)


def is_folder(descriptor):
    return os.path.isdir(f'/proc/self/fd/{descriptor}')


@pytest.mark.parametrize('name', ['EINVAL', 'ENOTSUP', 'ENOSYS', 'EBADF', 'EACCES', 'EISDIR', 'EPERM', 'EROFS'])
def test_a_folder_that_cannot_be_flushed(monkeypatch, tmp_path, name):
    refuse(monkeypatch, os, 'fsync', getattr(errno, name))
    assert files.sync_directory(tmp_path).errno == getattr(errno, name)


@pytest.mark.parametrize('name', ['EIO', 'ENOSPC', 'EDQUOT'])
def test_content_that_is_lost(monkeypatch, tmp_path, name):
    (tmp_path / 'file').write_text('x')
    refuse(monkeypatch, os, 'fsync', getattr(errno, name))
    for sync, path in ((files.sync_directory, tmp_path), (files.sync_file, tmp_path / 'file')):
        with pytest.raises(OSError) as caught:
            sync(path)
        assert caught.value.errno == getattr(errno, name)


def test_flushing_a_file(monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('x')
    files.sync_file(tmp_path / 'file')
    assert files.sync_directory(tmp_path) is None
    for name in ('EINVAL', 'ENOSYS', 'EOPNOTSUPP'):
        with monkeypatch.context() as patch:
            refuse(patch, os, 'fsync', getattr(errno, name))
            files.sync_file(tmp_path / 'file')
    refuse(monkeypatch, os, 'fsync', errno.EBADF)  # of a file it is none of the ways to say that there is no fsync
    with pytest.raises(OSError, match='Bad file'):
        files.sync_file(tmp_path / 'file')


@pytest.mark.parametrize('name', ['ENOLCK', 'ENOSYS', 'EOPNOTSUPP', 'EINVAL', 'EPERM', 'EIO', 'EACCES'])
def test_no_locks_accuse_nobody(monkeypatch, tmp_path, name):
    refuse(monkeypatch, fcntl, 'flock', getattr(errno, name))
    for owner in ('', '0' * 9 + '4194305', 'nonsense', str(os.getpid())):  # beyond the highest number of a process
        (tmp_path / '.lock').write_text(owner)
        said = []
        with locked(tmp_path, said.append):
            assert (tmp_path / '.lock').read_text() == str(os.getpid())
        warning, = said
        assert warning == (f'warning: the file system of {tmp_path} has no locks ({os.strerror(getattr(errno, name))}):'
                           ' nothing keeps another process from training there, too')


def test_a_lock_that_is_taken(monkeypatch, tmp_path):
    said = []
    program = ('import fcntl, sys, os; f = open(sys.argv[1], "w"); fcntl.flock(f, fcntl.LOCK_EX); '
               'f.write(str(os.getpid())); f.flush(); print("ready", flush=True); sys.stdin.read()')
    with subprocess.Popen([sys.executable, '-c', program, str(tmp_path / '.lock')], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b'ready\n'
        complaint = f'{tmp_path}: process {other.pid} is training in this folder: wait for it, stop it, or set name='
        with pytest.raises(ValueError) as caught, locked(tmp_path, said.append):
            pass
        assert str(caught.value) == complaint
        with monkeypatch.context() as patch:  # POSIX lets a lock say this, too
            refuse(patch, fcntl, 'flock', errno.EACCES)
            with pytest.raises(ValueError) as caught, locked(tmp_path, said.append):
                pass
            assert str(caught.value) == complaint
        other.stdin.close()
        with locked(tmp_path, said.append, patience=60):  # it is about to end
            pass
    with locked(tmp_path, said.append):  # a stale one is nobody's
        pass
    assert not said


def test_a_folder_in_use_on_another_host(monkeypatch, tmp_path):
    """Where locks do not reach other hosts, signs of life in the folder do."""
    monkeypatch.setattr(run_folder, 'BEAT', 0.2)
    refuse(monkeypatch, fcntl, 'flock', errno.ENOLCK)
    (tmp_path / '.holder').write_text('123 elsewhere 000000000007')
    with locked(tmp_path, list):  # of a host that is no more
        first = (tmp_path / '.holder').read_text()
        assert first.startswith(f'{os.getpid()} {platform.node()} ')
        with monkeypatch.context() as patch:
            patch.setattr(platform, 'node', lambda: 'elsewhere')
            with pytest.raises(ValueError) as caught, locked(tmp_path, list):
                pass
        assert str(caught.value) == (f'{tmp_path}: process {os.getpid()} on {platform.node()} is training in this '
                                     'folder: wait for it, stop it, or set name=')
        assert (tmp_path / '.holder').read_text() > first
    assert not (tmp_path / '.holder').exists()
    monkeypatch.setattr(run_folder, 'BEAT', 1000)
    (tmp_path / '.holder').write_text(f'123 {platform.node()} 000000000007')
    with locked(tmp_path, list):  # nobody waits: the lock of the same host would have told
        pass


def tree(folder):
    return sorted(str(path) for path in Path(folder).rglob('*'))


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'there' / 'config.yaml').write_text('x')
    before = tree(tmp_path)
    for place in ('there', 'new', 'a/b/c', os.fsdecode(b'caf\xe9'), 'n' * 255):
        assert files.try_place(tmp_path / place) == []
        assert tree(tmp_path) == before


@pytest.mark.parametrize('module, name, number, when, complaint', [
    (os, 'mkdir', errno.EROFS, lambda *_: True, 'cannot make a folder (Read-only file system): set output= or name='),
    (os, 'replace', errno.EPERM, lambda *_: True, 'cannot rename a file (Operation not permitted): set output= or'),
    (os, 'rename', errno.ENOSYS, lambda *_: True, 'cannot rename a folder (Function not implemented): set output= or'),
    (os, 'fsync', errno.ENOSPC, lambda *_: True, 'cannot write a file (No space left on device): make room there, or'),
    (os, 'fsync', errno.EDQUOT, lambda *_: True, 'cannot write a file (Disk quota exceeded): make room there, or set'),
    (os, 'fsync', errno.EIO, is_folder, 'cannot flush a folder to the disk (Input/output error): make room there, or'),
    (os, 'rmdir', errno.EPERM, lambda path, *_: '.try-' in str(path), 'cannot delete a folder (Operation not permit'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_place_that_will_not_do(monkeypatch, tmp_path, module, name, number, when, complaint):
    with monkeypatch.context() as patch:
        refuse(patch, module, name, number, when)
        with pytest.raises(ValueError) as caught:
            files.try_place(tmp_path / 'a' / 'b')
    assert str(caught.value).startswith(f'{tmp_path}/a/b: cannot write the run there: {complaint}')
    assert name == 'rmdir' or tree(tmp_path) == []


def test_a_place_that_flushes_no_folders(monkeypatch, tmp_path):
    refuse(monkeypatch, os, 'fsync', errno.EINVAL, is_folder)
    warning, = files.try_place(tmp_path / 'run')
    assert warning.startswith(f'warning: the file system of {tmp_path}/run does not flush folders to the disk (Invalid')
    assert tree(tmp_path) == []


def test_files_of_somebody_else(monkeypatch, tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    monkeypatch.setattr(os, 'access', lambda path, mode: not str(path).endswith('checkpoints'))
    with pytest.raises(ValueError, match=r'cannot write to checkpoints, which is there already \(Permission denied\)'):
        files.try_place(tmp_path)


def test_names_too_long_and_files_in_the_way(tmp_path):
    (tmp_path / 'file').write_text('')
    for place, reason in (('n' * 256, 'File name too long'), ('file', 'File exists'), ('file/run', 'Not a directory')):
        with pytest.raises(ValueError, match=f'cannot make a folder .{reason}.: set output= or name='):
            files.try_place(tmp_path / place)
        assert tree(tmp_path) == [str(tmp_path / 'file')]


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'none', str(folder)], capture_output=True,
                          check=False) if shutil.which('mount') else None
    if done is None or done.returncode:
        pytest.skip('mounting a small tmpfs needs root')
    try:
        yield folder
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def test_a_full_and_a_read_only_disk(tmp_path):
    with mounted(tmp_path / 'small', 'size=64k') as small:
        assert files.free(small / 'not' / 'yet') == 65536
        files.check_room(small, 32768, 0)
        with pytest.raises(ValueError) as caught:
            files.check_room(small, 32769, 0)
        assert str(caught.value) == (f'{small}: checkpoints need 65,538 bytes there (32,769 each), and 65,536 are free:'
                                     ' make room, or set output=')
        files.check_room(small, 65536, 1)  # takes the place of the one before the last
        with pytest.raises(ValueError, match='need 65,537 bytes there'):
            files.check_room(small, 65537, 3)
        (small / 'rest').write_bytes(bytes(65536 - 4096))  # one page is left
        with pytest.raises(ValueError, match=r'cannot write a file \(No space left on device\): make room there, or'):
            files.try_place(small / 'run')
        assert tree(small) == [str(small / 'rest')]
        subprocess.run(['mount', '-o', 'remount,ro', str(small)], check=True)
        with pytest.raises(ValueError, match=r'cannot make a folder \(Read-only file system\): set output= or name='):
            files.try_place(small / 'run')


def test_a_file_system_that_does_not_tell_its_size(monkeypatch, tmp_path):
    monkeypatch.setattr(os, 'statvfs', lambda path: os.statvfs_result([4096, 4096] + [0] * 8))
    assert files.free(tmp_path) is None
    files.check_room(tmp_path, 10 ** 18, 0)
    refuse(monkeypatch, os, 'statvfs', errno.ENOSYS)
    assert files.free(tmp_path) is None
