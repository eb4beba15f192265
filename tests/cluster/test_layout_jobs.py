"""Layouts over processes, hybrid ones above all: what they train is what one process trains."""
import sys

import pytest
from support import machine
from support.jobs import PROGRAMS
from support.running import rounds

pytestmark = [pytest.mark.unmeasured, machine.natively]


CASES = [
    (4, 'pretrain,finetune', 'pipeline=2 tensor=2 micro_batches=2'),
    (4, 'finetune,sharded', 'tensor=2'),
    (3, 'pretrain', 'pipeline=3 micro_batches=4'),
]
IN_SOAK = [
    (2, 'pretrain,finetune', 'pipeline=2 tensor=2 micro_batches=2 devices=2'),
    (4, 'finetune,sharded,fp16', 'tensor=2'),
    (4, 'pretrain,finetune', 'pipeline=4 micro_batches=4'),
    (4, 'pretrain,finetune,sharded,fp16', 'pipeline=2 tensor=2 micro_batches=2 devices=2'),  # of two replicas
    (4, 'finetune,sharded,fp16', 'pipeline=2 micro_batches=2'),
]


@pytest.mark.soak
@pytest.mark.parametrize('workers, cases, keys', rounds(CASES, CASES + IN_SOAK))
def test_weights_are_those_of_one_process(launcher, workers, cases, keys):
    """10 steps: weights, moments, averages, losses, evaluation; and who decodes images: no stage without need."""
    launcher.run('-n', workers, '--horovod', '--', sys.executable, '-W', 'ignore', PROGRAMS / 'layouts.py', cases,
                 *keys.split(), seconds=120)
