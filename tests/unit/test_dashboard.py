"""What the dashboard reads of run folders, and what it does not."""
import asyncio
import base64
import hashlib
import importlib
import json
import os
import sys

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from mxsimmim import cli
from mxsimmim.training import dashboard
from mxsimmim.training.dashboard import (
    Dashboard,
    curves,
    events,
    folder_of,
    names,
    newest_picture,
    picture_of,
    tail,
    thinned,
)
from mxsimmim.training.status import StatusFile

PNG = b'\x89PNG\r\n\x1a\n'
TAG = '<img src=x onerror=alert(1)>'


@pytest.fixture
def runs(tmp_path):
    """A folder with two runs, what is none, and secrets beside it."""
    folder = tmp_path / 'runs'
    for name in ('a', TAG):
        run = folder / name
        (run / 'pictures').mkdir(parents=True)
        StatusFile(run, 100, 0).tell(step=20, loss=0.5)
        (run / 'metrics.jsonl').write_text('{"step": 10, "loss": 0.75, "time": 1}\n{"step": 11, "event": "skipped", '
                                           '"cause": "loss", "time": 2}\n{"step": 20, "loss": 0.5}\n')
        for step in (9, 100, 20):
            (run / 'pictures' / f'reconstruction-{step:08d}.png').write_bytes(PNG + b'%d' % step)
    (folder / 'no-run').mkdir()
    (folder / 'a' / 'pictures' / 'link.png').symlink_to(tmp_path / 'secret.png')
    (tmp_path / 'secret.png').write_bytes(b'secret')
    StatusFile(tmp_path, 1, 0)  # beside the folder, as if it were a run
    return folder


def test_names(runs):
    assert names(runs) == [TAG, 'a']
    os.mkdir(os.fsencode(runs) + b'/\xe9')
    (runs / os.fsdecode(b'\xe9') / 'status.json').write_text('{}')
    assert names(runs) == [TAG, 'a']


@pytest.mark.parametrize('name', ['', '.', '..', '../runs/a', 'a/.', 'a/../a', '/', 'no-run', 'b', 'a\0', './a', '~'])
def test_what_is_no_name_of_a_run(runs, name):
    with pytest.raises(web.HTTPNotFound):
        folder_of(runs, name)
    assert folder_of(runs, 'a') == runs / 'a'


@pytest.mark.parametrize('name', [
    '', '.', '..', '../status.json', '../../../secret.png', '../metrics.jsonl', 'link.png', 'none.png',
    '../../a/pictures/../../../secret.png'])
def test_what_is_no_picture(runs, name):
    with pytest.raises(web.HTTPNotFound):
        picture_of(runs / 'a', name)
    assert picture_of(runs / 'a', 'reconstruction-00000020.png').read_bytes() == PNG + b'20'


def test_the_newest_picture(runs):
    assert newest_picture(runs / 'a') == 'reconstruction-00000100.png'
    assert newest_picture(runs / 'no-run') == ''


def test_tail(tmp_path):
    """Each record once, a torn one when it is whole, all of them again after the file was replaced."""
    file = tmp_path / 'metrics.jsonl'
    assert tail(file, '') == ([], '', True)
    file.write_text('{"step": 1, "loss": 0.5, "skipped": 0}\nnonsense\n{"event": "x"}\n{"step": 2, "lo')
    records, seen, anew = tail(file, '')
    assert (records, anew) == ([{'step': 1, 'loss': 0.5}], True)
    assert tail(file, seen) == ([], seen, False)
    with open(file, 'a') as stream:
        stream.write('ss": null}\n')
    records, later, anew = tail(file, seen)
    assert (records, anew) == ([{'step': 2, 'loss': None}], False) and later != seen
    beside = tmp_path / 'beside'
    beside.write_text('{"step": 1, "loss": 0.25}\n' * 9)
    beside.replace(file)
    records, last, anew = tail(file, later)
    assert (len(records), anew) == (9, True)
    file.write_text('{"step": 1, "loss": 0.25}\n')  # shorter, under the same number
    for other in (last, 'x', '1-x', '-', f'{last}9'):
        assert tail(file, other)[0::2] == ([{'step': 1, 'loss': 0.25}], True)


def test_what_is_drawn_and_what_happened():
    skipped = [{'step': step, 'event': 'skipped', 'cause': 'loss', 'time': step} for step in range(150)]
    records = [{'step': 1, 'loss': 0.5}, *skipped, {'step': 3}, {'step': 4, 'val_loss': None}]
    assert curves(records) == [{'step': 1, 'loss': 0.5}, {'step': 4, 'val_loss': None}]
    assert events(records) == skipped[-100:] and events(records[:1]) == []


def test_long_curves_are_thinned():
    rows = [{'step': step, 'loss': 1.0} for step in range(5001)] + [{'step': 5000, 'val_loss': 2.0}]
    kept = thinned(rows)
    assert len(kept) == 1668 and kept[-1] == {'step': 5000, 'val_loss': 2.0} and kept[-2]['step'] == 5000
    assert {b['step'] - a['step'] for a, b in zip(kept, kept[1:])} == {3, 0}
    assert thinned(rows[:1000]) == rows[:1000]


def asked(runs, *paths):
    """Status, headers and body of each answer; the paths are sent as they are."""
    async def ask():
        async with TestServer(Dashboard(runs).app()) as server, TestClient(server) as client:
            found = []
            for path in paths:
                reader, writer = await asyncio.open_connection(server.host, server.port)
                writer.write(f'GET {path} HTTP/1.0\r\nHost: x\r\n\r\n'.encode())
                head, _, body = (await reader.read()).partition(b'\r\n\r\n')
                found.append((int(head.split()[1]), head.decode(), body))
                writer.close()
            assert (await client.post('/api/runs')).status == 405
            return found
    return asyncio.run(asyncio.wait_for(ask(), 20))


def test_answers(runs):
    quoted = TAG.replace('<', '%3C').replace('>', '%3E').replace(' ', '%20')
    page, all_, one, again, picture, tagged = asked(
        runs, '/', '/api/runs', '/api/runs/a', '/api/runs/a?seen=1-2',
        '/api/runs/a/pictures/reconstruction-00000100.png', f'/api/runs/{quoted}')
    assert {each[0] for each in (page, all_, one, again, picture, tagged)} == {200}
    assert [(run['name'], run['step'], run['total']) for run in json.loads(all_[2])] == [(TAG, 20, 100), ('a', 20, 100)]
    told = json.loads(one[2])
    assert told['records'] == [{'step': 10, 'loss': 0.75}, {'step': 20, 'loss': 0.5}] and told['anew']
    assert told['events'] == [{'step': 11, 'event': 'skipped', 'cause': 'loss', 'time': 2}]
    assert (told['picture'], told['checkpoint'], told['left']) == ('reconstruction-00000100.png', None, None)
    assert picture[2] == PNG + b'100' and 'Content-Type: image/png' in picture[1]
    assert json.loads(tagged[2])['name'] == TAG
    assert page[2] == dashboard.PAGE.read_bytes() and 'Content-Type: text/html' in page[1]
    for kind in ('script', 'style'):
        text = page[2].decode().partition(f'<{kind}>')[2].partition(f'</{kind}>')[0]
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in page[1]


@pytest.mark.parametrize('path', [
    '/api/runs/..', '/api/runs/../api/runs/b', '/api/runs/%2e%2e', '/api/runs/..%2fruns%2fa', '/api/runs/a%2f..%2fa',
    '/api/runs/%2Fetc', '/api/runs/a/pictures/..%2fstatus.json', '/api/runs/a/pictures/%2e%2e%2f%2e%2e%2fsecret.png',
    '/api/runs/a/pictures/..%2f..%2f..%2fsecret.png', '/api/runs/a/pictures/link.png', '/api/runs/../../secret.png',
    '/api/runs/a/pictures/' + '..%2f' * 9 + 'etc/passwd', '/api/runs/a%00', '/api/runs/%ff', '/secret.png',
    '/api/runs/..%5c..%5csecret.png', '/status.json', '/runs/a/status.json'])
def test_a_name_that_leaves_the_folder(runs, path):
    (status, _, body), = asked(runs, path)
    assert status in (400, 404) and b'secret' not in body.replace(path.encode(), b'').replace(b'secret.png', b'')


def test_the_page_asks_nobody_else():
    text = dashboard.PAGE.read_text()
    assert 'http://www.w3.org/2000/svg' in text
    assert '://' not in text.replace('http://www.w3.org/2000/svg', '')
    for word in ('innerHTML', 'outerHTML', 'insertAdjacentHTML', 'document.write', ' style="'):
        assert word not in text


def test_a_status_that_cannot_be_read(runs):
    (runs / 'a' / 'status.json').write_text('{"state"')
    told = dashboard.summary(runs / 'a')
    assert told['state'] == 'unreadable' and 'cannot be read' in told['error']
    (runs / 'a' / 'status.json').write_text('{}')
    assert dashboard.summary(runs / 'a')['state'] == 'unreadable'


def test_what_is_no_folder_of_runs(runs, capsys):
    for path, part in ((runs / 'x', 'is not a folder'), (runs / 'a', f'give the folder that holds it, {runs}')):
        assert cli.main(['dashboard', str(path)]) == 1 and part in capsys.readouterr().err
    assert cli.main(['dashboard', str(runs), '--port', '70000']) == 1
    assert '--port=70000 must be in 0 to 65535' in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'aiohttp', None)
    monkeypatch.delitem(sys.modules, 'mxsimmim.training.dashboard')
    with pytest.raises(ValueError, match=r"the dashboard needs the package aiohttp: pip install 'mxsimmim\[deploy\]'"):
        importlib.import_module('mxsimmim.training.dashboard')
