"""Long jobs, for `make soak`: what a night must neither lose nor gather."""
import json
import os
import random
import re
import signal
import time
from pathlib import Path
from statistics import median

import pytest
from support.jobs import HOROVOD, MESSAGES, PRETRAIN, SERVERS, assert_close, newest, steps
from support.tiny import TEN_STEPS

STEPS, SECONDS, KILLS = 12_000, 1200, 30
OFTEN = TEN_STEPS + ['validation.every=500', 'checkpoint.every=500', 'checkpoint.keep=2', 'train.check_replicas=100',
                'log.every=10', f'train.length={STEPS}']


def measured(pid):
    """(bytes of memory, open files, threads) of a process; None if it has ended."""
    try:
        text = Path(f'/proc/{pid}/status').read_text()
        own, shared, threads = (int(re.search(rf'^{name}:\s+(\d+)', text, re.MULTILINE)[1])
                                for name in ('RssAnon', 'RssShmem', 'Threads'))
        return 1024 * (own + shared), len(os.listdir(f'/proc/{pid}/fd')), threads
    except (OSError, TypeError):
        return None


@pytest.mark.parametrize('launch, keys, allowed', [
    (['-n', 1], [], 100),
    (['-n', 1], ['train.accumulate=2', 'devices=[cpu(0),cpu(1)]'], 100),
    (HOROVOD, [], 100),
    (HOROVOD + MESSAGES, [], 100),
    # ps-lite keeps 8 bytes of every request of a worker, in a vector that doubles.
    (SERVERS, [], 200),
    (SERVERS, ['train.compression=2bit'], 300),
    (SERVERS, ['train.aggregation=local_sgd'], 500),
    (SERVERS, ['train.store=dist_async', 'optim.clip_grad=null'], 2000),
], ids=lambda value: ' '.join(map(str, value)) if isinstance(value, list) else str(value))
def test_memory_files_and_threads_do_not_grow(launcher, launch, keys, allowed):
    """No process takes more than some bytes a step, over thousands with validations, checkpoints and comparisons."""
    job = launcher.start(*launch, '--', *PRETRAIN, *OFTEN, *keys, 'name=job')
    seen = {}  # process -> its measurements, at equal intervals
    deadline = time.monotonic() + SECONDS
    while job.poll() is None:
        assert time.monotonic() < deadline, launcher.text('err')
        for process in launcher.left():
            seen.setdefault(process, []).append(measured(process[0]))
        time.sleep(0.5)
    assert job.returncode == 0, launcher.text('err')
    assert steps(launcher.folder / 'runs' / 'job')[-1] == STEPS
    longest = max(map(len, seen.values()))
    assert longest > 40
    for (_, line), rows in seen.items():
        rows = [row for row in rows if row]
        if len(rows) > 0.8 * longest:  # not of the preflight
            windows = [rows[len(rows) * first // 10:len(rows) * (first + 1) // 10] for first in (3, 8)]
            was, now = (tuple(median(values) for values in zip(*window)) for window in windows)
            growth = (now[0] - was[0]) / (0.5 * STEPS)
            print(f'{growth:6.0f} bytes a step, files {now[1]:.0f}, threads {now[2]:.0f}: {line[:100]}')
            assert growth < allowed and now[1:] == was[1:], (line, rows[::len(rows) // 10])


@pytest.mark.parametrize('launch, keys', [
    (SERVERS, []), (HOROVOD, ['parallel.shard_optimizer=true']),
    (['-n', 4, '--horovod'], ['parallel.pipeline=2', 'parallel.tensor=2', 'parallel.micro_batches=2'])],
    ids=['servers', 'sharded', 'pipeline, tensor'])
def test_rollbacks_of_every_layout(launcher, launch, keys):
    """Ordinary noise taken for spikes: the job goes back where one process does, and ends with its weights."""
    common = [*PRETRAIN, *TEN_STEPS, 'train.length=60', 'checkpoint.every=10', 'validation.every=60', 'log.every=7',
              'train.rollback=true', 'train.spike=0.9', 'optim.base_lr=1e-4', 'train.ema=0.9']
    runs = launcher.folder / 'runs'
    launcher.run('-n', 1, '--', *common, 'name=one')
    launcher.run(*launch, '--', *common, *keys, 'name=many')

    def rollbacks(name):
        with open(runs / name / 'metrics.jsonl') as file:
            return [(row['step'], row['spike_step']) for row in map(json.loads, file) if row.get('event') == 'rollback']
    assert rollbacks('many') == rollbacks('one') != []
    (last, ours), (_, expected) = newest(runs / 'many'), newest(runs / 'one')
    assert last == 60
    assert_close(ours, expected)


@pytest.mark.parametrize('launch', [SERVERS, HOROVOD], ids=['servers', 'horovod'])
def test_killed_thirty_times(launcher, launch):
    """SIGKILL of any of its processes at any moment, and the same command again: the weights of an undisturbed job."""
    seed = random.randrange(1 << 32)
    print('seed', seed)
    chance = random.Random(seed)
    keys = [*TEN_STEPS, 'train.length=1200', 'checkpoint.every=10', 'validation.every=100']
    run = launcher.folder / 'runs' / 'killed'
    for kill in range(KILLS):
        job = launcher.start(*launch, '--', *PRETRAIN, *keys, 'name=killed')
        target = (kill + 1) * 1000 // KILLS
        launcher.until(lambda: job.poll() is not None or (run / 'metrics.jsonl').exists()
                       and (steps(run) or [0])[-1] >= target, 60, f'step {target}')
        assert job.poll() is None, launcher.text('err')
        time.sleep(chance.random() * 0.2)
        pid, line = chance.choice(launcher.left())
        print(f'after step {target}: {line[:100]}')
        os.kill(pid, signal.SIGKILL)
        assert job.wait(15) != 0
        launcher.gone(15)
    launcher.run(*launch, '--', *PRETRAIN, *keys, 'name=killed')
    launcher.run(*launch, '--', *PRETRAIN, *keys, 'name=whole')
    whole = launcher.folder / 'runs' / 'whole'
    (last, ours), (_, expected) = newest(run), newest(whole)
    assert last == 1200 and steps(run) == steps(whole)
    assert_close(ours, expected)
