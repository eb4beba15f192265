"""What people type for the launcher who know others: hostfiles and options of mpirun, torchrun, horovodrun."""
import pytest

from mxsimmim.cluster import options
from mxsimmim.cluster.backends import ssh
from mxsimmim.cluster.hostfile import Host, read_hostfile
from mxsimmim.cluster.spec import JobSpec, place_processes


def test_no_more_workers_than_a_host_takes():
    hosts = [Host('a', None, 1, 2), Host('b')]
    assert [p.host for p in place_processes(JobSpec(('x',), 4, horovod=True), hosts)] == [0, 0, 1, 1]
    with pytest.raises(ValueError) as error:
        place_processes(JobSpec(('x',), 5, horovod=True), hosts)
    assert str(error.value) == ('5 workers are 3 for host a, which takes max_slots=2: start fewer, add hosts, or '
                                'raise it')


@pytest.mark.parametrize('content, hosts', [
    (b'\xef\xbb\xbfa slots=2\r\nb\r\n', [Host('a', None, 2), Host('b')]), (b'a\t# x\n\n\tb', [Host('a'), Host('b')])])
def test_a_hostfile_of_another_editor(content, hosts, tmp_path, monkeypatch):
    (tmp_path / 'hosts').write_bytes(content)
    monkeypatch.setenv('HOME', str(tmp_path))
    for words in (['-H=~/hosts'], ['-H~/hosts'], ['--hostfile=~/hosts'], ['-H', '~/hosts']):
        given = options.parse(['-n', '1', *words, 'x'])
        assert read_hostfile(options.contents(given.hostfile), 'hosts') == hosts


@pytest.mark.parametrize('name, complaint', [
    ('a:2,b:2', ": write the hosts into a file, one a line, as in 'a slots=2', and give its name"),
    ('none', 'No such file or directory)'), ('/dev/zero', '(larger than 256 KiB)'), ('/', '(Is a directory)')])
def test_what_is_no_hostfile(name, complaint):
    with pytest.raises(ValueError) as error:
        options.contents(name)
    assert str(error.value).startswith(f"hostfile '{name}' cannot be read (") and str(error.value).endswith(complaint)


@pytest.mark.parametrize('words, line', [
    ('-np 4 x', "no option '-np': write -n N, the workers"), ('-np4 x', "no option '-np': write -n N, the workers"),
    ('--num-proc=4 x', "no option '--num-proc': write -n N, the workers"),
    ('--nproc_per_node=4 x', "no option '--nproc_per_node': write -n N, the workers on all hosts together, and slots=N "
     'after a host in the file'), ('-n 2 -hostfile h x', "no option '-hostfile': write -H FILE"),
    ('-n 2 --machinefile h x', "no option '--machinefile': write -H FILE"),
    ('-n 2 -x PATH x', "no option '-x': write --env NAME, or --env NAME=VALUE"),
    ('-n 2 --master_port 1 x', "no option '--master_port': leave it out: one launcher starts all hosts, and finds "
     'where they meet')])
def test_options_of_other_launchers(words, line):
    with pytest.raises(ValueError) as error:
        options.parse(words.split())
    assert str(error.value) == line


def test_none_of_their_options_is_ours():
    assert not set(options.FOREIGN) & {name for names, _ in options.OPTIONS for name in names}


def test_a_port_that_looks_like_a_number_of_processes():
    said = 'ssh: connect to host a port 4: Connection refused'
    assert ssh.explain(Host('a', 4), said).endswith('The hostfile takes host:port; for 4 workers write a slots=4)')
    assert ssh.explain(Host('a', 22), said).endswith('The hostfile takes host:port)')
