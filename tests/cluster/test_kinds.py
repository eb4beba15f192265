"""What holds for jobs on other hosts whichever kind of launcher starts them: one table over the kinds."""
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from support.clusters import (
    GRADIENT,
    JOB,
    KILLED,
    KINDS,
    PRETRAIN,
    TINY,
    cluster,
    environment,
    on_hosts,
)
from support.hosts import three_hosts, wait_for, words_of
from support.running import rounds

pytestmark = pytest.mark.unmeasured
in_soak = pytest.mark.skipif(not rounds(0, 1), reason='in `make soak`')


@pytest.fixture
def made(request, tmp_path):
    """A cluster of the kind that `kinds` says."""
    with cluster(request.param, tmp_path) as one:
        yield one


def kinds(*here, never=()):
    """Runs a test for each kind, but for those that `never` can: for these always, for the others in `make soak`."""
    return pytest.mark.parametrize('made', [
        pytest.param(kind, marks=() if kind in here else (pytest.mark.soak, in_soak))
        for kind in KINDS if kind not in never], indirect=True)


# --- jobs; those in `make soak` alone are much like what faults/test_faults.py does to its jobs

MODES = {'dist_sync': ['-s', 1], 'horovod': ['--horovod'], 'pipeline': ['--horovod']}
KEYS = {'pipeline': ['parallel.pipeline=2', 'parallel.micro_batches=2']}


def test_all_kinds_compute_the_same(tmp_path):
    """To the last bit: sums of two have one order."""
    losses = {}
    with three_hosts(tmp_path / 'hosts') as hosts:
        for kind in KINDS:
            with on_hosts(kind, hosts, tmp_path / kind) as made:
                for mode, words in list(MODES.items())[:rounds(1, 3) if kind in ('kubernetes', 'ray') else 3]:
                    before = hosts.traffic()
                    status, said = made.launch('-n', 2, *words, '--', *PRETRAIN, *TINY, 'train.length=10',
                                               'checkpoint.every=10', 'log.every=1', f'name={mode}',
                                               *KEYS.get(mode, []))
                    assert status == 0, said
                    sent = [after[0] - start[0] for after, start in zip(hosts.traffic(), before)]
                    assert mode == 'pipeline' or min(sent[:2]) > 10 * GRADIENT / 2, sent
                    records = map(json.loads, made.metrics(mode))
                    losses[mode, kind] = [record['loss'] for record in records if 'loss' in record]
                    assert f'network: eth0, {hosts.address(0)} {hosts.address(1)}\n' in said
                    assert sorted(made.logs()) == [
                        *['scheduler-0', 'server-0'] * (words[0] == '-s'), 'worker-0', 'worker-1']  # fetched
                    wait_for(lambda: not made.left(), 'nothing is left', 5 + made.slack)
    for (mode, kind), values in losses.items():
        assert len(values) == 10 and values == losses[mode, 'ssh'], (mode, kind)


@kinds(*KINDS)
@pytest.mark.soak
@in_soak
@pytest.mark.parametrize('options, keys', [
    pytest.param(['-s', 2], ['train.store=dist_sync'], id='dist_sync'),
    pytest.param(['-s', 2, '--p3'], ['train.store=dist_sync'], id='p3'),
    pytest.param(['-s', 1], ['train.store=dist_async', 'optim.clip_grad=null'], id='dist_async'),
    pytest.param(['--horovod'], ['train.store=horovod'], id='horovod')])
def test_a_job_on_three_hosts(made, options, keys):
    status, said = made.launch('-n', 3, *options, '--', *PRETRAIN, *TINY, *keys)
    assert status == 0, said
    assert max(json.loads(line)['step'] for line in made.metrics()) == 20
    wait_for(lambda: not made.left(), 'nothing is left', 5 + made.slack)


@kinds('ssh', 'slurm', 'kubernetes')
def test_the_command_arrives_byte_for_byte(made):
    words = ['a b', "it's", '"quoted"', '$HOME', '`id`', '\\', '*', '-n', '--', '', 'two\nlines', 'ä;|&<>']
    program = 'import os, sys; print(ascii(sys.argv[1:])); print(os.environ["MINE"])'
    status, said = made.launch('-n', 3, '-s', 1, '--env', 'MINE', '--', sys.executable, '-c', program, *words,
                               environ={'MINE': 'one two'})
    assert status == 0, said
    for n in range(3):
        assert made.logs()[f'worker-{n}'] == f'{ascii(words)}\none two\n'


@kinds('ssh', 'slurm', never=['kubernetes', 'ray'])
def test_the_working_directory_is_copied(made, tmp_path):
    (made.job / 'model.py').write_text('print("in " + __import__("os").getcwd())')
    where = tmp_path / 'copied' / 'a folder'
    where.parent.mkdir()
    for n in range(3):
        made.hosts.hide(n, where.parent)
    command = ['-n', 3, '-s', 1, '--sync-dst-dir', where, '--', sys.executable, 'model.py']
    status, said = made.launch(*command)
    assert status == 0, said
    assert made.logs()['worker-2'] == f'in {where}\n'
    for n in (1, 2):
        made.hosts.run(n, f'mount -o remount,ro {tmp_path}/copied')
    (made.job / 'model.py').write_text('changed')
    status, said = made.launch(*command)
    assert status == 2
    for n in (1, 2):
        assert re.search(f'host host{n}: --sync-dst-dir: .*Read-only file system', said), said
    assert 'host host0' not in said


@kinds('ssh')
def test_the_job_goes_through_the_network_of_the_interface(made):
    before = made.hosts.traffic(1)
    status, said = made.launch('-n', 3, '-s', 1, '--interface', 'eth1', '--', *PRETRAIN, *TINY)
    assert status == 0, said
    assert f'network: eth1, {made.hosts.address(0, 1)} {made.hosts.address(1, 1)} {made.hosts.address(2, 1)}\n' in said
    sent = [after[0] - start[0] for after, start in zip(made.hosts.traffic(1), before)]
    assert min(sent) > 20 * GRADIENT, sent


@kinds('ssh')
def test_horovod_in_the_network_of_the_interface(made):
    command = ['-n', 3, '--horovod', '--interface', 'eth1', '--', *PRETRAIN, *TINY]
    status, said = made.launch(*command)
    assert status == 2
    for n in range(3):
        assert f"write '{made.hosts.address(n, 1)} host{n}' into its /etc/hosts" in said
    names = made.hosts.folder / 'etc_hosts'
    names.write_text(''.join(f'{made.hosts.address(n, 1)} host{n}\n' for n in range(3)))
    before = made.hosts.traffic(1)
    status, said = made.launch(*command)
    assert status == 0, said
    sent = [after[0] - start[0] for after, start in zip(made.hosts.traffic(1), before)]
    assert min(sent) > 20 * GRADIENT, sent


@kinds('ssh', 'slurm', never=['ray'])  # whose agents then cannot call, and say so
def test_an_interface_that_hosts_lack(made):
    made.hosts.run(1, 'ip link del eth1')
    status, said = made.launch('-n', 3, '--interface', 'eth1', '--', *PRETRAIN, *TINY)
    assert status == 2
    assert f"host {made.called(1)}: no interface 'eth1' with an IPv4 address: --interface takes one of lo 127.0.0.1, " \
           f'eth0 {made.hosts.address(1)}' in said


@kinds('ssh')
def test_hosts_with_other_versions(made):
    import mxnet

    import mxsimmim
    for n, path, old in ((1, Path(mxnet.__file__).with_name('libinfo.py'), mxnet.__version__),
                         (2, Path(mxsimmim.__file__), mxsimmim.__version__)):
        other = made.folder / f'other-{n}.py'
        other.write_text(path.read_text().replace(old, '1.0.7'))
        made.hosts.run(n, f'mount --bind {other} {path}')
    status, said = made.launch('-n', 3, '--', *PRETRAIN, *TINY)
    assert status == 2
    assert re.search(rf'host {made.called(1)}: .*mxnet 1\.0\.7.*{re.escape(mxnet.__version__)}', said), said
    assert re.search(rf'host {made.called(2)}: .*mxsimmim 1\.0\.7.*{re.escape(mxsimmim.__version__)}', said), said


# --- ends

@kinds('ssh')
@pytest.mark.soak
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP][:rounds(2, 4)],
                         ids=lambda number: number.name)
def test_a_signal_to_the_launcher(made, number):
    process = made.train('-s', 1)
    os.kill(made.launcher(process), number)
    wait_for(lambda: not made.left(), 'nothing is left of the job', 10 + made.slack)
    assert process.wait(5) in (-number, 128 + number, 0 if number == signal.SIGKILL and made.allocates else None)
    [checkpoint] = made.checkpoints()
    assert checkpoint > 'step-00000005'


@kinds('ssh')
@pytest.mark.soak
@pytest.mark.parametrize('options', [pytest.param(('-s', 1), id='dist_sync'),
                                     pytest.param(('--horovod',), id='horovod')][:rounds(1, 2)])
def test_kill_9_of_a_remote_worker(made, options):
    process = made.train(*options)
    os.kill(made.worker(1), signal.SIGKILL)
    assert process.wait(KILLED) == 128 + signal.SIGKILL
    assert f'worker 1 on {made.called(1)} was killed by SIGKILL; its log is logs/worker-1.log' in made.said()
    assert 'step' in made.logs()['worker-0']  # fetched after the failure
    wait_for(lambda: not made.left(), 'nothing is left of the job', 5 + made.slack)


@kinds('ssh')
@pytest.mark.soak
@pytest.mark.parametrize('which', [0, 1][:rounds(1, 2)])
def test_kill_9_of_what_holds_a_host(made, which):
    process = made.train('-s', 1)
    made.kill(made.holders[which], 2)
    assert process.wait(KILLED) not in (0, 2)
    lost = made.called(2)
    assert f'launch: host {lost} was lost' in made.said() or f'on {lost} was killed by SIGKILL' in made.said()
    wait_for(lambda: not made.left(), 'nothing is left of the job', 10 + made.slack)


@kinds(*KINDS)
@pytest.mark.soak
@in_soak
def test_a_cable_that_is_out_for_five_seconds_costs_only_time(made):
    process = made.train('-s', 1)
    made.hosts.plug(1, state='down')
    time.sleep(5)
    before = len(made.metrics())
    made.hosts.plug(1)
    wait_for(lambda: process.poll() is not None or len(made.metrics()) > before + 5, 'training goes on')
    assert process.poll() is None, made.said()


@kinds('ssh')
def test_a_host_that_vanishes(made):
    process = made.train('-s', 1)
    made.hosts.plug(1, state='down')
    assert process.wait(2 * KILLED) == 1
    assert f'launch: host {made.called(1)} was lost' in made.said()
    wait_for(lambda: not made.left(), 'nothing is left of the job, on the lost host either', 60)


@kinds(*KINDS)
@pytest.mark.soak
@in_soak
def test_a_host_that_comes_back(made):
    """Its job is started again from the last checkpoint, by nobody but the launcher."""
    job = made.start('-n', 3, '--horovod', '--max-restarts', 9, '--', *PRETRAIN, *TINY, 'train.length=200',
                     'checkpoint.every=20', 'validation.every=200')
    wait_for(made.checkpoints, 'a checkpoint')
    made.hosts.plug(1, state='down')
    wait_for(lambda: 'restart in' in made.said(), 'a restart')
    made.hosts.plug(1)
    assert job.wait(JOB) == 0, made.said()
    assert f'launch: host {made.called(1)} was lost: ' in made.said()
    assert 'step-00000200' in made.checkpoints()


# --- secrets

@kinds('ssh', 'slurm')
def test_no_secret_on_any_command_line(made):
    made.train('-s', 1, '--env', 'TOKEN', '--env-worker', 'OTHER=a-second-secret',
               environ={'TOKEN': 'the-first-secret'})
    environ = environment(made.worker(1))
    assert environ['TOKEN'] == 'the-first-secret' and environ['OTHER'] == 'a-second-secret'
    path = environ['MXSIMMIM_KEY_FILE']
    key = made.hosts.run(1, f'cat {path}').strip()
    assert len(key) == 64 and made.hosts.run(1, f'stat -c %a {path}').strip() == '600'
    pids = [pid for pid in map(int, filter(str.isdigit, os.listdir('/proc')))]
    own = [environment(pid)['MXSIMMIM_LAUNCH'].split()[-1] for pid in made.local() if 'MXSIMMIM_LAUNCH' in
           environment(pid)]  # with which agents call, where one command starts all of them
    lines = [words_of(pid) for pid in pids]
    assert sum('pretrain' in line for line in lines) > 3
    for secret in ('the-first-secret', key, 'a-second-secret', *own):  # the third is in the user's own command alone
        assert not [line for line in lines if secret in line and 'OTHER=' not in line], secret
    assert key not in environ.values() and not set(own) & set(environ.values())
