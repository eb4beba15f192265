"""Find out what a host is like before anything starts on it. Sent to every host.

Nothing is imported to learn its version: `import mxnet` takes a second, and would start a server in a server's
environment.
"""
import fcntl
import glob
import os
import platform
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from mxsimmim.runtime import environment
from mxsimmim.system import paths

SIOCGIFADDR = 0x8915  # of Linux's bits/ioctls.h
GIVEN = 'SLURM_CPUS_ON_NODE', 'MXSIMMIM_CORES'  # by Slurm, and by Ray's driver
TRIAL = 10.0  # seconds after which the job begins without having heard of its configuration


def collect_facts(needs: Dict[str, Any], environ: Dict[str, str]) -> Dict[str, Any]:
    """Collect the host's versions, cores, GPUs and network, and what is wrong with it.

    Args:
        needs: `command` (its first word), `paths` (of data), `interface` (a name, or empty), `near` (an address of this
            host that others reach, or empty), `gpus` and `horovod` (whether they are needed), `trial` (the words and
            the environment of a command that checks the job's configuration; no words for none).
        environ: what the processes will see.
    """
    problems = []
    words, changes = needs['trial']
    refusal = start_trial(words, changes, environ)
    if not shutil.which(needs['command'], path=environ.get('PATH', '')):
        problems.append(f"no command '{needs['command']}' in {os.getcwd()}, in {os.path.dirname(sys.executable)} or on "
                        'its PATH: install it there, or write its full path')
    for path in needs['paths']:
        problem = unreadable(path)
        if problem:
            problems.append(problem)
    interface, address = '', ''
    try:
        interface, address = choose_interface(interfaces(), needs['interface'], needs['near'])
    except ValueError as error:
        problems.append(str(error))
    return {'host': platform.node(), 'python': '{}.{}'.format(*sys.version_info), 'executable': sys.executable,
            'packages': {name: version(name) for name in ('mxnet', 'mxsimmim', 'horovod')},
            'mpi': needs['horovod'] and horovod_has_mpi(), 'cores': cores(os.environ),
            'gpus': gpus(environ) if needs['gpus'] else [], 'interface': interface, 'address': address,
            'named': named_address() if needs['horovod'] else '', 'problems': problems, 'refusal': refusal()}


def start_trial(words: List[str], changes: Dict[str, Optional[str]], environ: Dict[str, str]
                ) -> Callable[[], List[str]]:
    """Start a check of the job's configuration; the returned function waits for it, and returns its errors as lines.

    There are none where it cannot be checked: the processes themselves will say.
    """
    def is_pipe(word: str) -> bool:  # which has to be left to the one that needs it
        try:
            return stat.S_ISFIFO(os.stat(word).st_mode)
        except (OSError, ValueError):
            return False
    if not words or any(map(is_pipe, words)):
        return list
    environ = {name: value for name, value in {**environ, **changes}.items() if value is not None}
    try:
        child = subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE)
    except OSError:
        return list

    def finish() -> List[str]:
        try:
            said = child.communicate(timeout=TRIAL)[1].decode(errors='replace')
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return []
        lines = [line for line in said.splitlines() if re.match(r'mxsimmim( \w+)?: error: ', line)]
        known = not any('--check-config' in line for line in lines)  # else it is of another version
        return lines if child.returncode in (1, 2) and known else []
    return finish


def cores(environ: Mapping[str, str]) -> int:
    """Count the cores of this host that are the job's: within what Slurm or Ray gives, which not every one enforces."""
    given = [int(environ[name]) for name in GIVEN if environ.get(name, '').isdigit()]
    return min([environment.cores(), *given])


def unreadable(path: str) -> str:
    """Say what is wrong with a data path; empty if it can be read."""
    try:
        path = paths.expand(path)
    except ValueError:  # a variable that is not set here, and may be with --env: the workers will say
        return ''
    files = [path] if os.path.exists(path) else [part.strip() for part in path.split(';') if part.strip()]
    for file in files:  # several RecordIO files are separated by semicolons
        try:
            if os.path.isdir(file):
                os.listdir(file)
            else:
                open(file, 'rb').close()
        except OSError as error:
            return f"data '{file}' cannot be read ({error.strerror}): put the data there, or mount them"
    return ''


def folder(package: str) -> Optional[str]:
    """Find the folder a package would be imported from; None if it is not installed."""
    for finder in sys.meta_path:
        spec = finder.find_spec(package, None) if hasattr(finder, 'find_spec') else None
        if spec and spec.origin:
            return os.path.dirname(spec.origin)
    return None


def version(package: str) -> Optional[str]:
    """Read the version of a package without importing it; None if it is not installed."""
    where = folder(package)
    if where is None:
        return None
    for name in ('libinfo.py', '__init__.py'):
        found = re.search(r'^__version__ = [\'"](.*)[\'"]', environment.contents(environment.Path(where, name)),
                          re.MULTILINE)
        if found:
            return found.group(1)
    return 'unknown'


def horovod_has_mpi() -> bool:
    """Tell whether Horovod's library for MXNet was linked with MPI."""
    for path in glob.glob(os.path.join(glob.escape(folder('horovod') or '/nowhere'), 'mxnet', 'mpi_lib*.so')):
        with open(path, 'rb') as file:
            return b'\0libmpi.so' in file.read()
    return False


def gpus(environ: Dict[str, str]) -> List[str]:
    """List the GPUs of this host, as CUDA_VISIBLE_DEVICES names them."""
    if environ.get('CUDA_VISIBLE_DEVICES') is not None:
        return [name for name in environ['CUDA_VISIBLE_DEVICES'].split(',') if name.strip() not in ('', '-1')]
    try:
        listing = subprocess.run(['nvidia-smi', '-L'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=15,
                                 universal_newlines=True).stdout
        count = sum(line.startswith('GPU ') for line in listing.splitlines())
    except (OSError, subprocess.SubprocessError):
        count = 0
    return [str(number) for number in range(count or len(glob.glob('/proc/driver/nvidia/gpus/*')))]


def named_address() -> str:
    """Look up the address of this host's own name; empty if it has none."""
    try:
        return socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return ''


def interfaces() -> Dict[str, str]:
    """Map the name of each network interface to its IPv4 address, where it has one.

    IPv4 alone: ps-lite and Gloo's rendezvous speak nothing else.
    """
    result = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack('256s', name.encode()))
                result[name] = socket.inet_ntoa(reply[20:24])
            except OSError:
                pass  # no IPv4 address
    return result


def inet6() -> Dict[str, str]:
    """Map each IPv6 address to the name of its interface."""
    rows = [line.split() for line in environment.contents(environment.Path('/proc/net/if_inet6')).splitlines()]
    return {socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])): row[5] for row in rows}


def choose_interface(known: Dict[str, str], wanted: str, near: str) -> Tuple[str, str]:
    """Choose the interface to use: the one named `wanted`, else the one that holds the address `near`.

    Returns:
        its name and its address.

    Raises:
        ValueError: there is none.
    """
    near = near.partition('%')[0]
    near = near[7:] if near.startswith('::ffff:') and '.' in near else near
    listing = ', '.join(f'{name} {address}' for name, address in known.items()) or 'none'
    if wanted:
        if wanted not in known:
            raise ValueError(f"no interface '{wanted}' with an IPv4 address: --interface takes one of {listing}")
        return wanted, known[wanted]
    for name, address in known.items():
        if near == address or inet6().get(near) == name:
            return name, address
    raise ValueError(f'no interface with an IPv4 address holds {near or "the address"} where this host is reached: '
                     f'choose with --interface among {listing}')
