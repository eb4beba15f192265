"""Hosts reached over ssh: the commands that start an agent on each, and that copy the working directory there."""
import shlex
from typing import List, Optional, Sequence

from mxsimmim.cluster.job import Host

# Never a question; a host that vanishes is noticed in some 9 s; a connection of its own, whatever the user shares.
OPTIONS = ('-o', 'BatchMode=yes', '-o', 'ConnectTimeout=10', '-o', 'ServerAliveInterval=3', '-o',
           'ServerAliveCountMax=3', '-o', 'ControlPath=none', '-o', 'ClearAllForwardings=yes')
LEFT_OUT = ('/runs', '/logs', '.git', '.venv', '__pycache__')  # by --sync-dst-dir
REMEDIES = (('not resolve', 'correct the name in the hostfile, or give it a HostName in ~/.ssh/config'),
            ('Permission denied', 'copy your key there: ssh-copy-id {host}; if it has a passphrase: ssh-add'),
            ('Host key verification failed', 'look at its key and accept it, once: ssh {host}'),
            ('IDENTIFICATION HAS CHANGED', 'if the host was set up anew: ssh-keygen -R {host}'),
            ('refused', 'does sshd run there, on this port? The hostfile takes host:port'),
            ('timed out', 'is the host up, and on this network?'), ('No route', 'is the host up, and on this network?'))


def agent(host: Host, python: str, bootstrap: str, path: Optional[str] = None) -> List[str]:
    """The command whose standard input and output become the channel to the agent on `host`.

    The agent's Python is `python`, the launcher's own, where the host has it, else ``python3``; with `path`, the PATH
    that the user gives to the job, it is that PATH's ``python3``.
    """
    if path is None:
        find, wanted = f'p={shlex.quote(python)}; [ -x "$p" ] || p=python3', f'{python} or python3'
    else:
        find, wanted = f'PATH={shlex.quote(path)}; export PATH; p=python3', 'python3'
    script = (f'{find}; command -v "$p" > /dev/null || {{ echo "no Python: there is no {wanted} on PATH ($PATH): '
              f'install it, or name its folder with --env PATH=..." >&2; exit 127; }}; '
              f'exec "$p" -X utf8 -c {shlex.quote(bootstrap)}')
    port = ['-p', str(host.port)] if host.port else []
    return ['ssh', '-T', *OPTIONS, *port, '--', host.name, 'exec /bin/sh -c ' + shlex.quote(script)]


def remedy(host: Host, said: str) -> str:
    """What ssh said last, and what to do about it."""
    for part, way_out in REMEDIES:
        if part in said:
            port = f'-p {host.port} ' if host.port else ''
            # MPICH's and Horovod's host:N is a number of processes.
            few = host.port != 22 and 0 < (host.port or 0) <= 512
            slots = f'; for {host.port} workers write {host.name} slots={host.port}' if few else ''
            return f'{said} ({way_out.format(host=port + host.name)}{slots})'
    return said


def directory(folder: str) -> str:
    """A folder on a host: absolute, or counted from the home directory, where ssh begins."""
    return folder[2:] or '.' if folder.startswith('~/') else folder


def sync(host: Host, folder: str) -> List[str]:
    """The rsync command that copies the working directory, but for runs, logs and what is made anew, to a host."""
    words: Sequence[str] = ['ssh', *OPTIONS, *(['-p', str(host.port)] if host.port else [])]
    user, at, name = host.name.rpartition('@')
    name = f'[{name}]' if ':' in name else name
    folder = directory(folder)
    return ['rsync', '-azs', '--timeout=30', *(f'--exclude={pattern}' for pattern in LEFT_OUT), '-e', ' '.join(words),
            f'--rsync-path=mkdir -p {shlex.quote(folder)} && rsync', './', f'{user}{at}{name}:{folder}/']
