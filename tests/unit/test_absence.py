"""Jobs that go on without hosts, and with them again: hosts that are this machine and come and go as files do."""
import json
import os
import signal
import sys

import pytest
from support.screen import Screen

from mxsimmim.cluster import absence, attempt, prepare
from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.connections import BOOTSTRAP
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec
from mxsimmim.cluster.supervisor import Supervisor

HOSTS = Host('a'), Host('b'), Host('c')
# A host is away while there is a file of its name.
AGENT = ['sh', '-c', 'test -e "$0" && {{ echo "$0 is asleep" >&2; exit 1; }}; exec "$@"', '{name}', sys.executable,
         '-X', 'utf8', '-c', BOOTSTRAP]
# A worker that writes a checkpoint after another until it is told to stop.
TRAIN = '''
trap 'echo "stopped at $step"; exit 143' TERM
while sleep 0.05; do
    step=$((step + 1))
    if test $HOROVOD_RANK = 0; then
        echo "{\\"checkpoint\\": $step, \\"notify\\": \\"cat >> heard\\", \\"run\\": \\"r\\"}" > report
        mv report $MXSIMMIM_REPORT_FILE
    fi
    test $step = 3 && MORE
done'''


class Sleepers(Backend):
    """Hosts that are this machine, and whose agents do not start while they are away."""
    agent_address = '127.0.0.1'

    def hosts(self, spec):
        return spec.hosts

    def start_agents(self, spec, agents):
        for agent in agents:
            agent.open([word.format(name=agent.host.name) for word in AGENT])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script as so many workers; returns the exit status and what was said."""
    monkeypatch.chdir(tmp_path)
    for name, value in (('FIRST', 0.1), ('LATEST', 0.5), ('AGAIN', 1)):
        monkeypatch.setattr(absence, name, value)
    monkeypatch.setattr(attempt, 'PING', 0.1)
    monkeypatch.setattr(attempt, 'SETTLE', 0.05)
    monkeypatch.setattr('mxsimmim.cluster.restarts.SOONEST', 0.05)
    before = len(os.listdir('/proc/self/fd'))

    def unlike(_spec, infos, *_others):  # the real one knows that this machine is no cluster
        return [(n, f'host {info.name}: is of another kind') for n, info in enumerate(infos)
                if len(infos) > 1 and os.path.exists(f'{info.name}-is-unlike')]
    monkeypatch.setattr(prepare.preflight, 'problems', unlike)

    def begin(script, workers=3, **changes):
        screen = Screen()
        spec = JobSpec(('sh', '-c', script), workers, hosts=HOSTS, horovod=True, directory=os.getcwd(), **changes)
        status = Supervisor(Sleepers(), screen).run(spec)
        # But for what runs where.
        return status, [line for line in screen.lines if not line.startswith(('network: ', 'a: ', 'b: ', 'c: '))]

    def late(*_):
        raise AssertionError('not done after 60 s')
    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60, 5)  # again, should the end hang as well
    yield begin
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
    assert len(os.listdir('/proc/self/fd')) <= before + 1  # it lists itself


def test_a_host_that_was_away_joins_at_a_checkpoint(run, tmp_path):
    """It is away from the start, which costs no restart; nor does its return."""
    (tmp_path / 'b').touch()
    status, lines = run('test $HOROVOD_SIZE = 3 && echo "$MXSIMMIM_RESTARTS" && exit 0'
                        + TRAIN.replace('MORE', 'rm -f b'), min_workers=2, max_restarts=0)
    assert (status, lines) == (0, [
        'host b: b is asleep', 'left out for now: host b; the job goes on with 2 of 3 workers',
        'host b is back: after the next checkpoint the job goes on with 3 workers'])
    (before, first), (too, second), (nothing, third) = ((tmp_path / 'logs' / f'worker-{n}.log').read_text().split(
        'launch: restart 1\n') for n in range(3))
    assert 'stopped at ' in before and 'stopped at ' in too and nothing == ''
    (_, why), = json.loads(first)
    assert why == 'host b is back' and first == second == third
    assert [json.loads(line) for line in (tmp_path / 'heard').read_text().splitlines()] == [
        {'run': 'r', 'event': 'restart', 'number': 1, 'cause': why}, {'run': 'r', 'event': 'end', 'status': 0}]


def test_a_host_that_is_lost_and_stays_away(run, tmp_path):
    """Its worker switches it off; the others write checkpoints, switch it on, and all end well."""
    status, lines = run('test "$HOROVOD_RANK$MXSIMMIM_RESTARTS" = 1 && sleep 1 && touch b && kill -9 $PPID; '
                        'test $HOROVOD_SIZE = 3 && test -n "$MXSIMMIM_RESTARTS" && exit 0' + TRAIN.replace(
                            'MORE', 'test $HOROVOD_SIZE = 2 && rm -f b'), min_workers=2, max_restarts=1)
    assert status == 0
    assert [line.partition(';')[0].partition(' s, ')[0] for line in lines] == [
        'host b was lost: its agent ended without a word', 'restart in 0.05', 'host b: b is asleep',
        'left out for now: host b',
        'host b is back: after the next checkpoint the job goes on with 3 workers']


def test_too_few_hosts_are_left(run, tmp_path):
    for name in 'bc':
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match='^host b: b is asleep\nhost c: c is asleep$'):
        run('exit 0', min_workers=2)
    with pytest.raises(ValueError, match='^host b: b is asleep\nhost c: c is asleep$'):
        run('exit 0')
    assert run('exit 0', min_workers=1)[0] == 0


def test_a_spare_host_takes_the_place_of_another(run, tmp_path):
    """Of whose return nothing follows."""
    (tmp_path / 'b').touch()
    status, lines = run('rm -f b; sleep 1', 2, min_workers=2)
    assert (status, lines[1:]) == (0, ['left out for now: host b; the job goes on with 2 of 2 workers'])


def test_a_host_that_comes_back_another(run, tmp_path):
    """It would be left out again at once, and so the job is not disturbed."""
    (tmp_path / 'b-is-unlike').touch()
    status, lines = run('step=0' + TRAIN.replace('MORE', 'sleep 1 && exit 0'), min_workers=2)
    assert (status, lines) == (0, ['host b: is of another kind',
                                   'left out for now: host b; the job goes on with 2 of 3 workers'])


def test_what_is_refused_with_fewer_hosts_is_tried_with_all(run, tmp_path):
    (tmp_path / 'b').touch()
    status, lines = run('test $HOROVOD_SIZE = 3 && exit 0; rm -f b; exit 2', min_workers=2, max_restarts=9)
    assert status == 0 and [line for line in lines if 'restart' in line][0] == (
        'restart in 0.05 s, from the newest whole checkpoint (1 of 9)')


def test_a_number_of_workers_that_is_refused(run, tmp_path):
    """By its processes. As many as it takes go on, which costs no restart."""
    (tmp_path / 'b').touch()
    status, lines = run('test $HOROVOD_SIZE = 4 && exit 2; exit 0', 6, min_workers=2, max_restarts=0)
    assert status == 0 and [*lines[:2], lines[-1]] == [
        'host b: b is asleep', 'left out for now: host b; the job goes on with 4 of 6 workers',
        'the command refuses 4 workers; the job goes on with 3 of 6 workers']
    assert 'failed with exit code 2' in lines[2]


def test_a_configuration_that_is_refused(run, tmp_path, monkeypatch):
    """Before anything is started, for numbers of workers that two does not divide."""
    check = 'test $((HOROVOD_SIZE % 2)) = 0 || { echo "mxsimmim: error: $HOROVOD_SIZE workers" >&2; exit 2; }'
    monkeypatch.setattr(prepare.preflight, 'check_command', lambda command: ['sh', '-c', check])
    (tmp_path / 'b').touch()
    status, lines = run('test $HOROVOD_SIZE = 2', 4, min_workers=1, max_restarts=0)
    assert (status, lines) == (0, [
        'host b: b is asleep', 'left out for now: host b; the job goes on with 3 of 4 workers',
        'mxsimmim: error: 3 workers', 'the command refuses 3 workers; the job goes on with 2 of 4 workers'])
    with pytest.raises(ValueError, match='^mxsimmim: error: 3 workers$'):
        run('exit 0', 4, min_workers=3)


def test_a_host_whose_processes_fail_again_and_again(run, tmp_path):
    """It answers, and is left out all the same; it comes back as others do."""
    status, lines = run('test $HOROVOD_SIZE = 3 && { test -e mended && exit 0; test $HOROVOD_RANK = 1 && kill -9 $$; '
                        'sleep 9; }; touch mended' + TRAIN.replace('MORE', ':'), min_workers=2, max_restarts=2)
    killed = ['worker 1 on b was killed by SIGKILL', 'if nobody sent that signal']
    assert status == 0
    assert [line.partition('; its')[0].partition(', b ran')[0].partition(' s, from')[0] for line in lines] == [
        *killed, 'restart in 0.05', *killed, 'restart in 0.1',
        'left out for now: host b, which 2 failures in a row came from; the job goes on with 2 of 3 workers',
        'host b is back: after the next checkpoint the job goes on with 3 workers']


def test_agents_that_are_slow_to_start(run, monkeypatch):
    """Signs of life wait for them: pieces of one behind its program would be the end of an agent."""
    monkeypatch.setattr(attempt, 'PING', 0.01)
    monkeypatch.setitem(globals(), 'AGENT', [*AGENT[:2], 'sleep 0.5; ' + AGENT[2], *AGENT[3:]])
    assert run('exit 0')[0] == 0
