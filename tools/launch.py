#!/usr/bin/env python3
"""Starts a training job as many processes, on this machine or on many: tools/launch.py -h tells how."""
import os
import signal
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, '.venv')  # where `make` installs everything
PYTHON = os.path.join(VENV, 'bin', 'python')

if __name__ == '__main__':
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while there is nothing to end yet
    if not find_spec('mxnet') and os.path.exists(PYTHON) and not os.path.samefile(sys.prefix, VENV):
        os.execv(PYTHON, [PYTHON] + sys.argv)
    sys.path.insert(0, ROOT)
    from mxsimmim.system import text
    text.restart_in_utf8()
    from mxsimmim.cluster.launch import main
    sys.exit(main(sys.argv[1:]))
