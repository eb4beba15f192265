"""Starts coverage in a process of the tests: `make coverage` has a .pth file run this in each, and in those they start.

Where its file cannot be written, on a full disk or as another user, nothing is said: the tests read what commands say.
"""
import atexit
import contextlib

import coverage


def save():
    with contextlib.suppress(Exception):
        measured.stop()
        measured.save()


with contextlib.suppress(Exception):
    measured = coverage.process_startup()
    atexit.unregister(measured._atexit)
    atexit.register(save)
