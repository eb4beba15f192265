"""A process that crashes in native code, where its first argument says so; all others sleep.

Arguments: the role that crashes, with its number; how; `mxnet` to import it before, else nothing.
"""
import ctypes
import os
import sys
import threading
import time

role, how, first = sys.argv[1:]


def read():
    ctypes.string_at(0)


def give_up():
    os.abort()


def in_a_thread():
    thread = threading.Thread(target=read)
    thread.start()
    thread.join()


me = os.environ.get('DMLC_ROLE', 'worker') + os.environ.get('DMLC_WORKER_ID', os.environ.get('HOROVOD_RANK', ''))
if me == role:
    if first == 'mxnet':
        os.environ.pop('DMLC_ROLE', None)  # or it would serve
        import mxnet  # noqa: F401
    if first == 'horovod':
        import horovod.mxnet  # noqa: F401
    print('last words', flush=True)
    globals()[how]()
time.sleep(600)
