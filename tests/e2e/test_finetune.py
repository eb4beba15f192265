"""Fine-tuning as a user runs it: from what, how it goes on, when it ends, what it keeps, what it refuses."""
import json
import shutil
import signal
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.images import noise
from support.running import BASE, DEADLINE, ROOT, command, last_step, metrics, wait_for, weights
from support.tiny import TINY

from mxsimmim import cli

FINETUNE = [*TINY, 'model.use_mean_pooling=true', 'name=run', 'optim.base_lr=1e-2', 'optim.layer_decay=0.75',
            'train.length=40', 'train.ema=0.8', 'train.lr_on_plateau=0.5', 'train.patience=1', 'validation.every=5',
            'checkpoint.every=5', 'data.val_fraction=0.2']


def rows(run, name):
    return {row['step']: row for row in metrics(run) if name in row}


def state(run, folder='checkpoints'):
    return json.loads((sorted((run / folder).glob('step-*'))[-1] / 'state.json').read_text())['state']


def first_best(run):
    """(step, val_top1) of the highest, the first of equals."""
    validations = rows(run, 'val_top1')
    step = max(validations, key=lambda step: (validations[step]['val_top1'], -step))
    return step, validations[step]['val_top1']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A pre-training run, the same as .pth, and a whole fine-tuning run from it: runs/pre, pre.pth, runs/run."""
    made = tmp_path_factory.mktemp('finetune')
    for words in (['pretrain', BASE, *TINY, 'name=pre', 'train.length=20'], ['export', 'runs/pre', 'pre.pth'],
                  ['finetune', BASE, *FINETUNE, 'model.pretrained=runs/pre']):
        subprocess.run(command(*words), cwd=made, check=True, timeout=DEADLINE)
    return made


@pytest.fixture
def whole(folder, tmp_path):
    """Copies of these in the folder of the test; the run is uninterrupted."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return folder / 'runs' / 'run'


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """Commands in this process find MXNet imported, with whatever threads other tests gave it."""
    monkeypatch.setattr('mxsimmim.runtime.environment.prepare', lambda config: None)


def test_what_a_run_leaves(whole):
    text = (whole / 'logs' / 'rank-0.log').read_text()
    assert 'encoder from runs/pre/checkpoints/step-00000020; new: fc_norm.weight, fc_norm.bias, head.weight' in text
    assert '1,438 training images' in text and '359 held-out images' in text
    assert list(rows(whole, 'val_top1')) == list(range(5, 41, 5))
    step, top1 = first_best(whole)
    assert [path.name for path in (whole / 'best').iterdir()] == [f'step-{step:08d}']
    assert f'best: {top1:.2f} % at step {step}, kept in runs/run/best' in text
    assert state(whole)['progress']['best'] == top1 and state(whole, 'best')['progress']['best'] == top1
    assert state(whole)['classes'] == list('0123456789')
    assert set(weights(whole)) == {'weights.safetensors', 'optimizer.safetensors', 'ema.safetensors'}
    last, evaluation = rows(whole, 'val_top1')[40], json.loads((whole / 'evaluation.json').read_text())
    assert evaluation.pop('images') == 359 and evaluation.pop('val_images_per_second') > 0
    assert evaluation == {name: last[name] for name in evaluation}


def test_the_rate_falls_where_validations_do_not_improve(whole):
    """Logged rates are the schedule's, constant after the warm-up, times 0.5 for each validation without a best."""
    best, factor, factors = -1.0, 1.0, {}
    for step, row in rows(whole, 'val_top1').items():
        best, factor = (row['val_top1'], factor) if row['val_top1'] > best else (best, factor / 2)
        factors[step] = factor
    assert state(whole)['progress']['factor'] == factor < 1
    for step, row in rows(whole, 'loss').items():
        if step > 6:
            assert row['lr'] == pytest.approx(1e-2 * 32 / 512 * factors.get((step - 1) // 5 * 5, 1), rel=1e-9)


def test_from_a_file(whole, mxsimmim, tmp_path):
    """Bit by bit what the run itself gives."""
    text = mxsimmim('finetune', BASE, *FINETUNE, 'name=other', 'model.pretrained=pre.pth').stderr
    assert 'encoder from pre.pth; new: fc_norm.weight, fc_norm.bias, head.weight, head.bias' in text
    other = tmp_path / 'runs' / 'other'
    assert weights(other) == weights(whole) and weights(other, 'best') == weights(whole, 'best')
    assert metrics(other) == metrics(whole)


def test_a_signal_changes_nothing(whole, start, mxsimmim, tmp_path):
    """Neither weights, their average, moments and the best checkpoint, nor what is known of the progress."""
    run = tmp_path / 'runs' / 'run'
    shutil.rmtree(run)
    options = [*FINETUNE, 'model.pretrained=runs/pre', 'checkpoint.every=1000']
    process = start('finetune', BASE, *options)
    assert wait_for(process, lambda: last_step(run) >= 12)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == 143 and 'stopped by signal 15: step' in text
    shutil.rmtree(tmp_path / 'runs' / 'pre')  # is of no use any more
    text = mxsimmim('finetune', BASE, *options).stderr
    assert 'going on from runs/run/checkpoints/step-000000' in text and 'encoder from' not in text
    assert weights(run) == weights(whole) and weights(run, 'best') == weights(whole, 'best')
    assert metrics(run) == metrics(whole) and state(run)['progress'] == state(whole)['progress']


@pytest.mark.parametrize('words', [[], ['devices=[cpu(0),cpu(1)]', 'parallel.pipeline=2']], ids=['one', 'pipeline'])
def test_evaluation_alone(whole, mxsimmim, tmp_path, words):
    """Of the best checkpoint, which load_run hands out: the numbers that were measured when it was saved."""
    before = weights(tmp_path / 'runs' / 'run')
    text = mxsimmim('finetune', BASE, *FINETUNE, *words, '--eval').stdout
    step, top1 = first_best(whole)
    assert f'runs/run, step {step}\ntop-1 {top1:.2f} %, ' in text and 'of 359 images' in text
    found = json.loads((tmp_path / 'runs' / 'run' / 'evaluation.json').read_text())
    row = rows(whole, 'val_top1')[step]
    assert {name: found[name] for name in found if name in row} == pytest.approx(
        {name: row[name] for name in row if name in found}, rel=1e-6 if words else 0, abs=0)
    assert set(found) == {'images', 'val_top1', 'val_top5', 'val_loss', 'val_ece', 'val_images_per_second'}
    assert weights(tmp_path / 'runs' / 'run') == before and metrics(tmp_path / 'runs' / 'run') == metrics(whole)


def test_it_stops_early_once(here, tmp_path):
    """A rate too small to move anything: the first validation stays the best, and the third without one ends it."""
    options = [*FINETUNE, 'optim.base_lr=1e-12', 'optim.warmup=0', 'train.stop_early=3', 'train.ema=0']
    text = here('finetune', BASE, *options).stderr
    run = tmp_path / 'runs' / 'run'
    assert list(rows(run, 'val_top1')) == [5, 10, 15, 20] and first_best(run)[0] == 5
    assert 'stopped: 3 validations without a new best (train.stop_early)' in text and 'at step 5, kept in' in text
    rate = 1e-12 * 32 / 512
    assert [row['lr'] for row in rows(run, 'loss').values()] == pytest.approx(
        [rate] * 3 + [rate / 2] * 2 + [rate / 4], rel=1e-9, abs=0)  # at steps 3, 6, 9; 12, 15; 18
    before = weights(run), weights(run, 'best'), metrics(run)
    text = here('finetune', BASE, *options).stderr
    assert 'stopped: 3 validations without a new best (train.stop_early)' in text
    assert (weights(run), weights(run, 'best'), metrics(run)) == before


def test_an_average_can_begin_in_another_run(whole, tmp_path, monkeypatch):
    """From the weights of a checkpoint that has none."""
    monkeypatch.chdir(tmp_path)
    options = [*FINETUNE, 'train.length=2', 'optim.warmup=0', 'optim.base_lr=1e-12']
    assert cli.main(['finetune', str(BASE), *options, 'name=a', 'train.ema=0']) == 0
    assert cli.main(['finetune', str(BASE), *options, 'name=b', 'train.ema=0.5', 'train.length=4',
                     'resume=runs/a/checkpoints/step-00000002']) == 0
    own, average = (load_file(tmp_path / 'runs' / 'b' / 'checkpoints' / 'step-00000004' / f'{name}.safetensors')
                    for name in ('weights', 'ema'))
    assert all(np.allclose(average[name], own[name], atol=1e-7) for name in own)


def test_a_probe_may_have_few_labels(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['probe', 'runs/pre', 'data.labels_per_class=10', '--seeds', '1']) == 0
    assert '100 training images (10 of each class, 1 draws)' in capsys.readouterr().out


@pytest.fixture
def folders(whole, tmp_path):
    """Class folders in various states, a table of labels that lacks an image."""
    for name in ('train/cat', 'train/dog', 'val/cat', 'val/bird', 'gap/cat', 'flat'):
        noise(tmp_path / name, 20)
    (tmp_path / 'gap' / 'dog').mkdir()
    (tmp_path / 'labels.csv').write_text(''.join(f'{number:03d}.png,{number % 2}\n' for number in range(19)))
    (tmp_path / 'names.txt').write_text('\n'.join(['0', '1', '2', 'three', '4', '5', '6', '7', '8', '9']))


@pytest.mark.parametrize('options, complaint', [
    (['data.path=train', 'data.val_path=val'], 'val/bird is not one of the 2 classes cat, dog: rename or remove'),
    (['data.path=train', 'data.val_path=flat'], 'or name their classes in a file, data.val_labels'),
    (['data.path=gap'], 'class folder gap/dog has no images: add some or remove the folder'),
    (['data.path=flat', 'data.labels=labels.csv'],
     '1 of the 20 images in flat have no line in labels.csv, the first is 019.png'),
    (['model.pretrained=runs/pre', 'model.embed_dim=24', 'name=wide'],
     'model.pretrained=runs/pre/checkpoints/step-00000020: these weights do not fit the network: cls_token has shape '
     '(1, 1, 16), the network needs (1, 1, 24); '),
    (['model.pretrained=runs/none', 'name=other'], 'runs/none'),
    (['name=none', '--eval'], 'runs/none is not the folder of a run'),
    (['name=pre', '--eval'], 'runs/pre has 0 classes, the data here have 10'),
    (['--eval', 'data.path=train'], "runs/run has 10 classes, the data here have 2, and class 0 is '0' there, 'cat' "
                                    'here: give data of its classes'),
    (['--eval', 'data.val_fraction=0'], '--eval needs held-out images: set data.val_path or data.val_fraction'),
    (['--eval', 'model.img_size=32'], 'runs/run was trained with model.img_size=16, here it is 32'),
    (['data.classes=names.txt'],
     "step-00000040 has 10 classes, the data here have 10, and class 3 is '3' there, 'three' here: give data of its "
     'classes, or set name= for a new run'),
    (['data.classes=names.txt', 'resume=runs/run/checkpoints/step-00000035', 'name=other'],
     "class 3 is '3' there, 'three' here: give data of its classes, or start from its encoder by model.pretrained="),
    (['resume=runs/pre/checkpoints/step-00000020', 'name=other'],
     'runs/pre/checkpoints/step-00000020 has 0 classes, the data here have 10, and class 0 is missing there'),
])
def test_bad_input(folders, tmp_path, monkeypatch, capfd, options, complaint):
    """One line each, in this process, which has imported MXNet already."""
    monkeypatch.chdir(tmp_path)
    before = weights(tmp_path / 'runs' / 'run')
    assert cli.main(['finetune', str(BASE), *FINETUNE, *options]) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith('mxsimmim: error: ')]
    assert len(errors) == 1 and complaint in errors[0], errors
    assert weights(tmp_path / 'runs' / 'run') == before


def test_a_flat_validation_folder(folders, tmp_path, monkeypatch, capfd):
    """With a list of its classes it is measured as in class folders, in training and by --eval."""
    monkeypatch.chdir(tmp_path)
    for number in range(20):
        place = tmp_path / 'inside' / ('dog' if number % 3 else 'cat') / f'{number:03d}.png'
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / 'flat' / f'{number:03d}.png', place)
    (tmp_path / 'map.txt').write_text(''.join(f'{number:03d}.png\t{int(number % 3 > 0)}\n' for number in range(20)))
    ways = {'inside': ['data.val_path=inside'], 'map': ['data.val_path=flat', 'data.val_labels=map.txt']}
    said = {}
    for name, keys in ways.items():
        words = ['finetune', str(BASE), *FINETUNE, 'data.path=train', f'name={name}', 'train.length=5', *keys]
        assert cli.main([*words, 'optim.warmup=1', 'optim.milestones=[3]']) == 0
        capfd.readouterr()
        assert cli.main([*words, '--eval']) == 0
        said[name] = [line for line in capfd.readouterr().out.splitlines() if line.startswith(('cat', 'dog'))]
    assert said['map'] == said['inside'] and len(said['map']) == 2
    # The same files in another order, and summed in that.
    first, second = (rows(tmp_path / 'runs' / name, 'val_top1')[5] for name in ways)
    assert first['val_top1'] == second['val_top1'] and first['val_loss'] == pytest.approx(second['val_loss'], rel=1e-6)


@pytest.mark.parametrize('words, status, complaint', [
    (['finetune', BASE, *FINETUNE, 'data.path=gap'], 1, 'class folder gap/dog has no images'),
    (['pretrain', ROOT / 'conf' / 'finetune_digits.yaml'], 2, 'optim.layer_decay is for fine-tuning: mxsimmim finetun'),
])
def test_bad_input_to_the_command(folders, mxsimmim, words, status, complaint):
    text = mxsimmim(*words, status=status).stderr
    assert text.startswith('mxsimmim: error: ') and complaint in text and text.count('\n') == 1
