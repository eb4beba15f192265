"""Whatever is in a configuration: one line a problem, or a configuration that is written and read back as it was.

2,000 documents, the same ones every time (derandomize): a failure prints its document.
"""
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings, strategies as st

from mxsimmim import config as cfg
from mxsimmim.config import configfile
from mxsimmim.optim import learning_rates
from mxsimmim.parallel.strategies import Strategy
from mxsimmim.training.timetable import timetable_of

pytestmark = pytest.mark.unmeasured
CONF = Path(__file__).parents[2] / 'conf'
RECIPES = {path.name: path.read_text() for path in sorted(CONF.glob('*.yaml'))}
RECIPES['base.yaml'] = 'seed: 0\n'  # its keys are the defaults, and it is long
KEYS = sorted(configfile.known_keys())


def fuzz(examples):
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """With the recipes in it, so that `base:` finds them, and as the working directory."""
    folder = tmp_path_factory.mktemp('fuzz')
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def survives(folder, content, overrides=()):
    """Loads a document; returns the configuration, or None and has checked the complaint."""
    content = content if isinstance(content, bytes) else content.encode('utf-8', 'surrogatepass')
    (folder / 'it.yaml').write_bytes(content)
    try:
        config = configfile.load(folder / 'it.yaml', overrides)
    except cfg.ConfigError as error:
        lines = str(error).split('\n')
        assert 0 < len(lines) <= 21 and all(line.isprintable() and 0 < len(line) <= 500 for line in lines), lines
        return None
    (folder / 'again.yaml').write_text(configfile.to_yaml(config), encoding='utf-8')
    assert configfile.load(folder / 'again.yaml') == config == configfile.recorded(folder / 'again.yaml')
    assert configfile.from_dict(configfile.to_dict(config), 'a checkpoint') == config
    for samples in (1, 1_281_167, 10 ** 15):
        try:
            plan = timetable_of(config, samples, Strategy('device', 'sync'))
        except ValueError as error:
            assert 'train.' in str(error) and str(error).isprintable()
            continue
        assert 1 <= min(plan.total, plan.validate, plan.save)
        rate = learning_rates(config.optim, config.train, plan.per_epoch, plan.total)
        assert all(rate(update) >= 0 for update in (0, 1, plan.total // 2, plan.total - 1))
    return config


def flow(children):
    """YAML in flow style around other YAML, with anchors, aliases and merges."""
    names = st.sampled_from(['a', '<<', 'base', 'model', 'optim', 'base_lr', '? [x]', '{{ x }}', 'null', '1', 'on', ''])
    return st.one_of(
        st.lists(children, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(names, children), max_size=4).map(
            lambda items: '{' + ', '.join(f'{name}: {value}' for name, value in items) + '}'),
        children.map(lambda text: f'&a {text}'), children.map(lambda text: f'!!set {text}'))


SCALARS = st.one_of(st.sampled_from([
    '', '~', 'null', 'on', 'no', 'yes', 'off', 'True', '.inf', '-.inf', '.nan', '1e-4', '1e999', '-1e-999', '1:30',
    '010', '0o17', '0x1F', '1_000', '_', '1__', '10 epochs', '5%', '1e300 epochs', '0.00000001 epochs', '-0.0',
    '2020-01-01', '2020-99-99', '!!int x', '!!float x', '!!bool x', '!!timestamp x', '!!binary "%%"', '!!set {a, b}',
    '!!omap [a: 1]', '!!pairs [a: 1]', '!!map x', '!!seq x', '!!python/object:os.system x', '!x y', '*a', '&a [*a]',
    '&a {b: *a}', '{{ data_path }}', '{? [a] : b}', '"\\0"', '"\\x1b[31m"', '"\\ud800"', "'it''s'", '=', '<<', '---',
    '...', '%TAG', '@', '`', '|', '>', '"', "'", '9' * 400, '9' * 5000, '1' * 30, '-' + '1' * 20, 'a' * 3000,
    '[' * 30, '[' * 3000, '{a: ' * 300, '- ' * 400, 'x' * 200 + '\n\n\t y', '~nobody/x', '$UNDEFINED/x',
    '${HOME}/x', '$$x', '${', '~']),
    st.integers().map(str), st.floats().map(str), st.text(max_size=8),
    st.builds(lambda value: yaml.safe_dump(value, default_flow_style=True).strip(), st.one_of(
        st.text(max_size=20), st.dates(), st.binary(max_size=4), st.booleans(), st.none(), st.floats(),
        st.integers(-2 ** 70, 2 ** 70))))
VALUES = st.recursive(SCALARS, flow, max_leaves=12)


@fuzz(300)
@example('a: &a [x]\nb: *a\nname: {{ data_path }}\n')
@example('\ufeffname: x')
@given(st.text(max_size=200))
def test_any_text(folder, text):
    survives(folder, text)


@fuzz(200)
@example('name: x'.encode('utf-16'))
@example('name: x'.encode('utf-16-le'))
@given(st.binary(max_size=120))
def test_any_bytes(folder, content):
    survives(folder, content)


@fuzz(600)
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_of_a_key(folder, key, value):
    *section, leaf = key.split('.')
    survives(folder, f'{section[0]}:\n  {leaf}: {value}\n' if section else f'{leaf}: {value}\n')


@fuzz(400)
@given(st.lists(st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=6),
                                    st.sampled_from(['', '.', 'a..b', 'model.', '.x', 'model.depth.a'])),
                          st.sampled_from(['=', '=', '=', ' = ', ':', ' ', '']), VALUES).map(''.join), max_size=3))
def test_any_overrides(folder, overrides):
    survives(folder, '', overrides)


@fuzz(500)
@given(st.sampled_from(sorted(RECIPES)), st.data())
def test_recipes_with_something_changed(folder, name, data):
    text = RECIPES[name]
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 8)))
        new = data.draw(st.one_of(st.sampled_from(list('{}[]:,-?&*!|>\'"%@`#\t\n \0')), SCALARS))
        text = text[:start] + new + text[end:]
    survives(folder, text)
