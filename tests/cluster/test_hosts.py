"""The three hosts that other tests work with."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.hosts import DEADLINE, remove_leftovers, run, three_hosts, wait_for, words_of


@pytest.fixture
def hosts(tmp_path):
    with three_hosts(tmp_path / 'hosts') as made:
        yield made


def test_each_host_has_its_own_name_address_and_files(hosts, tmp_path):
    (tmp_path / 'job').mkdir()
    for n in range(3):
        hosts.hide(n, tmp_path / 'job')
        said = subprocess.run(['ssh', f'host{n}', f'hostname; ip -4 -o addr show eth0; ls {tmp_path}/job | wc -l; '
                               f'touch {tmp_path}/job/a'], env=hosts.environ, timeout=DEADLINE, check=True,
                              stdout=subprocess.PIPE, universal_newlines=True).stdout
        assert said.split()[0] == f'host{n}' and f' {hosts.address(n)}/24 ' in said and said.split()[-1] == '0'
    assert [hosts.run(n, f'ls {tmp_path}/job').split() for n in range(3)] == [['a']] * 3
    assert list((tmp_path / 'job').iterdir()) == []


@pytest.mark.alone
def test_a_limited_link_is_as_slow_as_it_should_be(hosts):
    hosts.limit('200mbit')
    before, begin = hosts.traffic()[1][0], time.monotonic()
    said = subprocess.run(['ssh', 'host1', 'head -c 20000000 /dev/zero'], env=hosts.environ, stdout=subprocess.PIPE,
                          timeout=DEADLINE, check=True).stdout
    seconds, sent = time.monotonic() - begin, hosts.traffic()[1][0] - before
    assert len(said) == 20_000_000 and 20e6 < sent < 21.5e6
    assert 0.75 < seconds < 4, f'20 MB at 25 MB/s took {seconds:.2f} s'


def test_a_pulled_cable_and_what_runs_on_a_host(hosts):
    process = subprocess.Popen(['ssh', 'host2', 'exec sleep 1000'], env=hosts.environ, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: [words_of(pid) for pid in hosts.processes(2)] == ['sleep 1000'], 'sleep runs on host2')
    finally:
        process.kill()
        process.wait()
    reach = ['ssh', '-o', 'ConnectTimeout=1', 'host2', 'true']
    hosts.plug(2, state='down')
    assert subprocess.run(reach, env=hosts.environ, stderr=subprocess.DEVNULL, timeout=DEADLINE).returncode == 255
    hosts.plug(2)
    assert subprocess.run(reach, env=hosts.environ, timeout=DEADLINE).returncode == 0


def test_what_a_killed_run_left_is_removed(tmp_path):
    def everything():
        return run('ip', 'netns', 'list') + run('ip', 'link')

    with three_hosts(tmp_path / 'other'):  # skips, where it must; and lives, so that nothing of it may be removed
        mine = everything().count(f'mx{os.getpid()}-')
        code = ("import os, pathlib; from support.hosts import Hosts; "
                "Hosts(pathlib.Path(os.environ['T']) / 'hosts').start(); os.kill(os.getpid(), 9)")
        killed = subprocess.Popen([sys.executable, '-c', code], cwd=Path(__file__).parents[1],
                                  env=dict(os.environ, T=str(tmp_path)))
        assert killed.wait(DEADLINE) == -9
        assert f'mx{killed.pid}-switch' in everything()
        remove_leftovers()
        assert f'mx{killed.pid}-' not in everything()
        assert everything().count(f'mx{os.getpid()}-') == mine >= 6
    assert f'mx{os.getpid()}-' not in everything()
