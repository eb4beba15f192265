"""A command that has failed ends, whatever is still under way in its process."""
import subprocess
import sys
import time

import pytest

PROGRAM = '''
import atexit, ctypes, pathlib, sys, threading, time
from mxsimmim import cli
cli.LEAVING = 1.0
atexit.register(pathlib.Path('called').touch)
print('before')
{held}
sys.argv = ['mxsimmim', 'plot', 'nowhere']
sys.exit(cli.main())
'''
ENGINE = '''
import mxnet
from mxnet.base import _LIB, check_call
sleep = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: time.sleep(1000))
array, normal, cpu = mxnet.nd.zeros((1,)), ctypes.byref(ctypes.c_int(0)), (ctypes.c_int * 2)(1, 0)
handles = (ctypes.c_void_p * 1)(array.handle)
check_call(_LIB.MXEnginePushSyncND(sleep, None, None, cpu, None, 0, handles, 1, normal, 0, b''))
'''


@pytest.mark.parametrize('held', [
    '',
    'threading.Thread(target=time.sleep, args=(1000,)).start()',
    'from concurrent.futures import ThreadPoolExecutor; ThreadPoolExecutor().submit(time.sleep, 1000)',
    'atexit.register(time.sleep, 1000)',
    ENGINE,
], ids=['nothing', 'thread', 'pool', 'atexit', 'operator'])
def test_it_ends(tmp_path, held):
    """Functions registered with atexit are called, as far as they come; output arrives."""
    began = time.monotonic()
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', PROGRAM.format(held=held)], cwd=tmp_path,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=60)
    print(f'{time.monotonic() - began:.1f} s')
    assert result.returncode == 1 and result.stdout == 'before\n'
    assert result.stderr.startswith('mxsimmim: error: nowhere/metrics.jsonl: no such file')
    assert result.stderr.count('\n') == 1
    assert (tmp_path / 'called').exists() or 'atexit.register(time.sleep' in held
