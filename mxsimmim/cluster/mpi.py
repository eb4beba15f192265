"""Hosts reached by Open MPI: one `mpirun`, which starts an agent for each process; they call the launcher back.

The launcher's address and a key that holds for this job alone travel as an environment variable (``mpirun -x NAME``
takes its value from the environment). With the key, an agent makes sure that the program it gets, and each message
after it, come from the launcher, and the launcher that they come from an agent.
"""
import hashlib
import hmac
from typing import List, Sequence

from mxsimmim.cluster.job import Host, Process

VARIABLE = 'MXSIMMIM_LAUNCH'  # its value: the launcher's addresses with commas between, port, key
ALLOCATIONS = 'SLURM_JOB_ID', 'PBS_NODEFILE', 'LSB_JOBID', 'PE_HOSTFILE'  # set where a resource manager gives the hosts
BOOTSTRAP = """\
import hashlib, hmac, os, socket, sys
addresses, port, key = os.environ.pop('MXSIMMIM_LAUNCH').split()
for address in addresses.split(','):
    try:
        connection = socket.create_connection((address, int(port)), 5)
    except OSError as error:
        print(f'{socket.gethostname()} cannot reach the launcher at {address}:{port}: {error}', file=sys.stderr)
        continue
    file = connection.makefile('rb')
    size, nonce, proof = file.readline().split()
    text = file.read(int(size))
    if hmac.compare_digest(proof.decode(), hmac.new(bytes.fromhex(key), nonce + text, hashlib.sha256).hexdigest()):
        secret = hmac.new(bytes.fromhex(key), nonce, hashlib.sha256).digest()
        exec(text)
"""
CALL = "main(connection.fileno(), connection.fileno(), secret, connection.getsockname()[0])"


def command(processes: Sequence[Process], hosts: Sequence[Host], python: str, interface: str) -> List[str]:
    """The mpirun that starts one agent a process, rank by rank in the order of `processes`.

    Without hosts it starts them where it finds itself: in the allocation of a resource manager, or on this machine.

    Raises:
        ValueError: a host that cannot be told to mpirun.
    """
    agent = ['-x', VARIABLE, python, '-X', 'utf8', '-c', BOOTSTRAP]
    start = ['mpirun', '--oversubscribe', '--bind-to', 'none']
    start += ['--mca', 'btl_tcp_if_include', interface] if interface else []
    for host in hosts:
        if host.port or ':' in host.name:
            raise ValueError(f"host '{host.name}': mpirun takes neither ports nor IPv6 addresses: give it a name, "
                             'and its port, in ~/.ssh/config')
    if not hosts:
        return start + ['-np', str(len(processes))] + agent
    groups: List[List[int]] = []  # host and number of processes, of neighbours on one host
    for process in processes:
        if groups and groups[-1][0] == process.host:
            groups[-1][1] += 1
        else:
            groups.append([process.host, 1])
    words: List[str] = []
    for host, count in groups:
        words += [':'] * bool(words) + ['--host', f'{hosts[host].name}:{count}', '-np', str(count)] + agent
    return start + words


def greeting(key: bytes, nonce: bytes, text: bytes) -> bytes:
    """What an agent gets when it calls: the program, with the proof that it is ours."""
    proof = hmac.new(key, nonce + text, hashlib.sha256).hexdigest()
    return b'%d %s %s\n' % (len(text), nonce, proof.encode()) + text
