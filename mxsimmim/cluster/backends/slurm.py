"""Run a job in an allocation of Slurm: one `srun` starts an agent on each host, and they call the launcher back.

srun hands its environment on, so that the key is on no command line.
"""
import errno
import os
import re
import subprocess
import sys
import time
from types import MappingProxyType
from typing import List, Mapping, Sequence, Tuple

from mxsimmim.cluster.backends.base import Backend
from mxsimmim.cluster.backends.ssh import rsync
from mxsimmim.cluster.callback import AGENT, own_addresses, start_all, why_none_came
from mxsimmim.cluster.connections import AgentConnection
from mxsimmim.cluster.hostfile import Host
from mxsimmim.cluster.spec import JobSpec

# Each host's agent gets all that the job has there, however its tasks were asked for: it divides that itself.
STEP = ('--overlap', '--ntasks-per-node=1', '--mpi=none', '--export=ALL')
SHAPE = re.compile('S(LURM|RUN)_(CPUS_PER_TASK|EXACT|EXCLUSIVE|GPU_BIND|GPUS_PER_TASK|MEM_PER_\\w+|NTASKS_PER_\\w+|'
                   'THREADS_PER_CORE|TRES_PER_TASK)')  # what else srun would take from a batch script's environment
PLACE = 'SLURMD_NODENAME'
# How a task ends whose program cannot be started, by the number of the error: no agent that runs ends so.
UNSTARTED = re.compile(f'srun: error: .*: Exited with exit code ({errno.ENOENT}|{errno.EACCES})')


class SlurmBackend(Backend):
    """Have srun start an agent on each host of the allocation that the launcher runs in."""
    grace = 90.0  # of the 120 s that --signal=B:TERM@120 gives; scancel gives less, and enforces that itself
    other_python = 'start this launcher with'
    refuses = MappingProxyType({
        'hostfile': '--launcher slurm takes its hosts from the allocation: leave out -H, and ask salloc or sbatch for '
                    'them (--nodes, --nodelist)',
        'min_workers': '--min-workers leaves out hosts that do not answer, and one srun starts all of them or none: '
                       'leave it out, and let Slurm start the job on other hosts (sbatch --requeue)'})

    def hosts(self, spec: JobSpec) -> Sequence[Host]:
        return allocated_hosts(os.environ)

    def start_agents(self, spec: JobSpec, agents: Sequence[AgentConnection]) -> None:
        names = [agent.host.name for agent in agents]
        command = [*step(','.join(names), len(names)), '--cpu-bind=none', '--kill-on-bad-exit=1', '--input=none',
                   *AGENT]
        start_all(command, own_addresses(spec.interface, True), PLACE, {agent.host.name: agent for agent in agents},
                  {name: value for name, value in os.environ.items() if not SHAPE.fullmatch(name)})

    def why_none_came(self, agents: Sequence[AgentConnection]) -> List[str]:
        said = why_none_came(agents)
        lines = [line for line in said if not line.startswith('srun: ') or 'error: ' in line] or said
        if any('execve()' in line for line in lines):
            return lines
        # srun may drop what tasks said, when it ends the step.
        return [UNSTARTED.sub(lambda found: f'{found[0]} ({sys.executable}: {os.strerror(int(found[1]))})', line)
                for line in lines]

    def copy_command(self, host: Host, directory: str) -> List[str]:
        run = ' '.join(step('"$host"', 1)) + ' --unbuffered'  # or what is no whole line would wait for the next
        return rsync(['sh', '-c', f"'host=$1; shift; exec {run} sh -c \"$*\"'", 'sh'], host.name, directory)

    def restarts(self) -> Sequence[Tuple[float, str]]:
        count = int(os.environ.get('SLURM_RESTART_COUNT') or 0)
        return [(round(time.time(), 3), f'Slurm has requeued the job (SLURM_RESTART_COUNT={count})')] if count else []


def allocated_hosts(environ: Mapping[str, str]) -> List[Host]:
    """List the hosts of the allocation that this process runs in, in Slurm's order, with its tasks a host as slots.

    Raises:
        ValueError: there is no allocation, or no Slurm, or a step of srun that has not all hosts.
    """
    nodes = environ.get('SLURM_JOB_NODELIST')
    if not nodes:
        raise ValueError('--launcher slurm takes its hosts from an allocation, and here is none (no '
                         'SLURM_JOB_NODELIST): begin the line with salloc -N 2, or write it into a script for sbatch')
    try:
        names = subprocess.run(['scontrol', 'show', 'hostnames', nodes], stdout=subprocess.PIPE, check=True,
                               universal_newlines=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"'scontrol show hostnames {nodes}' does not say the hosts of the allocation ({error}): "
                         'install the commands of Slurm on this machine') from None
    counts = read_counts(environ.get('SLURM_TASKS_PER_NODE', ''))
    if len(counts) != len(names):
        raise ValueError(f'the allocation has {len(names)} hosts ({nodes}), and SLURM_TASKS_PER_NODE='
                         f'{environ.get("SLURM_TASKS_PER_NODE", "")} is of {len(counts)}: start the launcher from the '
                         'script of sbatch or the shell of salloc, not by srun')
    return [Host(name, slots=slots) for name, slots in zip(names, counts)]


def read_counts(text: str) -> List[int]:
    """Read Slurm's numbers of tasks, a host each: ``2(x3),1`` are 2, 2, 2 and 1."""
    return [int(count) for count, times in re.findall(r'(\d+)(?:\(x(\d+)\))?', text) for _ in range(int(times or 1))]


def step(nodelist: str, count: int) -> List[str]:
    """Build the words of the srun that starts a command once on each of these hosts, so many."""
    return ['srun', *STEP, f'--nodes={count}', f'--ntasks={count}', f'--nodelist={nodelist}']
