"""Who a process is, from what each launcher leaves in the environment."""
import pytest

from mxsimmim.runtime.process import ALONE, ProcessInfo, process_info

PS = {'DMLC_ROLE': 'worker', 'DMLC_WORKER_ID': '2', 'DMLC_NUM_WORKER': '4', 'DMLC_NUM_SERVER': '3'}
HOROVOD = {'HOROVOD_RANK': '1', 'HOROVOD_SIZE': '4', 'HOROVOD_LOCAL_RANK': '1', 'HOROVOD_LOCAL_SIZE': '2'}
MPI = {'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_LOCAL_RANK': '0',
       'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}


@pytest.mark.parametrize('environ, expected', [
    ({}, ALONE),
    (PS, ProcessInfo('worker', 2, 4, servers=3, transport='ps')),
    (dict(PS, DMLC_PS_VAN_TYPE='p3'), ProcessInfo('worker', 2, 4, servers=3, transport='ps', p3=True)),
    (dict(PS, DMLC_ROLE='server', DMLC_SERVER_ID='1'), ProcessInfo('server', 1, 4, servers=3, transport='ps')),
    (dict(PS, DMLC_ROLE='scheduler'), ProcessInfo('scheduler', 0, 4, servers=3, transport='ps')),
    (HOROVOD, ProcessInfo('worker', 1, 4, 1, 2, transport='horovod')),
    (dict(HOROVOD, MXSIMMIM_FIRST_RANKS='0,2'), ProcessInfo('worker', 1, 4, 1, 2, transport='horovod', firsts=(0, 2))),
    (dict(HOROVOD, MXSIMMIM_RESTARTS='[[1.5, "why"]]', MXSIMMIM_WRITTEN='20'),
     ProcessInfo('worker', 1, 4, 1, 2, transport='horovod', restarts=((1.5, 'why'),), written=20)),
    (dict(HOROVOD, **MPI), ProcessInfo('worker', 1, 4, 1, 2, transport='horovod')),
    (dict(MPI, MXSIMMIM_FIRST_RANKS='0,2'), ProcessInfo('worker', 3, 4, transport='horovod')),
    (dict(MPI, **PS), ProcessInfo('worker', 2, 4, servers=3, transport='ps')),
    ({'HOROVOD_RANK': '0', 'HOROVOD_SIZE': '1'}, ALONE),
    ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '8'}, ALONE),  # a batch script, before srun
    ({'SLURM_PROCID': '5', 'SLURM_NTASKS': '8', 'SLURM_STEP_ID': '0', 'SLURM_LOCALID': '1',
      'SLURM_NTASKS_PER_NODE': '4'}, ProcessInfo('worker', 5, 8, 1, 4, transport='horovod')),
])
def test_process_info(environ, expected):
    assert process_info(environ) == expected


@pytest.mark.parametrize('environ, message', [
    (dict(PS, DMLC_ROLE='boss'), 'DMLC_ROLE=boss'),
    (dict(PS, DMLC_WORKER_ID='x'), "DMLC_WORKER_ID='x'"),
    ({k: v for k, v in PS.items() if k != 'DMLC_WORKER_ID'}, 'DMLC_WORKER_ID.*tools/launch.py'),
])
def test_what_makes_no_sense_is_named(environ, message):
    with pytest.raises(ValueError, match=message):
        process_info(environ)
