"""Names that are no text: nothing is lost on the way to files, nothing ends the way to a terminal or a picture."""
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from mxsimmim import cli
from mxsimmim.config import DataConfig, configfile
from mxsimmim.data.labels import open_labelled
from mxsimmim.system import text
from mxsimmim.tasks import metrics
from mxsimmim.training import run_folder

CAFE = os.fsdecode(b'caf\xe9')  # in Latin-1


@pytest.mark.parametrize('name, encoded, line, picture', [
    ('größe', 'größe'.encode(), 'größe', 'größe'),
    (CAFE, b'caf\xe9', CAFE, r'caf\xe9'),
    ('a\tb\nc', b'a\tb\nc', r'a\tb\nc', r'a\tb\nc'),
    ('\x1b[31mred\x7f\x9b', '\x1b[31mred\x7f\x9b'.encode(), r'\x1b[31mred\x7f\x9b', r'\x1b[31mred\x7f\x9b'),
    ('\u202eevil\u2028', '\u202eevil\u2028'.encode(), r'\u202eevil\u2028', r'\u202eevil\u2028'),
    ('back\\slash', b'back\\slash', 'back\\slash', 'back\\slash'),
    ('\ud800', b'\\ud800', '\ud800', '\\ud800'),  # stands for no byte
])
def test_names(name, encoded, line, picture):
    assert text.encode(name) == encoded
    assert text.one_line(name) == line
    assert text.drawn(name) == picture
    picture.encode()


def test_messages_keep_their_lines():
    assert text.shown('one\n\ttwo\x1b[2J\r\n') == '\n'.join(['one', '\ttwo\\x1b[2J\\r', ''])


@pytest.mark.parametrize('data, found', [
    (b'a\r\nb\rc\n', 'a\nb\nc\n'), ('größe'.encode('utf-8-sig'), 'größe'), ('größe'.encode('utf-16'), 'größe'),
    (b'\xfe\xff' + 'größe'.encode('utf-16-be'), 'größe'), (b'caf\xe9', CAFE), (b'', '')])
def test_files_of_text(data, found):
    assert text.decode(data) == found


class Closed(io.StringIO):
    def write(self, _):
        raise OSError(5, 'Input/output error')


def test_show():
    assert not text.show('x', None) and not text.show('x', Closed())
    closed = io.StringIO()
    closed.close()
    assert not text.show('x', closed)
    for encoding, expected in (('utf-8', b'caf\\xe9 \\u2026\n'), ('ascii', b'caf\\xe9 \\u2026\n')):
        stream = io.TextIOWrapper(io.BytesIO(), encoding, 'strict')
        assert text.show(f'{CAFE} …', stream)
        assert stream.buffer.getvalue() == expected


def test_configurations_round_trip(tmp_path):
    for name in (CAFE, 'a\nb', '\x1b[31m', 'größe', '"\', :', '-x', ' '):
        config = configfile.load(os.devnull, [f'output={name}', f'data.path={name}/x', 'resume=' + name, 'name=n'])
        assert (config.output, config.data.path, config.resume) == (name, f'{name}/x', name)
        (tmp_path / 'config.yaml').write_text(configfile.to_yaml(config), encoding='ascii')
        assert run_folder.read_config(tmp_path) == config
        assert json.loads(json.dumps(configfile.to_dict(config)).encode('ascii'))['output'] == name
    assert yaml.safe_load(configfile.to_yaml(config))['name'] == 'n'
    with pytest.raises(ValueError, match=r"name='caf\\xe9' must consist of letters"):
        configfile.load(os.devnull, [f'name={CAFE}'])
    with pytest.raises(ValueError, match="key 'output': should have at least 1 character"):
        configfile.load(os.devnull, ['output='])


def test_tables_of_classes(tmp_path):
    for name in (b'caf\xe9', b'plain'):
        (tmp_path / 'images' / os.fsdecode(name)).mkdir(parents=True)
        (tmp_path / 'images' / os.fsdecode(name + b'/' + name + b'.jpg')).write_text('')

    def opened(table, content, path='images', classes=None):
        (tmp_path / table).write_bytes(content)
        keys = {'classes': str(tmp_path / table)} if classes else {'labels': str(tmp_path / table)}
        return open_labelled(DataConfig(path=str(tmp_path / path), **keys), 0)

    found = opened('t.csv', b'caf\xe9/caf\xe9.jpg,fran\xe7ais\nplain/plain.jpg,\xc3\xb6\n')
    assert found.classes == (os.fsdecode(b'fran\xe7ais'), 'ö')
    assert dict(zip(map(found.train.name, range(2)), found.train_labels)) == {
        str(tmp_path / 'images' / CAFE / f'{CAFE}.jpg'): 0, str(tmp_path / 'images/plain/plain.jpg'): 1}
    assert opened('c.txt', b'plain\ncaf\xe9\n', classes=True).classes == ('plain', CAFE)
    with pytest.raises(ValueError, match=r"t.csv, line 1: there is no image .*'plain\\xe9.jpg' is not UTF-8; .*iconv"):
        opened('t.csv', b'plain\xe9.jpg,a\n')
    with pytest.raises(ValueError, match=r"is not one of the 2 classes .*rename or remove the folder \('fa\\xe9' is"):
        opened('c.txt', b'plain\nfa\xe9\n', classes=True)
    (tmp_path / 'flat').mkdir()
    for name in ('größe.jpg', 'line\nbreak.jpg'):
        (tmp_path / 'flat' / name).write_text('')
    table = 'größe.jpg\ta\r\n"line\nbreak.jpg"\tb\r\n'
    for content in (table.encode('utf-16'), table.encode('utf-8-sig')):
        assert opened('t.tsv', content, 'flat').classes == ('a', 'b')
    with pytest.raises(ValueError, match='t.tsv, line 1: has a zero byte: .*iconv -f UTF-16LE'):
        opened('t.tsv', table.encode('utf-16-le'), 'flat')


def test_tables_have_one_line_a_class():
    names = ['a\nb', CAFE, '\x1b[31m']
    table = metrics.class_table(metrics.class_scores(np.arange(3), np.arange(3), 3), names)
    assert [line.split('  ')[0] for line in table.splitlines()] == ['class', r'a\nb', CAFE, r'\x1b[31m']


def error(call, *arguments):
    try:
        call(*arguments)
    except ValueError as caught:
        return caught


@pytest.mark.parametrize('caught, ours', [
    (lambda: error(run_folder.read_config, 'nowhere'), True),
    (lambda: error(configfile.load, os.devnull, ['x']), True),
    (lambda: error(metrics.Tally, 'x'), False),  # NumPy's, called by ours
    (lambda: error(json.loads, 'x'), False),
    (lambda: error(int, 'x'), False),
    (lambda: error(text.encode(CAFE).decode), False),
    (lambda: error(Path('x\0').read_bytes), False),
    (lambda: KeyError('x'), False),
])
def test_whose_words(caught, ours):
    assert cli.speaks_to_the_user(caught()) is ours


def test_python_s_words_do_not_pass_for_ours(monkeypatch, capsys):
    def broken(*_):
        raise UnicodeEncodeError('ascii', 'é', 0, 1, 'ordinal not in range')
    monkeypatch.setattr(configfile, 'reference_yaml', broken)
    with pytest.raises(UnicodeEncodeError):
        cli.main(['config'])
    assert 'error:' not in capsys.readouterr().err
    assert cli.main(['plot', 'nowhere']) == 1
    assert capsys.readouterr().err.startswith('mxsimmim: error: nowhere/metrics.jsonl: no such file')
