"""Configuration files as people and machines write them: what a value is, and one line for what cannot be read."""
import os
import time

import pytest

from mxsimmim import config as cfg
from mxsimmim.config import configfile, documents

LAUGHS = 'a: &a [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join([f"*{before}"] * 10)}]\n' for before, name in zip('abcdefgh', 'bcdefghi'))


@pytest.mark.parametrize('text, value', [
    ('1e-4', 1e-4), ('1E5', 1e5), ('5e-7', 5e-7), ('.5', 0.5), ('5.', 5.0), ('-1.5', -1.5), ('+3', 3), ('010', 10),
    ('0x1f', 31), ('0o17', 15), ('1_000', 1000), ('1:30', '1:30'), ('2020-01-01', '2020-01-01'), ('yes', 'yes'),
    ('off', 'off'), ('true', True), ('False', False), ('~', None), ('', None), ('null', None), ('=', '='), ('"1"', '1'),
    ('[1, a, 2.5]', [1, 'a', 2.5]), ('{1: 2, on: 3, null: 4}', {'1': 2, 'on': 3, 'null': 4}),
    ('a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}', {'a': {'b': 1, 'c': 2}, 'd': {'b': 1, 'c': 3}}),
    ('a: &x [1]\nb: *x', {'a': [1], 'b': [1]}), ('\ufeffa: 1', {'a': 1}), ('a: 1\r\nb: 2\r\n', {'a': 1, 'b': 2})])
def test_values(text, value):
    found = documents.parse(text)
    assert found == value and type(found) is type(value)
    assert documents.parse(text.encode()) == value and documents.parse(text.encode('utf-16')) == value


@pytest.mark.parametrize('typed, value', [
    ('0123', '0123'), ('1e3', '1e3'), ('no', 'no'), ('2020-01-01', '2020-01-01'), ('1:30', '1:30'), ('0x1f', '0x1f'),
    ('"~"', '~'), ("'null'", 'null'), ('!!int 5', '5'), ('~', ''), ('null', ''), ('', '')])
def test_texts_are_taken_as_typed(typed, value):
    found = documents.parse(f'a: {typed}\ns: {{a: {typed}}}' if typed else 'a:\ns:\n  a:\n', ['a', 's.a'])
    assert found == {'a': value, 's': {'a': value}}


@pytest.mark.parametrize('text, complaint', [
    ('path: {{ data_path }}', 'a key is not a name: {{ … }} is a place that a template program fills in: write the '
     'value itself, or quotes around it (line 1, column 8)'),
    ('? [a, b]\n: c', 'a key is not a name: write a name before the colon (line 1, column 3)'),
    ('a: &a [*a]', 'an alias (*) stands within what it stands for (line 1, column 4)'),
    ('&a b: *a\n<<: &c {d: *c}', 'an alias (*) stands within what it stands for (line 2, column 5)'),
    (LAUGHS, 'more than 10,000 values (line 4, column 4)'),
    ('[' * 3000, 'nested more than 20 levels deep'), ('a: ' + '[' * 30 + ']' * 30, 'nested more than 20 levels deep'),
    ('a: 1\n---\nb: 2\n', 'expected a single document in the stream, but found another document (line 2, column 1)'),
    ('a: 1\na: 2', "key 'a' is given twice (line 2, column 1)"),
    ('a:\tb\n\tc: 1', "found character '\\t' that cannot start any token (line 1, column 3)"),
    ('a: *b', "found undefined alias 'b' (line 1, column 4)"), ('a: !!int x', 'not a whole number (line 1, column 4)'),
    ('a: !!timestamp x', 'a value does not fit the tag (!!) before it'), ('a: ' + '9' * 5000, 'not a whole number'),
    ('a: !ENV x', "could not determine a constructor for the tag '!ENV' (line 1, column 4)"),
    (b'caf\xe9: 1', 'byte 4 is not of UTF-8 text: save the file as UTF-8'), ('a: "\0"', 'special characters'),
    ('a: 1'.encode('utf-16-le'), 'special characters are not allowed')], ids=lambda value: repr(value)[:30])
def test_complaints(text, complaint):
    began = time.monotonic()
    with pytest.raises(documents.NotYaml) as error:
        documents.parse(text)
    assert complaint in str(error.value) and '\n' not in str(error.value)
    assert time.monotonic() - began < 20  # on a busy machine; 1 to 2 s


def test_a_template_in_a_configuration(tmp_path):
    (tmp_path / 'a.yaml').write_text('data:\n  path: {{ data_path }}\n')
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(tmp_path / 'a.yaml')
    assert str(error.value).startswith(f'{tmp_path}/a.yaml: not YAML: a key is not a name: {{{{ … }}}} is a place that')


@pytest.mark.parametrize('base, complaint', [
    ('folder', 'Is a directory'), ('missing.yaml', 'No such file or directory'), ('/dev/zero', 'larger than 256 KiB'),
    ('pipe', 'a pipe that nobody writes to'), ('huge', 'larger than 256 KiB'), ('loop', 'Too many levels of symbolic'),
    ('socket', 'No such device or address'), ('"a\\0b"', 'not the name of a file'), ('x' * 256, 'File name too long')],
                         ids=lambda value: value[:12])
def test_what_is_no_file(base, complaint, tmp_path):
    import socket
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    with open(tmp_path / 'huge', 'wb') as file:
        file.truncate(1 << 40)
    (tmp_path / 'loop').symlink_to('loop')
    with socket.socket(socket.AF_UNIX) as own:
        before = os.getcwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            own.bind('socket')
        finally:
            os.chdir(before)
        (tmp_path / 'a.yaml').write_text(f'base: {base}\n')
        for path in [tmp_path / 'a.yaml'] + [tmp_path / base] * ('\\' not in base):
            began = time.monotonic()
            with pytest.raises(cfg.ConfigError) as error:
                configfile.load(path)
            assert complaint in str(error.value) and len(str(error.value).splitlines()) == 1
            assert time.monotonic() - began < 3


def test_a_pipe_that_somebody_writes_to(tmp_path):
    reader, writer = os.pipe()
    try:
        os.write(writer, b'name: piped\nseed: 3\n')
        os.close(writer)
        config = configfile.load(f'/dev/fd/{reader}')
    finally:
        os.close(reader)
    assert (config.name, config.seed) == ('piped', 3)


def test_numbers_and_words_of_keys(tmp_path):
    (tmp_path / 'a.yaml').write_text('name: 0123\nmodel: {depth: 012, use_ape: yes}\ntrain: {length: 1e3}\n'
                                     'optim: {base_lr: 1e-4, warmup: .5 epochs}\ndata: {path: off, val_path: }\n')
    config = configfile.load(tmp_path / 'a.yaml')
    assert (config.name, config.model.depth, config.model.use_ape) == ('0123', 12, True)
    assert config.optim.base_lr == 1e-4
    assert (str(config.optim.warmup), str(config.train.length)) == ('0.5 epochs', '1000 steps')
    assert (config.data.path, config.data.val_path) == ('off', '')


@pytest.mark.parametrize('overrides, complaint', [
    (['model.depth=true'], "command line: key 'model.depth': true is no value for it"),
    (['optim.base_lr=false'], "key 'optim.base_lr': false is no value for it"),
    (['train.length=1:30'], "'1:30' is not a length of time"),
    (['train.length=1e300 epochs'], "'1e300 epochs' is longer than any run: at most 1e+12 steps, epochs or per cent"),
    (['model.embed_dim=99999999999999999999'], 'larger than 9,007,199,254,740,992, the largest whole number'),
    (['optim.betas=[0.9, 0.99999999]'], 'in float32, one of them is 1: lower it'),
    (['name=..'], "name='..' must consist of letters"), (['data.path=a\0b'], 'a NUL character is no part of any value'),
    (['=x'], "command line: unknown key ''"), (['a..b=1'], "unknown key 'a..b'"),
    (['model='], "key 'model': input should be"), (['model.depth={a: 1}'], "unknown key 'model.depth.a'"),
    (['model.depth={}'], "key 'model.depth': input should be"),
    (['x\ny\x1b=1'], "command line: unknown key 'x\\ny\\x1b'")])
def test_values_that_mean_nothing(overrides, complaint, tmp_path):
    (tmp_path / 'a.yaml').write_text('')
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(tmp_path / 'a.yaml', overrides)
    assert complaint in str(error.value) and len(str(error.value).splitlines()) == 1


def test_very_many_problems(tmp_path):
    (tmp_path / 'a.yaml').write_text(''.join(f'key{number}: 1\n' for number in range(3000)))
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(tmp_path / 'a.yaml')
    assert len(str(error.value).splitlines()) == 21 and str(error.value).endswith('\nand 2,980 more problems')


def test_the_later_spelling_of_a_key_wins(tmp_path):
    (tmp_path / 'a.yaml').write_text('model: {ape: true}\n')
    (tmp_path / 'b.yaml').write_text('base: a.yaml\nmodel: {use_ape: false}\n')
    assert not configfile.load(tmp_path / 'b.yaml').model.use_ape
    assert configfile.load(tmp_path / 'b.yaml', ['model.ape=true']).model.use_ape
