"""A job that goes on without a host, and takes it in again."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from support.hosts import three_hosts, wait_for
from support.jobs import PROGRAMS, newest, steps
from support.running import DIGITS, ROOT, command, rounds
from support.tiny import TEN_STEPS

pytestmark = pytest.mark.unmeasured

LENGTH, JOB = 100, 90  # steps; seconds that a whole job may take
KEYS = [*TEN_STEPS, f'train.length={LENGTH}', 'validation.every=1000', 'checkpoint.every=10', 'log.every=5',
        'optim.base_lr=2e-3']  # with 1e-2 rounding grows a thousandfold in 100 steps, whatever the number of workers
SLOW = [sys.executable, '-W', 'ignore', PROGRAMS / 'with_fault.py', 'slow', 'pretrain', DIGITS]  # 50 ms a step
# With host0 go the scheduler, a server and rank 0, for which the next one makes sure that it is gone.
CASES = [(['-s', 2], 1), (['-s', 2], 0), (['--horovod'], 1), (['--horovod'], 0)]


PIPELINE = ['parallel.pipeline=2', 'parallel.micro_batches=2']


def interrupted(tmp_path, lines, victim, fewer, *words):
    """The folder of a run on the hosts of these lines, and what was said.

    One host is switched off, and boots when the job goes on with `fewer` workers.
    """
    def said():
        return (tmp_path / 'said').read_text()

    def begun(step):
        return (run / 'metrics.jsonl').exists() and max(steps(run), default=0) >= step
    folder, run = tmp_path / 'job', tmp_path / 'job' / 'runs' / 'job'
    folder.mkdir()
    (folder / 'hosts').write_text('\n'.join(lines))
    with three_hosts(tmp_path / 'hosts') as hosts, open(tmp_path / 'said', 'wb') as err:
        job = subprocess.Popen([sys.executable, str(ROOT / 'tools' / 'launch.py'), '-H', 'hosts', *map(str, words)],
                               cwd=folder, env=hosts.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=err)
        try:
            wait_for(lambda: job.poll() is not None or begun(15), 'step 15', JOB)
            hosts.switch_off(victim)
            wait_for(lambda: job.poll() is not None or f'the job goes on with {fewer} of' in said(),
                     f'{fewer} workers', JOB)
            hosts.switch_on(victim)
            assert job.wait(JOB) == 0, said()
        finally:
            job.kill()
            job.wait()
    return run, said()


def assert_undisturbed(run, *keys):
    """Weights are those of one process that nothing happens to."""
    folder = run.parents[1]
    subprocess.run([*command('pretrain', DIGITS), *KEYS, *keys, 'name=alone', 'train.check_replicas=0'], cwd=folder,
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=JOB)
    (step, ours), (expected_step, expected) = newest(run), newest(folder / 'runs' / 'alone')
    assert step == expected_step == LENGTH
    for group, arrays in expected.items():
        away = sum(np.sum((ours[group][key] - array) ** 2.) for key, array in arrays.items())
        assert (away / sum(np.sum(array ** 2.) for array in arrays.values())) ** 0.5 < 1e-5, group


@pytest.mark.soak
@pytest.mark.parametrize('options, victim', CASES[:rounds(1, len(CASES))])
def test_three_hosts_then_two_then_three(tmp_path, options, victim):
    """A host is switched off and boots: the weights are those of one process that nothing happens to."""
    run, said = interrupted(tmp_path, ['host0', 'host1', 'host2'], victim, 2, '-n', 3, *options, '--min-workers', 2,
                            '--', *SLOW, *KEYS, 'name=job', 'notify.command=cat >> heard')
    name = f'host{victim}'
    assert f'launch: left out for now: host {name}; the job goes on with 2 of 3 workers\n' in said
    assert f'launch: host {name} is back: after the next checkpoint the job goes on with 3 workers\n' in said
    status = json.loads((run / 'status.json').read_text())
    (_, lost), (_, back) = status['restarts']
    assert lost.startswith(f'host {name} was lost: ') and back == f'host {name} is back'
    assert [worker['host'] for worker in status['workers']] == ['host0', 'host1', 'host2']
    log = (run / 'logs' / 'rank-0.log').read_text()
    assert [log.count(f'images a step: {parts}') for parts in ('[11, 11, 10]', '[16, 16]')] == [2, 1]
    assert steps(run) == list(range(5, LENGTH + 1, 5))
    assert 'is saved, the same command goes on from it' in log  # where it made room, with no step lost
    heard = [json.loads(line) for line in (run.parents[1] / 'heard').read_text().splitlines()]
    assert [event['event'] for event in heard] == ['failure', 'restart', 'restart', 'end']
    assert (heard[2]['number'], heard[2]['cause']) == (2, back)
    assert_undisturbed(run)


@pytest.mark.soak
@pytest.mark.skipif(not rounds(0, 1), reason='in `make soak`; test_absence.py has the policy')
@pytest.mark.parametrize('keys, refused', [(PIPELINE, 3), (['parallel=auto'], 0)], ids=['pipeline', 'auto'])
def test_workers_that_a_layout_does_not_divide(tmp_path, keys, refused):
    """Two pipelines of two stages, on four workers; of the three that are left two make one. Or chosen anew."""
    run, said = interrupted(tmp_path, ['host0 slots=2', 'host1', 'host2'], 1, 2 if refused else 3, '-n', 4, '--horovod',
                            '--min-workers', 2, '--', *SLOW, *KEYS, *keys, 'name=job')
    assert 'launch: left out for now: host host1; the job goes on with 3 of 4 workers\n' in said
    if refused:
        assert 'launch: the command refuses 3 workers; the job goes on with 2 of 4 workers\n' in said
    assert 'launch: host host1 is back: after the next checkpoint the job goes on with 4 workers\n' in said
    assert 'restart in' in said and said.count('(not counted, as there was progress)') == said.count('restart in') == 1
    log = (run / 'logs' / 'rank-0.log').read_text()
    # How `auto` divides them is the planner's choice, by what it measures.
    assert re.findall(r'(\d) workers, sync over horovod', log) == ['4', '2' if refused else '3', '4'], log
    assert_undisturbed(run)
