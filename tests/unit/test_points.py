"""Points at which faults can be made to happen."""
import signal
import subprocess
import sys

import pytest

PROGRAM = "from mxsimmim.system.points import reach\nfor n in range(5):\n    reach('here')\n    print(n, flush=True)"


def passed(environ):
    process = subprocess.Popen([sys.executable, '-c', PROGRAM], env=environ, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=30)
    return process.returncode, len(out.split())


@pytest.mark.parametrize('arrival, expected', [(1, (-signal.SIGKILL, 0)), (3, (-signal.SIGKILL, 2)), (9, (0, 5))])
def test_a_fault_comes_at_an_arrival_and_to_one_process(tmp_path, arrival, expected):
    (tmp_path / 'here').write_text(f'{int(signal.SIGKILL)} {arrival}')
    assert passed({'MXSIMMIM_FAULTS': str(tmp_path)}) == expected
    assert [file.name for file in tmp_path.iterdir()] == ['here.taken' if expected[0] else 'here']
    assert passed({'MXSIMMIM_FAULTS': str(tmp_path)}) == (0, 5)


def test_without_the_variable_nothing_is_looked_at(tmp_path):
    (tmp_path / 'here').write_text(f'{int(signal.SIGKILL)} 1')
    assert passed({}) == (0, 5)
