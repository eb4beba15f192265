"""Detection shared among processes, and gone on with: the weights and the evaluation are those of one process."""
import json
import shutil
import subprocess

import numpy as np
import pytest
from support.jobs import SERVERS, newest, recorded, same, vector
from support.running import BASE, command, rounds
from support.tiny import DETECTOR

pytestmark = pytest.mark.unmeasured

COMMAND = command('finetune', BASE)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """The run of one process, whole."""
    made = tmp_path_factory.mktemp('alone')
    subprocess.run(COMMAND + DETECTOR + ['name=alone'], cwd=made, check=True, timeout=120)
    return made / 'runs' / 'alone'


CASES = [(SERVERS, []), (['-n', 3, '--horovod'], ['data.worker_weights=[3,2,1]']),
         (['-n', 3, '-s', 1], ['train.accumulate=2']), (SERVERS, ['devices=[cpu(0),cpu(1)]'])]


@pytest.mark.soak
@pytest.mark.parametrize('launch, keys', CASES[:rounds(2, len(CASES))])
def test_weights_are_those_of_one_process(launcher, alone, launch, keys):
    """4 steps: weights to 1e-5 in the L2 norm, losses, and what is found in 10 evaluated images."""
    launcher.run(*launch, '--', *COMMAND, *DETECTOR, *keys, 'name=many')
    many, expected = launcher.folder / 'runs' / 'many', vector(alone, 4)
    assert np.linalg.norm(vector(many, 4) - expected) / np.linalg.norm(expected) < 1e-5
    np.testing.assert_allclose(recorded(many, 'loss'), recorded(alone, 'loss'), rtol=1e-5)
    for name in ('val_box_ap', 'val_mask_ap50'):
        np.testing.assert_allclose(recorded(many, name), recorded(alone, name), rtol=1e-3, atol=1e-4)


def test_resuming_is_exact(alone, tmp_path):
    """From step 2 of 4: the same bits. A picture of each validation is there, and the evaluation of the last."""
    shutil.copytree(alone, tmp_path / 'alone')
    shutil.rmtree(tmp_path / 'alone' / 'checkpoints' / 'step-00000004')
    subprocess.run(COMMAND + DETECTOR + ['name=alone', f'output={tmp_path}'], check=True, timeout=120)
    (step, ours), (last, expected) = newest(tmp_path / 'alone'), newest(alone)
    assert step == last == 4
    same(ours, expected)
    assert [path.name for path in sorted((alone / 'pictures').iterdir())] == ['prediction-00000004.png']
    values = json.loads((alone / 'evaluation.json').read_text())
    assert values['images'] == 10 and 0 <= values['box_ap'] <= values['box_ap50'] < 1
