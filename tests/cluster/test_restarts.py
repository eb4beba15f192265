"""Jobs that nobody watches: the launcher starts them again."""
import json
import os
import signal
import sys

import pytest
from support.jobs import HOROVOD, PRETRAIN, PROGRAMS, SERVERS, assert_close, newest, steps
from support.running import rounds
from support.tiny import TEN_STEPS

LONG = TEN_STEPS + ['train.length=80', 'validation.every=40', 'checkpoint.every=15', 'log.every=5']
FAULT = [sys.executable, '-W', 'ignore', PROGRAMS / 'with_fault.py']


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """The newest checkpoint of a job that nothing happens to, whatever adds up its gradients."""
    from support.launcher import Launcher
    launcher = Launcher(tmp_path_factory.mktemp('undisturbed'))
    launcher.run(*HOROVOD, '--', *PRETRAIN, *LONG, 'name=job')
    yield newest(launcher.folder / 'runs' / 'job')
    launcher.close()


@pytest.mark.soak
@pytest.mark.parametrize('launch, victim', [
    pytest.param(SERVERS, ['DMLC_ROLE=server'], id='server'),
    pytest.param(HOROVOD, ['HOROVOD_RANK=0'], id='rank')][:rounds(1, 2)])  # ranks also in faults/test_faults.py
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(launcher, undisturbed, launch, victim):
    """It goes on from what it wrote, though by its own words it may go on from nothing."""
    run = launcher.folder / 'runs' / 'job'
    job = launcher.start(*launch, '--max-restarts', 1, '--', *PRETRAIN, *LONG, 'name=job', 'resume=none')
    launcher.until((run / 'checkpoints' / 'step-00000015').exists, 60, 'a checkpoint')
    pids = launcher.find(*victim)
    launcher.until(lambda: steps(run)[-1] >= 20, 60, 'step 20')
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert job.wait(60) == 0, launcher.text('err')
    launcher.gone(10)
    err = launcher.text('err')
    assert 'was killed by SIGKILL' in err
    assert 'restart in 1 s, from the newest whole checkpoint (not counted, as there was progress)' in err
    assert 'launch: restart 1' in launcher.log('worker-1')
    told = json.loads((run / 'status.json').read_text())
    (_, why), = told['restarts']
    assert 'was killed by SIGKILL; its log is logs/' in why
    assert (told['state'], told['step'], len(told['workers'])) == ('ended', 80, 2)
    assert len(set(steps(run))) == len(steps(run)) and steps(run)[-1] == 80
    (step, ours), (expected_step, expected) = newest(run), undisturbed
    assert step == expected_step == 80
    assert_close(ours, expected)


def test_an_error_that_comes_again_at_the_same_step(launcher):
    """After the second time nobody waits for a third; both are told."""
    _, err = launcher.run(*HOROVOD, '--max-restarts', 5, '--', *FAULT, 'changed-weight', *PRETRAIN[5:], *TEN_STEPS,
                          'name=job', status=1)
    assert 'restart in 1 s, from the newest whole checkpoint (1 of 5)' in err
    assert 'no restart: the same error after the same 4 steps as the time before' in err
    assert err.count('after step 4 the weights of rank 0 on ') >= 2
    assert 'attempt 1: worker ' in err and 'attempt 2: worker ' in err
