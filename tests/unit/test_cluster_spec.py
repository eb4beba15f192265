"""What a job is, what of it runs where, and with which environment: pure functions, by tables."""
import pytest

from mxsimmim.cluster import environment
from mxsimmim.cluster.hostfile import Host, read_hostfile
from mxsimmim.cluster.spec import (
    HostInfo,
    JobSpec,
    Process,
    describe_placement,
    part_of_cores,
    place_processes,
    regroup,
    without,
)

TWO = [Host('a'), Host('b')]


def job(workers, servers=0, command=('x',), **changes):
    return JobSpec(command, workers, servers, **changes)


@pytest.mark.parametrize('line, host', [
    ('a', Host('a')), ('a:2222', Host('a', 2222)), ('a slots=4', Host('a', None, 4)),
    ('a:1 slots=02  # x', Host('a', 1, 2)), ('a slots = 4', Host('a', None, 4)), ('a\tslots= 4\t ', Host('a', None, 4)),
    ('a slots=2 max_slots=4', Host('a', None, 2, 4)), ('me@a max-slots=3', Host('me@a', None, 1, 3)),
    ('[::1]:22 max_slots = 8 slots = 8#x', Host('::1', 22, 8, 8)),
    ('10.0.0.1:65535', Host('10.0.0.1', 65535)), ('me@node-1.lab:22', Host('me@node-1.lab', 22)), ('::1', Host('::1')),
    ('[::1]', Host('::1')), ('[fe80::1%eth0]:22 slots=3', Host('fe80::1%eth0', 22, 3)),
    ('me@[::1]:22', Host('me@::1', 22)), ('fe80::1%eth0', Host('fe80::1%eth0'))])
def test_a_line_of_the_hostfile(line, host):
    assert read_hostfile(f'# hosts\n\n  {line}\r\n', 'hosts') == [host]


@pytest.mark.parametrize('line, part', [
    ('a b', "'b' after the host"), ('a slots=0', "'slots=0' after the host"), ('a slots=2 x', "'x' after"),
    ('a 4', "'4' after the host: only slots=N can stand there, N at least 1, and max_slots=N: write slots=4"),
    ('a slots=3 max_slots=2', 'slots=3 is more than max_slots=2'), ('a max_slots=x', "'max_slots=x' after"), ('a:0',
    'port 0 is not'), ('a:65536', 'port 65536 is not'),
    ('a:', "'a:' is not a host"),
    ('a:x', "'a:x' is not a host"), ('[::1', 'is not a host'), ('-oProxyCommand=x', 'is not a host'), ('a;b', 'is not'),
    ('-x@a', 'is not a host'), ('first', 'stands in line 1 already'), ('$(reboot)', 'is not a host')])
def test_a_bad_line_of_the_hostfile_is_named(line, part):
    with pytest.raises(ValueError) as error:
        read_hostfile(f'first\n# two\n{line}\nlast', 'my/hosts')
    assert str(error.value).startswith('my/hosts:3: ') and part in str(error.value)


def test_an_empty_hostfile():
    with pytest.raises(ValueError, match='^hosts: no host in it'):
        read_hostfile('# none\n\n', 'hosts')


@pytest.mark.parametrize('workers, slots, horovod, expected', [
    (1, [1], False, [0]), (5, [1], False, [0] * 5), (4, [1, 1, 1], False, [0, 1, 2, 0]), (3, [2, 1], False, [0, 1, 0]),
    (6, [2, 1], False, [0, 1, 0, 0, 1, 0]), (4, [1, 3], False, [0, 1, 1, 1]), (4, [1, 1, 1], True, [0, 0, 1, 2]),
    (6, [2, 1], True, [0, 0, 0, 0, 1, 1]), (1, [1, 5], False, [0])])
def test_workers_go_round_the_hosts_by_slots(workers, slots, horovod, expected):
    hosts = [Host(f'h{n}', None, slot) for n, slot in enumerate(slots)]
    placed = place_processes(job(workers, 0 if horovod else 3, horovod=horovod), hosts)
    assert [p for p in placed if p.role == 'worker'] == [Process('worker', n, host) for n, host in enumerate(expected)]
    others = [] if horovod else [('server', n, n % len(hosts)) for n in range(3)] + [('scheduler', 0, 0)]
    assert placed[workers:] == others


# Slots and max_slots of hosts a, b, …; workers, servers, least; those away; what is left: hosts, workers, servers.
@pytest.mark.parametrize('slots, asked, away, left', [
    ('1 1 1', (3, 2, 2), '', ('abc', 3, 2)), ('1 1 1', (3, 2, 0), 'c', None),
    ('1 1 1', (3, 3, 2), 'b', ('ac', 2, 2)), ('1 1 1', (3, 3, 3), 'b', None), ('1 1 1', (3, 3, 2), 'ab', None),
    ('1 1 1', (3, 1, 1), 'ab', ('c', 1, 1)), ('1 1 1', (3, 0, 1), 'a', ('bc', 2, 0)), ('1 1', (2, 1, 1), 'ab', None),
    # Others than those of the job may be away, and be of use: there are more slots than workers.
    ('1 1 1', (2, 2, 2), 'c', ('ab', 2, 2)), ('1 1 1', (2, 2, 2), 'a', ('bc', 2, 2)),
    ('4 4', (4, 4, 4), 'b', ('a', 4, 2)), ('4 4', (6, 1, 1), 'a', ('b', 4, 1)), ('2 1', (3, 1, 1), 'b', ('a', 2, 1)),
    # There are more workers than slots: each host keeps what it has.
    ('1 1 1', (6, 5, 1), 'b', ('ac', 4, 4)), ('1 1 1', (4, 1, 1), 'a', ('bc', 2, 1)),
    ('1 1 1', (4, 1, 1), 'c', ('ab', 3, 1)), ('2 1', (5, 1, 1), 'b', ('a', 3, 1)),
    ('1/3 1/1', (3, 1, 1), 'b', ('a', 2, 1)),
])
def test_what_is_left_of_a_job_while_hosts_are_away(slots, asked, away, left):
    hosts = tuple(Host(name, None, *map(int, words.split('/'))) for name, words in zip('abc', slots.split()))
    spec = job(*asked[:2], hosts=hosts, min_workers=asked[2])
    found = without(spec, {host for host in hosts if host.name in away})
    assert left == (found and (''.join(host.name for host in found.hosts), found.workers, found.servers))
    if found:  # and so it is placed, each host with its own workers
        before, after = (place_processes(each, each.hosts) for each in (spec, found))
        for number, host in enumerate(found.hosts):
            had, has = (sum((p.role, p.host) == ('worker', n) for p in placed)
                        for n, placed in ((hosts.index(host), before), (number, after)))
            assert had <= has <= max(host.slots, had)


# Slots of a, b, …; workers, least; numbers of workers that the command refuses; workers that are left without a.
@pytest.mark.parametrize('slots, asked, refused, left', [
    ('1 1 1', (3, 1), [], 2), ('1 1 1', (3, 1), [2], 1), ('1 1 1', (3, 2), [2], None), ('2 2 2', (6, 2), [], 4),
    ('2 2 2', (6, 2), [4], 3), ('2 2 2', (6, 2), [3, 4], 2), ('2 2 2', (6, 4), [4], None), ('1 2 2', (5, 1), [3], 4),
    ('1 1 1', (2, 2), [2], None)])
def test_no_number_of_workers_that_the_command_refuses(slots, asked, refused, left):
    """As two stages refuse three workers. The most of what is left are taken."""
    hosts = tuple(Host(name, None, int(slot)) for name, slot in zip('abc', slots.split()))
    found = without(job(asked[0], hosts=hosts, min_workers=asked[1]), {hosts[0]}, set(refused))
    assert (found and found.workers) == left
    if found:
        assert len(place_processes(found, found.hosts)) >= found.workers and found.hosts == hosts[1:]


@pytest.mark.parametrize('names, hosts', [('aaa', [0, 0, 0]), ('aba', [0, 1, 0]), ('bab', [0, 1, 0]),
                                          ('cab', [0, 1, 2])])
def test_hosts_that_others_have_chosen_are_numbered_as_they_come(names, hosts):
    processes = place_processes(job(2, 1), TWO)[:3]
    assert regroup(processes, names) == [process._replace(host=host) for process, host in zip(processes, hosts)]


INFOS = [HostInfo('a', '10.0.0.1', 'eth0', 8, ('0', '1', '2', '3')),
         HostInfo('b', '10.0.0.2', 'ib0', 3, ('4', '5', '6'))]


@pytest.mark.parametrize('spec, infos, lines', [
    (job(3, 1), INFOS,
     ['network: eth0, 10.0.0.1; ib0, 10.0.0.2', 'a: workers 0 2, server 0, scheduler', 'b: worker 1']),
    (job(3, horovod=True), [INFOS[0], INFOS[1]._replace(interface='eth0')],
     ['network: eth0, 10.0.0.1 10.0.0.2', 'a: workers 0 1', 'b: worker 2'])])
def test_what_runs_where_is_told(spec, infos, lines):
    assert describe_placement(infos, place_processes(spec, TWO)) == lines


def environments(spec, port=9000, **keys):
    return environment.environments(spec, place_processes(spec, TWO), INFOS, port, **keys)


def test_the_environment_of_parameter_servers():
    environs = environments(job(3, 2, p3=True, worker_variables={'A': 'w'}, server_variables={'A': 's'}),
                            control='10.0.0.1:9001')
    common = {'DMLC_PS_ROOT_URI': '10.0.0.1', 'DMLC_PS_ROOT_PORT': '9000', 'DMLC_NUM_WORKER': '3',
              'DMLC_NUM_SERVER': '2', 'DMLC_PS_VAN_TYPE': 'p3', 'PYTHONUNBUFFERED': '1', 'PYTHONFAULTHANDLER': '1',
              'HOROVOD_RANK': None, 'HOROVOD_SIZE': None, 'OMPI_COMM_WORLD_RANK': None, 'OMPI_COMM_WORLD_SIZE': None,
              **environment.KEPT}
    own = [('worker', 'DMLC_WORKER_ID', '0', 0, '4'), ('worker', 'DMLC_WORKER_ID', '1', 1, '3'),
           ('worker', 'DMLC_WORKER_ID', '2', 0, '4'), ('server', 'DMLC_SERVER_ID', '0', 0, '4'),
           ('server', 'DMLC_SERVER_ID', '1', 1, '3')]
    for environ, (role, name, index, host, threads) in zip(environs, own):
        assert environ == {**common, 'DMLC_ROLE': role, name: index, 'DMLC_NODE_HOST': INFOS[host].address,
                           'MXSIMMIM_CONTROL': '10.0.0.1:9001' if role == 'worker' else None,
                           'OMP_NUM_THREADS': threads, 'A': role[0]}
    assert environs[5] == {**common, 'DMLC_ROLE': 'scheduler', 'DMLC_NODE_HOST': '10.0.0.1', 'OMP_NUM_THREADS': '4',
                           'A': 's', 'MXSIMMIM_CONTROL': None}


def test_the_environment_of_horovod():
    spec = job(3, horovod=True, worker_variables={'OMP_NUM_THREADS': '7'})
    names = 'RANK', 'SIZE', 'LOCAL_RANK', 'LOCAL_SIZE', 'CROSS_RANK', 'CROSS_SIZE', 'HOSTNAME', 'GLOO_IFACE'
    table = [('0', '3', '0', '2', '0', '2', 'a', 'eth0'), ('1', '3', '1', '2', '0', '1', 'a', 'eth0'),
             ('2', '3', '0', '1', '1', '2', 'b', 'ib0')]
    for environ, row in zip(environments(spec, control='10.0.0.1:9001'), table):
        assert environ == {**{f'HOROVOD_{name}': value for name, value in zip(names, row)}, 'OMP_NUM_THREADS': '7',
                           'HOROVOD_CONTROLLER': 'gloo', 'HOROVOD_CPU_OPERATIONS': 'gloo', 'PYTHONUNBUFFERED': '1',
                           'PYTHONFAULTHANDLER': '1',
                           'HOROVOD_GLOO_RENDEZVOUS_ADDR': '10.0.0.1', 'HOROVOD_GLOO_RENDEZVOUS_PORT': '9000',
                           'NCCL_SOCKET_IFNAME': row[-1], 'DMLC_ROLE': None, 'MXSIMMIM_FIRST_RANKS': '0,2',
                           'MXSIMMIM_CONTROL': '10.0.0.1:9001'}
    by_mpi = environments(spec, mpi=True)[0]
    assert by_mpi['HOROVOD_RANK'] == '0' and not any('GLOO' in name or 'CONTROLLER' in name for name in by_mpi)


def test_gpus_are_divided_among_the_workers_of_a_host():
    environs = environments(job(3, 1, gpus=True))
    assert [environ['CUDA_VISIBLE_DEVICES'] for environ in environs] == ['0,1', '4,5,6', '2,3', '', '']
    with pytest.raises(ValueError, match='host b has 3 GPUs for 4 workers'):
        environments(job(8, 1, gpus=True))


def test_cores_are_divided_but_never_to_nothing():
    environs = environments(job(8, 1))
    assert [environ['OMP_NUM_THREADS'] for environ in environs] == ['2', '1'] * 4 + ['2', '2']


@pytest.mark.parametrize('horovod, expected', [
    (False, [(0, 2), (0, 1), (1, 2), (0, 1), (0, 1)]), (True, [(0, 2), (1, 2), (0, 1)])])
def test_workers_of_a_host_divide_its_cores(horovod, expected):
    processes = place_processes(job(3, 1, horovod=horovod), TWO)
    assert [part_of_cores(process, processes) for process in processes] == expected
