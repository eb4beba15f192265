"""What the commands print and how soon."""
import json
import time

import pytest
import yaml
from support.running import BASE, ROOT, command
from support.tiny import TINY


def fastest(run, *arguments, **keys):
    def seconds():
        began = time.perf_counter()
        run(*arguments, **keys)
        return time.perf_counter() - began
    return min(seconds() for _ in range(5))


@pytest.mark.alone
def test_help_and_wrong_keys_answer_at_once(mxsimmim):
    assert fastest(mxsimmim, '--help') < 0.5
    assert fastest(mxsimmim, 'pretrain', BASE, 'optim.base_lrr=1', status=2) < 0.5


def test_mxnet_stays_away_from_help_and_errors(mxsimmim, tmp_path):
    (tmp_path / 'mxnet.py').write_text('raise SystemExit(99)')
    for arguments, status in ((['--help'], 0), (['config'], 0), (['pretrain', BASE, 'x=1'], 2),
                              (['pretrain', BASE], 2)):
        mxsimmim(*arguments, status=status)


def test_config(mxsimmim):
    assert mxsimmim('config').stdout == BASE.read_text()
    resolved = yaml.safe_load(mxsimmim('config', ROOT / 'conf' / 'vit_tiny.yaml', 'train.batch_size=8').stdout)
    assert (resolved['model']['embed_dim'], resolved['train']['batch_size']) == (192, 8)


def test_a_run_from_start_to_pictures(mxsimmim, tmp_path):
    text = mxsimmim('pretrain', BASE, *TINY, 'name=run', 'train.length=20', 'validation.at_start=true',
                    'validation.every=10').stderr
    for part in ('parameters', 'GFLOPs an image', 'embed_dim: 16',
                 '1,617 training images, 50 steps an epoch, 20 in all',
                 'val_avg_dist', 'step 3/20', 'step 20/20', 'validation loss', 'at the start', 'at the end',
                 'mean of the visible pixels', 'nearest visible pixel', 'pictures: runs/run/pictures'):
        assert part in text, part
    run = tmp_path / 'runs' / 'run'
    rows = [json.loads(line) for line in open(run / 'metrics.jsonl')]
    assert [row['step'] for row in rows if 'val_loss' in row] == [0, 10, 20]
    assert [row['step'] for row in rows if 'loss' in row] == [3, 6, 9, 12, 15, 18, 20]
    assert rows[-1]['val_loss'] < rows[0]['val_loss']
    assert {path.name for path in run.iterdir()} >= {'config.yaml', 'metrics.jsonl', 'tensorboard', 'logs',
                                                     'checkpoints', 'pictures'}
    assert len(list((run / 'pictures').glob('*.png'))) == 3
    mxsimmim('plot', 'runs/run')
    assert (run / 'curves.png').stat().st_size > 10_000


def test_the_command_runs_as_a_module():
    assert command('x')[1:5] == ['-W', 'ignore', '-m', 'mxsimmim']
