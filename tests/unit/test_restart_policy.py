"""Whether a job that failed is started again: the policy as a table, and launchers that follow it."""
import asyncio
import json
import os
import signal
import sys

import pytest
from support.screen import Screen

from mxsimmim.cluster.backends.local import LocalBackend
from mxsimmim.cluster.outcome import Exit, Outcome
from mxsimmim.cluster.restarts import (
    Failure,
    decide,
    failing_host,
    failure_of,
    history,
    host_to_blame,
    without_progress,
)
from mxsimmim.cluster.spec import JobSpec, Process
from mxsimmim.cluster.supervisor import Supervisor
from mxsimmim.config import Config
from mxsimmim.runtime import report
from mxsimmim.system import files, notify
from mxsimmim.training import run_folder

KILLED = Failure(137, ['worker 1 on a was killed by SIGKILL'])
SAVED_5, SAVED_9 = (KILLED._replace(checkpoint=step) for step in (5, 9))
ERROR = Failure(1, ['worker 0 on a failed with exit code 1'], error=('ZeroDivisionError: 1 / 0', 7))


@pytest.mark.parametrize('failures, most, seconds, part', [
    ([KILLED], 0, None, ''),
    ([KILLED], 1, 1, 'restart in 1 s, from the newest whole checkpoint (1 of 1)'),
    ([KILLED] * 2, 1, None, 'no restart: 1 without progress were allowed (--max-restarts 1)'),
    ([KILLED] * 2, 3, 2, '2 of 3'),
    ([KILLED] * 3, 3, 4, '3 of 3'),
    ([KILLED] * 9, 20, 60, '9 of 20'),
    # Progress makes up for all failures before it, and costs nothing itself.
    ([SAVED_5], 1, 1, 'not counted, as there was progress'),
    ([SAVED_5, KILLED], 1, 1, '1 of 1'),
    ([SAVED_5, SAVED_5], 1, 1, '1 of 1'),
    ([SAVED_5, SAVED_5, SAVED_5], 1, None, '1 without progress'),
    ([SAVED_5, SAVED_5, SAVED_9], 1, 1, 'not counted'),
    ([SAVED_5, SAVED_5, SAVED_9, SAVED_5, SAVED_9], 2, 2, '2 of 2'),
    # What would happen again.
    ([Failure(2, ['error: no key'])], 5, None, 'no restart: the command refuses its words or its configuration'),
    ([ERROR], 5, 1, '1 of 5'),
    ([ERROR, ERROR], 5, None, 'no restart: the same error after the same 7 steps as the time before'),
    ([ERROR, ERROR._replace(error=(ERROR.error[0], 8))], 5, 2, '2 of 5'),
    ([ERROR, ERROR._replace(error=('other', 7))], 5, 2, '2 of 5'),
    ([ERROR, KILLED, ERROR], 5, 4, '3 of 5'),
    # With all hosts it may not.
    ([Failure(2, ['error: 2 stages, 3 workers'], reduced=True)], 5, 1, '1 of 5'),
    ([ERROR, ERROR._replace(reduced=True)], 5, 2, '2 of 5'),
])
def test_the_policy(failures, most, seconds, part):
    decision = decide(failures, most)
    assert decision.seconds == seconds and part in decision.why and bool(part) == bool(decision.why)


def exit_of(number, code, host='a', **told):
    return Exit(Process('worker', number, 0), host, code, 1.0, (), '', told)


@pytest.mark.parametrize('outcome, host', [
    (Outcome(failed=(exit_of(1, -9, 'b'), exit_of(0, 1, 'a', error='E'))), 'b'),
    (Outcome(failed=(exit_of(1, 1, 'b', error='E'), exit_of(0, -9, 'a'))), 'b'),
    (Outcome(failed=(Exit(Process('server', 0, 1), 'b', -11, 1.0),)), 'b'),
    (Outcome(failed=(exit_of(0, 1, 'a', stalled='rank 1 is silent'),), stopped=((Process('worker', 1, 1), 'b'),)), 'b'),
    (Outcome(failed=(exit_of(0, -9, 'a'),), lost=(('b', 'gone'),)), 'b'),
    # It speaks of others, of a disk, or of nothing that is its host's.
    (Outcome(failed=(exit_of(0, 1, 'a', stalled='rank 1 is silent'),)), ''),
    (Outcome(failed=(exit_of(0, 1, 'a'), exit_of(1, -9, 'b'))), ''), (Outcome(failed=(exit_of(0, 2, 'a'),)), ''),
    # A switch, not a host.
    (Outcome(lost=(('a', 'gone'), ('b', 'gone'))), ''), (Outcome(), '')])
def test_the_host_to_blame(outcome, host):
    assert host_to_blame(outcome) == host


A, B, NOBODY = (KILLED._replace(host=host) for host in ('a', 'b', ''))


@pytest.mark.parametrize('failures, host', [
    ([], ''), ([A], ''), ([A, A], 'a'), ([A, B], ''), ([A, B, B], 'b'), ([B, A, B], ''), ([A, NOBODY, A], ''),
    ([NOBODY, NOBODY], ''), ([A, A._replace(checkpoint=5)], ''), ([A._replace(checkpoint=5)] * 2, 'a'),
    ([A._replace(checkpoint=5), A._replace(checkpoint=9), A._replace(checkpoint=9)], 'a')])
def test_the_host_that_failures_come_from(failures, host):
    """Twice in a row, with no newer checkpoint from the second attempt."""
    assert failing_host(failures) == host


def test_what_a_failure_was():
    found = failure_of(Outcome(failed=(exit_of(1, 1, error='E', step=3), exit_of(0, 1, error='other')), checkpoint=2))
    assert found == Failure(1, ['worker 1 on a failed with exit code 1; its log is logs/worker-1.log, and empty',
                                'after it: worker 0 failed with exit code 1'], 2, ('E', 3), False,
                            tuple({'rank': rank, 'host': 'a', 'why': 'failed with exit code 1'} for rank in (1, 0)),
                            'a')
    assert failure_of(Outcome(failed=(exit_of(0, -9),)))[2:] == (
        -1, None, False, ({'rank': 0, 'host': 'a', 'why': 'was killed by SIGKILL'},), 'a')
    assert failure_of(Outcome(lost=(('b', 'gone'),))) == Failure(1, ['host b was lost: gone'], host='b')
    assert without_progress([]) == 0 and history([KILLED]) == []
    assert history([KILLED, Failure(1, [])]) == [f'attempt 1: {KILLED.causes[0]}', 'attempt 2: failed without a word']


def test_what_others_can_mend_is_no_error_of_the_job(tmp_path, monkeypatch):
    """A restart that meets a full disk, or the processes that it is to replace, may be followed by another."""
    monkeypatch.setattr(files, 'free', lambda folder: 0)
    monkeypatch.setattr(report, '_told', {})
    monkeypatch.setenv(report.FILE, str(tmp_path / 'file'))
    with run_folder.locked(tmp_path / 'run', print):
        for refused in (lambda: run_folder.locked(tmp_path / 'run', print).__enter__(),
                        lambda: files.check_room(tmp_path, 100, 0), lambda: files.try_place(tmp_path / 'file' / 'run'),
                        lambda: run_folder.write_config(tmp_path / 'no' / 'run', Config())):
            report.tell(step=3)
            with pytest.raises(ValueError) as error:
                refused()
            report.tell_error(error.value)
            assert report.read(str(tmp_path / 'file')) == {'step': 3}, error.value


def test_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(report, '_told', {})
    report.tell(step=1)  # to nobody
    monkeypatch.setenv(report.FILE, str(tmp_path / 'file'))
    assert report.read(str(tmp_path / 'file')) == {}
    report.tell(checkpoint=4)
    for error in (OSError('disk'), MemoryError()):
        report.tell_error(error)
    assert report.read(str(tmp_path / 'file')) == {'step': 1, 'checkpoint': 4}
    report.tell_error(ValueError('ü' * 5000))
    assert report.read(str(tmp_path / 'file'))['error'] == ('ValueError: ' + 'ü' * 5000)[:report.LONGEST]
    for text in ('', '[1]', '{'):
        (tmp_path / 'file').write_text(text)
        assert report.read(str(tmp_path / 'file')) == {}


PROGRAM = '''
import json, os, signal, sys, time
attempt = len(json.loads(os.environ.get('MXSIMMIM_RESTARTS', '[]')))
print('attempt', attempt)
def tell(**values):
    with open(os.environ['MXSIMMIM_REPORT_FILE'], 'w') as file:
        json.dump(values, file)
role, what = os.environ['DMLC_ROLE'], json.loads(sys.argv[1])[attempt]
if role != 'worker':
    time.sleep(600)
elif os.environ['DMLC_WORKER_ID'] == '1':
    tell(**what.get('told', {}))
    time.sleep(what.get('seconds', 0))
    os.kill(os.getpid(), what['signal']) if 'signal' in what else sys.exit(what['code'])
else:
    time.sleep(600 if what.get('code', 1) else 0)
'''


def run(tmp_path, monkeypatch, attempts, most, stop=None):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mxsimmim.cluster.restarts.SOONEST', 0.05)
    monkeypatch.setattr('mxsimmim.cluster.attempt.SETTLE', 0.05)
    monkeypatch.setattr('mxsimmim.cluster.attempt.CLOSING', 0.05)
    screen, spec = Screen(), JobSpec((sys.executable, '-S', '-c', PROGRAM, json.dumps(attempts)), 2, 1,
                                     directory=os.getcwd(), max_restarts=most)
    if stop:
        async def stopper():
            while not any('restart in' in line for line in screen.lines):
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), stop)
        made = Supervisor(LocalBackend(), screen)
        original = made._run

        async def both(spec):
            task = asyncio.ensure_future(stopper())
            try:
                return await original(spec)
            finally:
                task.cancel()
        made._run = both
        return made.run(spec), screen.lines
    return Supervisor(LocalBackend(), screen).run(spec), screen.lines


def test_a_job_is_started_until_it_ends_well(tmp_path, monkeypatch):
    status, lines = run(tmp_path, monkeypatch, [{'signal': 9}, {'code': 3}, {'code': 0}], 2)
    assert status == 0
    assert [line for line in lines if 'restart' in line] == [
        'restart in 0.05 s, from the newest whole checkpoint (1 of 2)',
        'restart in 0.1 s, from the newest whole checkpoint (2 of 2)']
    assert any(line.startswith('worker 1 on') and 'was killed by SIGKILL' in line for line in lines)
    log = (tmp_path / 'logs' / 'worker-1.log').read_text()
    assert log == 'attempt 0\nlaunch: restart 1\nattempt 1\nlaunch: restart 2\nattempt 2\n'


def test_restarts_are_spent_by_failures_without_progress(tmp_path, monkeypatch):
    status, lines = run(tmp_path, monkeypatch, [
        {'signal': 9, 'told': {'checkpoint': 2}}, {'code': 3}, {'code': 4, 'told': {'checkpoint': 4}}, {'code': 5},
        {'code': 6}], 1)
    assert status == 6
    assert [line.partition(';')[0] for line in lines if line.startswith('attempt')] == [
        f'attempt {number}: worker 1 on {os.uname().nodename} {words}' for number, words in enumerate(
            ['was killed by SIGKILL', *(f'failed with exit code {code}' for code in (3, 4, 5, 6))], 1)]


def test_what_would_happen_again_is_not_tried(tmp_path, monkeypatch):
    told = {'error': 'ZeroDivisionError: division by zero', 'step': 12}
    status, lines = run(tmp_path, monkeypatch, [{'code': 1, 'told': told}] * 2, 5)
    assert status == 1 and 'no restart: the same error after the same 12 steps as the time before' in lines
    status, lines = run(tmp_path, monkeypatch, [{'code': 2}], 5)
    assert status == 2 and 'no restart: the command refuses its words or its configuration, and would again' in lines


def test_a_command_hears_of_all(tmp_path, monkeypatch):
    """In the order in which things happen; a command that fails or hangs costs nothing but a line."""
    told = {'notify': f'cat >> {tmp_path}/heard; echo no >&2; exit 3', 'run': 'runs/x'}
    status, lines = run(tmp_path, monkeypatch, [{'signal': 9, 'told': told}, {'code': 3}, {'code': 0}], 2)
    heard = [json.loads(line) for line in (tmp_path / 'heard').read_text().splitlines()]
    host = os.uname().nodename
    killed, failed = (f'worker 1 on {host} {words}; its log is logs/worker-1.log'
                      for words in ('was killed by SIGKILL', 'failed with exit code 3'))
    assert status == 0 and {event.pop('run') for event in heard} == {'runs/x'}
    assert [heard[number].pop('causes')[0] for number in (0, 2)] == [
        f'{why}, its last lines:' for why in (killed, failed)]
    assert heard == [{'event': 'failure', 'restart_in': 0.05}, {'event': 'restart', 'number': 1, 'cause': killed},
                     {'event': 'failure', 'restart_in': 0.1}, {'event': 'restart', 'number': 2, 'cause': failed},
                     {'event': 'end', 'status': 0}]
    assert lines.count(f'warning: notify.command={told["notify"]} failed with exit code 3: no') == 5


def test_the_run_hears_of_all(tmp_path, monkeypatch):
    """Also of a restart that comes to nothing; a status file that nobody of the job told of stays as it is."""
    (tmp_path / 'x').mkdir()
    status = tmp_path / 'x' / 'status.json'
    status.write_text('{"state": "training", "step": 7}')
    run(tmp_path, monkeypatch, [{'code': 3}], 0)
    assert json.loads(status.read_text()) == {'state': 'training', 'step': 7}
    run(tmp_path, monkeypatch, [{'signal': 9, 'told': {'notify': '', 'run': 'x'}}], 0)
    told = json.loads(status.read_text())
    host = os.uname().nodename
    assert (told['state'], told['step']) == ('failed', 7)
    assert told['gone'] == [{'rank': 1, 'host': host, 'why': 'was killed by SIGKILL'}]
    assert told['causes'][0].startswith(f'worker 1 on {host} was killed by SIGKILL; its log is ')
    ended, lines = run(tmp_path, monkeypatch, [{'code': 3, 'told': {'notify': '', 'run': 'x'}},
                                             {'code': 0}], 1, signal.SIGINT)
    assert ended == 128 + signal.SIGINT and json.loads(status.read_text())['state'] == 'failed'
    assert json.loads(status.read_text())['gone'][0]['why'] == 'failed with exit code 3'


def test_commands_that_hear_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(notify, 'PATIENCE', 0.2)
    assert notify.send('sleep 60; true', {}) == 'notify.command=sleep 60; true has not ended within 0.2 s'
    assert notify.send('exit 0', {'x': 'y' * 1_000_000}) == ''  # it reads nothing of what it is told
    assert 'exit code 127: ' in notify.send('/nowhere/to/be/found', {})


def test_a_signal_while_it_waits_for_the_next_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr('mxsimmim.cluster.restarts.LATEST', 30.0)
    status, lines = run(tmp_path, monkeypatch, [{'signal': 9}, {'code': 0}], 1, signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and lines[-1] == 'stopped by SIGTERM'
