"""What a message says to do, done word for word: the command then works."""
import re
import shutil

import pytest
from support.images import noise
from support.running import ROOT
from support.tiny import TINY

from mxsimmim import cli
from mxsimmim.config import configfile

BASE = str(ROOT / 'conf' / 'base.yaml')
SHORT = [*TINY, 'train.length=4', 'optim.warmup=1', 'optim.milestones=[]', 'optim.schedule=constant', 'data.threads=1',
         'checkpoint.every=2', 'validation.every=4', 'validation.images=8']
PRETRAIN = ['pretrain', BASE, *SHORT]
FINETUNE = ['finetune', BASE, *SHORT, 'model.use_mean_pooling=true']
OLDER = 'runs/done/checkpoints/step-00000002'
SMALL = ['train.batch_size=2', 'train.length=2']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """runs/done, runs/classes; images flat, in class folders, and some that are broken."""
    made = tmp_path_factory.mktemp('advice')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setattr('mxsimmim.runtime.environment.prepare', lambda config: None)
        assert cli.main([*PRETRAIN, 'name=done']) == 0
        assert cli.main([*FINETUNE, 'name=classes', 'data.val_fraction=0']) == 0
    noise(made / 'few', 5)
    for number, path in enumerate(sorted(noise(made / 'broken', 20).iterdir())):
        path.write_bytes(path.read_bytes()[:60 if number % 2 else None])
    for name in '0123456789':
        noise(made / 'labelled' / name, 4)
    (made / 'file').write_text('')
    gone = made / 'runs' / 'gone'  # a run whose devices and images are not here
    shutil.copytree(made / 'runs' / 'classes', gone)
    config = (gone / 'config.yaml').read_text()
    (gone / 'config.yaml').write_text(config.replace('devices: auto', 'devices: [gpu(7)]').replace(
        'path: digits', 'path: /nowhere'))
    assert 'gpu(7)' in (gone / 'config.yaml').read_text() and '/nowhere' in (gone / 'config.yaml').read_text()
    return made


CASES = [
    # A command that fails, what it says to do, and the words that this adds; {1} is what the pattern's group found.
    ([*PRETRAIN, 'data.path='], r'add data.path=/images, or (data.path=digits)', ['{1}']),
    ([*PRETRAIN, 'data.path=none'], r'a RecordIO file \(.rec\), or (digits)', ['data.path={1}']),
    ([*PRETRAIN, 'data.path=none'], r'give a folder of images', ['data.path=broken', *SMALL]),
    ([*PRETRAIN, 'data.path=few', 'data.val_fraction=0'], r'lower train.batch_size to (\d+) at most',
     ['train.batch_size={1}']),
    ([*PRETRAIN, *SMALL, 'data.path=few', 'data.val_fraction=0.01'], r'change the fraction', ['data.val_fraction=0.4']),
    ([*PRETRAIN, *SMALL, 'data.path=few', 'data.val_fraction=0.01'], r'or set data.val_path', ['data.val_path=few']),
    ([*PRETRAIN, *SMALL, 'train.length=10', 'data.path=broken', 'data.val_fraction=0', 'data.max_broken=3'],
     r'raise data.max_broken', ['data.max_broken=20']),
    ([*PRETRAIN, 'data.val_path=broken', 'validation.images=20', 'data.max_broken=3'], r'raise data.max_broken',
     ['data.max_broken=20']),
    ([*PRETRAIN, 'optim.warmup=100'], r'for instance (optim.warmup=5%)', ['{1}']),
    ([*PRETRAIN, 'devices=[gpu(9)]'], r'write (devices=auto)', ['{1}']),
    ([*PRETRAIN, 'output=file'], r'set output=', ['output=elsewhere']),
    ([*PRETRAIN, 'data.worker_weights=[3,1]'], r'2 weights for 1 workers: one a worker', ['data.worker_weights=[1]']),
    ([*PRETRAIN, 'train.compression=2bit'], r'set (train.compression=none)', ['{1}']),
    ([*PRETRAIN, 'name=done', 'resume=none'], r'set name= for a new run', ['name=other']),
    ([*PRETRAIN, 'name=done', 'resume=none'], r'or (resume=auto)', ['{1}']),
    ([*PRETRAIN, 'name=done', 'seed=9'], r'set name= for a new run', ['name=other']),
    ([*PRETRAIN, 'name=done', 'seed=9', 'train.length=6'], r'or (resume=\S+) to go on from there', ['{1}']),
    ([*PRETRAIN, 'name=done', 'optim.type=sgd', 'train.ema=0.5', 'train.accumulate=2', 'train.length=6'],
     r'or (resume=\S+) to go on from there', ['{1}']),
    ([*PRETRAIN, 'name=done', 'model.depth=3'], r'set name= for a new run$', ['name=other']),
    ([*PRETRAIN, 'name=done', f'resume={OLDER}'], r'or (resume=auto) to go on here', ['{1}']),
    ([*PRETRAIN, 'name=done', f'resume={OLDER}'], r'set name= for a new run', ['name=other']),
    ([*FINETUNE, 'name=classes', 'data.val_fraction=0', '--eval'], r'set data.val_path or data.val_fraction',
     ['data.val_path=labelled']),
    ([*FINETUNE, 'name=classes', 'data.val_fraction=0', '--eval'], r'set data.val_path or (data.val_fraction)',
     ['{1}=0.2']),
    ([*FINETUNE, *SMALL, 'name=few', 'data.labels_per_class=400'], r'lower it', ['data.labels_per_class=100']),
    (['probe', 'runs/classes', 'data.path=labelled'], r'set data.val_path, or (data.val_fraction=0.2)', ['{1}']),
    (['probe', 'runs/done', 'data.path=labelled', 'data.val_fraction=0.5', 'seed=3'], r'only data.… can be changed',
     ['-seed=3']),
    (['features', 'runs/done', 'digits', '--block', '9'], r'without it: the last', ['---block', '-9']),
    (['features', 'runs/done', 'digits', '--block', 'all'], r'give its number', ['-all', '1']),
    (['reconstruct', 'runs/done', 'none.png'], r'give image files, or folders of images', ['-none.png', 'few']),
    (['predict', 'runs/classes', 'none.png'], r'give image files, or folders of images', ['-none.png', 'few']),
    (['predict', 'runs/done', 'few'], r'`mxsimmim (reconstruct)` shows', ['-predict', '-runs/done', '-few', '{1}',
                                                                         'runs/done', 'few']),
    (['reconstruct', 'runs/classes', 'few'], r'`mxsimmim (predict)` shows',
     ['-reconstruct', '-runs/classes', '-few', '{1}', 'runs/classes', 'few']),
    (['export', 'runs/done', 'out.xyz'], r'use (.pth) or', ['-out.xyz', 'out{1}']),
    (['export', 'runs/classes', 'out', '--int8', '--max-drop', '100', '--images', 'labelled'],
     r'is of (--format symbol): add that', ['--format', 'symbol']),
    (['export', 'runs/classes', 'out', '--int8', '--max-drop', '100', '--format', 'symbol'],
     r'name some with --images', ['--images', 'labelled']),
    (['export', 'runs/gone', 'out', '--int8', '--max-drop', '100', '--format', 'symbol'],
     r'name labelled images with --images', ['--images', 'labelled']),
]


def followed(words, added):
    """Words with others added; those that begin with - are taken out, but for options."""
    words = list(words)
    for word in added:
        if word.startswith('-') and word[1:] in words:
            words.remove(word[1:])
        else:
            words.append(word)
    return words


@pytest.mark.parametrize('words, advice, added', CASES,
                         ids=[f'{words[0]} {" ".join(words[-2:])}: {advice}' for words, advice, _ in CASES])
def test_following_it_helps(folder, tmp_path, monkeypatch, capfd, words, advice, added):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mxsimmim.runtime.environment.prepare', lambda config: None)
    assert cli.main(words) in (1, 2)
    said, = [line for line in capfd.readouterr().err.splitlines() if line.startswith('mxsimmim: error: ')]
    found = re.search(advice, said)
    assert found, said
    assert cli.main(followed(words, [word.format(said, *found.groups()) for word in added])) == 0, (
        said, capfd.readouterr().err)


def test_a_run_of_other_devices_is_of_use_here(folder, monkeypatch, capfd):
    """Commands that take no keys cannot be told others."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr('mxsimmim.runtime.environment.prepare', lambda config: None)
    assert cli.main(['predict', 'runs/gone', 'few']) == 0
    out, err = capfd.readouterr()
    assert out.count('few/') == 5 and 'gpu(7) asked for' in err and 'cpu(0) computes' in err and 'error' not in err
    cli.main(['predict', 'runs/classes', 'few'])
    assert capfd.readouterr().out == out


def test_an_import_that_could_not_be_saved_can_be_given_again(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mxsimmim.runtime.environment.prepare', lambda config: None)
    words = ['import', str(ROOT / 'tests' / 'data' / 'finetune_vit.pth'), 'runs/new', 'mask.patch_size=16']
    with pytest.MonkeyPatch.context() as patch:
        def full(*_):
            raise OSError(28, 'No space left on device')
        patch.setattr('mxsimmim.training.checkpoint.write_arrays', full)
        assert cli.main(words) == 1
    assert 'run the same command again' in capfd.readouterr().err
    assert cli.main(words) == 0


def test_keys_in_the_table_exist():
    known = set(configfile.known_keys())
    for words, _, added in CASES:
        for word in (*words, *added):
            key, equals, _ = word.partition('=')
            assert not equals or '{' in key or key.lstrip('-') in known, word
