"""Segmentation that is gone on with: the weights and the evaluation are those of one run."""
import json
import shutil
import subprocess

import pytest
from support.jobs import newest, same
from support.running import BASE, command
from support.tiny import SEGMENTER

pytestmark = pytest.mark.unmeasured

COMMAND = command('finetune', BASE)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The run, whole."""
    made = tmp_path_factory.mktemp('alone')
    subprocess.run(COMMAND + SEGMENTER + ['name=alone'], cwd=made, check=True, timeout=120)
    return made / 'runs' / 'alone'


def test_resuming_is_exact(alone, tmp_path):
    """From step 4 of 8: the same bits. A picture of each validation is there, and the evaluation of the last."""
    shutil.copytree(alone, tmp_path / 'alone')
    shutil.rmtree(tmp_path / 'alone' / 'checkpoints' / 'step-00000008')
    subprocess.run(COMMAND + SEGMENTER + ['name=alone', f'output={tmp_path}'], check=True, timeout=120)
    (step, ours), (last, expected) = newest(tmp_path / 'alone'), newest(alone)
    assert step == last == 8
    same(ours, expected)
    assert [path.name for path in sorted((alone / 'pictures').iterdir())] == ['prediction-00000008.png']
    values = json.loads((alone / 'evaluation.json').read_text())
    assert values['images'] == 50 and 0 < values['miou'] < values['pixel_accuracy'] < 1
