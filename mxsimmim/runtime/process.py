"""Who this process is in its job, from what its launcher put into the environment. Standard library only."""
import json
import platform
from typing import Mapping, NamedTuple, Optional, Tuple, Union

# What each launcher calls rank, size, rank on its host, processes on that host.
HOROVOD = ('HOROVOD_RANK', 'HOROVOD_SIZE', 'HOROVOD_LOCAL_RANK', 'HOROVOD_LOCAL_SIZE')
MPI = ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_LOCAL_SIZE')
FIRSTS = 'MXSIMMIM_FIRST_RANKS'  # from our launcher: of Horovod's ranks, which go host by host, each host's first
CONTROL = 'MXSIMMIM_CONTROL'  # from our launcher: address:port where rank 0 serves the control plane
RESTARTS = 'MXSIMMIM_RESTARTS'  # from our launcher: [unix seconds, why] of each time it started the job again, JSON
WRITTEN = 'MXSIMMIM_WRITTEN'  # from our launcher, which may start it on other hosts: step of its newest checkpoint
SLURM = ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NTASKS_PER_NODE')


class ProcessInfo(NamedTuple):
    """A process's place. `transport` is how it reaches the others: 'ps', 'horovod', or None where it is alone.

    `firsts` are the first ranks of all hosts, ascending; `control` is where rank 0 serves the control plane. Both are
    empty where the launcher does not say.
    """
    role: str = 'worker'  # or 'server', 'scheduler'
    rank: int = 0
    size: int = 1  # workers in the job
    local_rank: int = 0
    local_size: int = 1
    servers: int = 0
    transport: Optional[str] = None
    p3: bool = False
    firsts: Tuple[int, ...] = ()
    control: str = ''
    restarts: Tuple[Tuple[float, str], ...] = ()  # when the launcher has started the job again, and why
    written: int = -1  # step of the newest checkpoint that the job has told its launcher of; -1: none, or unknown


ALONE = ProcessInfo()


def named(process: ProcessInfo) -> str:
    """What this process, whose place that is, calls itself to others: ``rank 3 on host``, ``server 0 on host``."""
    role = 'rank' if process.role == 'worker' else process.role
    return f'{role} {process.rank} on {platform.node()}'


def process_info(environ: Mapping[str, str]) -> ProcessInfo:
    """The place that the environment describes.

    DMLC_* (parameter servers) comes first, since such a job may have been started through mpirun or srun; then
    Horovod's own names, then those of Open MPI and Slurm, under which Horovod's ranks can be started directly.

    Raises:
        ValueError: a variable is missing or no number.
    """
    restarts = json.loads(environ.get(RESTARTS) or '[]')
    return _place(environ)._replace(restarts=tuple((when, why) for when, why in restarts),
                                    written=int(environ.get(WRITTEN) or -1))


def _place(environ: Mapping[str, str]) -> ProcessInfo:
    if environ.get('DMLC_ROLE'):
        return _servers(environ)
    # In a Slurm batch script, before srun, SLURM_PROCID is set though there is only one process.
    for names in (HOROVOD, MPI) + ((SLURM,) if 'SLURM_STEP_ID' in environ else ()):
        if names[0] in environ and _number(environ, names[1], 1) > 1:
            rank, size, local_rank, local_size = (_number(environ, name, default)
                                                  for name, default in zip(names, (0, 1, 0, 1)))
            firsts = tuple(map(int, filter(None, environ.get(FIRSTS, '').split(',')))) if names is HOROVOD else ()
            return ProcessInfo('worker', rank, size, local_rank, local_size, 0, 'horovod', firsts=firsts,
                         control=environ.get(CONTROL, '') if names is HOROVOD else '')
    return ALONE


def _servers(environ: Mapping[str, str]) -> ProcessInfo:
    role = environ['DMLC_ROLE']
    if role not in ('worker', 'server', 'scheduler'):
        raise ValueError(f'DMLC_ROLE={role} is not worker, server or scheduler: start the job with '
                         'tools/launch.py, which sets it')
    # ps-lite's own ranks change from start to start; the launcher's do not.
    rank = 0 if role == 'scheduler' else _number(environ, f'DMLC_{role.upper()}_ID')
    return ProcessInfo(role, rank, _number(environ, 'DMLC_NUM_WORKER'), servers=_number(environ, 'DMLC_NUM_SERVER'),
                 transport='ps', p3=environ.get('DMLC_PS_VAN_TYPE') == 'p3', control=environ.get(CONTROL, ''))


def _number(environ: Mapping[str, str], name: str, default: Union[int, str] = '') -> int:
    try:
        return int(environ.get(name, default))
    except ValueError:
        raise ValueError(f"the environment has {name}={environ.get(name, '')!r}, which must be a number: start the "
                         'job with tools/launch.py, which sets it') from None
