"""A run that is interrupted, however and whenever, ends as if it had not been."""
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
from support.running import BASE, DEADLINE, command, last_step, metrics, rounds, wait_for, weights
from support.tiny import TINY

pytestmark = pytest.mark.unmeasured

SEED, KILLS = 20261120, rounds(4, 20)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run of 60 steps."""
    folder = tmp_path_factory.mktemp('whole')
    subprocess.run(command('pretrain', BASE, *TINY, 'name=run'), cwd=folder, check=True, timeout=DEADLINE)
    return folder / 'runs' / 'run'


@pytest.mark.soak
def test_killed_again_and_again(whole, start, mxsimmim, tmp_path):
    """SIGKILL at random steps, and at random moments between: bit-identical weights, metrics without gap or double."""
    print('seed', SEED)
    chance = random.Random(SEED)
    run = tmp_path / 'runs' / 'run'
    for kill in range(KILLS):
        target = 1 + (kill + 1) * 57 // KILLS
        process = start('pretrain', BASE, *TINY, 'name=run')
        if wait_for(process, lambda: last_step(run) >= target - 3):
            time.sleep(chance.random() * 0.05)
        process.kill()
        assert process.wait(DEADLINE) == -signal.SIGKILL, process.stderr.read()
    mxsimmim('pretrain', BASE, *TINY, 'name=run')
    assert weights(run) == weights(whole)
    assert metrics(run) == metrics(whole)
    assert [row['step'] for row in metrics(run) if 'loss' in row] == list(range(3, 61, 3))


def test_a_disk_that_dies_costs_nothing(whole, start, mxsimmim, tmp_path):
    """The run goes on from the copies in its second place, which are a run by themselves."""
    run, copies = tmp_path / 'runs' / 'run', tmp_path / 'disk' / 'run'
    options = [*TINY, 'name=run', 'checkpoint.copy_to=disk']
    process = start('pretrain', BASE, *options)
    assert wait_for(process, lambda: list((copies / 'checkpoints').glob('step-*')))
    process.kill()
    process.wait(DEADLINE)
    listed = mxsimmim('checkpoints', 'runs/run').stdout.splitlines()
    assert {line.split('/')[0] for line in listed} == {'runs', 'disk'}
    assert all(line.endswith('whole') for line in listed)
    shutil.rmtree(tmp_path / 'runs')
    assert mxsimmim('checkpoints', 'disk/run').stdout.splitlines() == [
        line for line in listed if line.startswith('disk/run/')]
    text = mxsimmim('pretrain', BASE, *options).stderr
    assert 'going on from disk/run/checkpoints/step-' in text
    assert weights(run) == weights(whole) == weights(copies)
    refused = mxsimmim('pretrain', BASE, *options, 'output=new', 'resume=none', status=1).stderr
    assert 'resume=none, but disk/run/checkpoints has checkpoints' in refused


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_first(whole, start, mxsimmim, tmp_path, number, status):
    run = tmp_path / 'runs' / 'run'
    options = [*TINY, 'name=run', 'checkpoint.every=1000']
    process = start('pretrain', BASE, *options)
    assert wait_for(process, lambda: last_step(run) >= 12)
    process.send_signal(number)
    text = process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == status
    assert f'stopped by signal {int(number)}: step' in text
    saved = [path.name for path in (run / 'checkpoints').iterdir()]
    assert len(saved) == 1 and 12 <= int(saved[0][5:]) <= 59
    text = mxsimmim('pretrain', BASE, *options).stderr
    assert f'going on from runs/run/checkpoints/{saved[0]}' in text
    assert weights(run) == weights(whole) and metrics(run) == metrics(whole)


def test_a_damaged_checkpoint_is_passed_over(whole, mxsimmim, tmp_path):
    run = tmp_path / 'runs' / 'run'
    shutil.copytree(whole, run)
    newest = run / 'checkpoints' / 'step-00000060' / 'weights.safetensors'
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(bytes(content))
    text = mxsimmim('pretrain', BASE, *TINY, 'name=run').stderr
    assert 'passing over the checkpoint of step 60' in text and 'weights.safetensors: damaged' in text
    assert 'going on from runs/run/checkpoints/step-00000055' in text
    assert weights(run) == weights(whole) and metrics(run) == metrics(whole)


def test_a_finished_run_says_so(whole, here, tmp_path):
    shutil.copytree(whole, tmp_path / 'runs' / 'run')
    text = here('pretrain', BASE, *TINY, 'name=run').stderr
    assert 'step-00000060 is the end of this run' in text
    assert metrics(tmp_path / 'runs' / 'run') == metrics(whole)


def test_a_full_disk_fails_the_save_and_nothing_else(whole, mxsimmim, tmp_path):
    run = tmp_path / 'runs' / 'run'
    shutil.copytree(whole, run)
    shutil.rmtree(run / 'checkpoints' / 'step-00000060')

    def no_room():  # a limit on file sizes stands in for a disk that fills up
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    result = mxsimmim('pretrain', BASE, *TINY, 'name=run', status=1, preexec_fn=no_room)
    for part in ('cannot save this checkpoint', 'step-00000060', 'untouched, the newest is step 55', 'bytes',
                 'run the same command again'):
        assert part in result.stderr
    assert [path.name for path in (run / 'checkpoints').iterdir()] == ['step-00000055']
    mxsimmim('pretrain', BASE, *TINY, 'name=run')
    assert weights(run) == weights(whole)


@pytest.mark.parametrize('changed, complaint', [
    (['optim.base_lr=1e-3'], 'differs in optim.base_lr (there 0.0001, here 0.001)'),
    (['data.val_fraction=0.2'], 'data.val_fraction (there 0.1, here 0.2)'),
    (['train.length=70'], 'differs in train.length (there 60 steps, here 70 steps)'),
    (['resume=none'], 'resume=none, but runs/run/checkpoints has checkpoints'),
    (['resume=runs/run/checkpoints/step-00000055'], 'is step 55, but runs/run/checkpoints goes up to step 60'),
    (['resume=nowhere'], 'nowhere/manifest.json: missing'),
])
def test_a_run_is_not_continued_as_another(whole, here, tmp_path, changed, complaint):
    shutil.copytree(whole, tmp_path / 'runs' / 'run')
    assert complaint in here('pretrain', BASE, *TINY, 'name=run', *changed, status=1).stderr
    assert weights(tmp_path / 'runs' / 'run') == weights(whole)


def test_a_checkpoint_can_start_another_run(whole, mxsimmim, tmp_path):
    text = mxsimmim('pretrain', BASE, *TINY, 'name=other', f'resume={whole}/checkpoints/step-00000055',
                    'train.length=70', 'optim.base_lr=2e-4').stderr
    assert 'optim.base_lr was 0.0001' in text and 'is 0.0002 from here on' in text
    assert metrics(tmp_path / 'runs' / 'other')[-1]['step'] == 70


def test_two_processes_do_not_train_in_one_folder(start, mxsimmim, tmp_path):
    run = tmp_path / 'runs' / 'run'
    process = start('pretrain', BASE, *TINY, 'name=run', 'train.length=100000')
    assert wait_for(process, lambda: last_step(run) >= 3)
    text = mxsimmim('pretrain', BASE, *TINY, 'name=run', status=1).stderr
    assert f'runs/run: process {process.pid} is training in this folder' in text
