"""Run a job on hosts that are reached over ssh: an agent on each, and a copy of the working directory by rsync."""
import shlex
import sys
from typing import List, Optional, Sequence

from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.connections import BOOTSTRAP, AgentConnection
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec

# Never a question; a host that vanishes is noticed in some 9 s; a connection of its own, whatever the user shares.
OPTIONS = ('-o', 'BatchMode=yes', '-o', 'ConnectTimeout=10', '-o', 'ServerAliveInterval=3', '-o',
           'ServerAliveCountMax=3', '-o', 'ControlPath=none', '-o', 'ClearAllForwardings=yes')
LEFT_OUT = ('/runs', '/logs', '.git', '.venv', '__pycache__')  # of the copy
REMEDIES = (('not resolve', 'correct the name in the hostfile, or give it a HostName in ~/.ssh/config'),
            ('Permission denied', 'copy your key there: ssh-copy-id {host}; if it has a passphrase: ssh-add'),
            ('Host key verification failed', 'look at its key and accept it, once: ssh {host}'),
            ('IDENTIFICATION HAS CHANGED', 'if the host was set up anew: ssh-keygen -R {host}'),
            ('refused', 'does sshd run there, on this port? The hostfile takes host:port'),
            ('timed out', 'is the host up, and on this network?'), ('No route', 'is the host up, and on this network?'))


class SshBackend(Backend):
    """Start an agent on each host of the hostfile, through a connection of ssh that lasts as long as the job."""
    needs_hostfile = True
    copies_by_ssh = True

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        return spec.hosts

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        for agent in agents:
            agent.open(agent_command(agent.host, sys.executable, BOOTSTRAP, spec.worker_variables.get('PATH')))

    def explain(self, host: Host, said: str) -> str:
        return explain(host, said)

    def copy_command(self, host: Host, directory: str) -> List[str]:
        return copy_command(host, directory)


def agent_command(host: Host, python: str, bootstrap: str, path: Optional[str] = None) -> List[str]:
    """Build the command whose standard input and output carry the messages of the agent on `host`.

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


def explain(host: Host, said: str) -> str:
    """Add to what ssh or rsync said what to do about it."""
    for part, way_out in REMEDIES:
        if part in said:
            port = f'-p {host.port} ' if host.port else ''
            # MPICH's and Horovod's host:N is a number of processes.
            few = host.port != 22 and 0 < (host.port or 0) <= 512
            slots = f'; for {host.port} workers write {host.name} slots={host.port}' if few else ''
            return f'{said} ({way_out.format(host=port + host.name)}{slots})'
    return said


def copy_command(host: Host, directory: str) -> List[str]:
    """Build the rsync that copies the working directory to a host over ssh."""
    words = ['ssh', *OPTIONS, *(['-p', str(host.port)] if host.port else [])]
    user, at, name = host.name.rpartition('@')
    return rsync(words, f'{user}{at}[{name}]' if ':' in name else host.name, directory)


def rsync(shell: Sequence[str], host: str, directory: str) -> List[str]:
    """Build the rsync that copies the working directory to a host, but for runs, logs and what is made anew.

    Args:
        shell: the words to which rsync adds the host and a command, to have it run there.
    """
    return ['rsync', '-azs', '--timeout=30', *(f'--exclude={pattern}' for pattern in LEFT_OUT), '-e', ' '.join(shell),
            f'--rsync-path=mkdir -p {shlex.quote(directory)} && rsync', './', f'{host}:{directory}/']
