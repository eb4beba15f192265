"""`--check`: what it says of a good run and of each part that is not, and that it leaves nothing."""
import re
import shutil
import subprocess
import sys

import pytest
from support.images import noise
from support.running import BASE, ROOT, metrics, weights
from support.tiny import TINY

from mxsimmim.config import configfile

PARTS = ['devices', 'data', 'schedule', 'model', 'forward', 'memory', 'places']


def parts(text):
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def files(folder):
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob('*')}


def test_a_good_run(mxsimmim, tmp_path):
    result = mxsimmim('pretrain', BASE, *TINY, 'name=run', '--check')
    said = parts(result.stdout)
    assert [name for name in said if name != 'all'] == PARTS and result.stderr == ''
    assert said['data'] == '1,617 training images, 180 held out; 16 read'
    assert said['schedule'] == '60 steps of 32 images, 50 an epoch; warm-up 5; every 5 a checkpoint'
    assert re.match(r'vit, [\d,]+ parameters, 0.00 GFLOPs', said['model'])
    assert re.match(r'loss \d\.\d{4} of 2 images', said['forward'])
    assert re.match(r'about 0\.\d GiB for 32 images at once, .* GiB are there', said['memory'])
    assert said['all'] == 'good: without --check, the same command trains'
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_and_accumulated_parts(here):
    said = parts(here('pretrain', BASE, *TINY, 'name=run', '--check', 'devices=[cpu(0),cpu(1)]',
                      'train.accumulate=4', 'parallel.pipeline=2', 'parallel.micro_batches=3').stdout)
    assert re.match(r'loss \d\.\d{4} of 6 images', said['forward']) and 'for 8 images at once' in said['memory']
    assert said['all'] == 'good: without --check, the same command trains'


def test_a_classifier_and_a_run_that_goes_on(here, tmp_path):
    words = ['finetune', ROOT / 'conf' / 'finetune_digits.yaml', *TINY[:5], 'name=run', 'train.length=4',
    'runtime.threads=1']
    here(*words)
    before = files(tmp_path)
    said = parts(here(*words, '--check').stdout)
    assert said['data'] == '100 training images, 359 held out, 10 classes; 16 read'
    assert said['places'].endswith('; goes on from step 4')
    assert files(tmp_path) == before
    said = parts(here(*words, '--check', 'optim.base_lr=1', status=1).stdout)
    assert said['places'].startswith('NOT GOOD: runs/run holds a run that differs in optim.base_lr')
    assert said['not'] == 'good: places'


def test_every_part_that_is_not_good(here, tmp_path):
    noise(tmp_path / 'few', 40)
    for number in range(40):
        (tmp_path / 'few' / f'{number:03d}.png').write_bytes(b'\x89PNG broken')
    (tmp_path / 'file').write_text('')
    said = parts(here('pretrain', BASE, *TINY, '--check', 'data.path=few', 'output=file', 'devices=[gpu(7)]',
                      status=1).stdout)
    assert said['devices'].startswith('NOT GOOD: devices: gpu(7) asked for, but MXNet sees 0 GPUs')
    assert said['data'].startswith('NOT GOOD: ') and 'images cannot be read; the last: few/' in said['data']
    assert said['places'].startswith('NOT GOOD: file/base: cannot write the run there: cannot make a folder')
    assert said['not'] == 'good: devices, data, places' and set(said) == {'devices', 'data', 'places', 'not'}
    said = parts(here('pretrain', BASE, *TINY, '--check', 'train.batch_size=5000', 'data.val_fraction=0',
                      status=1).stdout)
    assert said['schedule'].startswith('NOT GOOD: a batch of 5000 images cannot be filled from 1797')


@pytest.mark.parametrize('flag', ['--check', '--check-config'])
@pytest.mark.parametrize('word, line', [
    ('train.epochs=3', "command line: unknown key 'train.epochs': write train.length='3 epochs'"),
    ('optim.warmup=61', 'optim.warmup=61 steps is longer than train.length=60 steps: shorten the warm-up, for instance '
     'optim.warmup=5%')])
def test_a_wrong_configuration(here, tmp_path, flag, word, line):
    result = here('pretrain', BASE, *TINY, word, flag, status=2)
    assert (result.stdout, result.stderr) == ('', f'mxsimmim: error: {line}\n')
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_alone(here, tmp_path):
    code = ('import sys\nfrom mxsimmim import cli\nprint(cli.main(sys.argv[1:]), "mxnet" in sys.modules)')
    result = subprocess.run([sys.executable, '-c', code, 'pretrain', str(BASE), *TINY, '--check-config'], cwd=tmp_path,
                            stdout=subprocess.PIPE, universal_newlines=True, timeout=60)
    assert result.stdout == '0 False\n' and list(tmp_path.iterdir()) == []
    line = 'train.aggregation=local_sgd needs several workers, and there is one: tools/launch.py -n 2'
    assert here('pretrain', BASE, *TINY, 'train.aggregation=local_sgd', '--check-config',
                status=2).stderr == f'mxsimmim: error: {line}\n'


def test_a_run_whose_length_alone_was_shortened(here, tmp_path):
    words = ['pretrain', 'recipe.yaml', 'train.length=12', 'name=run']
    config = configfile.load(BASE, TINY + ['train.length=10 epochs', 'optim.warmup=1 epochs',
                                           'optim.milestones=[8 epochs]'])
    (tmp_path / 'recipe.yaml').write_text(configfile.to_yaml(config))
    said = here(*words, 'checkpoint.every=6', 'log.every=1').stderr
    note = 'optim.warmup=1 epochs of train.length=10 epochs is longer than 12 steps, and keeps its share: 1 steps'
    assert note in said and 'so do optim.milestones=[8 epochs]: [10 steps]' in said
    run = tmp_path / 'runs' / 'run'
    recorded = (run / 'config.yaml').read_text()
    assert 'warmup: 1 steps' in recorded and 'milestones: [10 steps]' in recorded
    before = metrics(run), weights(run)
    rates = [row['lr'] for row in before[0] if 'lr' in row]
    assert rates[10] == rates[3] and rates[11] == pytest.approx(rates[3] * 0.1)
    # Interrupted and resumed by the same command: the same schedule, the same weights.
    shutil.rmtree(run / 'checkpoints' / 'step-00000012')
    here(*words, 'checkpoint.every=6', 'log.every=1')
    assert (metrics(run), weights(run)) == before
    longer = here('pretrain', 'recipe.yaml', 'train.length=20', 'name=run', status=1).stderr
    assert 'differs in optim.warmup (there 1 steps, here 2 steps)' in longer
    assert 'train.length (there 12 steps, here 20 steps)' in longer
