"""Paths as people type them, and small files of which nothing is known yet. Standard library only."""
import errno
import os
import re
import select
import stat
import time
from typing import List, Mapping, Union

LARGEST = 1 << 18  # bytes of a file that people write by hand
PATIENCE = 10.0  # seconds in which the next part of a pipe must come
BUILT_IN = re.compile(r'digits|digit-scenes(-val)?(?:-(\d+)x(\d+))?', re.ASCII)  # data that are no file
VARIABLE = re.compile(r'\$(?:(\$)|([A-Za-z_]\w*)|\{([^{}]*)\})', re.ASCII)


def expand(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A path, or several with ``;`` between them, with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced.

    ``$$`` is a dollar sign, and so is any in the path of something that exists under its literal name.

    Raises:
        ValueError: a variable is not set, or a user unknown.
    """
    text = ';'.join(home(part) for part in text.split(';'))
    if '$' not in text or os.path.lexists(text):
        return text

    def value(found: 're.Match') -> str:
        dollar, plain, braced = found.groups()
        name = plain if plain is not None else braced
        if dollar:
            return dollar
        if not re.fullmatch(r'[A-Za-z_]\w*', name, re.ASCII):
            raise ValueError(f"'{found[0]}' in '{text}' is no variable: write ${{NAME}}, or $$ for a dollar sign")
        if not environ.get(name):
            raise ValueError(f"variable {name} of '{text}' is not set here: set it (export {name}=...), or write $$ "
                             'for a dollar sign')
        return environ[name]
    return VARIABLE.sub(value, text)


def escape(path: str) -> str:
    """What `expand` turns into this path, on any machine."""
    return path.replace('$', '$$')


def home(text: str) -> str:
    """A path with the ``~`` or ``~user`` at its beginning replaced, as a shell does where it sees one.

    Raises:
        ValueError: there is no such user, or no home folder.
    """
    if not text.startswith('~'):
        return text
    path = os.path.expanduser(text)
    if path.startswith('~'):
        user = text[1:].partition('/')[0]
        if user and os.path.lexists(text):
            return './' + text
        raise ValueError(f"'{text}': " + (f"no user '{user}' here" if user else 'no home folder is known: set HOME')
                         + f"; a folder of this name is './{text}'")
    return path


def contents(path: Union[str, os.PathLike], largest: int = LARGEST) -> bytes:
    """The whole content of a small file or pipe.

    Raises:
        OSError: it cannot be read, is larger than `largest` bytes, or is a pipe or terminal out of which nothing comes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        parts: List[bytes] = []
        size, limit = 0, time.monotonic() + PATIENCE
        while size <= largest:
            try:
                part = os.read(descriptor, largest + 1 - size)
            except BlockingIOError:  # a pipe or terminal
                if not select.select([descriptor], [], [], max(0, limit - time.monotonic()))[0]:
                    raise OSError(errno.ETIMEDOUT, f'nothing came out of it for {PATIENCE:.0f} s') from None
                continue
            if not part:
                if not size and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    raise OSError(errno.EPIPE, 'a pipe that nobody writes to')
                return b''.join(parts)
            parts.append(part)
            size, limit = size + len(part), time.monotonic() + PATIENCE
        raise OSError(errno.EFBIG, f'larger than {largest >> 10} KiB')
    finally:
        os.close(descriptor)
