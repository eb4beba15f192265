"""Features and probes of a run, as typed."""
import numpy as np
import pytest
from PIL import Image
from support.images import noise
from support.running import ROOT
from support.tiny import TINY


@pytest.fixture
def run(mxsimmim):
    mxsimmim('pretrain', ROOT / 'conf' / 'base.yaml', *TINY, 'name=run', 'train.length=4', 'optim.warmup=1',
             'validation.pictures=0', 'checkpoint.every=4')
    return 'runs/run'


def test_features_and_probe(run, here, tmp_path):
    said = here('features', run, 'digits', '--block', 1).stdout
    assert said == 'features.npz: 1,797 x 16 after block 1 of 2, step 4, 10 classes\n'
    with np.load(tmp_path / 'features.npz') as saved:
        assert saved['features'].shape == (1797, 16) and saved['labels'].shape == (1797,)
    for name in ('some/a', 'some/b'):
        noise(tmp_path / name, 20)
    said = here('features', run, 'some', '-o', 'some.npz', '--picture', 'embedding.png').stdout
    assert said == 'some.npz: 40 x 16 after block 2 of 2, step 4, 2 classes\nembedding.png\n'
    assert Image.open(tmp_path / 'embedding.png').size[0] > 500

    probe = 'probe', run, 'data.labels_per_class=3', '--block', 'all', '--seeds', 2
    lines = here(*probe).stdout.splitlines()
    assert lines[0] == 'run, step 4: 30 training images (3 of each class, 2 draws), 180 held out, 10 classes'
    assert [line.split()[0] for line in lines[1:]] == ['block', '1', '2']
    assert all(10 < float(line.split()[1]) < 90 for line in lines[2:])  # even a hardly trained network beats chance
    assert here(*probe).stdout.splitlines() == lines  # from cached features

    (tmp_path / 'flat').mkdir()
    Image.new('RGB', (20, 20)).save(tmp_path / 'flat' / 'a.png')
    for arguments, status, complaint in (
            (('features', run, 'digits', '--block', 3), 1, '--block 3: this vit has blocks 1 to 2'),
            (('features', run, 'flat', '-o', 'none/f.npz'), 1, 'none/f.npz: cannot be written'),
            (('probe', run, 'data.path=flat'), 1, 'in no class folder'),
            (('probe', run, 'model.depth=3'), 2, "'model.depth=3': only data.… can be changed"),
            (('probe', run, 'data.labels_per_class=500'), 1, 'data.labels_per_class=500, but class')):
        errors = [line for line in here(*arguments, status=status).stderr.splitlines() if 'error' in line]
        assert errors[-1].startswith('mxsimmim: error: ') and complaint in errors[-1] and 'Traceback' not in str(errors)
