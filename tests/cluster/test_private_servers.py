"""Private functions of MXNet that need servers: barrier, commands, updater, the server's loop."""
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / 'programs'


def test_servers_do_what_is_relied_on(launcher, tmp_path):
    launcher.run('-n', 2, '-s', 1, '--', sys.executable, '-W', 'ignore', PROGRAMS / 'private_servers.py', tmp_path)
    for rank in range(2):
        assert (launcher.folder / 'logs' / f'worker-{rank}.log').read_text() == f'ok {rank}\n'
