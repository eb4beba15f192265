"""Jobs over ssh on a cluster of three hosts that the tests make, with everything that goes wrong on clusters."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import tiny
from support.hosts import three_hosts, wait_for, words_of
from support.running import BASE, ROOT, command, rounds

pytestmark = pytest.mark.unmeasured
in_soak = pytest.mark.skipif(not rounds(0, 1), reason='in `make soak`')

LAUNCH = [sys.executable, str(ROOT / 'tools' / 'launch.py')]
PRETRAIN = command('pretrain', BASE)
TINY = [*tiny.TINY, 'name=tiny', 'model.drop_path=0', 'train.length=20', 'optim.milestones=[15]',
        'validation.pictures=0', 'checkpoint.every=20', 'log.every=5', 'data.threads=1']
ENDLESS = [*TINY, 'train.length=100000', 'validation.every=100000', 'checkpoint.every=100000']
GRADIENT = 4 * 8360  # bytes of that network's gradients
JOB = 90  # seconds that a whole job may take
KILLED = 15  # seconds until nothing of a job is left, once one of its processes is killed


@pytest.fixture
def hosts(tmp_path):
    """Three hosts, on each of which the folder `job` is its own."""
    with three_hosts(tmp_path / 'hosts') as made:
        (tmp_path / 'job').mkdir()
        for n in range(3):
            made.hide(n, tmp_path / 'job')
        yield made


@pytest.fixture
def start(hosts, tmp_path):
    """Starts the launcher in `job`; its standard error goes to `said`. Kills it at the end of the test."""
    started = []

    def begin(*words, names=('host0', 'host1', 'host2'), environ=None):
        (tmp_path / 'hostfile').write_text(''.join(name + '\n' for name in names))
        with open(tmp_path / 'said', 'wb') as said:
            started.append(subprocess.Popen(
                [*LAUNCH, '-H', str(tmp_path / 'hostfile'), *map(str, words)], cwd=tmp_path / 'job', stderr=said,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=dict(hosts.environ, **environ or {})))
        return started[-1]
    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def launch(start, tmp_path):
    """Runs the launcher to its end; returns its exit status and what it said."""
    def finish(*words, **keys):
        status = start(*words, **keys).wait(JOB)
        return status, (tmp_path / 'said').read_text()
    return finish


@pytest.fixture
def training(start, hosts, tmp_path):
    """Starts a job that trains for ever; returns its launcher when all workers train."""
    def begin(*words, command=(*PRETRAIN, *ENDLESS), **keys):
        process = start('-n', 3, *words, '--', *command, **keys)
        metrics = tmp_path / 'job' / 'runs' / 'tiny' / 'metrics.jsonl'

        def trains():
            assert process.poll() is None, (tmp_path / 'said').read_text()
            return hosts.run(0, f'cat {metrics} 2> /dev/null | wc -l').strip() not in ('0', '1')
        wait_for(trains, 'training begins', JOB)
        assert all(hosts.processes(n) for n in range(3)) and len(local(tmp_path)) == 3  # as `left` would see them
        return process
    return begin


def environment(pid):
    """Variables of a process."""
    words = Path(f'/proc/{pid}/environ').read_bytes().decode().split('\0')
    return dict(word.partition('=')[::2] for word in words if word)


def local(folder):
    """Processes on this machine that are ssh to the hosts."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir('/proc')))
            if f'{folder}/hosts/ssh_config' in words_of(pid).split()]


def left(hosts, folder):
    """Command lines of what still runs of a job, on the hosts and here."""
    pids = [pid for n in range(3) for pid in hosts.processes(n)] + local(folder)
    return [words for words in map(words_of, pids) if words]


def worker(hosts, n):
    """The process of a host that is a worker (or a rank)."""
    return next(pid for pid in hosts.processes(n) if 'pretrain' in words_of(pid)
                and environment(pid).get('DMLC_ROLE', 'worker') == 'worker')


# --- jobs; those in `make soak` alone are much like what faults/test_faults.py does to its jobs

@pytest.mark.soak
@pytest.mark.parametrize('options, keys, logs', [
    pytest.param(['-s', 2], ['train.store=dist_sync'],
                 ['scheduler-0', 'server-0', 'server-1', 'worker-0', 'worker-1', 'worker-2'], id='dist_sync'),
    pytest.param(['-s', 1], ['train.store=dist_async', 'optim.clip_grad=null'],
                 ['scheduler-0', 'server-0', 'worker-0', 'worker-1', 'worker-2'], id='dist_async'),
    pytest.param(['--horovod'], ['train.store=horovod'], ['worker-0', 'worker-1', 'worker-2'], id='horovod'),
][:rounds(1, 3)])
def test_a_job_on_three_hosts(launch, hosts, tmp_path, options, keys, logs):
    before = hosts.traffic()
    status, said = launch('-n', 3, *options, '--', *PRETRAIN, *TINY, *keys)
    assert status == 0, said
    sent = [after[0] - start[0] for after, start in zip(hosts.traffic(), before)]
    assert min(sent) > 20 * GRADIENT / 2, sent
    records = [json.loads(line) for line in hosts.run(0, f'cat {tmp_path}/job/runs/tiny/metrics.jsonl').splitlines()]
    assert max(record['step'] for record in records) == 20
    assert sorted(path.stem for path in (tmp_path / 'job' / 'logs').iterdir()) == logs  # of all hosts, fetched
    assert f'network: eth0, {hosts.address(0)} {hosts.address(1)} {hosts.address(2)}\n' in said
    assert left(hosts, tmp_path) == []


def test_the_job_goes_through_the_network_of_the_interface(launch, hosts):
    before = hosts.traffic(1)
    status, said = launch('-n', 3, '-s', 1, '--interface', 'eth1', '--', *PRETRAIN, *TINY)
    assert status == 0, said
    assert f'network: eth1, {hosts.address(0, 1)} {hosts.address(1, 1)} {hosts.address(2, 1)}\n' in said
    sent = [after[0] - start[0] for after, start in zip(hosts.traffic(1), before)]
    assert min(sent) > 20 * GRADIENT, sent


def test_horovod_in_the_network_of_the_interface(launch, hosts):
    command = ['-n', 3, '--horovod', '--interface', 'eth1', '--', *PRETRAIN, *TINY]
    status, said = launch(*command)
    assert status == 2
    for n in range(3):
        assert f"write '{hosts.address(n, 1)} host{n}' into its /etc/hosts" in said
    names = hosts.folder / 'etc_hosts'
    names.write_text(''.join(f'{hosts.address(n, 1)} host{n}\n' for n in range(3)))
    before = hosts.traffic(1)
    status, said = launch(*command)
    assert status == 0, said
    sent = [after[0] - start[0] for after, start in zip(hosts.traffic(1), before)]
    assert min(sent) > 20 * GRADIENT, sent


def test_an_interface_that_hosts_lack(launch, hosts):
    hosts.run(1, 'ip link del eth1')
    status, said = launch('-n', 3, '--interface', 'eth1', '--', *PRETRAIN, *TINY)
    assert status == 2
    assert f"host host1: no interface 'eth1' with an IPv4 address: --interface takes one of lo 127.0.0.1, " \
           f'eth0 {hosts.address(1)}' in said


def test_the_command_arrives_byte_for_byte(launch, tmp_path):
    words = ['a b', "it's", '"quoted"', '$HOME', '`id`', '\\', '*', '-n', '--', '', 'two\nlines', 'ä;|&<>']
    program = 'import sys; print(ascii(sys.argv[1:]))'
    status, said = launch('-n', 3, '-s', 1, '--', sys.executable, '-c', program, *words)
    assert status == 0, said
    for n in range(3):
        assert (tmp_path / 'job' / 'logs' / f'worker-{n}.log').read_text().strip() == ascii(words)


def test_the_working_directory_is_copied(launch, hosts, tmp_path):
    (tmp_path / 'job' / 'model.py').write_text('print("in " + __import__("os").getcwd())')
    where = tmp_path / 'copied' / 'a folder'
    where.parent.mkdir()
    for n in range(3):
        hosts.hide(n, where.parent)
    command = ['-n', 3, '-s', 1, '--sync-dst-dir', where, '--', sys.executable, 'model.py']
    status, said = launch(*command)
    assert status == 0, said
    assert (tmp_path / 'job' / 'logs' / 'worker-2.log').read_text() == f'in {where}\n'
    for n in (1, 2):
        hosts.run(n, f'mount -o remount,ro {tmp_path}/copied')
    (tmp_path / 'job' / 'model.py').write_text('changed')
    status, said = launch(*command)
    assert status == 2
    for n in (1, 2):
        assert re.search(f'host host{n}: --sync-dst-dir: .*Read-only file system', said), said
    assert 'host host0' not in said


# --- hosts that are not as they should be

def test_all_problems_of_all_hosts_at_once(launch, hosts, tmp_path):
    images = tmp_path / 'data' / 'images'
    images.mkdir(parents=True)
    (hosts.folder / 'host1' / 'authorized_keys').write_text('')
    hosts.hide(2, tmp_path / 'data')
    status, said = launch('-n', 4, '--', *PRETRAIN, *TINY, f'data.path={images}',
                          names=('host0', 'host1', 'host2', 'no-such-host'))
    assert status == 2
    errors = [line for line in said.splitlines() if line.startswith('launch: error: ')]
    assert len(errors) == 3 and len(said.splitlines()) == 3, said
    assert re.search(r'host host1: .*Permission denied \(publickey\)', said)
    assert f"host host2: data '{images}' cannot be read (No such file or directory)" in said
    assert re.search(r'host no-such-host: .*Could not resolve hostname no-such-host', said)
    assert left(hosts, tmp_path) == []


def test_hosts_with_other_versions(launch, hosts, tmp_path):
    import mxnet

    import mxsimmim
    for n, path, old in ((1, Path(mxnet.__file__).with_name('libinfo.py'), mxnet.__version__),
                         (2, Path(mxsimmim.__file__), mxsimmim.__version__)):
        other = tmp_path / f'other-{n}.py'
        other.write_text(path.read_text().replace(old, '1.0.7'))
        hosts.run(n, f'mount --bind {other} {path}')
    status, said = launch('-n', 3, '--', *PRETRAIN, *TINY)
    assert status == 2
    assert re.search(rf'host host1: .*mxnet 1\.0\.7.*{re.escape(mxnet.__version__)}', said), said
    assert re.search(rf'host host2: .*mxsimmim 1\.0\.7.*{re.escape(mxsimmim.__version__)}', said), said


def test_a_host_without_python(launch, hosts):
    hosts.hide(1, Path(sys.executable).parent)
    status, said = launch('-n', 3, '--', *PRETRAIN, *TINY)
    assert status == 2
    assert 'host host1: ' in said and sys.executable in said and 'host host0' not in said, said


def test_a_hostfile_with_a_bad_line(launch, tmp_path):
    status, said = launch('-n', 2, '--', *PRETRAIN, *TINY, names=('host0', '# a comment', 'host1 slots=two'))
    assert status == 2
    assert f"{tmp_path}/hostfile:3: 'slots=two' after the host: only slots=N can stand there" in said


def test_a_host_whose_key_is_not_the_known_one(launch, hosts):
    known = hosts.folder / 'known_hosts'
    lines = known.read_text().splitlines()
    known.write_text('\n'.join([lines[0], lines[1].split()[0] + ' ' + lines[2].split(' ', 1)[1], lines[2], '']))
    status, said = launch('-n', 3, '--', *PRETRAIN, *TINY)
    assert status == 2
    assert re.search('host host1: .*Host key verification failed', said), said


# --- ends

@pytest.mark.soak
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP][:rounds(2, 4)],
                         ids=lambda number: number.name)
def test_a_signal_to_the_launcher(training, hosts, tmp_path, number):
    process = training('-s', 1)
    process.send_signal(number)
    wait_for(lambda: not left(hosts, tmp_path), 'nothing is left of the job', 10)
    assert process.wait(1) == (-9 if number == signal.SIGKILL else 128 + number)
    checkpoint, = hosts.run(0, f'ls {tmp_path}/job/runs/tiny/checkpoints').split()
    assert checkpoint > 'step-00000005'


@pytest.mark.soak
@pytest.mark.parametrize('options', [pytest.param(('-s', 1), id='dist_sync'),
                                     pytest.param(('--horovod',), id='horovod')][:rounds(1, 2)])
def test_kill_9_of_a_remote_worker(training, hosts, tmp_path, options):
    process = training(*options)
    os.kill(worker(hosts, 1), signal.SIGKILL)
    assert process.wait(KILLED) == 128 + signal.SIGKILL
    said = (tmp_path / 'said').read_text()
    assert 'worker 1 on host1 was killed by SIGKILL; its log is logs/worker-1.log' in said
    assert 'step' in (tmp_path / 'job' / 'logs' / 'worker-0.log').read_text()  # fetched after the failure
    wait_for(lambda: not left(hosts, tmp_path), 'nothing is left of the job', 5)


@pytest.mark.soak
@pytest.mark.parametrize('which', ['ssh', 'agent'][:rounds(1, 2)])
def test_kill_9_of_what_holds_a_host(training, hosts, tmp_path, which):
    process = training('-s', 1)
    if which == 'agent':
        killed = int(Path(f'/proc/{worker(hosts, 2)}/stat').read_text().rpartition(')')[2].split()[1])  # its parent
    else:
        killed, = [pid for pid in local(tmp_path) if 'host2' in words_of(pid).split()]
    os.kill(killed, signal.SIGKILL)
    assert process.wait(KILLED) == 1
    assert 'launch: host host2 was lost' in (tmp_path / 'said').read_text()
    wait_for(lambda: not left(hosts, tmp_path), 'nothing is left of the job', 10)


@in_soak
@pytest.mark.soak
def test_a_cable_that_is_out_for_five_seconds_costs_only_time(training, hosts, tmp_path):
    def records():
        return int(hosts.run(0, f'cat {tmp_path}/job/runs/tiny/metrics.jsonl | wc -l'))

    process = training('-s', 1)
    hosts.plug(1, state='down')
    time.sleep(5)
    before = records()
    hosts.plug(1)
    wait_for(lambda: process.poll() is not None or records() > before + 5, 'training goes on')
    assert process.poll() is None, (tmp_path / 'said').read_text()


def test_a_host_that_vanishes(training, hosts, tmp_path):
    process = training('-s', 1)
    hosts.plug(1, state='down')
    assert process.wait(2 * KILLED) == 1
    said = (tmp_path / 'said').read_text()
    assert 'launch: host host1 was lost' in said
    wait_for(lambda: not left(hosts, tmp_path), 'nothing is left of the job, on the lost host either', 60)


# --- secrets

@in_soak
@pytest.mark.soak
def test_a_host_that_comes_back(start, hosts, tmp_path):
    """Its job is started again from the last checkpoint, by nobody but the launcher."""
    def said():
        return (tmp_path / 'said').read_text()
    job = start('-n', 3, '--horovod', '--max-restarts', 9, '--', *PRETRAIN, *TINY, 'train.length=200',
                'checkpoint.every=20', 'validation.every=200')
    wait_for(lambda: 'step-0000' in hosts.run(0, f'ls {tmp_path}/job/runs/tiny/checkpoints || true'), 'a checkpoint')
    hosts.plug(1, state='down')
    wait_for(lambda: 'restart in' in said(), 'a restart')
    hosts.plug(1)
    assert job.wait(JOB) == 0, said()
    assert 'launch: host host1 was lost: ' in said()
    assert 'step-00000200' in hosts.run(0, f'ls {tmp_path}/job/runs/tiny/checkpoints')


def test_no_secret_on_any_command_line(training, hosts, tmp_path):
    training('-s', 1, '--env', 'TOKEN', '--env-worker', 'OTHER=a-second-secret', environ={'TOKEN': 'the-first-secret'})
    environ = environment(worker(hosts, 1))
    assert environ['TOKEN'] == 'the-first-secret' and environ['OTHER'] == 'a-second-secret'
    path = environ['MXSIMMIM_KEY_FILE']
    key = hosts.run(1, f'cat {path}').strip()
    assert len(key) == 64 and hosts.run(1, f'stat -c %a {path}').strip() == '600'
    lines = [words_of(pid) for pid in map(int, filter(str.isdigit, os.listdir('/proc')))]
    assert sum('pretrain' in line for line in lines) > 3
    for secret in ('the-first-secret', key, 'a-second-secret'):  # the third stands in the user's own command alone
        assert not [line for line in lines if secret in line and 'OTHER=' not in line], secret
    assert key not in environ.values()
