"""The scripts that make a private network for a job, with commands in place of ssh and ip that note their words."""
import os
import subprocess

import pytest

SCRIPTS = 'launch/security/wireguard.sh', 'launch/security/ssh_tunnel.sh'


@pytest.fixture
def run(tmp_path):
    """Run a script; returns its exit status, what it said, and the commands that it gave. `ssh` fails for node1."""
    for name in ('ssh', 'ip'):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/given\n'
                                     'case " $* " in *" node1 "*) exit 1;; esac\n')
        (tmp_path / name).chmod(0o755)

    def run(*words):
        (tmp_path / 'given').write_text('')
        done = subprocess.run(words, env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}, timeout=20,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        return done.returncode, done.stdout, (tmp_path / 'given').read_text().splitlines()
    return run


@pytest.mark.parametrize('script', SCRIPTS)
@pytest.mark.parametrize('words', [[], ['up'], ['node1', 'node2'], ['status', 'node2']], ids=' '.join)
def test_other_words_do_nothing(run, script, words):
    """Without `up`, node1 would be left out, and node2 alone have a network."""
    status, said, given = run(script, *words)
    assert status and 'up|down HOST [HOST ...]' in said and not given


@pytest.mark.parametrize('script, commands', [
    (SCRIPTS[0], ['ssh node1 wg-quick down mxjob', 'ssh node2 wg-quick down mxjob']),
    (SCRIPTS[1], ['ssh -S /run/mxjob-2 -O exit node1', 'ssh -S /run/mxjob-3 -O exit node2', 'ip link del mxjob'])])
def test_down_goes_on_where_a_host_is_away(run, script, commands):
    assert run(script, 'down', 'node1', 'node2') == (1, '', commands)
