"""tools/launch.py on this machine: what its processes get, what the user sees, how it ends, what is left: nothing."""
import json
import os
import re
import signal
import stat
import time
from pathlib import Path

import pytest
from support.running import rounds

from mxsimmim.runtime.environment import cores

ROLES = 'worker-0', 'worker-1', 'server-0', 'scheduler-0'
SLEEP = ['python', '-c', 'import os, time; print("ready", flush=True); time.sleep(600)']
SHOW = ['python', '-c', 'import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))']


# --- what the processes get

def test_arguments_arrive_byte_for_byte(launcher):
    odd = ['a b', "it's", '"', '', '-n', '9', '--', '--env=X', '$HOME `id` \\ *', 'two\nlines', 'ü',
           os.fsdecode(b'\xff')]
    launcher.run('-n', 1, '-s', 1, '--', *SHOW, *odd)
    for name in ('worker-0', 'server-0', 'scheduler-0'):
        assert json.loads(launcher.log(name))[0] == odd


def test_the_environment(launcher):
    launcher.environ['FROM_SHELL'] = 'x y'
    launcher.environ.pop('OMP_NUM_THREADS', None)
    launcher.run('-n', 2, '-s', 1, '--p3', '--env', 'ALL=1', '--env-server', 'ONLY=server', '--env-worker',
                 'ONLY=worker', *SHOW)
    seen = {name: json.loads(launcher.log(name))[1] for name in ROLES}
    same = ('DMLC_PS_ROOT_PORT', 'DMLC_PS_ROOT_URI', 'DMLC_NODE_HOST', 'DMLC_NUM_WORKER', 'DMLC_NUM_SERVER',
            'DMLC_PS_VAN_TYPE', 'ALL', 'FROM_SHELL', 'OMP_NUM_THREADS')
    assert len({tuple(env[key] for key in same) for env in seen.values()}) == 1
    assert seen['worker-0']['DMLC_NODE_HOST'] == '127.0.0.1'
    assert [seen[name]['DMLC_ROLE'] for name in ROLES] == ['worker', 'worker', 'server', 'scheduler']
    assert [seen[name]['ONLY'] for name in ROLES] == ['worker', 'worker', 'server', 'server']
    assert [seen[name].get('DMLC_WORKER_ID') for name in ROLES] == ['0', '1', None, None]
    assert [seen[name].get('DMLC_SERVER_ID') for name in ROLES] == [None, None, '0', None]
    assert not any('HOROVOD_RANK' in env for env in seen.values())


@pytest.mark.parametrize('words', [['-s', 1], ['--horovod']])
def test_each_worker_has_its_own_cores(launcher, words):
    whole = os.sched_getaffinity(0)
    if cores() < 2:
        pytest.skip('one core: nothing to divide')
    launcher.run('-n', 2, *words, '--', 'python', '-c', 'import os; print(sorted(os.sched_getaffinity(0)))')
    one, two = (set(json.loads(launcher.log(f'worker-{index}'))) for index in range(2))
    assert one | two == whole and not one & two
    if words == ['-s', 1]:
        assert set(json.loads(launcher.log('server-0'))) == whole


def test_the_key_is_for_the_jobs_eyes_only(launcher):
    process = launcher.start('-n', 2, '-s', 1, *SLEEP)
    launcher.until(lambda: 'ready' in launcher.text('out'), 20, 'ready')
    paths = {word for pid, _ in launcher.left() for word in launcher.environment(pid) if 'MXSIMMIM_KEY_FILE=' in word}
    assert len(paths) == 1
    path = Path(paths.pop().partition('=')[2])
    key = path.read_text()
    assert re.fullmatch('[0-9a-f]{64}', key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    shown = launcher.command_lines()
    assert 'import sys; exec(' in shown and key not in shown and launcher.mark not in shown
    assert all(key not in ' '.join(launcher.environment(pid)) for pid, _ in launcher.left())
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    assert not path.parent.exists()


def test_open_files_of_the_launcher_are_not_inherited(launcher):
    launcher.run('-n', 1, '-s', 1, '--', 'ls', '-l', '/proc/self/fd')
    for name in ('worker-0', 'server-0'):
        numbers = [int(found) for found in re.findall(r' (\d+) -> ', launcher.log(name))]
        assert numbers == [0, 1, 2, 3], launcher.log(name)  # 3 is the folder that ls reads


# --- what the user sees

def test_rank_0_is_shown_live_and_as_it_is(launcher):
    process = launcher.start('-n', 2, '-s', 1, 'python', '-c', 'import os, sys, time\nwho = os.environ["DMLC_ROLE"] + '
                             'os.environ.get("DMLC_WORKER_ID", "")\nprint("out of", who)\nprint("err of", who, '
                             'file=sys.stderr)\nwhile who == "worker0" and not os.path.exists("go"): time.sleep(0.05)')
    launcher.until(lambda: launcher.text('out') == 'out of worker0\n', 20, 'a line on the terminal')
    launcher.until(lambda: 'err of worker0\n' in launcher.text('err'), 5, 'a line of standard error')
    assert process.poll() is None
    (launcher.folder / 'go').touch()
    assert process.wait(20) == 0
    own = [line for line in launcher.text('err').splitlines() if line != 'err of worker0']
    assert own[0] == 'launch: network: lo, 127.0.0.1' and all(line.startswith('launch: ') for line in own)
    for name in ROLES:
        who = name.replace('-', '') if 'worker' in name else name[:-2]
        assert sorted(launcher.log(name).splitlines()) == [f'err of {who}', f'out of {who}']


def test_a_terminal_that_takes_nothing_does_not_stop_the_job(launcher):
    reader, writer = os.pipe()
    process = launcher.start('-n', 1, '-s', 1, 'python', '-c', 'print("x" * 2_000_000)', stdout=writer)
    assert process.wait(30) == 0
    assert len(launcher.log('worker-0')) == 2_000_001
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize('words, part', [
    (['-n', 2, '-s', 1, 'no-such-command'], "no command 'no-such-command' in"),
    (['-n', 2, '-s', 1, 'true', 'data.path=/no/such'], "data '/no/such' cannot be read"),
    (['-n', 2, '--interface', 'no0', 'true'], "no interface 'no0'"), (['-n', 2, '-H', 'bad', 'true'], 'bad:2: '),
    (['-n', 2, '-H', 'none', 'true'], "hostfile 'none' cannot be read"),
    (['-n', 2, '--lr', 1, 'x'], "no option '--lr'"),
    (['-n', 2, '--devices', 'gpu', 'true'], 'has 1 GPUs for 2 workers')])
def test_what_cannot_start_is_told_at_once(launcher, words, part):
    launcher.environ['CUDA_VISIBLE_DEVICES'] = '0'
    (launcher.folder / 'bad').write_text('# hosts\na slots=many\n')
    out, err = launcher.run(*words, status=2)
    assert out == '' and part in err and all(line.startswith('launch: error: ') for line in err.splitlines()), err
    assert not (launcher.folder / 'logs').exists()


def test_gpus_are_divided(launcher):
    launcher.environ['CUDA_VISIBLE_DEVICES'] = '1,3,5,6'
    launcher.run('-n', 2, '-s', 1, '--devices', 'gpu', *SHOW)
    assert [json.loads(launcher.log(name))[1]['CUDA_VISIBLE_DEVICES'] for name in ROLES] == ['1,3', '5,6', '', '']


def test_logs_of_a_larger_job_before_are_removed(launcher):
    for workers, names in ((3, 4), (1, 2)):
        launcher.run('-n', workers, '--horovod', 'true')
        (launcher.folder / 'logs' / 'my-1.log').touch()
        assert len(list((launcher.folder / 'logs').iterdir())) == names


def test_help(launcher):
    out, _ = launcher.run('-h')
    assert 'examples:' in out and all(name in out for name in ('--sync-dst-dir', '--env-worker', '--p3', '--horovod'))


# --- how it ends

def failing(role, action):
    """A command that fails in one role after all have begun, and sleeps in the others."""
    who = 'os.environ["DMLC_ROLE"] + os.environ.get("DMLC_WORKER_ID", "")'
    return ['python', '-c', f'import os, sys, time\nprint("line", {who}, flush=True)\nif {who} == "{role}":\n'
            f'    time.sleep(0.5)\n    {action}\ntime.sleep(600)']


@pytest.mark.parametrize('role, name, action, status, part', [
    ('worker1', 'worker 1', 'sys.exit(7)', 7, 'failed with exit code 7'),
    ('worker0', 'worker 0', 'raise ValueError("reason")', 1, 'failed with exit code 1'),
    ('server', 'server 0', 'os.kill(os.getpid(), 11)', 139, 'was killed by SIGSEGV'),
    ('scheduler', 'scheduler', 'os.kill(os.getpid(), 9)', 137, 'was killed by SIGKILL')])
def test_the_first_failure_ends_all_and_is_told(launcher, role, name, action, status, part):
    began = time.monotonic()
    _, err = launcher.run('-n', 2, '-s', 1, *failing(role, action), status=status)
    assert time.monotonic() - began < 10
    log = name.replace(' ', '-') if ' ' in name else name + '-0'
    summary = [line for line in err.splitlines() if part in line]
    assert len(summary) == 1 and re.match(rf'launch: {name} on \S+ {part}; its log is logs/{log}.log', summary[0]), err
    assert f'launch:   | line {role}' in err.splitlines() and 'after it' not in err
    assert len(re.findall(r'if nobody sent that signal, \S+ ran out of memory', err)) == ('SIGKILL' in part)
    if 'reason' in action:
        assert 'launch:   | ValueError: reason' in err.splitlines()


def test_of_many_failures_the_first_is_named(launcher):
    """Worker 2 fails; the others notice and fail a moment later."""
    _, err = launcher.run('-n', 4, '-s', 1, 'python', '-c', """
import os, time
number = os.environ.get('DMLC_WORKER_ID')
if number == '2':
    time.sleep(0.5)
    open('gone', 'w').close()
    os._exit(5)
while number is None or not os.path.exists('gone'):
    time.sleep(0.01)
time.sleep(0.3)
os._exit(6)""", status=5)
    assert 'worker 2 on' in err and 'after it: worker' in err, err


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_all_in_good_order(launcher, number):
    process = launcher.start('-n', 2, '-s', 1, 'python', '-c', """
import os, signal, sys, time
def save(*_):
    time.sleep(1)
    print('saved', flush=True)
    sys.exit(143)
if os.environ['DMLC_ROLE'] == 'worker':
    signal.signal(signal.SIGTERM, save)
else:
    signal.signal(signal.SIGTERM, lambda *_: (print('end', time.time()), sys.exit(0)))
print('ready', flush=True)
time.sleep(600)""")
    launcher.until(lambda: all(Path(launcher.folder, 'logs', f'{name}.log').exists() and 'ready' in launcher.log(name)
                               for name in ROLES), 20, 'all are ready')
    process.send_signal(number)
    if number == signal.SIGTERM:
        time.sleep(0.2)
        process.send_signal(number)  # from a scheduler that tells a script, and the launcher in it
    assert process.wait(10) == 128 + number
    assert launcher.left() == []
    assert f'launch: stopped by {number.name}' in launcher.text('err')
    assert [launcher.log(name).count('saved') for name in ROLES] == [1, 1, 0, 0]
    saved = max((launcher.folder / f'logs/worker-{n}.log').stat().st_mtime for n in range(2))
    assert all(float(launcher.log(name).split()[-1]) > saved - 0.1 for name in ROLES[2:])  # servers outlive workers


STUBBORN = ['sh', '-c', 'trap "" TERM INT HUP; setsid -f sh -c "trap \'\' TERM INT HUP; sleep 611; sleep 612"; '
            'echo ready; sleep 613; sleep 614']


@pytest.mark.soak
@pytest.mark.parametrize('how', ['twice', 'KILL', 'TERM'][:rounds(2, 3)])
def test_whoever_ignores_signals_is_killed_with_its_children(launcher, how):
    process = launcher.start('-n', 2, '-s', 1, *STUBBORN)
    launcher.until(lambda: sum(line.startswith('sleep 611') for _, line in launcher.left()) == 4, 20, 'grandchildren')
    began = time.monotonic()
    process.send_signal(signal.SIGKILL if how == 'KILL' else signal.SIGTERM)
    if how == 'twice':
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
    launcher.gone(10)
    seconds = time.monotonic() - began
    assert process.wait(1) == (-9 if how == 'KILL' else 143)
    assert seconds < (3 if how == 'twice' else 10)
    assert not list(launcher.folder.glob('mxsimmim-*'))  # the key went too


@pytest.mark.parametrize('who', ['agent', 'guardian', 'both'])
def test_killing_the_agent_ends_all(launcher, who):
    """The guardian is the agent's parent; with both gone, the kernel kills the processes that they started."""
    process = launcher.start('-n', 2, '-s', 1, *(SLEEP if who == 'both' else STUBBORN))
    launcher.until(lambda: 'ready' in launcher.text('out'), 20, 'ready')
    guardian, agent = guardian_and_agent(launcher, process)
    for pid in {'agent': [agent], 'guardian': [guardian], 'both': [agent, guardian]}[who]:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert process.wait(15) != 0
    launcher.gone(10)
    assert time.monotonic() - began < 12
    assert 'was lost' in launcher.text('err')
    assert who == 'both' or not list(launcher.folder.glob('mxsimmim-*'))  # whichever is left clears up


def test_an_agent_that_is_stopped_is_woken(launcher):
    process = launcher.start('-n', 1, '-s', 1, 'sh', '-c', 'echo ready; sleep 600')
    launcher.until(lambda: 'ready' in launcher.text('out'), 20, 'ready')
    _, agent = guardian_and_agent(launcher, process)
    os.kill(agent, signal.SIGSTOP)
    launcher.until(lambda: state(agent)[0] in 'SR', 5, 'it goes on')
    process.send_signal(signal.SIGTERM)
    launcher.gone(10)


def guardian_and_agent(launcher, process):
    return sorted(launcher.find('import sys; exec('), key=lambda pid: int(state(pid)[1]) != process.pid)


def state(pid):
    """State, parent, … of a process."""
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()


def test_grandchildren_do_not_outlive_a_good_end(launcher):
    launcher.run('-n', 2, '-s', 1, 'sh', '-c', 'setsid -f sleep 600; sleep 600 & exit 0')


def test_servers_that_stay_after_the_last_worker_are_ended(launcher):
    began = time.monotonic()
    launcher.run('-n', 2, '-s', 1, 'sh', '-c', 'test $DMLC_ROLE = worker || exec sleep 600')
    assert 4 < time.monotonic() - began < 10
