"""What users get wrong, each with its message and a status that is not zero. Keys are in unit/test_config.py."""
import numpy as np
import pytest
from PIL import Image
from support.images import noise
from support.running import BASE
from support.tiny import TINY


@pytest.fixture
def prepared(tmp_path):
    noise(tmp_path / 'few', 5)
    noise(tmp_path / 'many', 60)
    for number in range(20):
        (tmp_path / 'many' / f'{number:03d}.png').write_bytes(b'\x89PNG broken')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.txt').write_text('hello')
    (tmp_path / 'cut.rec').write_bytes(b'\x0a\x23\xd7\xce\xff\xff\x00\x00abc')
    (tmp_path / 'file').write_text('')


@pytest.mark.parametrize('options, status, complaint', [
    (['data.path='], 2, "key 'data.path' is not set: add data.path=/images, or data.path=digits"),
    (['data.path=missing'], 1, 'missing'),
    (['data.path=empty'], 1, 'empty'),
    (['data.path=text.txt'], 1, 'text.txt'),
    (['data.path=cut.rec'], 1, 'cut.rec'),
    (['data.path=few', 'data.val_fraction=0'], 1,
     'a batch of 32 images cannot be filled from 5: lower train.batch_size'),
    (['data.path=few', 'train.batch_size=2', 'data.val_path=missing'], 1, 'missing'),
    (['data.path=few', 'train.batch_size=2', 'data.val_fraction=0.01'], 1, 'val_fraction'),
    (['data.path=many', 'data.max_broken=3'], 1, 'more than data.max_broken=3'),
    (['devices=[gpu(9)]'], 1, 'gpu(9) asked for, but MXNet sees'),
    (['output=file'], 1, 'set output= or name='),
    (['optim.warmup=100'], 2, 'optim.warmup=100 steps is longer than train.length=60 steps: shorten the warm-up'),
    (['optim.warmup=3 epochs'], 1, 'optim.warmup=3 epochs is 150 steps, longer than the 60 of train.length=60 steps'),
    (['optim.base_lr=1e30', 'optim.warmup=0', 'train.max_bad_steps=4', 'optim.clip_grad=null'], 1,
     'was not finite in 4 steps in a row (train.max_bad_steps=4)'),
    (['train.lenght=3'], 2, "unknown key 'train.lenght' (did you mean 'train.length'?)"),
])
def test_pretrain(prepared, here, options, status, complaint):
    result = here('pretrain', BASE, *TINY, 'name=run', *options, status=status)
    errors = [line for line in result.stderr.splitlines() if line.startswith('mxsimmim: error: ')]
    assert len(errors) == 1 and complaint in errors[0], result.stderr
    assert 'Traceback' not in result.stderr


def test_bad_steps_name_their_samples(here, tmp_path):
    text = here('pretrain', BASE, *TINY, 'optim.base_lr=1e30', 'optim.warmup=0', 'train.max_bad_steps=2',
                'optim.clip_grad=null', 'train.batch_size=4', status=1).stderr
    assert 'learning rate 7.8125e+27' in text and text.count('digits#') >= 4
    text = here('pretrain', BASE, *TINY, 'optim.base_lr=1e30', 'optim.warmup=0', 'train.max_bad_steps=2',
                'optim.clip_grad=null', 'name=many', status=1).stderr
    assert 'and 24 more, all in runs/many/bad-samples.txt' in text
    assert len((tmp_path / 'runs' / 'many' / 'bad-samples.txt').read_text().split()) == 32


def test_broken_images_are_named_counted_and_replaced(prepared, mxsimmim, tmp_path):
    text = mxsimmim('pretrain', BASE, *TINY, 'name=run', 'data.path=many', 'train.length=4', 'data.max_broken=20',
                    'optim.warmup=1', 'data.val_fraction=0').stderr
    assert all(f'{number:03d}.png' in text for number in range(20))
    assert 'broken_images 20' in text


@pytest.mark.parametrize('arguments, status, complaint', [
    (['pretrain', 'nowhere.yaml'], 2, 'nowhere.yaml: cannot read the configuration'),
    (['pretrain'], 2, 'the following arguments are required: CONFIG'),
    (['pretend', 'x'], 2, 'invalid choice'),
    (['plot', 'nowhere'], 1, 'nowhere/metrics.jsonl: no such file'),
    (['reconstruct', 'nowhere', 'few'], 1, 'nowhere is not the folder of a run'),
    ([], 2, 'required: COMMAND'),
])
def test_other_commands(prepared, mxsimmim, arguments, status, complaint):
    result = mxsimmim(*arguments, status=status)
    assert complaint in result.stderr and 'Traceback' not in result.stderr


def test_reconstruct(prepared, mxsimmim, here, tmp_path):
    (tmp_path / 'few' / 'x.heic').touch()
    shown = mxsimmim('pretrain', BASE, *TINY, 'name=run', 'data.path=few', 'train.batch_size=2',
                     'data.val_fraction=0.4', 'train.length=2', 'optim.warmup=1', 'validation.pictures=0').stderr
    for text in (shown, (tmp_path / 'runs' / 'run' / 'logs' / 'rank-0.log').read_text()):
        assert text.count('few: 1 other file left out: .heic (1)\n') == 1
    here('reconstruct', 'runs/run', 'few', '-o', 'out.png')
    picture = np.asarray(Image.open(tmp_path / 'out.png'))
    assert picture.ndim == 3 and min(picture.shape[:2]) > 96
    (tmp_path / 'few' / 'broken.png').write_bytes(b'\x89PNG broken')
    (tmp_path / 'few' / 'gone.jpg').symlink_to('nowhere')
    told = mxsimmim('reconstruct', 'runs/run', 'missing.png', 'few', '-o', 'rest.png', status=1).stderr
    errors = [line for line in told.splitlines() if line.startswith('mxsimmim: error: ')]
    named = [error[len('mxsimmim: error: '):].split()[0] for error in errors]
    assert named == ['missing.png', 'few/broken.png:', 'few/gone.jpg:', 'rest.png']
    assert 'max_broken' not in told and '1 other file left out: .heic (1)' in told
    assert (np.asarray(Image.open(tmp_path / 'rest.png')) == picture).all()  # of the five that can be read
    assert 'broken.png: not an image' in here('reconstruct', 'runs/run', 'few/broken.png', status=1).stderr
    assert not (tmp_path / 'grid.png').exists()
    for name in ('broken.png', 'gone.jpg'):
        (tmp_path / 'few' / name).unlink()
    for arguments, complaint in ((['missing.png'], 'missing.png'), (['empty'], 'empty'),
                                 (['few'] * 700, '3,500 images make a picture that no viewer opens: give at'),
                                 (['few', '-o', 'nowhere/out.png'], 'nowhere/out.png: cannot write the picture')):
        assert complaint in here('reconstruct', 'runs/run', *arguments, status=1).stderr
    (tmp_path / 'none' / 'checkpoints').mkdir(parents=True)
    (tmp_path / 'none' / 'config.yaml').write_bytes((tmp_path / 'runs' / 'run' / 'config.yaml').read_bytes())
    assert 'none has no checkpoint yet' in here('reconstruct', 'none', 'few', status=1).stderr
