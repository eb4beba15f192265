"""`mxsimmim` with a fault in the worker of rank 1: with_fault.py FAULT ARGUMENTS OF MXSIMMIM.

changed-weight: a weight changes by itself after the third update. slow: each image takes 4 ms longer.
no-memory: memory cannot be mapped. no-room: there are no pages for it.
hanging-import: a file that `import mxnet` opens never comes, until the job is started again.
Or of rank 0: hanging-disk: what is written for a checkpoint never comes to the disk.
"""
import errno
import mmap
import os
import sys
import time

import mxsimmim.cli
from mxsimmim.config import RuntimeConfig
from mxsimmim.runtime.process import process_info

fault, *arguments = sys.argv[1:]
process = process_info(os.environ)
if fault == 'hanging-disk' and process.role == 'worker' and process.rank == 0:
    fsync = os.fsync

    def hanging(number):
        if 'checkpoints' in os.readlink(f'/proc/self/fd/{number}'):
            os.mkfifo('disk')
            open('disk', 'rb')
        fsync(number)
    os.fsync = hanging
elif fault == 'hanging-import' and process[:2] == ('worker', 1) and not process.restarts:
    class Hanging:
        @staticmethod
        def find_spec(name, *_):
            if name == 'mxnet':
                os.mkfifo('module')
                open('module', 'rb')
    sys.meta_path.insert(0, Hanging)
elif process.role == 'worker' and process.rank == 1 and fault != 'hanging-import':
    from mxsimmim.runtime import environment
    environment.prepare(RuntimeConfig(threads=1))
    import mxnet as mx

    from mxsimmim.parallel.placement import Replicated
    from mxsimmim.parallel.updates import SynchronousUpdate
    step, forward_backward = SynchronousUpdate.step, Replicated.forward_backward

    def changed(self, update, *others):
        stats = step(self, update, *others)
        if update == 2:
            self._parameters[0].list_data()[0][:] += 1e-6
        return stats

    def slow(self, batch, *others):
        mx.nd.waitall()
        time.sleep(0.004 * len(batch.index))
        return forward_backward(self, batch, *others)

    def failing(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    if fault == 'changed-weight':
        SynchronousUpdate.step = changed
    elif fault == 'slow':
        Replicated.forward_backward = slow
    elif fault == 'no-memory':
        mmap.mmap = failing
    elif fault == 'no-room':
        os.posix_fallocate = failing
sys.exit(mxsimmim.cli.main(arguments))
