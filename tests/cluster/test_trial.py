"""The launcher has the command's configuration checked once before it starts anything."""
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / 'conf' / 'digits.yaml')
PYTHON = [sys.executable, '-W', 'ignore', '-m', 'mxsimmim']
LENGTH = 'optim.warmup=9 epochs is longer than train.length=3 epochs: shorten the warm-up, for instance optim.warmup=5%'


@pytest.mark.parametrize('options, words, line', [
    (['-n', 24, '-s', 1], ['train.epochs=3'],
     "command line: unknown key 'train.epochs': write train.length='3 epochs'"),
    (['-n', 24, '-s', 4], ['train.length=3 epochs', 'optim.warmup=9 epochs'], LENGTH),
    (['-n', 2, '-s', 1, '--env', 'OMP_NUM_THREADS=1'], ['--lr', '0.1'],
     "no option '--lr': write optim.base_lr=0.1 (the rate for 512 images a step; it scales with train.batch_size)"),
    (['-n', 2, '--horovod'], ['train.store=dist_sync'],
     'train.store=dist_sync needs parameter servers, and this process '
     'was started as Horovod ranks: tools/launch.py -n 2 -s 1 -- mxsimmim pretrain …'),
    (['-n', 2, '-s', 1], ['train.store=horovod'],
     'train.store=horovod needs Horovod ranks, and this process was started '
     'with parameter servers: tools/launch.py -n 2 --horovod -- mxsimmim pretrain …')])
def test_one_line_and_nothing_is_started(launcher, options, words, line):
    out, err = launcher.run(*options, '--', *PYTHON, 'pretrain', BASE, *words, status=2, seconds=30)
    assert (out, err) == ('', f'mxsimmim: error: {line}\n')
    assert not (launcher.folder / 'logs').exists()


def test_other_problems_are_said_with_it(launcher):
    out, err = launcher.run('-n', 1, '--', *PYTHON, 'pretrain', BASE, 'data.path=none', 'train.epochs=3', status=2)
    assert err.splitlines()[0] == ("mxsimmim: error: command line: unknown key 'train.epochs': write "
                                   "train.length='3 epochs'")


def script(folder, text):
    (folder / 'mxsimmim').write_text('#!/bin/sh\necho "$@" >> asked\n' + text)
    (folder / 'mxsimmim').chmod(0o755)
    return str(folder / 'mxsimmim')


@pytest.mark.parametrize('answer', [
    'echo "usage: mxsimmim" >&2; echo "mxsimmim: error: unrecognized arguments: --check-config" >&2; exit 2',
    'echo "Traceback (most recent call last):" >&2; echo "ModuleNotFoundError: No module named pydantic" >&2; exit 1',
    'kill -9 $$', 'exit 0', 'exit 7'], ids=['older', 'broken', 'killed', 'good', 'other'])
def test_what_cannot_be_asked_is_started_all_the_same(launcher, answer):
    """Another version of the command, or one that fails for other reasons: the job itself will say."""
    command = script(launcher.folder, f'case "$*" in *--check-config) {answer};; esac\nexit 0\n')
    launcher.run('-n', 2, '-s', 1, '--', command, 'pretrain', 'x.yaml')
    assert sorted((launcher.folder / 'asked').read_text().splitlines()) == (
        ['pretrain x.yaml'] * 4 + ['pretrain x.yaml --check-config'])


@pytest.mark.parametrize('words', [['doctor'], ['probe', 'pretrain'], []])
def test_other_commands_are_not_asked(launcher, words):
    launcher.run('-n', 1, '--', script(launcher.folder, 'exit 0\n'), *words)
    assert '--check-config' not in (launcher.folder / 'asked').read_text()
