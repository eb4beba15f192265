"""tools/few_scenes.py: which runs it makes, and its table; the runs are no part of this."""
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mxsimmim.runtime import environment

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(environment, 'prepare', lambda runtime: None)
    return import_module('few_scenes')


def test_table(tool, monkeypatch, capsys):
    asked = []

    def measured(recipe, overrides, encoder, scenes, seed):
        asked.append((recipe.name, list(overrides), encoder, scenes, seed))
        return {'val_miou': (scenes / 10 + 4 * seed + 7 * bool(encoder)) / 100, 'val_loss': 1.0}
    monkeypatch.setattr(tool, 'measured', measured)
    monkeypatch.setattr(sys, 'argv', ['few_scenes.py', 'runs/x', 'runtime.threads=1', '--seeds', '2',
                                      '--scenes', '50,500', 'data.threads=1'])
    tool.main()
    assert asked == [('segment_digits.yaml', ['runtime.threads=1', 'data.threads=1'], encoder, scenes, seed)
                     for scenes in (50, 500) for seed in (0, 1) for encoder in ('', 'runs/x')]
    *told, title, few, many = capsys.readouterr().out.splitlines()
    assert told[1] == '50 scenes, seed 0, from runs/x: 12.0' and len(told) == 8
    assert title.split() == ['val_miou,', '%,', '2', 'seeds', 'random', 'weights', 'from', 'runs/x', 'gain']
    assert few.split() == ['50', 'scenes', '7.0', '±', '2.8', '14.0', '±', '2.8', '+7.0']
    assert many.split() == ['500', 'scenes', '52.0', '±', '2.8', '59.0', '±', '2.8', '+7.0']


def test_other_tasks(tool, monkeypatch):
    recipe = TOOLS.parent / 'conf' / 'finetune_digits.yaml'
    monkeypatch.setattr(sys, 'argv', ['few_scenes.py', '--config', str(recipe)])
    with pytest.raises(SystemExit, match='task=classify, but this compares networks for segment'):
        tool.main()


def test_a_stop_of_a_run_is_one_of_all(tool, monkeypatch):
    asked = []
    monkeypatch.setattr('mxsimmim.training.start.start', lambda config: asked.append(config) or 143)
    with pytest.raises(SystemExit) as ended:
        tool.measured(tool.RECIPE, ['train.length=10'], 'runs/x', 50, 3)
    config, = asked
    assert ended.value.code == 143 and (config.seed, config.data.train_images, config.train.length.value) == (3, 50, 10)
    assert config.model.pretrained == 'runs/x'
