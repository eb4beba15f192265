"""The command as a user runs it, with a deadline on everything."""
import os
import subprocess
from types import SimpleNamespace

import pytest
from support.running import DEADLINE, command

from mxsimmim import cli


@pytest.fixture
def mxsimmim(tmp_path):
    """Runs the command in an empty folder; returns the finished process with its text."""
    def run(*arguments, status=0, **keys):
        keys.setdefault('timeout', DEADLINE)
        result = subprocess.run(command(*arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                universal_newlines=True, **keys)
        assert result.returncode == status, f'{arguments}\n{result.stdout}\n{result.stderr}'
        return result
    return run


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    """`mxsimmim` in this process, which has MXNet already, with whatever threads other tests gave it: 1.5 s less each.

    For what other tests run as a process, too.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mxsimmim.runtime.environment.prepare', lambda config: None)

    def run(*arguments, status=0):
        capfd.readouterr()
        found = cli.main(list(map(str, arguments)))
        out, err = capfd.readouterr()
        assert found == status, f'{arguments}\n{out}\n{err}'
        return SimpleNamespace(stdout=out, stderr=err)
    return run


@pytest.fixture
def start(tmp_path):
    """Starts the command in the background; whatever still runs at the end of the test is killed."""
    started = []

    def run(*arguments, **keys):
        process = subprocess.Popen(command(*arguments), cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, universal_newlines=True, env=dict(os.environ), **keys)
        started.append(process)
        return process
    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=DEADLINE)
