"""The launcher's options, commands, findings on hosts, and messages."""
import asyncio
import os
import shlex
import socket
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from mxsimmim.cluster import connections, inspection, options, preflight
from mxsimmim.cluster.backends import mpi, ssh
from mxsimmim.cluster.callback import AGENT
from mxsimmim.cluster.connections import Command
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.messages import MessageStream
from mxsimmim.cluster.rendezvous import Rendezvous
from mxsimmim.cluster.spec import HostInfo, JobSpec, place_processes


def job(workers, servers=0, command=('x',), **changes):
    return JobSpec(command, workers, servers, **changes)


def test_a_job_does_not_change():
    parsed = options.job_spec(options.parse(['-n', '1', '--env', 'A=1', 'x', 'y']))
    assert parsed == job(1, 1, ('x', 'y'), directory=os.getcwd(), worker_variables=parsed.worker_variables,
                         server_variables=parsed.server_variables)
    with pytest.raises(FrozenInstanceError):
        parsed.workers = 2
    with pytest.raises(TypeError):
        parsed.worker_variables['A'] = '2'


@pytest.mark.parametrize('argv, own, command', [
    ('-n 2 x', '-n 2', 'x'), ('-n 2 -- x -n 3', '-n 2', 'x -n 3'), ('-n2 --horovod x --horovod', '-n2 --horovod',
                                                                    'x --horovod'),
    ('--env A=1 --env=B x -- y', '--env A=1 --env=B', 'x -- y'), ('-n 2 -- -- x', '-n 2', '-- x'), ('-n 2', '-n 2', ''),
    ('-n 2 -- --log-file z', '-n 2', '--log-file z'), ('--launcher mpi -H h x -H y', '--launcher mpi -H h', 'x -H y')])
def test_the_command_is_cut_off_untouched(argv, own, command):
    assert options.split(argv.split()) == (own.split(), command.split())
    odd = ['a b', "c'd", '"', '', '\n', '$HOME', '*', '--', 'ü\udc80']
    assert options.split(own.split() + ['--'] + odd) == (own.split(), odd)


@pytest.mark.parametrize('argv, part', [
    ('', 'how many workers'), ('-n 0 x', 'at least 1 worker'), ('-n x y', "invalid int value: 'x'"),
    ('-n 2', 'no command'),
    ('-n 2 -s 0 x', 'at least 1 parameter server'), ('-n 2 --horovod -s 1 x', 'leave out -s 1'),
    ('-n 2 --horovod --p3 x', '--p3'), ('-n 2 --launcher ssh x', 'give -H FILE'),
    ('-n 2 -H h --launcher local x', '-H'),
    ('-n 2 --launcher sge x', 'sge'), ('-n 2 --sync-dst-dir d x', 'needs -H'),
    ('-n 2 --num-serverz 3 x', '--num-servers'),
    ('-n 2 --lr 3 x', "no option '--lr'"), ('-n 2 --env 1=2 x', "'1=2' is not a variable"),
    ('-n 2 --env NOT_SET_ANYWHERE x', 'not set here'), ('-n 2 --horovod=1 x', '--horovod=1'),
    ('-n 2 --max-restarts -1 x', '--max-restarts -1 cannot be'), ('-n 2 --min-workers 1 x', '-H FILE'),
    ('-n 2 -H h --launcher mpi --min-workers 1 x', 'only --launcher ssh can'),
    ('-n 2 -H h --launcher slurm x', 'leave out -H'), ('-n 2 --launcher slurm --min-workers 1 x', 'one srun starts'),
    ('-n 2 -H h --min-workers 0 x', 'from 1 to the 2 workers of -n'),
    ('-n 2 -H h --min-workers 3 x', '--min-workers 3 cannot be'),
    ('-n 2 --min-np 1 x', 'write --min-workers M')])
def test_wrong_options(argv, part):
    with pytest.raises(ValueError) as error:
        options.parse(argv.split())
    assert part in str(error.value)


def test_options(monkeypatch):
    monkeypatch.setenv('HERE', 'x y')
    parsed = options.parse('-n 3 --env HERE --env-worker W=a=b --env-server S:1 --env-worker HERE= cmd'.split())
    assert parsed.given == {'worker': {'HERE': '', 'W': 'a=b'}, 'server': {'HERE': 'x y', 'S': '1'}}
    assert (parsed.num_workers, parsed.num_servers, parsed.launcher, parsed.command) == (3, 3, 'local', ['cmd'])
    assert options.parse(['-n', '1', '-H', 'f', 'x']).launcher == 'ssh'
    assert options.parse(['-n', '4', '--horovod', 'x']).num_servers == 0


HOSTS = (Host('a'), Host('b', 22))


@pytest.mark.parametrize('words, expected', [
    ('-n 2 x', dict(servers=2)), ('-n 2 --horovod --devices gpu x', dict(horovod=True, gpus=True)),
    ('-n 2 -H hosts --interface ib0 --p3 x', dict(servers=2, hosts=HOSTS, interface='ib0', p3=True)),
    ('-n 2 -H hosts --sync-dst-dir ~/x x', dict(servers=2, hosts=HOSTS, directory='x', copy=True)),
    ('-n 2 -H hosts --sync-dst-dir ~/ x', dict(servers=2, hosts=HOSTS, directory='.', copy=True)),
    ('-n 2 -H hosts --sync-dst-dir /x x', dict(servers=2, hosts=HOSTS, directory='/x', copy=True)),
    ('-n 2 --launcher slurm --sync-dst-dir ~/x x', dict(servers=2, directory=os.path.expanduser('~/x'), copy=True)),
    ('-n 2 -H hosts --max-restarts 5 x', dict(servers=2, hosts=HOSTS, max_restarts=5)),
    ('-n 2 -H hosts --min-workers 2 x', dict(servers=2, hosts=HOSTS, min_workers=2, max_restarts=3)),
    ('-n 2 -H hosts --min-workers 1 --max-restarts 0 x', dict(servers=2, hosts=HOSTS, min_workers=1))])
def test_the_job_of_options(words, expected, tmp_path, monkeypatch):
    (tmp_path / 'hosts').write_text('a\nb:22\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    made = options.job_spec(options.parse(words.split()))
    assert made == job(2, **{'directory': str(tmp_path), **expected, 'worker_variables': {}, 'server_variables': {}})


@pytest.mark.parametrize('words, threads', [('-n 1 x', '5'), ('-n 1 --env OMP_NUM_THREADS=3 x', '3'),
                                            ('-n 1 --launcher mpi x', None)])
def test_threads_that_the_user_set_here_hold_for_this_machine_alone(words, threads, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '5')
    made = options.job_spec(options.parse(words.split()))
    assert made.worker_variables.get('OMP_NUM_THREADS') == made.server_variables.get('OMP_NUM_THREADS') == threads


def test_data_paths():
    words = ['x', 'data.path=/a b', 'data.path=digits', 'data.val_path=digit-scenes-val-64x96', 'data.val_path=v',
             'data.threads=2', 'data.path=']
    assert preflight.data_paths(words) == ['/a b', 'v']


def test_the_ssh_command_runs_python_with_any_shell():
    command = ssh.agent_command(Host('me@::1', 2222), '/no/such/python', 'print("it\'s", 1)')
    assert command[0] == 'ssh' and command[-3:-1] == ['--', 'me@::1'] and command[-5:-3] == ['-p', '2222']
    assert {'BatchMode=yes', 'ConnectTimeout=10', 'ServerAliveInterval=3'} < set(command)
    for shell in ['sh', 'bash']:
        assert subprocess.check_output([shell, '-c', command[-1]]) == b"it's 1\n"
    mine = ssh.agent_command(Host('a'), sys.executable, 'import sys; print(sys.executable)')[-1]
    assert subprocess.check_output(['sh', '-c', mine]).decode().strip() == sys.executable


def test_a_path_of_the_users_finds_python(tmp_path):
    (tmp_path / 'python3').write_text('#!/bin/sh\necho mine\n')
    (tmp_path / 'python3').chmod(0o755)
    command = ssh.agent_command(Host('a'), sys.executable, 'x', f'{tmp_path}:/bin')[-1]
    assert subprocess.check_output(['/bin/sh', '-c', command]) == b'mine\n'
    command = ssh.agent_command(Host('a'), '/x', 'y', '/nowhere')[-1]
    nothing = subprocess.run(['/bin/sh', '-c', command], stderr=subprocess.PIPE)
    assert nothing.returncode == 127 and b'no Python: ' in nothing.stderr


def test_the_rsync_command():
    command = ssh.copy_command(Host('me@::1', 2222), "my 'dir'")
    assert command[0] == 'rsync' and command[-1] == "me@[::1]:my 'dir'/" and command[-4].endswith('-p 2222')
    assert '--rsync-path=mkdir -p ' + shlex.quote("my 'dir'") + ' && rsync' in command
    assert {'--exclude=/runs', '--exclude=/logs', '--exclude=.git', '--exclude=.venv'} < set(command)


@pytest.mark.parametrize('said, part', [
    ('ssh: Could not resolve hostname a: Name or service not known', 'correct the name'),
    ('me@a: Permission denied (publickey).', 'ssh-copy-id -p 22 a'), ('Host key verification failed.', 'ssh -p 22 a'),
    ('ssh: connect to host a port 22: Connection refused', 'does sshd run'), ('something new', 'something new')])
def test_what_ssh_says_and_what_to_do(said, part):
    assert ssh.explain(Host('a', 22), said).startswith(said) and part in ssh.explain(Host('a', 22), said)


def test_the_mpirun_command_holds_no_secret():
    agent = ['-x', 'MXSIMMIM_LAUNCH', *AGENT]
    start = ['mpirun', '--oversubscribe', '--bind-to', 'none']
    assert mpi.mpirun(place_processes(job(2, 1), [Host('')]), [], '') == start + ['-np', '4'] + agent
    network = ['--mca', 'btl_tcp_if_include', 'ib0']
    processes = place_processes(job(3, 1), [Host('a'), Host('b', None, 2)])  # a b b, a, a
    assert mpi.mpirun(processes, [Host('a'), Host('b')], 'ib0') == (
        start + network + ['--host', 'a:1', '-np', '1'] + agent + [':', '--host', 'b:2', '-np', '2'] + agent
        + [':', '--host', 'a:2', '-np', '2'] + agent)
    with pytest.raises(ValueError, match="host 'b': mpirun takes neither"):
        mpi.mpirun(processes, [Host('a'), Host('b', 2222)], '')


def fact(**changes):
    return {'problems': [], 'packages': {'mxnet': '1.9.1', 'mxsimmim': '0.1.0', 'horovod': None}, 'offset': 0.0,
            'python': '3.11', 'executable': '/py', 'named': '10.0.0.1', 'host': 'ha', 'mpi': False, **changes}


def checked(*facts, command='mxsimmim', horovod=False):
    infos = [HostInfo(name, f'10.0.0.{n}', 'eth0', 1) for n, name in zip(range(1, 9), 'abcdefgh')]
    found = preflight.problems(job(2, command=(command,), horovod=horovod), infos[:len(facts)], facts, 'take')
    assert all(line.startswith(f'host {infos[number].name}: ') for number, line in found)
    return [line for _, line in found]


def test_hosts_that_agree_have_no_problem():
    assert checked(fact(), fact(offset=-29)) == []
    other = {'mxnet': '1.9.1', 'mxsimmim': None, 'horovod': '1'}
    assert checked(fact(), fact(packages=other), command='python') == []


@pytest.mark.parametrize('changes, horovod, part', [
    (dict(problems=['no x']), False, 'no x'), (dict(python='3.8'), False, 'Python 3.8, but a has 3.11'),
    (dict(packages={'mxnet': '2.0', 'mxsimmim': '0.1.0', 'horovod': None}), False, 'mxnet 2.0, but a has 1.9.1'),
    (dict(packages={'mxnet': '1.9.1', 'mxsimmim': '0.2', 'horovod': None}), False, 'mxsimmim 0.2, but a has 0.1.0'),
    (dict(packages={'mxnet': None, 'mxsimmim': '0.1.0', 'horovod': None}), False,
     'no mxnet in /py: install it there, or take a Python that has it'),
    (dict(packages={'mxnet': '1.9.1', 'mxsimmim': None, 'horovod': None}), False, 'no mxsimmim in /py'),
    (dict(offset=31.4), False, 'its clock is 31 s ahead'), (dict(offset=-99.0), False, 'its clock is 99 s behind'),
    (dict(named='127.0.1.1', host='hb'), True, "hb, stands for 127.0.1.1 there")])
def test_each_problem_names_its_host(changes, horovod, part):
    have = {'mxnet': '1.9.1', 'mxsimmim': '0.1.0', 'horovod': '0.28.1'}
    first = fact(packages=have) if horovod else fact()
    second = fact(**{**({'packages': have} if horovod else {}), **changes})
    lines = checked(first, second, horovod=horovod)
    assert len(lines) == 1 and lines[0].startswith('host b: ') and part in lines[0]


def test_all_problems_of_all_hosts_are_told_at_once():
    lines = checked(fact(problems=['1', '2']), fact(problems=['3'], python='3.8'), fact())
    assert [line[:8] for line in lines] == ['host a: ', 'host a: ', 'host b: ', 'host b: ']


def test_a_loopback_address_does_not_serve_several_hosts():
    infos = [HostInfo('localhost', '127.0.0.1', 'lo', 1), HostInfo('b', '10.0.0.2', 'eth0', 1)]
    (number, line), = preflight.problems(job(2), infos, [fact(), fact()], '')
    assert number == 0 and 'host localhost: other hosts cannot reach it at 127.0.0.1' in line


def test_the_interface():
    known = {'lo': '127.0.0.1', 'eth0': '10.0.0.1', 'eth1': '10.1.0.1'}
    assert inspection.choose_interface(known, '', '10.1.0.1') == ('eth1', '10.1.0.1')
    assert inspection.choose_interface(known, 'eth0', '10.1.0.1') == ('eth0', '10.0.0.1')
    assert inspection.choose_interface(known, '', '::ffff:10.0.0.1') == ('eth0', '10.0.0.1')
    assert inspection.interfaces()['lo'] == '127.0.0.1'
    with pytest.raises(ValueError, match="no interface 'ib0'.*lo 127.0.0.1, eth0 10.0.0.1, eth1 10.1.0.1"):
        inspection.choose_interface(known, 'ib0', '')
    with pytest.raises(ValueError, match='holds 10.9.9.9 where'):
        inspection.choose_interface(known, '', '10.9.9.9')


def test_versions_are_found_without_importing(tmp_path, monkeypatch):
    for name, text in (('one', "__version__ = '1.2'\nraise SystemExit"), ('two', 'raise SystemExit')):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    versions = [inspection.version(name) for name in ('one', 'two', 'three')]
    assert versions == ['1.2', 'unknown', None]
    assert inspection.version('mxnet') == '1.9.1' and inspection.version('mxsimmim') == '0.1.0'


def test_gpus_of_a_user_who_restricts_them():
    assert inspection.gpus({'CUDA_VISIBLE_DEVICES': '3,GPU-5'}) == ['3', 'GPU-5']
    assert inspection.gpus({'CUDA_VISIBLE_DEVICES': ''}) == inspection.gpus({'CUDA_VISIBLE_DEVICES': '-1'}) == []


def test_what_is_sent_to_a_host_is_all_it_needs():
    text = connections.program('tail(sys.argv[1])').decode()
    call = "sys.modules['mxsimmim.cluster.agent'].tail"
    code = text.replace(call, 'print(' + call)
    subprocess.run([sys.executable, '-I', '-S', '-c', code.rstrip() + ')', os.devnull], check=True, cwd='/')


async def talk(secrets, tamper=None, opening=b''):
    """Messages that the launcher gets when an agent sends two, through sockets that are each other's ends."""
    loop, ends, got, closed = asyncio.get_event_loop(), socket.socketpair(), [], []
    wire = socket.socketpair()
    streams = [MessageStream(loop, *2 * [ends[0].fileno()], got.append, lambda: closed.append(0), secrets[0],
                             opening=opening),
               MessageStream(loop, *2 * [wire[0].fileno()], got.append, lambda: None, secrets[1], launcher=False)]
    streams[1].send(event='one', text='ü' * 100_000)
    streams[1].send(event='two')
    data = b''
    wire[1].setblocking(False)
    while not data.endswith(b'"two"}'):
        data += await asyncio.wait_for(loop.sock_recv(wire[1], 1 << 20), 10)
    ends[1].setblocking(False)
    await asyncio.wait_for(loop.sock_sendall(ends[1], tamper(data) if tamper else data), 10)
    for _ in range(1000):
        if closed or len(got) == 2:
            break
        await asyncio.sleep(0.01)
    for stream in streams:
        stream.close()
    return [message['event'] for message in got]


def test_messages_arrive_whole_and_in_order():
    assert asyncio.run(talk((b'', b''))) == asyncio.run(talk((b'k', b'k'))) == ['one', 'two']


def test_what_a_login_shell_prints_first_is_skipped():
    assert asyncio.run(talk((b'', b''), lambda data: b'Welcome!\n' * 99 + b'<<go>>' + data, b'<go>')) == []
    assert asyncio.run(talk((b'', b''), lambda data: b'Welcome!\n' * 99 + b'<<go>' + data, b'<go>')) == ['one', 'two']


@pytest.mark.parametrize('tamper', [lambda data: data[:100] + b'x' + data[101:], lambda data: data[200_000:] + data,
                                    lambda data: b'\xff' * 4 + data, None])
def test_forged_messages_go_nowhere(tamper):
    assert asyncio.run(talk((b'key', b'key' if tamper else b'other'), tamper)) == []


async def request(port, method, path, body=b'', length=None):
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    size = len(body) if length is None else length
    writer.write(f'{method} {path} HTTP/1.1\r\nHost: x\r\ncontent-length: {size}\r\n\r\n'.encode() + body)
    head, _, value = (await asyncio.wait_for(reader.read(), 10)).partition(b'\r\n\r\n')
    writer.close()
    return int(head.split()[1]), value


async def conversation():
    server = await asyncio.start_server(Rendezvous().serve, '127.0.0.1', 0)
    port = server.sockets[0].getsockname()[1]
    answers = [await request(port, *words) for words in [
        ('GET', '/global/0'), ('PUT', '/global/0', b'\0\xff'), ('PUT', '/global/rank_0', b'x'), ('GET', '/global/0'),
        ('PUT', '/global/1', b''), ('DELETE', '/global/0'), ('GET', '/global/0'), ('DELETE', '/global/1'),
        ('GET', '/global/0'), ('POST', '/global/0'), ('GET', '/x'), ('PUT', '/a/b', b'', 1 << 30)]]
    server.close()
    return answers


def test_the_rendezvous_forgets_a_scope_when_all_ranks_are_through():
    ok, absent, bad = (200, b''), (404, b''), (400, b'')
    assert asyncio.run(conversation()) == [absent, ok, ok, (200, b'\0\xff'), ok, ok, (200, b'\0\xff'), ok, absent, bad,
                                           bad, bad]


def test_a_line_that_comes_in_pieces_is_one():
    """A crashing agent writes its report word by word."""
    pieces = ['  File "x.py", line 3', ' in ', '<module>\\nlast', ' words\\n']
    script = '; sleep 0.1; '.join(f"printf '{piece}' >&2" for piece in pieces)

    async def hear():
        command = Command(['sh', '-c', script])
        await asyncio.wait_for(command.silent, 10)
        await command.end(0)
        command.close()
        return command.lines, command.first_line(), command.last_line()
    assert asyncio.run(hear()) == (['  File "x.py", line 3 in <module>', 'last words', ''],
                                   'File "x.py", line 3 in <module>', 'last words')
