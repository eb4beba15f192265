"""A warm-up that was written for a longer run: what becomes of it, by table."""
import pytest

from mxsimmim import config as cfg
from mxsimmim.config import configfile, schedule

RECIPE = 'optim: {warmup: 10 epochs, milestones: [700 epochs, 90%]}\ntrain: {length: 800 epochs}\n'


def resolve(folder, words, per_epoch, child=''):
    (folder / 'recipe.yaml').write_text(RECIPE)
    (folder / 'child.yaml').write_text(f'base: recipe.yaml\n{child}')
    config, written = configfile.load_with_lengths(folder / 'child.yaml', words)
    schedule.check(config, written)
    fitted, notes = schedule.fitted(config, written, per_epoch)
    assert configfile.differences(config, fitted) == [] or notes
    return config, fitted, notes


@pytest.mark.parametrize('words, per_epoch, warmup, milestones', [
    ([], 100, '10 epochs', ['700 epochs', '90%']), (['train.length=10 epochs'], 100, '10 epochs', ['700 epochs',
    '90%']),
    (['train.length=9 epochs'], 100, '11 steps', ['788 steps', '90%']),
    (['train.length=500'], 100, '6 steps', ['438 steps', '90%']),
    (['train.length=1000'], 100, '10 epochs', ['700 epochs',
                                                                                                           '90%']),
    (['train.length=1'], 100, '1 steps', ['1 steps', '90%']), (['train.length=4 epochs'], 3, '1 steps', ['10 steps',
    '90%']),
    (['train.length=4 epochs', 'optim.warmup=1 epoch'], 3, '1 epochs', ['700 epochs', '90%']),
    (['train.length=4 epochs', 'optim.milestones=[3 epochs]'], 3, '1 steps', ['3 epochs']),
    (['train.length=4 epochs', 'optim.schedule=cosine'], 3, '1 steps', ['700 epochs', '90%'])])
def test_a_shorter_length_alone(words, per_epoch, warmup, milestones, tmp_path):
    child = ''.join(f'train: {{length: {word[13:]}}}\n' for word in words if word.startswith('train.length'))
    for given, text in ((words, ''), ([word for word in words if not word.startswith('train.length')], child)):
        if text and len(given) > 0 and 'warmup' in given[0]:
            continue  # the later of the two is the warm-up then
        _, fitted, notes = resolve(tmp_path, given, per_epoch, text)
        assert (str(fitted.optim.warmup), list(map(str, fitted.optim.milestones))) == (warmup, milestones)
        changed = fitted.optim.warmup.unit == 'steps'
        assert bool(notes) == changed or notes[0].startswith('the learning rate never drops')
        # What is recorded is what the same command makes of it, and is taken as it is.
        (tmp_path / 'config.yaml').write_text(configfile.to_yaml(fitted))
        again, lengths = configfile.load_with_lengths(tmp_path / 'config.yaml')
        assert again.optim == fitted.optim and schedule.fitted(again, lengths, per_epoch)[0] == again
        assert schedule.fitted(fitted, {}, per_epoch)[0] == fitted


def test_what_is_said(tmp_path):
    assert resolve(tmp_path, ['train.length=5 epochs'], 100)[2] == [
        'optim.warmup=10 epochs of train.length=800 epochs is longer than 5 epochs, and keeps its share: 6 steps',
        'so do optim.milestones=[700 epochs, 90%]: [438 steps, 90%]']
    config, fitted, notes = resolve(tmp_path, ['train.length=100 epochs', 'optim.milestones=[90%]'], 100)
    assert fitted == config and notes == []
    (tmp_path / 'recipe.yaml').write_text('optim: {warmup: 1 epochs, milestones: [700 epochs]}\n')
    config, written = configfile.load_with_lengths(tmp_path / 'recipe.yaml', ['train.length=100 epochs'])
    assert schedule.fitted(config, written, 7) == (config, [
        'the learning rate never drops: optim.milestones=[700 epochs] of train.length=800 epochs is not reached by 100 '
        'epochs'])


@pytest.mark.parametrize('words, child, pair', [
    (['train.length=5 epochs', 'optim.warmup=9 epochs'], '', ('9 epochs', '5 epochs')),
    (['optim.warmup=900 epochs'], '', ('900 epochs', '800 epochs')),
    (['optim.warmup=9 epochs'], 'train: {length: 5 epochs}', ('9 epochs', '5 epochs')),
    ([], 'train: {length: 5 epochs}\noptim: {warmup: 9 epochs}', ('9 epochs', '5 epochs')),
    (['train.length=50', 'optim.warmup=60'], '', ('60 steps', '50 steps')),
    (['optim.warmup=150%'], '', ('150%', '800 epochs')), (['train.length=700 epochs'], 'optim: {warmup: 900 epochs}',
                                                          ('900 epochs', '700 epochs'))])
def test_what_was_written_together_must_fit(words, child, pair, tmp_path):
    with pytest.raises(cfg.ConfigError) as error:
        resolve(tmp_path, words, 100, child)
    assert str(error.value) == (f'optim.warmup={pair[0]} is longer than train.length={pair[1]}: shorten the warm-up, '
                                'for instance optim.warmup=5%')


def test_a_file_between(tmp_path):
    """A recipe of 800 epochs, a child of 100 with the warm-up of the first, 5 on the command line."""
    _, fitted, _ = resolve(tmp_path, ['train.length=5 epochs'], 80, 'train: {length: 100 epochs}')
    assert str(fitted.optim.warmup) == '5 steps'  # 10 of 800 epochs
    child = 'train: {length: 100 epochs}\noptim: {warmup: 10 epochs}'
    _, fitted, _ = resolve(tmp_path, ['train.length=5 epochs'], 80, child)
    assert str(fitted.optim.warmup) == '40 steps'  # 10 of 100
