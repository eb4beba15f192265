"""What waits in vain ends, and says why; what goes on does not, however long it takes."""
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from mxsimmim.runtime import watchdog
from mxsimmim.runtime.watchdog import Peer, deadline, doing, is_on, judge, pause_of

PROGRAM = '''
import os, sys, time
from mxsimmim.runtime import report, watchdog

def in_vain():
    open('fifo', 'rb')

def for_short():
    for _ in range(100):
        with watchdog.doing('little'):
            time.sleep(0.01)

def with_beats():
    for _ in range(100):
        time.sleep(0.01)
        watchdog.beat()

os.mkfifo('fifo')
print('begun', flush=True)
with watchdog.Watch('rank 3 on host', 0.05) as watch:
    watch.step = lambda: 7
    watch.join(lambda: {peers}, lambda status: None)
    watch.last_words = lambda text: print('told:', text, flush=True)
    {work}
print('done')
'''


@pytest.mark.parametrize('asked, step, record, seconds', [
    (0, None, 10, 1800), (60, None, 10, 600), (0.5, None, 1, 5),  # before the first record
    (60, 2., 10, 60), (60, 1000., 10, 60),
    (0, 0.2, 10, 300), (0, 30., 1, 600), (0, 30., 10, 900), (0, 30., 50, 4500)])
def test_deadline(asked, step, record, seconds):
    assert deadline(asked, step, record) == seconds


def test_signs_of_life_are_much_more_frequent_than_deadlines():
    assert [pause_of(asked) for asked in (1, 8, 80, 1800, 0)] == [0.125, 1, 10, 10, 10]


WAITS, WORKS = Peer('rank 1 on b', 0.5, 'votes', True), Peer('rank 2 on c', 0.5, 'data', False)
GONE, NEVER = Peer('rank 3 on d', 61., 'data', False), Peer('rank 4')


@pytest.mark.parametrize('peers, works, why', [
    ([], False, ''),
    ([WAITS], False, 'all workers wait: for a server, if there are any, or for what the network lost'),
    ([WAITS, WORKS], True, ''),
    ([WAITS, WORKS, GONE], False, 'nothing is heard of rank 3 on d for 61 s, since it waited for data: it is stopped, '
                                  'or cut off'),
    ([WAITS, GONE, NEVER], False, 'nothing is heard of rank 3 on d for 61 s, since it waited for data: it is stopped, '
                                  'or cut off; rank 4 has not come so far as to be heard of'),
    ([WAITS._replace(silent=29.)], False, 'all workers wait: for a server, if there are any, or for what the network '
                                          'lost'),
    ([WAITS._replace(silent=31.)], False, 'nothing is heard of rank 1 on b for 31 s, since it waited for '
                                          'votes: it is stopped, or cut off')])
def test_who_keeps_all_waiting(peers, works, why):
    assert judge(peers, 10) == (works, why)


def start(tmp_path, work, peers='[]'):
    """The program under a deadline of half a second, as there is no record."""
    with open(tmp_path / 'err', 'wb') as err:
        return subprocess.Popen([sys.executable, '-c', PROGRAM.format(work=work, peers=peers)], cwd=tmp_path,
                                stdout=subprocess.PIPE, stderr=err, universal_newlines=True,
                                env={**os.environ, 'MXSIMMIM_REPORT_FILE': str(tmp_path / 'report')})


@pytest.mark.parametrize('work, what', [
    ("with watchdog.doing('a file', lambda: 'fifo'): in_vain()", 'a file (fifo) after'),
    ("with watchdog.doing('a file', lambda: 1 / 0): in_vain()", 'a file after'),
    ("with watchdog.doing('a'), watchdog.doing('b'): in_vain()", 'b after'),
    ('in_vain()', 'what comes before and after the training after'),
    # While Python holds the lock of all imports: to tell it must not need one.
    ("sys.meta_path.insert(0, type('Finder', (), dict(find_spec=lambda *_: in_vain()))); import nothing_of_this",
     'what comes before and after the training after')])
def test_what_waits_in_vain_ends(tmp_path, work, what):
    """With status 1; the log has the stacks of all threads and then the reason, which the launcher gets, too."""
    process = start(tmp_path, work)
    out, _ = process.communicate(timeout=20)
    err = (tmp_path / 'err').read_text()
    assert process.returncode == 1, err
    text = err.splitlines()[-1]
    assert text.startswith('mxsimmim: error: rank 3 on host has waited 0.')
    assert f' s for {what} step 7, longer than runtime.deadline allows (0.5 s)' in text
    assert ' in in_vain\n' in err and err.count('Thread 0x') + err.count('Current thread 0x') >= 2
    told = text[len('mxsimmim: error: '):]
    assert out == f'begun\ntold: {told}\n'
    assert f'"stalled": "{told}"' in (tmp_path / 'report').read_text()


def test_who_waits_for_others_waits_longer_and_names_them(tmp_path):
    process = start(tmp_path, "with watchdog.doing('votes', together=True): in_vain()",
                    peers="[watchdog.Peer('rank 0 on a', 9., 'data')]")
    process.communicate(timeout=20)
    assert process.returncode == 1
    text = (tmp_path / 'err').read_text().splitlines()[-1]
    assert 0.625 <= float(text.split(' has waited ')[1].split(' s ')[0]) < 5
    assert text.endswith('for votes after step 7, longer than runtime.deadline allows (0.5 s): nothing is heard of '
                         'rank 0 on a for 9 s, since it waited for data: it is stopped, or cut off')


@pytest.mark.parametrize('work', ['for_short()', 'with_beats()'])
def test_what_goes_on_is_left_alone(tmp_path, work):
    """A second of it, twice the deadline."""
    process = start(tmp_path, work)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, 'begun\ndone\n'), (tmp_path / 'err').read_text()


def test_work_of_others_is_waited_for(tmp_path):
    process = start(tmp_path, "with watchdog.doing('votes', together=True): time.sleep(1.5)",
                    peers="[watchdog.Peer('rank 0 on a', 0.01, 'data')]")
    assert process.communicate(timeout=20)[0] == 'begun\ndone\n', (tmp_path / 'err').read_text()


def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path):
    process = start(tmp_path, 'with_beats()')
    assert process.stdout.readline() == 'begun\n'
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=20)[0] == 'done\n', (tmp_path / 'err').read_text()


def test_it_costs_nothing_beside_a_step():
    """Microseconds, where nobody watches and where somebody does; a step has about five."""
    assert not is_on()
    seconds = math.inf
    for _ in range(5):
        began = time.process_time()
        for _ in range(2000):
            with doing('data'):
                pass
        seconds = min(seconds, (time.process_time() - began) / 2000)
    print(f'{seconds * 1e6:.2f} us')
    assert seconds < 2e-5


def test_nothing_that_it_knew_is_kept():
    """A kvstore that is still known when the interpreter ends is an abort of MXNet's."""
    class Trainer:
        step = 7
    trainer = Trainer()
    known = weakref.ref(trainer)
    with watchdog.Watch('rank 0 on host', 60.0) as watch:
        watch.step = lambda trainer=trainer: trainer.step
        time.sleep(0.1)  # it looks, and then waits for seconds
    assert 'watchdog' not in [thread.name for thread in threading.enumerate()]
    del watch, trainer
    assert known() is None


def test_the_end_has_a_limit():
    program = 'import time; from mxsimmim.runtime import watchdog; watchdog.end_within(0.2, 7); time.sleep(60)'
    assert subprocess.run([sys.executable, '-c', program], timeout=30).returncode == 7
