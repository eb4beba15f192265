"""What the launcher reads of Slurm's environment and gives to srun; tests/cluster/test_slurm.py has the real one."""
import os
import subprocess
import sys

import pytest
from support.screen import Screen

from mxsimmim.cluster import inspection
from mxsimmim.cluster.backends import slurm
from mxsimmim.cluster.backends.slurm import SlurmBackend
from mxsimmim.cluster.callback import own_addresses
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec
from mxsimmim.cluster.supervisor import Supervisor
from mxsimmim.runtime import environment

NODES = {'SLURM_JOB_NODELIST': 'a[1-2],b', 'SLURM_TASKS_PER_NODE': '2(x2),1'}
# Starts the agents of two hosts here, and says with which options.
SRUN = """#!/bin/sh
echo "$@" >> options; env | grep SLURM_ >> options
while [ "$1" != "${1#-}" ]; do shift; done
for host in a1 a2; do SLURMD_NODENAME=$host "$@" & done; wait
"""


def program(folder, name, text):
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, where scontrol and srun are those that a test writes, in an allocation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    program(tmp_path, 'scontrol', '#!/bin/sh\ntest "$*" = "show hostnames a[1-2],b" && printf "a1\\na2\\nb\\n"\n')
    for name, value in NODES.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize('text, counts', [('4', [4]), ('2(x3),1', [2, 2, 2, 1]), ('1,2(x2)', [1, 2, 2])])
def test_counts(text, counts):
    assert slurm.read_counts(text) == counts


def test_hosts_are_those_of_the_allocation(folder, monkeypatch):
    assert SlurmBackend().hosts(JobSpec(('x',), 1)) == [Host('a1', slots=2), Host('a2', slots=2), Host('b')]
    program(folder, 'scontrol', '#!/bin/sh\nexit 1\n')
    with pytest.raises(ValueError, match=r"'scontrol show hostnames a\[1-2\],b' does not say the hosts"):
        SlurmBackend().hosts(JobSpec(('x',), 1))
    with pytest.raises(ValueError, match='here is none .* begin the line with salloc'):
        slurm.allocated_hosts({})


@pytest.mark.parametrize('counts', [{}, {'SLURM_TASKS_PER_NODE': '2'}])
def test_a_step_that_has_not_all_hosts(counts):
    """As `srun --nodes=1 tools/launch.py` would be: without a word the job would leave out hosts."""
    with pytest.raises(ValueError, match=r'the allocation has 3 hosts \(a\[1-2\],b\), and SLURM_TASKS_PER_NODE=2? is '
                       'of [01]: start the launcher from'):
        slurm.allocated_hosts({'SLURM_JOB_NODELIST': NODES['SLURM_JOB_NODELIST'], **counts})


def job(script, workers):
    return JobSpec(('sh', '-c', script), workers, 1, directory=os.getcwd())


def test_one_srun_starts_an_agent_on_each_host_that_is_needed(folder, monkeypatch):
    program(folder, 'srun', SRUN)
    monkeypatch.setenv('SLURM_CPUS_PER_TASK', '3')  # of the batch script's tasks; an agent gets all of its host
    screen = Screen()
    if own_addresses('', True)[0].startswith('127.'):
        pytest.skip('needs a network')  # or the hosts could not reach each other
    monkeypatch.setattr(slurm, 'allocated_hosts', lambda _: [Host('a1'), Host('a2'), Host('b')])
    assert Supervisor(SlurmBackend(), screen).run(job('echo $DMLC_ROLE', 2)) == 0
    words = (folder / 'options').read_text()
    assert words.startswith('--overlap --ntasks-per-node=1 --mpi=none --export=ALL --nodes=2 --ntasks=2 '
                            '--nodelist=a1,a2 --cpu-bind=none --kill-on-bad-exit=1 --input=none ')
    assert 'SLURM_CPUS_PER_TASK' not in words and 'SLURM_JOB_NODELIST' in words
    assert [line.split(':')[0] for line in screen.lines[1:]] == ['a1', 'a2']


def test_what_srun_says_stands_for_all_hosts(folder, monkeypatch):
    monkeypatch.setattr(slurm, 'own_addresses', lambda *_: ['127.0.0.1'])
    program(folder, 'srun', '#!/bin/sh\necho "srun: error: Unable to create step: down" >&2\nexit 1\n')
    screen = Screen()
    with pytest.raises(ValueError) as error:
        Supervisor(SlurmBackend(), screen).run(job('true', 2))
    assert str(error.value) == 'srun: error: Unable to create step: down'
    monkeypatch.setenv('SLURM_RESTART_COUNT', '1')  # the first start of this launcher all the same
    with pytest.raises(ValueError, match='Unable to create step'):
        Supervisor(SlurmBackend(), screen).run(job('true', 2))


@pytest.mark.parametrize('heard, code, told', [
    ('slurmstepd-a2: error: execve(): /x: No such file or directory', 2, ''),
    ('', 2, f' ({sys.executable}: No such file or directory)'), ('', 13, f' ({sys.executable}: Permission denied)'),
    ('', 1, '')])
def test_a_host_without_python(folder, monkeypatch, heard, code, told):
    """srun may end before it hands on what the host has said of it."""
    monkeypatch.setattr(slurm, 'own_addresses', lambda *_: ['127.0.0.1'])
    end = f'srun: error: a2: task 1: Exited with exit code {code}'
    program(folder, 'srun', f'#!/bin/sh\nprintf "{heard}\n{end}\nsrun: Force Terminated StepId=1.0\n" >&2\nexit 1\n')
    with pytest.raises(ValueError) as error:
        Supervisor(SlurmBackend(), Screen()).run(job('true', 2))
    assert str(error.value).splitlines() == [*filter(None, [heard]), end + told]


def test_a_requeued_job_is_a_restarted_one(monkeypatch):
    assert SlurmBackend().restarts() == []
    monkeypatch.setenv('SLURM_RESTART_COUNT', '2')
    [(_, why)] = SlurmBackend().restarts()
    assert why == 'Slurm has requeued the job (SLURM_RESTART_COUNT=2)'


@pytest.mark.parametrize('given, cores', [('1', 1), ('', 4), ('9', 4)])
def test_cores_are_within_what_slurm_gives(given, cores, monkeypatch):
    monkeypatch.setattr(environment, 'cores', lambda: 4)
    assert inspection.cores({'SLURM_CPUS_ON_NODE': given}) == cores


def test_the_copy_goes_through_srun(folder):
    """By rsync, which adds the host and a command for that host's shell."""
    program(folder, 'srun', '#!/bin/sh\necho "$@" > options\nwhile [ "$1" != "${1#-}" ]; do shift; done\nexec "$@"\n')
    (folder / 'from').mkdir()
    (folder / 'from' / 'file').write_text('text')
    command = SlurmBackend().copy_command(Host('a1'), str(folder / 'the copy'))
    subprocess.run(command, cwd=folder / 'from', check=True, timeout=60)
    assert (folder / 'the copy' / 'file').read_text() == 'text'
    assert '--nodelist=a1 --unbuffered sh -c mkdir -p' in (folder / 'from' / 'options').read_text()

