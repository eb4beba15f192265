"""Programs of Debian's that some tests need: where there are none these skip, but not in continuous integration."""
import os
import shutil
import socket

import pytest


def needed(name, package):
    """The path of a program, or the end of the test that asks for it."""
    found = shutil.which(name)
    if not found:
        missing = f'needs {name}: apt-get install {package}'
        pytest.fail(missing) if os.environ.get('CI') == 'true' else pytest.skip(missing)
    return found


def free_port():
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]
