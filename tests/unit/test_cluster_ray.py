"""What the launcher chooses of a Ray's nodes, and what it says of it; tests/cluster/test_ray.py has a real one."""
import io
import json
import os
import subprocess
import sys

import pytest
from support.hosts import wait_for, words_of
from support.screen import Screen

from mxsimmim.cluster import inspection, options
from mxsimmim.cluster.backends import ray as backend, ray_driver
from mxsimmim.cluster.backends.ray import RayBackend, choose
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec
from mxsimmim.cluster.supervisor import Supervisor
from mxsimmim.runtime import environment

NODES = [dict(name='a', address='10.0.0.1', cpus=4, gpus=1), dict(name='b', address='10.0.0.2', cpus=8, gpus=4),
         dict(name='c', address='10.0.0.3', cpus=0, gpus=4)]
# Tells two nodes, and starts an agent for each of them here.
DRIVER = """
import json, os, subprocess, sys
from mxsimmim.cluster.callback import AGENT
if sys.argv[1] == 'nodes':
    sys.exit(print(json.dumps([dict(name=name, cpus=2, gpus=0) for name in ('a', 'b', 'c')])))
json.dump(sys.argv[2:], open('words', 'w'))
for agent in [subprocess.Popen(AGENT, env={**os.environ, sys.argv[5]: name}) for name in json.loads(sys.argv[4])]:
    agent.wait()
"""


def spec(workers, **keys):
    return JobSpec(('x',), workers, **keys)


def test_for_cpus_all_nodes_that_have_some():
    assert choose(spec(2), NODES) == [Host('a', slots=4), Host('b', slots=8)]
    with pytest.raises(ValueError, match='13 workers need a CPU each, and of these Ray has free: a 4, b 8, c 0: start'):
        choose(spec(13), NODES)


@pytest.mark.parametrize('workers, names', [(1, 'b'), (4, 'b'), (5, 'ab')])
def test_for_gpus_as_few_nodes_as_it_needs(workers, names):
    assert ''.join(host.name for host in choose(spec(workers, gpus=True), NODES)) == names


def test_no_gpu_is_free_where_no_cpu_is():
    with pytest.raises(ValueError, match='6 workers need a GPU each, .* free: a 1, b 4, c 4 without a CPU: start'):
        choose(spec(6, gpus=True), NODES)


def test_a_bundle_is_all_free_cpus_or_a_gpu_a_worker_with_its_part_of_them():
    nodes = {node['name']: node for node in NODES}
    assert ray_driver.bundles_of(nodes, {'a': 2, 'b': 1}, False) == [
        {'CPU': 4, 'node:10.0.0.1': 0.001}, {'CPU': 8, 'node:10.0.0.2': 0.001}]
    assert ray_driver.bundles_of(nodes, {'b': 3, 'a': 0}, True) == [
        {'CPU': 6, 'GPU': 3, 'node:10.0.0.2': 0.001}, {'CPU': 1, 'node:10.0.0.1': 0.001}]  # a: a server alone
    assert ray_driver.bundles_of({'a': {**nodes['a'], 'cpus': 1}}, {'a': 2}, False) == [
        {'CPU': 2, 'node:10.0.0.1': 0.001}]  # another job has taken some: it waits for them
    with pytest.raises(ValueError, match='d has left Ray'):
        ray_driver.bundles_of(nodes, {'d': 1}, False)


class Ray:
    """Of two nodes on one machine and a third that is dead."""

    def nodes(self):
        return [dict(NodeID=f'{n}2345678', Alive=n < 2, NodeManagerHostname='pc', NodeManagerAddress='127.0.0.1',
                     NodeManagerPort=1) for n in range(3)]

    def get_runtime_context(self):
        return self

    def get_node_id(self):
        return '12345678'


def test_nodes_of_one_machine_have_names_of_their_own(monkeypatch):
    monkeypatch.setattr(ray_driver, 'answers', lambda node: True)
    monkeypatch.setitem(sys.modules, 'ray._private', State)
    monkeypatch.setitem(sys.modules, 'ray', Ray())
    first, second = ray_driver.nodes_of(Ray())
    assert (first['name'], first['own'], first['cpus']) == ('pc-123456', True, 3)
    assert (second['name'], second['own'], second['cpus']) == ('pc-023456', False, 0)


class State:
    """Of what is free on them."""
    class state:
        @staticmethod
        def available_resources_per_node():
            return {'12345678': {'CPU': 3.5, 'memory': 1e9}}


class Calls:
    """Of calls of actors, each of which ends by an error."""
    class exceptions:
        class RayError(Exception):
            pass

        class RayActorError(RayError):
            pass

        class OutOfMemoryError(RayError):  # as the real one is, also of an actor
            pass

    def wait(self, calls, timeout):
        return calls[:1], calls[1:]

    def get(self, call):
        raise call


@pytest.mark.parametrize('kind', ['RayActorError', 'OutOfMemoryError'])
def test_the_first_actor_that_ends_is_told_of(kind, monkeypatch):
    monkeypatch.setattr(ray_driver, 'launcher_is_gone', lambda: False)
    monkeypatch.setattr(ray_driver.os, 'close', lambda number: None)
    said, lines = io.StringIO(), []
    monkeypatch.setattr(said, 'close', lambda: lines.append(said.getvalue()))
    monkeypatch.setattr(sys, 'stderr', said)
    make = getattr(Calls.exceptions, kind)
    ray_driver.wait(Calls(), {make('low on memory'): ('b', None)})
    assert lines == ['the actor on b has ended: low on memory\n']


@pytest.mark.parametrize('text, line', [
    ('The actor died unexpectedly before finishing this task.\n\tclass_name: Place\nThe actor is dead because its '
     'worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a '
     'connection error code 2. End of file. Some common causes include: (1) …',
     'Worker unexpectedly exits with a connection error code 2. End of file'),
    ('The actor 4f24 is unavailable: The actor is temporarily unavailable: RpcError: RPC error: Socket closed '
     'rpc_code: 1',
     'The actor is temporarily unavailable: RpcError: RPC error: Socket closed')])
def test_what_ray_says_of_an_actor_is_a_line(text, line):
    assert ray_driver.reason(text) == line


@pytest.mark.parametrize('address, given, said', [
    ('127.0.0.1:1', '', r'no Ray answers at 127\.0\.0\.1:1 \(.*refused\): start it with ray start --head'),
    ('auto', 'http://h:8265', r"'http://h:8265' is no address of a Ray \(RAY_ADDRESS\): write HOST:PORT"),
    ('ray://h:10001', '', r"'ray://h:10001' is no address of a Ray \(--address\)")])
def test_addresses_that_cannot_be(address, given, said, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', Ray())
    monkeypatch.setenv('RAY_ADDRESS', given)
    with pytest.raises(ValueError, match=said):
        ray_driver.connect(address)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ValueError, match=r"the package ray, in the cluster's version: pip install 'mxsimmim\[ray\]'"):
        ray_driver.connect('auto')


@pytest.mark.parametrize('code, said', [
    ("print('no Ray answers', file=sys.stderr); sys.exit(2)", '^no Ray answers$'),
    ("print('[1 C 2] client.cc: no socket', file=sys.stderr); sys.exit(1)",
     r"the Ray at 'h:1' cannot be used from this machine, which must be one of its nodes: .* \(client.cc: no socket\)"),
    ('time.sleep(60)', "what is at 'h:1' does not tell the nodes of a Ray within 1 s")])
def test_a_ray_that_does_not_tell_its_nodes(code, said, monkeypatch):
    monkeypatch.setattr(backend, 'DRIVER', (sys.executable, '-c', f'import sys, time; {code}'))
    monkeypatch.setattr(backend, 'ANSWER', 1.0)
    with pytest.raises(ValueError, match=said):
        backend.nodes_of('h:1')


def test_one_driver_starts_an_agent_on_each_node_that_is_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'driver.py').write_text(DRIVER)
    monkeypatch.setattr(backend, 'DRIVER', (sys.executable, str(tmp_path / 'driver.py')))
    monkeypatch.setattr(backend, 'own_addresses', lambda *_: ['127.0.0.1'])
    with pytest.raises(ValueError, match='host b: other hosts cannot reach it at 127.0.0.1'):
        Supervisor(RayBackend(), Screen()).run(JobSpec(('true',), 2, 1, directory=os.getcwd(), address='h:1'))
    assert json.loads((tmp_path / 'words').read_text()) == ['h:1', 'cpu', '{"a": 1, "b": 1}', 'MXSIMMIM_NODE']


PARENT = """
import os, subprocess, sys
from mxsimmim.cluster.backends.ray_driver import ends_with
code = ends_with(os.getpid()) + 'import time; print(1, flush=True); time.sleep(60)'
child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_program_ends_with_its_parent():
    child = subprocess.run([sys.executable, '-c', PARENT], stdout=subprocess.PIPE, timeout=60).stdout.decode().strip()
    wait_for(lambda: not words_of(int(child)), 'it has ended')  # of one that nobody has collected there are no words


@pytest.mark.parametrize('words, said', [
    ('-n 2 -H h --launcher ray x', 'takes its hosts from Ray: leave out -H'),
    ('-n 2 --launcher ray --min-workers 1 x', 'Ray knows which of its nodes are there'),
    ('-n 2 --launcher ray --sync-dst-dir /d x', 'ray job submit --working-dir'),
    ('-n 2 --launcher slurm --address h:1 x', '--address is for --launcher ray')])
def test_options_that_cannot_be(words, said):
    with pytest.raises(ValueError, match=said):
        options.parse(words.split())


def test_options():
    given = options.parse('-n 2 --launcher ray --p3 x'.split())
    assert (options.job_spec(given).address, options.job_spec(given).p3) == ('auto', True)
    assert options.job_spec(options.parse('-n 2 --launcher ray --address h:1 x'.split())).address == 'h:1'
    assert options.job_spec(options.parse('-n 2 x'.split())).address == ''


def test_cores_are_within_what_ray_gives(monkeypatch):
    monkeypatch.setattr(environment, 'cores', lambda: 4)
    assert inspection.cores({'MXSIMMIM_CORES': '2', 'SLURM_CPUS_ON_NODE': '3'}) == 2
