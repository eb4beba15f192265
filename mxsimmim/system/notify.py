"""Tells somebody of what happens to a run, through a command of the user's."""
import json
import os
import signal
import subprocess
import tempfile
from typing import Any, Mapping

PATIENCE = 30.0  # seconds that such a command may take


def send(command: str, event: Mapping[str, Any]) -> str:
    """Runs a shell command with `event` as JSON on its standard input; returns what went wrong with it, '' if nothing.

    A run does not fail for want of somebody who hears of it.
    """
    with tempfile.TemporaryFile() as said:  # no pipe: what it leaves running could keep one open
        try:
            process = subprocess.Popen(command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                       stderr=said, start_new_session=True)
        except OSError as error:
            return f'notify.command={command} cannot be started: {error.strerror}'
        try:
            process.communicate(json.dumps(event).encode() + b'\n', PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f'notify.command={command} has not ended within {PATIENCE:g} s'
        said.seek(0)
        last = said.read().decode(errors='replace').strip().splitlines()[-1:]
    if process.returncode:
        return ': '.join([f'notify.command={command} failed with exit code {process.returncode}', *last])
    return ''
