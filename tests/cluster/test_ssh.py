"""What ssh alone does, and says, on three hosts that the tests make; test_kinds.py has what holds for every kind."""
import re
import sys
from pathlib import Path

import pytest
from support.clusters import PRETRAIN, TINY, cluster

pytestmark = pytest.mark.unmeasured


@pytest.fixture
def made(tmp_path):
    """Three hosts, on each of which the folder `job` is its own."""
    with cluster('ssh', tmp_path) as one:
        yield one


def test_all_problems_of_all_hosts_at_once(made):
    images = made.folder / 'data' / 'images'
    images.mkdir(parents=True)
    (made.hosts.folder / 'host1' / 'authorized_keys').write_text('')
    made.hosts.hide(2, made.folder / 'data')
    status, said = made.launch('-n', 4, '--', *PRETRAIN, *TINY, f'data.path={images}',
                               names=('host0', 'host1', 'host2', 'no-such-host'))
    assert status == 2
    errors = [line for line in said.splitlines() if line.startswith('launch: error: ')]
    assert len(errors) == 3 and len(said.splitlines()) == 3, said
    assert re.search(r'host host1: .*Permission denied \(publickey\)', said)
    assert f"host host2: data '{images}' cannot be read (No such file or directory)" in said
    assert re.search(r'host no-such-host: .*Could not resolve hostname no-such-host', said)
    assert made.left() == []


def test_a_host_without_python(made):
    made.hosts.hide(1, Path(sys.executable).parent)
    status, said = made.launch('-n', 3, '--', *PRETRAIN, *TINY)
    assert status == 2
    assert 'host host1: ' in said and sys.executable in said and 'host host0' not in said, said


def test_a_hostfile_with_a_bad_line(made):
    status, said = made.launch('-n', 2, '--', *PRETRAIN, *TINY, names=('host0', '# a comment', 'host1 slots=two'))
    assert status == 2
    assert f"{made.folder}/hostfile:3: 'slots=two' after the host: only slots=N can stand there" in said


def test_a_host_whose_key_is_not_the_known_one(made):
    known = made.hosts.folder / 'known_hosts'
    lines = known.read_text().splitlines()
    known.write_text('\n'.join([lines[0], lines[1].split()[0] + ' ' + lines[2].split(' ', 1)[1], lines[2], '']))
    status, said = made.launch('-n', 3, '--', *PRETRAIN, *TINY)
    assert status == 2
    assert re.search('host host1: .*Host key verification failed', said), said
