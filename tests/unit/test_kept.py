"""What a run has kept: the list of its checkpoints, and the mean of the last ones."""
import numpy as np
import pytest

from mxsimmim import cli
from mxsimmim.config import Config, configfile
from mxsimmim.training import checkpoint, kept
from mxsimmim.training.run_folder import read_config, write_config


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints of weights 1, 2 and 6, and a best one."""
    folder = tmp_path / 'run'
    folder.mkdir()
    write_config(folder, Config(output=str(tmp_path), name='run'))
    for step, value in ((10, 1), (20, 2), (30, 6)):
        arrays = {'weights': {'a': np.full((2, 3), value, 'float32'), 'b': np.array([value], 'float64')},
                  'optimizer': {'a.mean': np.zeros((2, 3), 'float32')}}
        checkpoint.save(folder / 'checkpoints', step, arrays, {'epoch': step // 10, 'samples': 5}, keep=9)
    checkpoint.save(folder / 'best', 20, arrays, {'epoch': 2}, keep=1)
    return folder


def test_the_list(run, capsys):
    assert cli.main(['checkpoints', str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(':')[0] for line in lines] == [
        str(run / path) for path in ('checkpoints/step-00000010', 'checkpoints/step-00000020',
                                     'checkpoints/step-00000030', 'best/step-00000020')]
    assert all(line.endswith(', whole') for line in lines) and ': step 20, epoch 2, 0.0 MB, 20' in lines[1]


def test_a_damaged_one_is_named_and_the_others_are_listed(run, capsys):
    file = run / 'checkpoints' / 'step-00000020' / 'weights.safetensors'
    file.write_bytes(file.read_bytes()[:-1] + b'!')
    assert cli.main(['checkpoints', str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].startswith(f'DAMAGED {file}: damaged: its SHA-256 is ')
    assert [line.endswith('whole') for line in lines] == [True, False, True, True]
    assert cli.main(['average', str(run), '-k', '2']) == 1
    assert f'{file}: damaged' in capsys.readouterr().err and not run.with_name('run-average').exists()
    assert cli.main(['average', str(run), '-k', '1']) == 0


def test_the_mean_is_a_run(run, capsys):
    made = run.with_name('run-average')
    assert cli.main(['average', str(run), '-k', '3']) == 0
    assert capsys.readouterr().out == (f'{made}: the mean of 3 checkpoints of {run}, steps 10, 20, 30; use it as any '
                                       'run\n')
    found = checkpoint.newest(made / 'checkpoints', pytest.fail)
    assert found.step == 30 and list(found.arrays) == ['weights'] and found.state == {'epoch': 3, 'samples': 5}
    for name, kind in (('a', 'float32'), ('b', 'float64')):
        assert found.arrays['weights'][name].dtype == kind and set(found.arrays['weights'][name].flat) == {3}
    config = read_config(made)
    assert (config.name, config.output) == ('run-average', str(run.parent))
    assert not configfile.differences(read_config(run), config.model_copy(update={'name': 'run'}))


def test_float32_is_rounded_once():
    values = np.array([1.0, 2.0 ** -24, 2.0 ** -24], 'float32')
    assert kept.mean([{'a': value[None]} for value in values])['a'] == np.float32((1 + 2.0 ** -23) / 3)


@pytest.mark.parametrize('words, part', [
    (['average', 'RUN', '-k', '4'], 'RUN has 3 checkpoints, and -k 4 asks for the mean of 4: train with '),
    (['average', 'RUN', '-k', '0'], '-k 0 asks for'),
    (['average', 'RUN', '-k', '2', '-o', 'RUN'], 'RUN exists already: give a new folder with -o'),
    (['checkpoints', 'RUN/best'], 'RUN/best is not the folder of a run'),
])
def test_what_cannot_be(run, capsys, words, part):
    assert cli.main([word.replace('RUN', str(run)) for word in words]) == 1
    assert part.replace('RUN', str(run)) in capsys.readouterr().err


def test_checkpoints_of_different_networks_and_none():
    with pytest.raises(ValueError, match='not of one network'):
        kept.mean([{'a': np.zeros(2)}, {'a': np.zeros(3)}])
