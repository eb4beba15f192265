"""Attempts at a job on a kind of cluster that the launcher has never heard of, and what is said of how they end."""
import asyncio
import os
import signal
import sys

import pytest
from support.screen import Screen

from mxsimmim.cluster.attempt import Attempt
from mxsimmim.cluster.backends import BACKENDS
from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.backends.mpi import MpiBackend
from mxsimmim.cluster.connections import BOOTSTRAP
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.outcome import Exit, Outcome, exit_status, summary
from mxsimmim.cluster.prepare import agents_of
from mxsimmim.cluster.spec import JobSpec, Process
from mxsimmim.cluster.supervisor import Supervisor

DEADLINE = 60  # seconds for one attempt
WHO = '$DMLC_ROLE$DMLC_WORKER_ID'


class Elsewhere(Backend):
    """Two hosts that are this machine, on which it starts an agent for each process where it likes."""
    agent_per_process = True
    agent_address = '127.0.0.1'

    def __init__(self, argv=(sys.executable, '-X', 'utf8', '-c', BOOTSTRAP), copies=()):
        self.argv, self.copies = argv, copies

    def hosts(self, spec):
        return [Host('up'), Host('down')]

    def start_agents(self, spec, agents):
        for agent in agents:
            agent.open(self.argv)

    def explain(self, host, said):
        return f'{said} (turn {host.name} round)'

    def copy_command(self, host, directory):
        return [word.format(host=host.name, directory=directory) for word in self.copies]


class OneAHost(Elsewhere):
    """The same, with an agent a host; the hosts do not see each other's logs."""
    agent_per_process = False


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, empty. Nothing of an attempt is open when it has ended."""
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir('/proc/self/fd'))
    yield tmp_path
    assert len(os.listdir('/proc/self/fd')) <= before + 1  # it lists itself


def job(script, workers=2, servers=1, **changes):
    return JobSpec(('sh', '-c', script), workers, servers, directory=os.getcwd(), **changes)


async def attempt(spec, backend, screen, stop=None):
    """One attempt, to which a signal comes once `stop` is said."""
    made = Attempt(spec, backend, screen)
    run = asyncio.ensure_future(made.run())
    while stop and not stop(made) and not run.done():
        await asyncio.sleep(0.02)
    if stop:
        made.stop(signal.SIGTERM)
    try:
        return await asyncio.wait_for(run, DEADLINE)
    finally:
        await asyncio.sleep(0)  # for callbacks of what has just ended
        assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize('turn', [1, 2])
def test_a_job_on_a_new_kind_of_cluster(folder, turn):
    screen = Screen()
    assert Supervisor(Elsewhere(), screen).run(job(f'echo {WHO}')) == 0
    assert screen.output == b'worker0\n'
    assert screen.lines == ['network: lo, 127.0.0.1', 'up: workers 0 1, server 0, scheduler']  # one host, after all
    logs = {path.name: path.read_text() for path in (folder / 'logs').iterdir()}
    assert logs == {'worker-0.log': 'worker0\n', 'worker-1.log': 'worker1\n', 'server-0.log': 'server\n',
                    'scheduler-0.log': 'scheduler\n'}


def test_a_second_attempt_owes_nothing_to_the_first():
    spec = job(f'test {WHO} = worker1 || exec sleep 600; test -e once && exit 0; touch once; echo no >&2; exit 3')
    screen = Screen()

    async def twice():
        return [await attempt(spec, Elsewhere(), screen), await attempt(spec, Elsewhere(), screen, lambda made: any(
            exit.code == 0 for exit in made.exits.values()))]
    first, second = asyncio.run(twice())
    assert first._replace(failed=()) == Outcome()
    assert [(exit.process[:2], exit.host, exit.code, exit.tail) for exit in first.failed] == [
        (('worker', 1), 'down', 3, ['no'])]
    assert second == Outcome(signal=signal.SIGTERM)  # worker 1 ended well, the others had to be stopped


def test_a_host_that_is_missed_after_a_worker_has_failed_for_want_of_it():
    """Its agent's end may be seen last: the guardian clears up first."""
    spec = job(f'case {WHO} in worker0) exit 3;; worker1) trap "" TERM; sleep 1; kill -9 $PPID;; esac; exec sleep 600')
    outcome = asyncio.run(attempt(spec, Elsewhere(), Screen()))
    assert [(exit.process[:2], exit.code) for exit in outcome.failed] == [(('worker', 0), 3)]
    assert outcome.lost == (('down', ''),)


SILENT = Elsewhere(['sleep', '600'])


@pytest.mark.parametrize('backend, moment', [
    (Elsewhere(), lambda made: True), (SILENT, lambda made: all(agent.command for agent in made.agents)),
    (Elsewhere(), lambda made: made.terminal.output)], ids=['before', 'connecting', 'running'])
def test_a_signal_ends_an_attempt_and_no_other(backend, moment):
    async def both():
        return (await attempt(job('echo ready; exec sleep 600'), backend, Screen(), moment),
                await attempt(job('true'), Elsewhere(), Screen()))
    assert asyncio.run(both()) == (Outcome(signal=signal.SIGTERM), Outcome())


def fails(backend, spec):
    """What keeps an attempt from starting; a second one in the same process says the same."""
    async def run():
        said = []
        for _ in range(2):
            with pytest.raises(ValueError) as error:
                await attempt(spec, backend, Screen())
            said.append(str(error.value).splitlines())
        return said
    first, second = asyncio.run(run())
    assert first == second
    return first


def test_agents_that_do_not_come_are_explained_by_the_backend(folder):
    backend = Elsewhere(['sh', '-c', 'echo first >&2; echo no way >&2'])
    assert fails(backend, job('true')) == ['host up: no way (turn up round)', 'host down: no way (turn down round)']
    assert fails(Elsewhere(['/no/such/command']), job('true')) == [
        "'/no/such/command' cannot be started (No such file or directory): install it on this machine"]
    assert not (folder / 'logs').exists()


def test_what_one_command_for_all_said_stands_for_them_all(monkeypatch, folder):
    (folder / 'mpirun').write_text('#!/bin/sh\necho ---- >&2\necho no slots >&2\necho at all >&2\nexit 1\n')
    (folder / 'mpirun').chmod(0o755)
    monkeypatch.setenv('PATH', str(folder), prepend=os.pathsep)
    assert fails(MpiBackend(), job('true')) == ['mpirun: no slots', 'mpirun: at all']
    monkeypatch.setenv('PATH', '/nowhere')
    assert fails(MpiBackend(), job('true')) == [
        "'mpirun' cannot be started (No such file or directory): install it on this machine"]


def test_the_working_directory_is_copied_by_the_backend(folder):
    copies = ['sh', '-c', 'echo {host} {directory} >> copied; test {host} = up || {{ echo full >&2; exit 1; }}']
    assert fails(Elsewhere(copies=copies), job('true', copy=True)) == [
        'host down: --sync-dst-dir: full (turn down round)']
    assert sorted((folder / 'copied').read_text().split('\n')) == ['', *2 * [f'down {folder}'], *2 * [f'up {folder}']]
    copies[-1] = 'true'
    assert asyncio.run(attempt(job('true', copy=True), Elsewhere(copies=copies), Screen())) == Outcome()


def test_connections_are_one_a_host_or_one_a_process():
    async def places(backend, spec):
        return [(agent.host.name, [process[:2] for process in agent.processes])
                for agent in agents_of(spec, backend, print)]
    spec = job('true', 3, 1)
    assert asyncio.run(places(OneAHost(), spec)) == [
        ('up', [('worker', 0), ('worker', 2), ('server', 0), ('scheduler', 0)]), ('down', [('worker', 1)])]
    assert asyncio.run(places(OneAHost(), job('true', 1, 1))) == [
        ('up', [('worker', 0), ('server', 0), ('scheduler', 0)])]
    assert asyncio.run(places(Elsewhere(), spec)) == [
        ('up', [('worker', 0)]), ('down', [('worker', 1)]), ('up', [('worker', 2)]), ('up', [('server', 0)]),
        ('up', [('scheduler', 0)])]


def test_hosts_and_what_is_declared_of_them():
    spec, given = JobSpec(('x',), 1), (Host('a'), Host('b'))
    hosts = {name: (list(backend.hosts(JobSpec(('x',), 1, hosts=given))), list(backend.hosts(spec)))
             for name, backend in BACKENDS.items() if name in ('local', 'ssh', 'mpi')}  # others know by themselves
    assert hosts == {'local': ([Host('')], [Host('')]), 'ssh': (list(given), []), 'mpi': (list(given), [Host('')])}
    assert [(backend.agent_per_process, backend.fetches_logs, backend.speaks_mpi) for backend in BACKENDS.values()] == [
        (False, False, False), (False, True, False), (True, True, True), *[(False, True, False)] * 3]


ONE, TWO = Process('worker', 1, 0), Process('server', 0, 1)
KILLED = 'if nobody sent that signal, a ran out of memory (`dmesg` there says so): start fewer processes a host, or ' \
         'lower train.batch_size'


@pytest.mark.parametrize('outcome, status, lines', [
    (Outcome(), 0, []),
    (Outcome(signal.SIGINT, [Exit(ONE, 'a', 3, 0.)], [('b', '')]), 130, ['stopped by SIGINT']),
    (Outcome(lost=[('a', 'Connection reset'), ('b', '')]), 1,
     ['host a was lost: Connection reset', 'host b was lost: its agent ended without a word']),
    (Outcome(failed=[Exit(ONE, 'a', 3, 0.)], lost=[('b', 'x')]), 3,
     ['host b was lost: x', 'worker 1 on a failed with exit code 3; its log is logs/worker-1.log, and empty']),
    (Outcome(failed=[Exit(TWO, 'b', -11, 0., ['one', 'two'], 'in native code at x.py:3 in f'),
                     Exit(ONE, 'a', 1, 1.), Exit(Process('scheduler', 0, 0), 'a', -64, 2.)]), 139,
     ['server 0 on b was killed by SIGSEGV; its log is logs/server-0.log, its last lines:', '  | one', '  | two',
      'server 0 crashed in native code at x.py:3 in f',
      'after it: worker 1 failed with exit code 1, scheduler was killed by SIGRTMAX']),
    (Outcome(failed=[Exit(ONE, 'a', 1, 0., ['x'], report={'stalled': 'rank 1 has waited'})], stopped=[(TWO, 'b')]), 1,
     ['server 0 on b was stopped, by a signal such as SIGSTOP or by a debugger: all wait for it',
      'worker 1 ended itself: rank 1 has waited; the stack of each of its threads is in logs/worker-1.log']),
    (Outcome(failed=[Exit(ONE, 'a', -9, 0.)]), 137,
     ['worker 1 on a was killed by SIGKILL; its log is logs/worker-1.log, and empty', KILLED]),
    (Outcome(failed=[Exit(ONE, 'a', 137, 0.)]), 137,
     ['worker 1 on a failed with exit code 137; its log is logs/worker-1.log, and empty', KILLED])])
def test_how_an_attempt_ended(outcome, status, lines):
    assert (exit_status(outcome), summary(outcome)) == (status, lines)
