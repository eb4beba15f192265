"""Train on the nodes of a Ray from a driver or a notebook: by the launcher, as a process of its own."""
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import List, Sequence, Union

from mxsimmim.cluster.backends.ray import driver_environ
from mxsimmim.cluster.backends.ray_driver import ends_with
from mxsimmim.cluster.restarts import USAGE
from mxsimmim.config import configfile

LAUNCH = 'from mxsimmim.cluster.launch import main\nsys.exit(main(sys.argv[1:]))\n'
KEPT = 40  # last lines that the launcher says itself, or its command against its configuration


def run(config: Union[str, Path], *overrides: str, workers: int = 1, servers: int = 0, command: str = 'pretrain',
        options: Sequence[str] = ()) -> Path:
    """Train on the nodes of the Ray that this driver is connected to, else on that of this machine, and wait for it.

    What worker 0 prints, and what the launcher says, is printed here. An interrupt stops the job, which saves a
    checkpoint; so does the end of this process.

    Args:
        config: a configuration file, which all nodes see.
        overrides: ``key=value``, as on the command line.
        servers: of parameters; with none the workers are ranks of Horovod.
        command: ``pretrain`` or ``finetune``.
        options: more of the launcher's, such as ``['--devices', 'gpu']``.

    Returns:
        the folder of the run, on the node of worker 0, which is this one if the job takes it.

    Raises:
        ValueError: nothing was started.
        RuntimeError: the job has failed; the text is the launcher's summary.
    """
    loaded = configfile.load(config, overrides)
    words = ['--launcher', 'ray', '-n', str(workers), *(['-s', str(servers)] if servers else ['--horovod']),
             *connected(), *options, '--', 'mxsimmim', command, str(config), *overrides]
    job = subprocess.Popen([sys.executable, '-X', 'utf8', '-c', ends_with(os.getpid()) + LAUNCH, *words],
                           env=driver_environ(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, start_new_session=True, encoding='utf-8', errors='replace')
    assert job.stdout
    said: List[str] = []
    with job:
        while True:
            try:
                for line in job.stdout:
                    print(line, end='', flush=True)
                    said = [*said, line][-KEPT:] if line.startswith(('launch: ', 'mxsimmim')) else said
                break
            except KeyboardInterrupt:
                job.send_signal(signal.SIGINT)
    status = job.returncode
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status:
        text = ''.join(said) or f'{shlex.join(words)} ended with status {status}'
        raise (ValueError if status == USAGE else RuntimeError)(text.rstrip())
    return Path(loaded.output, loaded.name)


def connected() -> List[str]:
    """Build the option that names the Ray this process is connected to; empty if it is to none."""
    ray = sys.modules.get('ray')
    if not ray or not ray.is_initialized():
        return []
    return ['--address', ray.get_runtime_context().gcs_address]
