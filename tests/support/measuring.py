"""Starts coverage in a process of the tests, once it imports mxsimmim; `make coverage` has a .pth file run this.

Tracing takes half as long again, so two things are left out that run hardly a line which others do not: the import of
other packages, and all processes of a job but its first worker and its first server. Where the file of what was run
cannot be written, on a full disk or as another user, nothing is said: the tests read what commands say.
"""
import atexit
import builtins
import contextlib
import os
import sys

RANKS = ('DMLC_WORKER_ID', 'DMLC_SERVER_ID', 'HOROVOD_RANK', 'OMPI_COMM_WORLD_RANK')


class Waiting:
    """Finds no module: waits for the import of mxsimmim."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 'mxsimmim':
            sys.meta_path.remove(Waiting)
            if {os.environ.get(rank, '0') for rank in RANKS} == {'0'} and os.environ.get('DMLC_ROLE') != 'scheduler':
                with contextlib.suppress(Exception):
                    begin()


def begin():
    import coverage
    measured = coverage.process_startup()

    def save():
        with contextlib.suppress(Exception):
            measured.stop()
            measured.save()
    atexit.unregister(measured._atexit)
    atexit.register(save)
    builtins.__import__ = untraced


def untraced(name, globals=None, locals=None, fromlist=(), level=0, whole=builtins.__import__):
    tracer = sys.gettrace()
    if level or tracer is None or name in sys.modules or name.startswith('mxsimmim'):
        return whole(name, globals, locals, fromlist, level)
    sys.settrace(None)
    try:
        return whole(name, globals, locals, fromlist, level)
    finally:
        sys.settrace(tracer)


sys.meta_path.insert(0, Waiting)
