"""Where native code crashed: reports as Python 3.8 to 3.11 write them, by a table."""
import subprocess
import sys

import pytest

from mxsimmim.runtime import fault

PYTHON = '/usr/lib/python3.11'
PACKAGES = '/home/me/.venv/lib/python3.8/site-packages'
CTYPES = f'  File "{PYTHON}/ctypes/__init__.py", line 519 in string_at\n'


def report(*threads, signal='Segmentation fault', after=''):
    return f'Fatal Python error: {signal}\n\n' + '\n'.join(threads) + after


def thread(*calls, current=True, number='0x00007f7e963d6b80'):
    return f'{"Current thread" if current else "Thread"} {number} (most recent call first):\n' + ''.join(calls)


TRAIN = '  File "train.py", line 12 in step\n'
MAIN = '  File "train.py", line 40 in <module>\n'
MODULES = '\nExtension modules: numpy.core._multiarray_umath, _ni_label (total: 2)\n'
CASES = [
    # log, place
    ('', ''), ('loss 0.5\nKilled\n', ''), ('Fatal Python error: Aborted\n', ''),
    (report(thread(TRAIN, MAIN)), 'in native code at train.py:12 in step'),
    (report(thread(TRAIN, MAIN), after=MODULES), 'in native code at train.py:12 in step'),
    (report(thread(CTYPES, TRAIN, MAIN)),
     f'in native code at {PYTHON}/ctypes/__init__.py:519 in string_at, called at train.py:12 in step'),
    # an import: Python's own machinery has no file
    (report(thread('  File "<frozen importlib._bootstrap>", line 241 in _call_with_frames_removed\n',
                   f'  File "{PACKAGES}/torch/__init__.py", line 445 in <module>\n',
                   '  File "<frozen importlib._bootstrap>", line 1176 in _find_and_load\n', MAIN)),
     f'in native code at {PACKAGES}/torch/__init__.py:445 in <module>, called at train.py:40 in <module>'),
    # this package is ours, also where it is installed
    (report(thread(f'  File "{PACKAGES}/mxnet/base.py", line 246 in check_call\n',
                   f'  File "{PACKAGES}/mxsimmim/training/trainer.py", line 7 in loop\n', MAIN)),
     f'in native code at {PACKAGES}/mxnet/base.py:246 in check_call, called at '
     f'{PACKAGES}/mxsimmim/training/trainer.py:7 in loop'),
    # another thread than the main one, which comes last
    (report(thread(CTYPES, '  File "load.py", line 3 in <lambda>\n', f'  File "{PYTHON}/runpy.py", line 9 in run\n'),
            thread(TRAIN, MAIN, current=False)),
     f'in native code at {PYTHON}/ctypes/__init__.py:519 in string_at, called at load.py:3 in <lambda>'),
    (report(thread('  File "load.py", line 3 in wait\n', current=False), thread(TRAIN, MAIN), signal='Bus error'),
     'in native code at train.py:12 in step'),
    # a thread that Python does not know
    (report(thread('  File "load.py", line 3 in wait\n', current=False), thread(TRAIN, MAIN, current=False)),
     'in a thread of native code, while Python was at train.py:12 in step'),
    (report(thread('  <no Python frame>\n'), thread(TRAIN, current=False)),
     'in a thread of native code, while Python was at train.py:12 in step'),
    # 3.10 and newer say so; names of files and functions are what they like
    (report(thread('  Garbage-collecting\n', '  File "/x/\\xe9/a b.py", line 3 in __del__\n')),
     'in native code at /x/\\xe9/a b.py:3 in __del__'),
    (report(thread('  File "f"o, line 3 in x", line 2 in <module>\n')),
     'in native code at f"o, line 3 in x:2 in <module>'),
    (report(thread('  File "<string>", line ??? in f\n', '  ...\n')), 'in native code at <string>:??? in f'),
    # Python itself gives up
    ('Fatal Python error: init: bad\nPython runtime state: initialized\n\n' + thread(TRAIN),
     'in native code at train.py:12 in step'),
    # in the middle of a line; of two reports the last; only libraries; CRLF
    ('step 3' + report(thread(TRAIN)), 'in native code at train.py:12 in step'),
    (report(thread(MAIN)) + 'again\n' + report(thread(TRAIN)), 'in native code at train.py:12 in step'),
    (report(thread(CTYPES)), f'in native code at {PYTHON}/ctypes/__init__.py:519 in string_at'),
    (report(thread(TRAIN)).replace('\n', '\r\n'), 'in native code at train.py:12 in step'),
]


@pytest.mark.parametrize('log, expected', CASES)
def test_the_place(log, expected):
    assert fault.place(log.splitlines()) == expected


def test_of_a_log_the_report_is_taken_apart():
    log = 'one\ntwo\n' + report(thread(CTYPES, TRAIN), thread(MAIN, current=False), after=MODULES) + 'three\n'
    rest, taken = fault.split(log.splitlines())
    assert rest == ['one', 'two', 'Fatal Python error: Segmentation fault', 'three']
    assert taken == log.splitlines()[3:-1]
    assert fault.split(['a', '', 'b']) == (['a', '', 'b'], [])


@pytest.mark.parametrize('crash', ['ctypes.string_at(0)', 'os.abort()'] + [
    f'signal.pthread_kill(threading.get_ident(), signal.{name})' for name in ('SIGBUS', 'SIGFPE', 'SIGILL')])
def test_what_this_python_writes_of_a_thread_that_is_not_the_first(tmp_path, crash):
    program = tmp_path / 'program.py'
    program.write_text(f'import ctypes, os, signal, threading\ndef crash():\n    {crash}\n'
                       'thread = threading.Thread(target=crash)\nthread.start()\nthread.join()\n')
    said = subprocess.run([sys.executable, '-X', 'faulthandler', program], stderr=subprocess.PIPE, timeout=60).stderr
    assert fault.place(said.decode().splitlines()).endswith(f' at {program}:3 in crash')
