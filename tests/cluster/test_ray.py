"""What Ray alone does to jobs: actors that end, nodes that leave, what it gives of each, drivers and its own jobs."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.clusters import ENDLESS, JOB, LAUNCH, PRETRAIN, TINY, cluster, environment, survives
from support.hosts import wait_for
from support.jobs import reach
from support.running import BASE, rounds

pytestmark = pytest.mark.unmeasured
in_soak = pytest.mark.skipif(not rounds(0, 1), reason='in `make soak`')
SHOW = 'import os; print(*(os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")))'
NOTEBOOK = '''
import sys, ray
from mxsimmim.cluster.ray import run
ray.init('auto', logging_level='error')
config, *overrides = sys.argv[1:]
print('in', run(config, *overrides, workers=2))
try:
    run(config, *overrides, 'train.length=100000', 'name=killed', workers=2, servers=1)
except RuntimeError as error:
    print('failed', error)
'''


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Ray on three hosts, for all tests of this file."""
    with cluster('ray', tmp_path_factory.mktemp('ray')) as one:
        yield one


@pytest.fixture
def shared(made, tmp_path):
    """A folder that all hosts see. Of what jobs of the test nothing is left at its end."""
    made.job = tmp_path
    yield tmp_path
    wait_for(lambda: not made.left(), 'no job is left', 15)


def inside(made, *words, **environ):
    """A command on host0; returns it running, what it says in the file `said`."""
    with open(made.folder / 'said', 'wb') as said:
        made.started.append(subprocess.Popen([*made.inside(0), *map(str, words)], stdin=subprocess.DEVNULL,
                                             env={**made.environ, **environ}, stdout=said, stderr=said))
    return made.started[-1]


def test_cores_and_gpus_are_those_that_ray_gives(made, shared):
    """Of two GPUs and four cores on each host: for four workers two hosts, for two one."""
    for workers, gives in (4, ['0 1\n', '1 1\n'] * 2), (2, ['0 1\n', '1 1\n']):
        status, said = made.launch('-n', workers, '--horovod', '--devices', 'gpu', '--', sys.executable, '-c', SHOW)
        assert status == 0, said
        assert [made.logs()[f'worker-{n}'] for n in range(workers)] == gives, said
        assert ('host1' in said) == (workers == 4) and 'host2' not in said


def test_what_cannot_start_is_told(made, shared):
    begin = time.monotonic()
    status, said = made.launch('-n', 13, '--address', made.ray.address, 'true')
    assert status == 2
    assert '13 workers need a CPU each, and of these Ray has free: host0 4, host1 4, host2 4: start fewer' in said
    nobody = f'{made.hosts.address(0)}:1'
    status, said = made.launch('-n', 2, 'true', environ={'RAY_ADDRESS': nobody})  # as a Ray job has it
    assert status == 2 and f'no Ray answers at {nobody} (' in said and said.count('\n') == 1
    assert time.monotonic() - begin < 20


def test_a_driver_or_a_notebook(made, shared):
    """Its job shows here what it says; that fails with its summary."""
    driver = inside(made, sys.executable, '-W', 'ignore', '-c', NOTEBOOK, BASE, *TINY)
    reach(shared, 5, 'killed')
    os.kill(made.worker(1), signal.SIGKILL)
    assert driver.wait(JOB) == 0, made.said()
    said = made.said()
    assert 'in runs/tiny\n' in said and (shared / 'runs' / 'tiny' / 'metrics.jsonl').exists()
    assert 'launch: host0: worker 0\n' in said and 'launch: host1: worker 1\n' in said
    assert 'launch: worker 1 on host1 was killed by SIGKILL' in said.partition('\nfailed ')[2]


def test_an_actor_that_is_killed_and_a_node_that_is_removed(made, shared, undisturbed):
    """It is started again from its newest checkpoint, by the launcher, at last on the nodes that are left."""
    survives(made, undisturbed, lambda: made.kill('actor', 1), lambda: made.ray.remove(1))
    assert 'launch: host host1 was lost: the actor on host1 has ended: ' in made.said()
    assert 'launch: host2: worker 1\n' in made.said()
    if rounds(0, 1):
        assert made.ray.boot(1).wait(60) == 0
        wait_for(lambda: made.ray.nodes() == 3, 'the node is back')


@pytest.mark.soak
@in_soak
def test_a_job_of_rays(made, shared):
    """As Ray starts and stops one: with its variables; by SIGTERM to all below it, and SIGKILL three seconds later."""
    given = {'runtime_env': {'env_vars': {'MINE': 'of the job'}}, 'metadata': {'job_submission_id': 'raysubmit_1'}}
    job = inside(made, *LAUNCH, '--launcher', 'ray', '-n', 2, '-s', 1, '--', *PRETRAIN, *ENDLESS,
                 RAY_ADDRESS=made.ray.address, RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(given))
    reach(shared, 5, 'tiny')
    assert environment(made.worker(1))['MINE'] == 'of the job'
    pids = [made.launcher(job), *made.local()]  # the launcher's, and its driver's
    for number in signal.SIGTERM, signal.SIGKILL:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(3)
    wait_for(lambda: not made.left(), 'nothing is left of it', 15)
    [checkpoint] = (shared / 'runs' / 'tiny' / 'checkpoints').iterdir()
    assert checkpoint.name > 'step-00000005'
