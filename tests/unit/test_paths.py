"""Paths as people type them: what becomes of ~ and $, in every key that is a path."""
import os
from pathlib import Path

import pytest

from mxsimmim import config as cfg
from mxsimmim.config import configfile
from mxsimmim.system import paths
from mxsimmim.training import run_folder

ENVIRON = {'A': '/a', 'B': 'b b', 'EMPTY': '', 'N1': 'n'}


@pytest.mark.parametrize('text, expected', [
    ('', ''), ('x/y', 'x/y'), ('$A/x', '/a/x'), ('${A}x', '/ax'), ('x/$B', 'x/b b'), ('$N1$A', 'n/a'), ('a$', 'a$'),
    ('$1', '$1'), ('a$-b', 'a$-b'), ('$$A', '$A'), ('a$$', 'a$'), ('$$$A', '$/a'), ('x~', 'x~'), ('./~', './~'),
    ('~', '/home/me'), ('~/x', '/home/me/x'), ('~root/x', '/root/x'), ('~/$A', '/home/me//a'),
    ('~/a.rec;~/b.rec', '/home/me/a.rec;/home/me/b.rec'), ('digits', 'digits'), ('é$A', 'é/a')])
def test_expand(text, expected, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert paths.expand(text, ENVIRON) == expected
    assert paths.expand(paths.escape(expected), ENVIRON) == expected


@pytest.mark.parametrize('text, complaint', [
    ('$NONE/x', "variable NONE of '$NONE/x' is not set here: set it (export NONE=...), or write $$ for a dollar sign"),
    ('${NONE}', 'variable NONE of'), ('$EMPTY/x', 'variable EMPTY of'), ('${A:-x}', "'${A:-x}' in '${A:-x}' is no "
     'variable: write ${NAME}'), ('${}', "'${}' in"),
    ('~nobody-here/x', "'~nobody-here/x': no user 'nobody-here' here")])
def test_what_cannot_be_expanded(text, complaint):
    with pytest.raises(ValueError) as error:
        paths.expand(text, ENVIRON)
    assert complaint in str(error.value)


def test_names_that_exist_are_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('$NONE', '~nobody-here', '~'):
        (tmp_path / name).mkdir()
    assert paths.expand('$NONE', {}) == '$NONE'
    assert paths.expand('~nobody-here', {}) == './~nobody-here'
    monkeypatch.setenv('HOME', '/home/me')
    assert paths.expand('~', {}) == '/home/me'  # once made by mistake, it must not catch all that follows


def test_no_home(monkeypatch):
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(os, 'getuid', lambda: 4_000_000)
    with pytest.raises(ValueError, match="^'~/x': no home folder is known: set HOME"):
        paths.expand('~/x')


def test_the_keys_that_are_paths():
    assert set(configfile.path_keys()) >= {'output', 'resume', 'model.pretrained', 'data.path', 'data.val_path',
                                           'data.labels', 'data.classes'}
    assert set(configfile.path_keys()) <= configfile.text_keys()


@pytest.mark.parametrize('key', configfile.path_keys())
@pytest.mark.parametrize('typed, expected', [('~/x', '/home/me/x'), ('$SOMEWHERE/x', '/data/x'), ('a$$b', 'a$b')])
def test_every_one_of_them_in_files_and_on_the_command_line(key, typed, expected, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    monkeypatch.setenv('SOMEWHERE', '/data')
    *section, leaf = key.split('.')
    (tmp_path / 'plain.yaml').write_text('task: classify\n')
    (tmp_path / 'it.yaml').write_text('task: classify\n' + (f'{section[0]}: {{{leaf}: {typed}}}' if section else
                                                             f'{leaf}: {typed}'))
    for config in (configfile.load(tmp_path / 'it.yaml'), configfile.load(tmp_path / 'plain.yaml', [f'{key}={typed}'])):
        value = configfile.to_dict(config)
        for part in key.split('.'):
            value = value[part]
        assert value == expected
        (tmp_path / 'config.yaml').write_text(configfile.to_yaml(config))
        assert run_folder.read_config(tmp_path) == config == configfile.load(tmp_path / 'config.yaml')


def test_an_unknown_variable_names_key_and_file(tmp_path):
    (tmp_path / 'a.yaml').write_text('output: $NONE_SUCH/r\n')
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(tmp_path / 'a.yaml', ['data.path=${NONE_SUCH}'])
    assert [line.partition(' of ')[0] for line in str(error.value).splitlines()] == [
        f"{tmp_path}/a.yaml: key 'output': variable NONE_SUCH", "command line: key 'data.path': variable NONE_SUCH"]


def test_base_and_the_file_itself(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.yaml').write_text('seed: 3\n')
    (tmp_path / 'sub').mkdir()
    for number, base in enumerate(('~/a.yaml', '$HOME/a.yaml', '${HOME}/sub/../a.yaml', '../a.yaml')):
        (tmp_path / 'sub' / f'b{number}.yaml').write_text(f'base: {base}\n')
        assert configfile.load(Path(f'~/sub/b{number}.yaml')).seed == 3
    (tmp_path / 'c.yaml').write_text('base: $NONE_SUCH/a.yaml\n')
    with pytest.raises(cfg.ConfigError, match="c.yaml: key 'base': variable NONE_SUCH"):
        configfile.load(tmp_path / 'c.yaml')
