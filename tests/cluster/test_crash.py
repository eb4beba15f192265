"""A crash in native code: the launcher's summary and the log name the line of Python."""
import os
import signal
from pathlib import Path

import pytest
from mxnet.libinfo import find_lib_path

from mxsimmim.runtime import mxnet_private

PROGRAM = Path(__file__).parent / 'programs' / 'crash.py'
LINES = {'read': 15, 'give_up': 19, 'in_a_thread': 15}  # of PROGRAM


@pytest.mark.parametrize('words, role, how, first', [
    (['-s', 1], 'worker1', 'read', 'mxnet'),
    (['-s', 1], 'worker0', 'give_up', ''),  # which the terminal shows, too
    (['-s', 1], 'server', 'in_a_thread', ''),
    (['-s', 1], 'scheduler', 'give_up', ''),
    (['--horovod'], 'worker1', 'read', 'horovod'),
    (['--horovod'], 'worker0', 'give_up', ''),
])
def test_the_line_is_named(launcher, words, role, how, first):
    if first == 'horovod':
        pytest.importorskip('horovod')
    _, err = launcher.run('-n', 2, *words, '--', 'python', '-W', 'ignore', PROGRAM, role, how, first,
                          status=134 if how == 'give_up' else 139)
    summary = err[err.index('launch: ' + role[:6]):].splitlines()
    name = role if role == 'scheduler' else f'{role[:6]} {role[6:] or 0}'
    killed, title = ('SIGABRT', 'Aborted') if how == 'give_up' else ('SIGSEGV', 'Segmentation fault')
    assert summary[0].startswith(f'launch: {name} on ') and f' was killed by {killed}; its log is ' in summary[0]
    assert summary[1:3] == ['launch:   | last words', f'launch:   | Fatal Python error: {title}']
    function = 'give_up' if how == 'give_up' else 'read'
    assert summary[3].startswith(f'launch: {name} crashed in native code at ')
    assert summary[3].endswith(f' at {PROGRAM}:{LINES[how]} in {function}') and len(summary) == 4
    log = launcher.log(name.replace(' ', '-') if ' ' in name else f'{name}-0')
    assert f'  File "{PROGRAM}", line {LINES[how]} in {function}\n' in log


def test_the_commands_own_crash(launcher):
    """At its import, before it does anything: of a stand-in for MXNet."""
    (launcher.folder / 'mxnet').mkdir()
    (launcher.folder / 'mxnet' / '__init__.py').write_text('import os\n\n\nos.abort()\n')
    # Servers load the library alone: the real one.
    (launcher.folder / 'mxnet' / 'libinfo.py').write_text(
        f'__version__ = {mxnet_private.SUPPORTED!r}\n\n\ndef find_lib_path():\n    return {find_lib_path()}\n')
    launcher.environ['PYTHONPATH'] = str(launcher.folder)
    _, err = launcher.run('-n', 1, '-s', 1, '--env', 'PYTHONFAULTHANDLER=', '--', 'python', '-m', 'mxsimmim',
                          'pretrain', PROGRAM.parents[3] / 'conf' / 'digits.yaml', status=134)
    assert f' crashed in native code at {launcher.folder}/mxnet/__init__.py:4 in <module>\n' in err


def test_the_agents_own_crash(launcher):
    process = launcher.start('-n', 1, '-s', 1, 'python', '-c', 'import time; print("ready", flush=True); '
                             'time.sleep(600)')
    launcher.until(lambda: 'ready' in launcher.text('out'), 20, 'ready')
    guardian, agent = sorted(launcher.find('import sys; exec('), key=lambda pid: parent(pid) != process.pid)
    os.kill(agent, signal.SIGSEGV)
    assert process.wait(15) != 0
    launcher.gone(10)
    assert ' was lost: its agent crashed in native code at ' in launcher.text('err'), launcher.text('err')


def parent(pid):
    return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])


def test_of_a_log_without_line_breaks_the_end_is_shown(launcher):
    _, err = launcher.run('-n', 1, '-s', 1, 'python', '-c', 'import os, sys\nif os.environ["DMLC_ROLE"] == "worker":\n'
                          '    print("x" * 300_000, "reason", flush=True)\n    sys.exit(3)\n'
                          'import time; time.sleep(600)', status=3)
    [line] = [line for line in err.splitlines() if line.startswith('launch:   | ')]
    assert len(line) == len('launch:   | ') + 8192 and line.endswith('x reason')
