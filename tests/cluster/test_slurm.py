"""What Slurm alone does to jobs: batch scripts, limits of time, requeueing, GPUs and cores that it gives."""
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.clusters import ENDLESS, JOB, LAUNCH, PRETRAIN, cluster, survives
from support.hosts import wait_for
from support.jobs import KEYS, SLOW, reach, recorded, steps
from support.programs import free_port
from support.prometheus import config_for, prometheus
from support.running import ROOT, rounds

pytestmark = pytest.mark.unmeasured
in_soak = pytest.mark.skipif(not rounds(0, 1), reason='in `make soak`')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Slurm on three hosts, for all tests of this file."""
    with cluster('slurm', tmp_path_factory.mktemp('slurm')) as one:
        yield one


@pytest.fixture
def shared(made, tmp_path):
    """A folder that all hosts see, as a user's checkout. Of what jobs of the test nothing is left at its end."""
    for name in ('launch', 'conf'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'tools').mkdir()  # no link, from which Python would begin to look
    (tmp_path / 'tools' / 'launch.py').write_text(f'#!/bin/sh\nexec {" ".join(LAUNCH)} "$@"\n')
    (tmp_path / 'tools' / 'launch.py').chmod(0o755)
    made.job = tmp_path
    yield tmp_path
    made.slurm.ask('scancel', '--user=root')
    wait_for(lambda: not made.slurm.ask('squeue', '-h') and not made.left(), 'no job is left', 30)


def submit(made, folder, *words, options=(), keys=SLOW):
    """The number of a batch job that runs the launcher with these words, as launch/slurm/run.sh does."""
    (folder / 'job.sbatch').write_text(
        '#!/bin/sh\n#SBATCH --nodes=2 --requeue --open-mode=append --output=said\n'
        f'{"".join(f"#SBATCH {option}" for option in options)}\nexec launch/slurm/run.sh "$@"\n')
    return subprocess.run(['sbatch', '--parsable', 'job.sbatch', *map(str, words), '--', *map(str, keys)], cwd=folder,
                          env=made.environ, check=True, timeout=JOB, stdout=subprocess.PIPE,
                          universal_newlines=True).stdout.strip()


def state(made, job):
    """Slurm's word for what a job is doing; empty if it is over."""
    return made.slurm.ask('squeue', '-h', '-o', '%T', '-j', job) if job in made.slurm.ask(
        'squeue', '-h', '-o', '%i').split() else ''


def saved_to_be_started_again(made, shared, job, times):
    """Waits until a batch job was stopped so often, and asserts that it has saved the step at which that was."""
    wait_for(lambda: (shared / 'said').read_text().count('launch: stopped by SIGTERM\n') == times
             and state(made, job) == 'PENDING', 'it waits to be started again', JOB)
    at = max(steps(shared / 'runs' / 'job'))
    assert (shared / 'runs' / 'job' / 'checkpoints' / f'step-{at:08d}').exists()


def test_a_job_that_is_stopped_and_started_again(made, shared, undisturbed):
    """By the signal of --signal=B:TERM, as before the time limit, and since Slurm counts a host as lost."""
    job = submit(made, shared, '-n', 2, '--horovod')
    reach(shared, 15)
    made.slurm.ask('scancel', '--batch', '--signal=TERM', job)
    saved_to_be_started_again(made, shared, job, 1)
    reach(shared, 30)
    made.slurm.ask('scontrol', 'update', 'nodename=host1', 'state=down', 'reason=test')
    saved_to_be_started_again(made, shared, job, 2)
    wait_for(lambda: not state(made, job), 'it ends', JOB)
    assert recorded(shared / 'runs' / 'job', 'loss') == undisturbed
    [[_, why]] = json.loads((shared / 'runs' / 'job' / 'status.json').read_text())['restarts']
    assert why == 'Slurm has requeued the job (SLURM_RESTART_COUNT=2)'
    for n in range(2):
        assert (shared / 'logs' / f'worker-{n}.log').read_text().count('launch: restart 1\n') == 2
    assert made.left() == []


def test_the_time_limit(made, shared, undisturbed):
    """Slurm looks every 30 s which jobs are near to it."""
    pause = ['train.length=4000', 'validation.every=100000', 'checkpoint.every=100000']
    job = submit(made, shared, '-n', 2, '--horovod', options=['--time=1 --signal=B:TERM@30'], keys=[*SLOW, *pause])
    reach(shared, 5)
    wait_for(lambda: state(made, job) == 'PENDING', 'it waits to be started again', JOB)
    assert 'launch: stopped by SIGTERM' in (shared / 'said').read_text()
    before = max(steps(shared / 'runs' / 'job'))
    reach(shared, before + 10)
    losses = recorded(shared / 'runs' / 'job', 'loss')
    assert len(losses) == max(steps(shared / 'runs' / 'job')) and losses[:20] == undisturbed[:20]


@pytest.mark.soak
@in_soak
def test_prometheus_finds_a_job_wherever_slurm_starts_it(made, shared):
    """One on the third host, under the name of the run: on host0, and when that is drained on host1."""
    port, run = free_port(), shared / 'runs' / 'job'
    found, known = run.with_name('job.prometheus.json'), ('mxsimmim', str(run))
    job = submit(made, shared, '-n', 2, '--horovod', keys=[
        *SLOW, 'train.length=100000', f'log.prometheus_port={port}', 'log.prometheus_host=0.0.0.0'])
    with prometheus(shared / 'prometheus', config_for(f'{shared}/runs/*.prometheus.json'), made.hosts.inside(2),
                    made.hosts.address(2)) as one:
        one.until(lambda: one.up().get(known) == '1' and one.query('mxsimmim_loss'), JOB)
        [before] = json.loads(found.read_text())
        made.slurm.ask('scontrol', 'update', 'nodename=host0', 'state=drain', 'reason=test')
        made.slurm.ask('scancel', '--batch', '--signal=TERM', job)
        saved_to_be_started_again(made, shared, job, 1)
        assert not found.exists()
        one.until(lambda: known not in one.up())
        assert one.firing() == {}
        one.until(lambda: one.up().get(known) == '1' and 'MxsimmimStartedAgain' in one.firing(), JOB)
        assert one.firing() == {'MxsimmimStartedAgain': 'job was started again: mxsimmim status says why'}
        [after] = json.loads(found.read_text())
        assert (before['targets'], after['targets']) == ([f'host0:{port}'], [f'host1:{port}'])
        assert before['labels'] == after['labels']
        assert {row['metric']['host'] for row in one.query('mxsimmim_step_seconds{rank="0"}')} == {'host1'}
    made.slurm.ask('scancel', job)
    made.slurm.ask('scontrol', 'update', 'nodename=host0', 'state=resume')


def test_a_job_that_is_cancelled(made, shared):
    job = submit(made, shared, '-n', 2, '-s', 1, '--max-restarts', 3, keys=[*PRETRAIN, *ENDLESS])
    reach(shared, 5, 'tiny')
    made.slurm.ask('scancel', job)
    wait_for(lambda: not state(made, job) and not made.left(), 'nothing is left of it', 15)
    [checkpoint] = (shared / 'runs' / 'tiny' / 'checkpoints').iterdir()
    assert checkpoint.name > 'step-00000005'
    assert 'restart in' not in (shared / 'said').read_text()


def test_a_job_whose_task_is_killed_and_that_loses_a_node(made, shared, undisturbed):
    """It is started again from its newest checkpoint, by the launcher."""
    def lose():
        made.hosts.switch_off(1)
        wait_for(lambda: made.said().count('restart in') > 1, 'another', JOB)
        made.hosts.switch_on(1)
        made.slurm.boot(1)
    survives(made, undisturbed, lambda: os.kill(made.worker(1), signal.SIGKILL), lose)
    assert 'launch: worker 1 on host1 was killed by SIGKILL' in made.said()
    wait_for(lambda: made.slurm.idle() == 3, 'the node is back')


def test_cores_and_gpus_are_those_that_slurm_gives(made, shared):
    show = 'import os; print(*(os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")))'
    command = ['salloc', '--quiet', '--nodes=2', '--ntasks-per-node=2', '--gres=gpu:2', *LAUNCH, '--launcher', 'slurm',
               '-n', '4', '--horovod', '--devices', 'gpu', '--', sys.executable, '-c', show]
    subprocess.run(command, cwd=shared, env=made.environ, check=True, timeout=JOB)
    logs = [(shared / 'logs' / f'worker-{n}.log').read_text() for n in range(4)]
    assert logs == ['0 1\n', '1 1\n'] * 2  # a core for each task, of the hosts' four


def test_what_cannot_start_is_told(made, shared, tmp_path):
    done = subprocess.run([*LAUNCH, '--launcher', 'slurm', '-n', '2', 'true'], cwd=shared, env=made.environ,
                          stderr=subprocess.PIPE, timeout=JOB, universal_newlines=True)
    assert done.returncode == 2 and 'begin the line with salloc -N 2' in done.stderr
    made.hosts.hide(1, Path(sys.executable).parent)
    try:
        status, said = made.launch('-n', 2, 'true')
    finally:
        made.hosts.run(1, f'umount {Path(sys.executable).parent}')
    assert status == 2 and re.search('launch: error: .*host1.*No such file or directory', said), said


@pytest.mark.parametrize('name', ['servers', 'horovod', 'hybrid'])
def test_the_batch_scripts(made, shared, name):
    """Slurm would take them, on hosts enough; in `make soak` they run."""
    words = [f'launch/slurm/{name}.sbatch', 'digits']
    few = ['--nodes=2', '--ntasks-per-node=4']
    made.slurm.ask('env', '-C', shared, 'sbatch', '--test-only', *few, *words)
    if rounds(0, 1):
        keys = [*KEYS, 'train.length=10', 'model.patch_size=4', 'train.batch_size=32']
        job = made.slurm.ask('env', '-C', shared, f'PATH={Path(sys.executable).parent}:{os.environ["PATH"]}', 'sbatch',
                             '--parsable', '--output=said', *few, *words, *keys)
        wait_for(lambda: not state(made, job), 'it ends', 2 * JOB)
        assert steps(shared / 'runs' / 'job')[-1] == 10, (shared / 'said').read_text()
