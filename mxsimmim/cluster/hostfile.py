"""Read the file that names the hosts of a job. Pure functions."""
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence


class Host(NamedTuple):
    """Describe a line of the hostfile; `port` None leaves it to ssh, `most` 0 is as many workers as asked for."""
    name: str
    port: Optional[int] = None
    slots: int = 1
    most: int = 0


def read_hostfile(text: str, name: str) -> List[Host]:
    """Read the hosts of a hostfile, one a line: ``host[:port] [slots=N] [max_slots=N]``.

    An IPv6 address is ``::1`` or ``[::1]:22``. What follows ``#`` is a comment.

    Raises:
        ValueError: a line that is not of this form, or no host at all; the text names file and line.
    """
    hosts: List[Host] = []
    lines: Dict[Any, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r'\s*=\s*', '=', line.partition('#')[0]).split()
        if not words:
            continue
        try:
            host = read_host(words)
            if host[:2] in lines:
                raise ValueError(f"'{words[0]}' stands in line {lines[host[:2]]} already: write it once, with slots=N")
        except ValueError as error:
            raise ValueError(f'{name}:{number}: {error}') from None
        lines[host[:2]] = number
        hosts.append(host)
    if not hosts:
        raise ValueError(f'{name}: no host in it: write one a line, as host[:port] [slots=N]')
    return hosts


def read_host(words: Sequence[str]) -> Host:
    """Read a host from the words of its line.

    Raises:
        ValueError: they do not make one.
    """
    found = re.fullmatch(r'((?:[\w.+-]+@)?)(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\](?::(\d+))?|([\w.-]+)(?::(\d+))?)', words[0])
    if found:
        user, inet6, port6, name, port = found.groups()
    elif words[0].count(':') > 1 and re.fullmatch(r'[0-9A-Fa-f:.]+(%\w+)?', words[0]):
        user, inet6, port6, name, port = '', words[0], None, None, None
    else:
        raise ValueError(f"'{words[0]}' is not a host: write host, host:port, an IPv6 address, or [IPv6]:port")
    if words[0].startswith('-'):
        raise ValueError(f"'{words[0]}' is not a host: a name does not begin with -")
    port = port or port6
    if port and not 1 <= int(port) <= 65535:
        raise ValueError(f'port {port} is not between 1 and 65535')
    given: Dict[str, int] = {}
    for word in words[1:]:
        found = re.fullmatch(r'(slots|max[_-]slots)=0*([1-9]\d{0,4})', word)
        if not found:
            raise ValueError(f"'{word}' after the host: only slots=N can stand there, N at least 1, and max_slots=N"
                             + (f': write slots={word}' if re.fullmatch(r'[1-9]\d*', word) else ''))
        given[found[1].replace('-', '_')] = int(found[2])
    slots, most = given.get('slots', 1), given.get('max_slots', 0)
    if 0 < most < slots:
        raise ValueError(f'slots={slots} is more than max_slots={most}')
    return Host(user + (name or inet6), int(port) if port else None, slots, most)
