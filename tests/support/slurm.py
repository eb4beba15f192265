"""A real Slurm on the hosts that the tests make: its controller and munge on this machine, a slurmd on each host."""
import contextlib
import os
import platform
import re
import shutil
import subprocess
from typing import Dict, List

from .hosts import PATH, Hosts, run, wait_for
from .programs import free_port

PROGRAMS = ('slurmctld', 'slurmd', 'srun', 'sbatch', 'munged')
CORES = 4  # that Slurm believes each host to have


def why_not() -> str:
    """Why this machine cannot have a Slurm; empty where it can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    return f'needs {", ".join(absent)} (Debian: slurmctld, slurmd, slurm-client, munge)' if absent else ''


class Slurm:
    """Slurm of `hosts`, from the call of `start` to that of `stop`."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.folder = hosts, hosts.folder / 'slurm'
        self.started: List[subprocess.Popen] = []
        self.daemons: Dict[int, subprocess.Popen] = {}  # the slurmd of each host
        self.environ = dict(hosts.environ, SLURM_CONF=str(self.folder / 'slurm.conf'))  # of who gives it jobs
        for name in [name for name in self.environ if re.match('SLURM_(?!CONF)|SBATCH_|SALLOC_|SRUN_', name)]:
            del self.environ[name]

    def start(self) -> 'Slurm':
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        self.folder.mkdir()
        self._configure()
        key = self.folder / 'munge.key'
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._begin('munged', '--foreground', '--force', f'--key-file={key}', f'--socket={self.folder}/munge',
                    f'--pid-file={self.folder}/munged.pid', f'--log-file={self.folder}/munged.log',
                    f'--seed-file={self.folder}/munged.seed')
        wait_for((self.folder / 'munge').exists, 'munge answers')
        self._begin('slurmctld', '-D', '-f', self.folder / 'slurm.conf')
        for n in range(self.hosts.count):
            self.boot(n)
        wait_for(lambda: self.idle() == self.hosts.count, 'all nodes are idle')

    def stop(self) -> None:
        for process in reversed(self.started):
            process.kill()
            process.wait()

    def _configure(self) -> None:
        nodes = ''.join(f'NodeName={name} NodeAddr={self.hosts.address(n)} CPUs={CORES} RealMemory=1000 '
                        f'Gres=gpu:2\n' for n, name in enumerate(self.hosts.names))
        machine, address = platform.node().partition('.')[0], f'10.77.{self.hosts.subnet}.9'
        (self.folder / 'slurm.conf').write_text(
            f'ClusterName=tests\nSlurmctldHost={machine}({address})\nSlurmctldPort={free_port()}\nSlurmUser=root\n'
            f'SlurmdUser=root\nAuthType=auth/munge\nAuthInfo=socket={self.folder}/munge,cred_expire=5\n'
            # As by proctrack/cgroup, tasks are told to end, and not what they start.
            'ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nMpiDefault=none\nSelectType=select/cons_tres\n'
            'SelectTypeParameters=CR_Core\nReturnToService=2\nSlurmdParameters=config_overrides\nGresTypes=gpu\n'
            'SlurmdTimeout=60\nKillWait=5\nMessageTimeout=5\nSchedulerParameters=sched_interval=1\n'
            f'StateSaveLocation={self.folder}/state\nSlurmdSpoolDir={self.folder}/%n\n'
            f'SlurmctldPidFile={self.folder}/slurmctld.pid\nSlurmdPidFile={self.folder}/%n.pid\n'
            f'SlurmctldLogFile={self.folder}/slurmctld.log\nSlurmdLogFile={self.folder}/%n.log\n'
            f'{nodes}PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n')
        (self.folder / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n')
        (self.folder / 'gres.conf').write_text('Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n')

    def _begin(self, *words: object) -> subprocess.Popen:
        with open(self.folder / 'said', 'ab') as said:
            self.started.append(subprocess.Popen(list(map(str, words)), stdin=subprocess.DEVNULL, stdout=said,
                                                 stderr=said, start_new_session=True, env=dict(self.environ)))
        return self.started[-1]

    def boot(self, n: int) -> None:
        """Starts the slurmd of a host."""
        self.daemons[n] = self._begin(*self.hosts.inside(n), 'slurmd', '-D', '-f', self.folder / 'slurm.conf')

    def idle(self) -> int:
        """How many nodes can take a job."""
        with contextlib.suppress(RuntimeError):
            return int(self.ask('sinfo', '-h', '-t', 'idle', '-o', '%D') or 0)
        return 0

    def ask(self, *words: object) -> str:
        """Output of a command of Slurm's."""
        return run('env', f'SLURM_CONF={self.folder}/slurm.conf', *words).strip()
