"""Layouts over processes, hybrid ones above all: what they train is what one process trains."""
import sys

import pytest
from support import machine
from support.hosts import three_hosts
from support.jobs import PROGRAMS
from support.running import DEADLINE, rounds

pytestmark = [pytest.mark.unmeasured, machine.natively]

LAYOUTS = ['--', sys.executable, '-W', 'ignore', PROGRAMS / 'layouts.py']
CASES = [  # workers, the first rank of each host, cases, keys
    (4, '0,1', 'pretrain,finetune', 'pipeline=2 tensor=2 micro_batches=2'),  # ranks 0 and 3, 1 and 2 are together
    (4, '0,1', 'finetune,sharded,2bit', 'tensor=2'),  # rank 3 is with 0
    (3, '0', 'pretrain', 'pipeline=3 micro_batches=4'),
]
IN_SOAK = [
    (2, '0', 'pretrain,finetune', 'pipeline=2 tensor=2 micro_batches=2 devices=2'),
    (4, '0,1', 'finetune,sharded,fp16', 'tensor=2'),
    (4, '0', 'pretrain,finetune', 'pipeline=2 tensor=2 micro_batches=2'),
    (4, '0', 'pretrain,finetune', 'pipeline=4 micro_batches=4'),
    (4, '0', 'pretrain,finetune,sharded,fp16,2bit', 'pipeline=2 tensor=2 micro_batches=2 devices=2'),  # of two replicas
    (4, '0', 'finetune,sharded,fp16,2bit', 'pipeline=2 micro_batches=2'),
    (4, '0', 'finetune,sharded,fp16,2bit', 'tensor=2'),
    # A neighbour on the same host. The reference's clipping of accumulated parts depends on how three divide a batch.
    (6, '0,2,5', 'finetune', 'pipeline=2 micro_batches=1'),
]
HOSTS = [  # slots of each, cases, keys
    ((2, 2, 2), 'finetune', 'pipeline=2 micro_batches=1'),  # of a stage's workers two are on one host, one on another
    ((3, 3, 2), 'pretrain', 'pipeline=2 micro_batches=1'),
    ((1, 1), 'pretrain', 'tensor=2'),
    ((1, 3), 'pretrain', 'pipeline=2 micro_batches=2'),
    ((1, 3), 'pretrain', 'pipeline=2 tensor=2 micro_batches=2'),
    ((1, 3), 'pretrain', 'pipeline=4 micro_batches=4'),
]


@pytest.mark.soak
@pytest.mark.parametrize('workers, firsts, cases, keys', rounds(CASES, CASES + IN_SOAK))
def test_weights_are_those_of_one_process(launcher, workers, firsts, cases, keys):
    """10 steps: weights, moments, averages, losses, evaluation; and who decodes images: no stage without need."""
    launcher.run('-n', workers, '--horovod', '--env', f'MXSIMMIM_FIRST_RANKS={firsts}', *LAYOUTS, cases, *keys.split(),
                 seconds=120)


@pytest.mark.soak
@pytest.mark.parametrize('slots, cases, keys', HOSTS[:rounds(1, len(HOSTS))])
def test_layouts_over_hosts(launcher, tmp_path, slots, cases, keys):
    with three_hosts(tmp_path / 'hosts') as hosts:
        (tmp_path / 'hostfile').write_text('\n'.join(f'host{i} slots={count}' for i, count in enumerate(slots)))
        launcher.run('-n', sum(slots), '-H', tmp_path / 'hostfile', '--horovod', *LAYOUTS, cases, *keys.split(),
                     env=hosts.environ, seconds=DEADLINE)
