"""Three hosts on one machine: a network namespace each, on a switch in a fourth, each with its name and its sshd.

A host has its own network, host name, processes, mounts (a folder can be hidden from one host alone), TMPDIR and
/dev/shm, and shares the other files, users and clock of the machine. `eth0` is 10.77.N.1, .2, .3 and `eth1`
10.78.N.1, .2, .3; the machine itself is .9 on both. Everything bears the process id of its maker, so that a later run
can remove what a killed one left. A host's clock cannot be set apart: time namespaces cover the monotonic clocks alone.
"""
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

PROGRAMS = ('ip', 'tc', 'unshare', 'nsenter', 'sshd', 'ssh', 'ssh-keygen', 'rsync')  # what the hosts are made with
PATH = os.environ['PATH'] + ':/usr/sbin:/sbin'
NETWORKS = (77, 78)  # second byte of the addresses of eth0, eth1
DEADLINE = 20  # seconds, for anything here


def run(*command: object) -> str:
    """Output of a command that must succeed; RuntimeError with what it said."""
    result = subprocess.run([str(word) for word in command], env=dict(os.environ, PATH=PATH), timeout=DEADLINE,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            universal_newlines=True)
    if result.returncode:
        raise RuntimeError(f'{" ".join(map(str, command))}: exit {result.returncode}: {result.stderr.strip()}')
    return result.stdout


def words_of(pid: int) -> str:
    """The command line of a process; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f'/proc/{pid}/cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace').strip()
    return ''


def wait_for(condition, what: str, seconds: float = DEADLINE) -> None:
    """Returns as soon as `condition()` is true; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'not within {seconds} s: {what}'
        time.sleep(0.05)


def why_not() -> str:
    """Why this machine cannot hold the hosts; empty when it can."""
    if os.geteuid() != 0:
        return 'needs root'
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f'needs {", ".join(absent)} (Debian: iproute2, util-linux, openssh-server, openssh-client, rsync)'
    name = f'mx{os.getpid()}-try'
    try:
        run('ip', 'netns', 'add', name)
        run('ip', 'netns', 'exec', name, 'unshare', '--uts', '--mount', '--pid', '--fork', '--mount-proc', 'true')
        run('ip', '-n', name, 'link', 'add', 'switch', 'type', 'bridge')
        run('ip', '-n', name, 'link', 'add', 'here', 'type', 'veth', 'peer', 'name', 'there')
    except RuntimeError as error:
        return f'this kernel or container does not let us make network namespaces: {error}'
    finally:
        subprocess.run(['ip', 'netns', 'del', name], env=dict(os.environ, PATH=PATH), stderr=subprocess.DEVNULL)
    return ''


def _namespaces() -> List[str]:
    return [line.split()[0] for line in run('ip', 'netns', 'list').splitlines()]


def _remove(pid: int) -> None:
    """Everything that the process `pid` made."""
    mine = [name for name in _namespaces() if name.startswith(f'mx{pid}-')]
    for name in mine:
        for process in run('ip', 'netns', 'pids', name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), 9)
    for name in mine:
        wait_for(lambda: not run('ip', 'netns', 'pids', name).split(), f'{name} is empty')
        run('ip', 'netns', 'del', name)
    for link in json.loads(run('ip', '-j', 'link')):  # else the kernel takes them away when it finds the time
        if link['ifname'].startswith(f'mx{pid}-'):
            with contextlib.suppress(RuntimeError):  # it just found it
                run('ip', 'link', 'del', link['ifname'])


def remove_leftovers() -> None:
    """What killed runs left behind."""
    for pid in {int(found[1]) for found in map(re.compile(r'mx(\d+)-').match, _namespaces()) if found}:
        if not os.path.exists(f'/proc/{pid}'):
            _remove(pid)


class Hosts:
    """`count` hosts named host0, host1, …, from the call of `start` to that of `stop`. Hosts go by their index."""

    def __init__(self, folder: Path, count: int = 3):
        self.folder, self.count = Path(folder), count
        self.names = [f'host{n}' for n in range(count)]
        self.prefix = f'mx{os.getpid()}-'
        routes = run('ip', '-4', 'route', 'show', 'table', 'all')
        tried = (1 + (os.getpid() + n) % 254 for n in range(254))  # two that look at once take two
        self.subnet = next(n for n in tried if not re.search(rf'\b10\.(77|78)\.{n}\.', routes))
        self._init: Dict[int, int] = {}  # the first process of each host
        self._started: List[subprocess.Popen] = []
        self.environ = dict(os.environ, PATH=f'{self.folder / "bin"}:{PATH}')  # its ssh knows the hosts

    def address(self, n: int, interface: int = 0) -> str:
        return f'10.{NETWORKS[interface]}.{self.subnet}.{n + 1}'

    # --- made and removed

    def start(self) -> 'Hosts':
        self._make_keys()
        self._make_network()
        for n in range(self.count):
            self._boot(n)
        return self

    def stop(self) -> None:
        _remove(os.getpid())
        for process in self._started:
            process.wait(DEADLINE)

    def _make_keys(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True)
        key, known = self.folder / 'key', []
        run('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key)
        for n, name in enumerate(self.names):
            home = self.folder / name
            (home / 'tmp').mkdir(mode=0o700, parents=True)
            run('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', home / 'host_key')
            shutil.copy(str(key) + '.pub', home / 'authorized_keys')
            public = ' '.join((home / 'host_key.pub').read_text().split()[:2])
            known.append(f'{name},{self.address(n)},{self.address(n, 1)} {public}\n')
            (home / 'sshd_config').write_text(
                f'HostKey {home}/host_key\nAuthorizedKeysFile {home}/authorized_keys\nPidFile none\nUseDNS no\n'
                'UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 100\n'
                'KbdInteractiveAuthentication no\nStrictModes no\nSubsystem sftp internal-sftp\n'
                f'SetEnv TMPDIR={home}/tmp\n')
        (self.folder / 'known_hosts').write_text(''.join(known))
        own = ''.join(f'{self.address(n)} {name}\n' for n, name in enumerate(self.names))
        (self.folder / 'etc_hosts').write_text('127.0.0.1 localhost\n' + own)
        aliases = ''.join(f'Host {name}\n  HostName {self.address(n)}\n' for n, name in enumerate(self.names))
        (self.folder / 'ssh_config').write_text(
            f'{aliases}Host *\n  User root\n  IdentityFile {key}\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n'
            f'  UserKnownHostsFile {self.folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n')
        wrapper = self.folder / 'bin' / 'ssh'  # ssh takes ~/.ssh from the password file, so HOME would not do
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def _make_network(self) -> None:
        """The bridges lie in a namespace of their own, out of reach of this machine's firewall."""
        switch = f'{self.prefix}switch'
        run('ip', 'netns', 'add', switch)
        for n in range(self.count):
            run('ip', 'netns', 'add', f'{self.prefix}{n}')
            run('ip', '-n', f'{self.prefix}{n}', 'link', 'set', 'lo', 'up')
        for i, net in enumerate(NETWORKS):
            run('ip', '-n', switch, 'link', 'add', f'switch{i}', 'type', 'bridge')
            run('ip', '-n', switch, 'link', 'set', f'switch{i}', 'up')
            ends = [(f'{self.prefix}{n}', f'eth{i}', n) for n in range(self.count)] + [('', f'{self.prefix}{i}', 8)]
            for space, link, n in ends:
                where = ['-n', space] if space else []
                run('ip', '-n', switch, 'link', 'add', f'port{n}-{i}', 'type', 'veth', 'peer', 'name', link,
                    'netns', space or str(os.getpid()))
                run('ip', '-n', switch, 'link', 'set', f'port{n}-{i}', 'master', f'switch{i}', 'up')
                run('ip', *where, 'addr', 'add', f'10.{net}.{self.subnet}.{n + 1}/24', 'dev', link)
                run('ip', *where, 'link', 'set', link, 'up')

    def _boot(self, n: int) -> None:
        """Starts the first process of a host, which its sshd replaces, with empty TMPDIR and /dev/shm."""
        home = self.folder / self.names[n]
        script = (f'hostname {self.names[n]} && mount -t tmpfs -o mode=755 none /run && mkdir /run/sshd && '
                  f'mount -t tmpfs none {home}/tmp && mount -t tmpfs none /dev/shm && '
                  f'sed "s/^root:[^:]*/root:*/" /etc/shadow > {home}/shadow && '  # sshd turns locked accounts away
                  f'mount --bind {home}/shadow /etc/shadow && mount --bind {self.folder}/etc_hosts /etc/hosts && '
                  f'exec {shutil.which("sshd", path=PATH)} -D -e -f {home}/sshd_config')
        with open(home / 'sshd.log', 'wb') as log:
            self._started.append(subprocess.Popen(
                ['ip', 'netns', 'exec', f'{self.prefix}{n}', 'unshare', '--uts', '--mount', '--ipc', '--pid', '--fork',
                 '--kill-child', '--mount-proc', 'sh', '-c', script], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, env=dict(os.environ, PATH=PATH)))
        wait_for(lambda: 'Server listening on 0.0.0.0' in (home / 'sshd.log').read_text(), f'sshd of {self.names[n]}')
        self._init[n] = next(pid for pid in self.processes(n, all=True) if self._name(pid) == 'sshd')

    # --- used

    @staticmethod
    def _name(pid: int) -> str:
        with contextlib.suppress(OSError):
            return Path(f'/proc/{pid}/comm').read_text().strip()
        return ''

    def processes(self, n: int, all: bool = False) -> List[int]:
        """Processes of a host, as this machine numbers them; without those of its sshd or Slurm, unless `all`."""
        pids = [int(pid) for pid in run('ip', 'netns', 'pids', f'{self.prefix}{n}').split()]
        return pids if all else [pid for pid in pids if not re.match('sshd|slurm|unshare$|nsenter$|$', self._name(pid))]

    def inside(self, n: int) -> List[str]:
        """The words before a command that run it on a host, without ssh."""
        return ['nsenter', '-t', str(self._init[n]), '-m', '-u', '-i', '-n', '-p']

    def run(self, n: int, script: str) -> str:
        """Output of a shell script on a host, without ssh; its mounts stay that host's own."""
        return run(*self.inside(n), 'sh', '-c', script)

    def hide(self, n: int, folder: object) -> None:
        """Puts an empty folder over `folder` on one host."""
        self.run(n, f'mount -t tmpfs none {folder}')

    def plug(self, n: int, interface: int = 0, state: str = 'up') -> None:
        """Puts a host's network cable in, or pulls it out: state='down'."""
        run('ip', '-n', f'{self.prefix}switch', 'link', 'set', f'port{n}-{interface}', state)

    def lose(self, n: int, share: float, interface: int = 0) -> None:
        """Loses this share of the packets that a host sends and of those sent to it; 0: none any more.

        By a filter in place of `netem`, which not every kernel has: a packet stays if a random word is large enough.
        """
        code = f'4,32 0 0 {2**32 - 4096 + 56},53 0 1 {min(int(share * 2**32), 2**32 - 1)},6 0 0 {2**32 - 1},6 0 0 2'
        for space, link in ((f'{self.prefix}switch', f'port{n}-{interface}'), (f'{self.prefix}{n}', f'eth{interface}')):
            with contextlib.suppress(RuntimeError):  # there was none
                run('tc', '-n', space, 'qdisc', 'del', 'dev', link, 'clsact')
            if share:
                run('tc', '-n', space, 'qdisc', 'add', 'dev', link, 'clsact')
                run('tc', '-n', space, 'filter', 'add', 'dev', link, 'egress', 'bpf', 'da', 'bytecode', code)

    def switch_off(self, n: int) -> None:
        """Ends everything on a host at once, as if its power went; its network stays, so that others are refused."""
        os.kill(self._init.pop(n), 9)
        wait_for(lambda: not self.processes(n, all=True), f'{self.names[n]} is off')

    def switch_on(self, n: int) -> None:
        """Boots a host that was switched off. What was hidden from it is to be seen again."""
        self._boot(n)

    def limit(self, rate: str = '200mbit') -> None:
        """Each host sends and receives on eth0 at this rate at most, both at the same time."""
        for n in range(self.count):
            for space, link in ((f'{self.prefix}switch', f'port{n}-0'), (f'{self.prefix}{n}', 'eth0')):
                run('tc', '-n', space, 'qdisc', 'replace', 'dev', link, 'root', 'tbf', 'rate', rate,
                    'burst', '128kb', 'latency', '50ms')

    def traffic(self, interface: int = 0) -> List[Tuple[int, int]]:
        """Bytes that each host has (sent, received) since it was made."""
        links = {link['ifname']: link['stats64'] for link in
                 json.loads(run('ip', '-n', f'{self.prefix}switch', '-s', '-j', 'link'))}
        ports = [links[f'port{n}-{interface}'] for n in range(self.count)]
        return [(port['rx']['bytes'], port['tx']['bytes']) for port in ports]


@contextlib.contextmanager
def three_hosts(folder: Path) -> Iterator[Hosts]:
    """The hosts, for a `with`. Skips the test where they cannot be made; fails there under continuous integration."""
    reason = why_not()
    if reason and os.environ.get('CI') == 'true':
        pytest.fail(f'the hosts cannot be made: {reason}')
    if reason:
        pytest.skip(f'the hosts cannot be made: {reason}')
    remove_leftovers()
    hosts = Hosts(folder)
    try:
        yield hosts.start()
    finally:
        hosts.stop()
