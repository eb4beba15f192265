"""What workers and our parameter servers agree on: signed commands, and which key means what."""
import hashlib
import hmac
import json
import os
import re
from typing import Any, Dict, Mapping, NamedTuple

KEY_FILE = 'MXSIMMIM_KEY_FILE'
HEAD = 0  # of our commands: the only one that MXNet hands to a controller, and where it expects a pickled optimizer
# The board: one array on a server to which every update adds. STALENESS is the sum, over updates, of how many updates
# by others came between the pull of the weights and the push of their gradient; STOP counts workers that want to end,
# SAVE checkpoints that the clock asked for; the NOTED numbers come from the workers' logs.
UPDATES, IMAGES, LOSS, STALENESS, STOP, SAVE, NOTES = range(7)
NOTED = 4
FIELDS = NOTES + 1 + NOTED
# What float32 rounds off is in the second row: MXNet's servers keep no more even of a float64, and images are counted
# far beyond 2**24.
BOARD_SHAPE = (2, FIELDS)


class Layout(NamedTuple):
    """Keys by number.

    A weight, its moments and their slices lie on one server, as MXNet takes a small array's key modulo the number of
    servers for its place: numbers of what belongs together differ by multiples of it.
    """
    weights: int
    moments: int
    servers: int

    @property
    def stride(self) -> int:
        """Return the distance between a weight's key and those of its moments."""
        return -(-self.weights // self.servers) * self.servers

    @property
    def board(self) -> int:
        """Return the board's key."""
        return (1 + self.moments) * self.stride


def job_key(environ: Mapping[str, str]) -> bytes:
    """Read the job's key, which its launcher made.

    Raises:
        ValueError: there is none.
    """
    path = environ.get(KEY_FILE)
    if not path:
        raise ValueError(f'{KEY_FILE} is not set: parameter servers take commands only from their own job: start it '
                         'with tools/launch.py, which makes a key and hands it to every process')
    try:
        with open(path, 'rb') as file:
            text = file.read().decode('ascii', 'replace').strip()
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ValueError(f'{KEY_FILE}={path}: others than its owner may read it: chmod 600 {path}')
    except OSError as error:
        raise ValueError(f'{KEY_FILE}={path}: cannot be read: {error.strerror}') from None
    if not re.fullmatch('([0-9a-f]{2}){16,}', text):
        raise ValueError(f'{KEY_FILE}={path}: a key has at least 16 bytes, as hexadecimal digits; this is something '
                         f'else, of {len(text)} characters')
    return bytes.fromhex(text)


def sign(command: Dict[str, Any], number: int, key: bytes) -> str:
    """Return a command as text, with a number that grows from command to command and a signature (HMAC-SHA256)."""
    text = json.dumps([number, command])
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest() + text


def opened(body: str, last: int, key: bytes) -> Any:
    """(number, command) of what `sign` returned.

    Raises:
        ValueError: it was not signed with this key, or is no younger than command number `last`.
    """
    signature, text = body[:64], body[64:]
    expected = hmac.new(key, text.encode('utf-8', 'surrogateescape'), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(signature.encode('utf-8', 'surrogateescape'), expected.encode()):
        raise ValueError('not signed with the key of this job')
    number, command = json.loads(text)
    if number <= last:
        raise ValueError(f'command number {number} came again')
    return number, command
