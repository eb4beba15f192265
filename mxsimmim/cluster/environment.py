"""Decide what each process of a job finds in its environment. Pure functions."""
from typing import Dict, List, Optional, Sequence

from mxsimmim.cluster.spec import HostInfo, JobSpec, Process, root, workers_beside

from ..runtime.process import CONTROL, FIRSTS

Environment = Dict[str, Optional[str]]  # None removes a variable

# What a process must not inherit from a shell that itself ran inside another job.
OTHER_JOBS = {'ps': ('HOROVOD_RANK', 'HOROVOD_SIZE', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'),
              'horovod': ('DMLC_ROLE',)}
# ps-lite takes a new buffer for each message, and glibc gives large ones back to the kernel at once: page faults were a
# seventh of what an exchange costs the CPU.
KEPT = {'MALLOC_MMAP_THRESHOLD_': str(1 << 30), 'MALLOC_TRIM_THRESHOLD_': str(1 << 32)}


def environments(spec: JobSpec, processes: Sequence[Process], infos: Sequence[HostInfo], port: int, control: str = '',
                 mpi: bool = False) -> List[Environment]:
    """Decide what each process finds in its environment beside what its host gives it.

    Args:
        infos: of the hosts, as `Process.host` counts them.
        port: of the scheduler, or of Horovod's rendezvous, on the host of the scheduler or of rank 0.
        control: address:port of the control plane, on the host of worker 0.
        mpi: whether Horovod's ranks speak MPI; else they speak Gloo.

    Raises:
        ValueError: a host has fewer GPUs than workers.
    """
    meeting = infos[root(processes).host].address
    result = []
    for process in processes:
        info, mates = infos[process.host], workers_beside(process, processes)
        environ: Environment = dict.fromkeys(OTHER_JOBS['horovod' if spec.horovod else 'ps'])
        environ[CONTROL] = control if process.role == 'worker' and control else None
        environ['PYTHONUNBUFFERED'] = '1'  # or rank 0's lines would arrive in blocks
        environ['PYTHONFAULTHANDLER'] = '1'  # any Python then names the line of a crash in native code
        environ['OMP_NUM_THREADS'] = str(max(1, info.cores // max(1, len(mates))))
        if spec.gpus:
            environ['CUDA_VISIBLE_DEVICES'] = ','.join(gpus_of(process, mates, info))
        if spec.horovod:
            environ.update(horovod_variables(process, processes, infos))
            if not mpi:
                environ.update(HOROVOD_CONTROLLER='gloo', HOROVOD_CPU_OPERATIONS='gloo',
                               HOROVOD_GLOO_IFACE=info.interface, HOROVOD_GLOO_RENDEZVOUS_PORT=str(port),
                               HOROVOD_GLOO_RENDEZVOUS_ADDR=meeting)
        else:
            environ.update(server_variables(spec, process, info.address), DMLC_PS_ROOT_URI=meeting,
                           DMLC_PS_ROOT_PORT=str(port))
        environ.update(spec.worker_variables if process.role == 'worker' else spec.server_variables)
        result.append(environ)
    return result


def server_variables(spec: JobSpec, process: Process, address: str) -> Environment:
    """Tell ps-lite who a process is, in a job with parameter servers; `address` is its host's."""
    environ: Environment = dict(DMLC_ROLE=process.role, DMLC_NUM_WORKER=str(spec.workers),
                                DMLC_NUM_SERVER=str(spec.servers), DMLC_NODE_HOST=address, **KEPT)
    if process.role != 'scheduler':
        environ[f'DMLC_{process.role.upper()}_ID'] = str(process.index)
    if spec.p3:
        environ['DMLC_PS_VAN_TYPE'] = 'p3'
    return environ


def horovod_variables(process: Process, workers: Sequence[Process], infos: Sequence[HostInfo]) -> Environment:
    """Tell Horovod which rank a process is: of all, on its host, and of those with the same number on their hosts."""
    local = {worker: workers_beside(worker, workers).index(worker) for worker in workers}
    across = [worker for worker in workers if local[worker] == local[process]]
    environ: Environment = {
        'HOROVOD_RANK': str(process.index), 'HOROVOD_SIZE': str(len(workers)),
        'HOROVOD_LOCAL_RANK': str(local[process]),
        'HOROVOD_LOCAL_SIZE': str(len(workers_beside(process, workers))),
        'HOROVOD_CROSS_RANK': str(across.index(process)), 'HOROVOD_CROSS_SIZE': str(len(across)),
        'HOROVOD_HOSTNAME': infos[process.host].name}
    environ[FIRSTS] = ','.join(str(worker.index) for worker in workers if local[worker] == 0)
    if infos[process.host].interface != 'lo':
        environ['NCCL_SOCKET_IFNAME'] = infos[process.host].interface
    return environ


def check_environment(spec: JobSpec) -> Environment:
    """Decide what worker 0 will find in its environment, as far as a check of its configuration depends on it."""
    environ: Environment = dict.fromkeys(OTHER_JOBS['horovod' if spec.horovod else 'ps'])
    if spec.horovod:
        environ.update(HOROVOD_RANK='0', HOROVOD_SIZE=str(spec.workers), HOROVOD_LOCAL_RANK='0',
                       HOROVOD_LOCAL_SIZE='1')
    else:
        environ.update(DMLC_ROLE='worker', DMLC_WORKER_ID='0', DMLC_NUM_WORKER=str(spec.workers),
                       DMLC_NUM_SERVER=str(spec.servers), DMLC_PS_VAN_TYPE='p3' if spec.p3 else None)
    return {**environ, **spec.worker_variables}


def gpus_of(process: Process, mates: Sequence[Process], info: HostInfo) -> Sequence[str]:
    """Choose the GPUs of its host that belong to a process: for workers an equal part each, for others none.

    Raises:
        ValueError: there are more workers than GPUs.
    """
    if process.role != 'worker':
        return []
    if len(info.gpus) < len(mates):
        raise ValueError(f'host {info.name} has {len(info.gpus)} GPUs for {len(mates)} workers: start fewer workers, '
                         'or leave out --devices gpu')
    each, number = len(info.gpus) // len(mates), mates.index(process)
    return info.gpus[number * each:(number + 1) * each]
