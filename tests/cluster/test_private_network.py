"""The ready examples of launch/security, on three hosts: a job whose every byte goes through the tunnel."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.hosts import three_hosts, wait_for
from support.running import rounds

pytestmark = pytest.mark.unmeasured

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / 'launch' / 'security'
PROGRAM = [sys.executable, '-W', 'ignore', Path(__file__).parent / 'programs' / 'commands.py', 'ours', '']


@pytest.fixture
def hosts(tmp_path):
    """Three whose sshd lets tunnels through and knows the PATH of the tests."""
    with three_hosts(tmp_path / 'hosts') as made:
        for n, name in enumerate(made.names):
            home = made.folder / name
            with open(home / 'sshd_config', 'a') as file:
                file.write(f'PermitTunnel yes\nSetEnv PATH={made.environ["PATH"]}\n')
            made.run(n, 'kill -HUP 1')
            wait_for(lambda: (home / 'sshd.log').read_text().count('Server listening on 0.0.0.0') == 2, 'sshd again')
        yield made


@pytest.mark.soak
@pytest.mark.parametrize('script, others', [
    ('wireguard.sh', ['host0', 'host1', 'host2']), ('ssh_tunnel.sh', ['host1', 'host2'])][:rounds(1, 2)])
def test_a_job_in_a_private_network(hosts, tmp_path, script, others):
    """WireGuard from a machine outside it, which reaches the hosts by ssh; the tunnels from host0, where they end."""
    where = hosts.inside(0) if script == 'ssh_tunnel.sh' else []

    def call(*command):
        done = subprocess.run([*where, 'env', '-C', str(tmp_path), *map(str, command)], env=hosts.environ, timeout=90,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        assert done.returncode == 0, done.stdout
        return done.stdout

    if script == 'wireguard.sh':
        if not shutil.which('wg-quick'):
            pytest.skip('needs wg-quick (Debian: wireguard-tools) and, without it in the kernel, wireguard-go')
        for n in range(3):
            hosts.run(n, 'mount -t tmpfs -o mode=700 none /etc/wireguard')  # hosts share the machine's files
    call(EXAMPLES / script, 'up', *others)
    (tmp_path / 'hostfile').write_text('host0\nhost1\nhost2\n')
    (tmp_path / 'go').mkdir()
    before = received(hosts)
    said = call(sys.executable, ROOT / 'tools' / 'launch.py', '-n', 3, '-s', 2, '-H', 'hostfile', '--interface',
                'mxjob', '--env', f'PYTHONPATH={ROOT}', '--', *PROGRAM)
    assert 'network: mxjob, 10.99.0.1 10.99.0.2 10.99.0.3' in said and 'ready' in said
    assert all(after - earlier > 1000 for earlier, after in zip(before, received(hosts)))
    call(EXAMPLES / script, 'down', *others)
    assert all('mxjob' not in hosts.run(n, 'ip link') for n in range(3))


def received(hosts):
    """Bytes that each host has received through the interface `mxjob`."""
    links = [json.loads(hosts.run(n, 'ip -s -j link show mxjob')) for n in range(3)]
    return [link[0]['stats64']['rx']['bytes'] for link in links]
