r"""Names that are no text, and streams that take none. Standard library only.

A file name is bytes. Inside the program it is these bytes decoded as UTF-8, whatever the locale, with what is not
UTF-8 kept in surrogates (PEP 383), so that it still opens its file. Going out, `encode` gives files, tables and
terminals the bytes back, JSON has its escapes (\udce9), and pictures get what `drawn` makes of it (\xe9).
"""
import codecs
import io
import os
import re
import select
import sys
from typing import Any, Iterable, Optional, Tuple

ERRORS = 'mxsimmim'  # of our encoder: bytes for surrogates that stand for bytes, \u2026 for what a charset lacks
STALLED = 5.0  # seconds that a terminal may take before lines are lost
# What a terminal would obey: C0 but for tab and newline, DEL, C1, line separators, changes of direction.
CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]')
ONE_LINE = re.compile(f'[\t\n]|{CONTROL.pattern}')


def _escape(error: UnicodeError) -> Tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start:error.end]
    return b''.join(bytes([ord(char) - 0xdc00]) if '\udc80' <= char <= '\udcff'
                    else char.encode('ascii', 'backslashreplace') for char in part), error.end


codecs.register_error(ERRORS, _escape)


def encode(text: str) -> bytes:
    """UTF-8, with the bytes that were none as they were."""
    return text.encode('utf-8', ERRORS)


def decode(data: bytes) -> str:
    r"""The text of a file, in UTF-8, or as Windows marks UTF-16; lines end in \n.

    Raises:
        UnicodeDecodeError: marked as UTF-16, and it is not.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        found = data.decode('utf-16')
    else:
        found = data.decode('utf-8-sig', 'surrogateescape')
    return found.replace('\r\n', '\n').replace('\r', '\n')


def advice(names: Iterable[str], file: str) -> str:
    """What to do if `names` from a text file match nothing: where one is not UTF-8, how to convert the file."""
    other = next((name for name in names if re.search('[\udc80-\udcff]', name)), None)
    return '' if other is None else (f" ('{drawn(other)}' is not UTF-8; of a file in Latin-1 or Windows-1252: iconv -f "
                                     f'WINDOWS-1252 -t UTF-8 {file} > new.txt)')


def shown(text: str) -> str:
    """Without what a terminal would obey, such as the escape codes in a name, but for tabs and newlines."""
    return CONTROL.sub(_backslashed, text)


def one_line(name: str) -> str:
    """As `shown`, for a name in a table or a message: on one line, whatever is in it."""
    return ONE_LINE.sub(_backslashed, name)


def drawn(name: str) -> str:
    r"""As `one_line`, for what wants Unicode, such as fonts: bytes that are none as \xe9."""
    return re.sub('[\udc80-\udcff]', lambda found: f'\\x{ord(found[0]) - 0xdc00:02x}', one_line(name)).encode(
        'utf-8', 'backslashreplace').decode()


def _backslashed(found: Any) -> str:
    return found[0].encode('unicode_escape').decode()


def show(text: str, stream: Any) -> bool:
    """Prints `text`, if anything takes it; whether it did."""
    if stream is None:
        return False
    try:
        try:
            print(shown(text), file=stream, flush=True)
        except UnicodeEncodeError:
            print(shown(text).encode('ascii', ERRORS).decode('ascii', 'backslashreplace'), file=stream, flush=True)
    except (OSError, ValueError):  # closed, full, gone
        return False
    return True


class Unwritten(ValueError):
    """Standard output does not take what a command was called for."""


class _Output(io.FileIO):
    """Standard output or error: once it fails, it takes and forgets everything."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, 'w', closefd=False)
        self.needed = False  # whether a failure is one of the command
        self.lost: Optional[OSError] = None

    def write(self, data: Any) -> int:
        """Writes some of `data`; the number of bytes that are done with.

        Raises:
            Unwritten, BrokenPipeError: the first time, where the stream is `needed`.
        """
        if self.lost:
            return len(data)
        try:
            written = super().write(data)
            while written is None:  # a terminal that somebody has made non-blocking
                if not select.select([], [self], [], STALLED)[1]:
                    raise OSError(0, f'nothing taken for {STALLED:.0f} s')
                written = super().write(data)
            return written
        except OSError as error:
            self.lost = error
            if not self.needed:
                return len(data)
            if isinstance(error, BrokenPipeError):
                raise
            raise Unwritten(f'standard output cannot be written: {error.strerror}') from None


def open_streams() -> None:
    """Makes the standard streams of a process of ours ones that take any text and that end no work when they fail.

    A closed descriptor is opened on /dev/null: the next file to be opened would get its number, and whatever some
    library prints.
    """
    for descriptor, name, flags in ((0, 'stdin', os.O_RDONLY), (1, 'stdout', os.O_WRONLY), (2, 'stderr', os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest number that is free
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if descriptor == 0:
            sys.stdin = sys.stdin or open(0, closefd=False)
            continue
        old = getattr(sys, name)
        encoding = getattr(old, 'encoding', None) or 'utf-8'
        if codecs.lookup(encoding).name == 'ascii':  # the C locale, whose terminals pass bytes on as they are
            encoding = 'utf-8'
        if old:
            old.flush()
        buffer = io.BufferedWriter(_Output(descriptor))
        plain = name == 'stderr' or buffer.isatty() or bool(os.environ.get('PYTHONUNBUFFERED'))
        setattr(sys, name, io.TextIOWrapper(buffer, encoding, ERRORS, line_buffering=plain, write_through=plain))


def needs_output(needed: bool) -> None:
    """Whether from here on standard output that fails is an error."""
    raw = getattr(getattr(sys.stdout, 'buffer', None), 'raw', None)
    if isinstance(raw, _Output):
        raw.needed = needed


def restart_in_utf8() -> None:
    """Begins this command anew where the locale has another charset for file names than UTF-8; else it comes back.

    The terminal keeps its own.
    """
    program = sys.argv[0]
    if sys.getfilesystemencoding().lower() == 'utf-8' or sys.flags.utf8_mode or not os.path.isfile(program):
        return
    if 'PYTHONIOENCODING' not in os.environ and sys.stderr:
        os.environ['PYTHONIOENCODING'] = sys.stderr.encoding
    how = ['-m', 'mxsimmim'] if os.path.basename(program) == '__main__.py' else [program]
    os.execv(sys.executable, [sys.executable, '-X', 'utf8', *(f'-W{option}' for option in sys.warnoptions), *how,
                              *sys.argv[1:]])
