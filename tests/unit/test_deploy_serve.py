"""What the service does when it has too much to do, and whether it hears strangers."""
import asyncio
import importlib
import json
import os
import signal
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient, TestServer

from mxsimmim.data.transforms import BrokenImage
from mxsimmim.inference import serve
from mxsimmim.inference.engine import Room
from mxsimmim.inference.serve import QUEUE, Service
from mxsimmim.system import web

DEADLINE = 20


class FakeEngine:
    """Answers when `go` is set; an upload is a number, which is its answer."""
    predictor = SimpleNamespace(command='predict', kind='a game')

    def __init__(self):
        self.go = threading.Event()

    def prepare(self, data, name):
        try:
            return int(data)
        except ValueError:
            raise BrokenImage(f'{name}: not a number') from None

    def answer(self, batch):
        assert self.go.wait(DEADLINE)
        return np.array([[1 - item % 2, item % 2] for item in batch], float)

    def body(self, item, row, accepted):
        return 'application/json', json.dumps({'classes': [{'name': 'odd' if row[1] else 'even'}]}).encode()


def with_service(use, max_batch=2, max_bytes=100):
    """Runs `use(client, engine)` against a service on a free port."""
    async def run():
        engine = FakeEngine()
        async with TestClient(TestServer(Service(engine, max_batch, max_bytes).app())) as client:
            return await asyncio.wait_for(use(client, engine), DEADLINE)
    return asyncio.run(run())


def test_more_than_the_queue_holds_is_turned_away():
    async def use(client, engine):
        posts = [asyncio.ensure_future(client.post('/predict', data=b'%d' % i)) for i in range(2 * QUEUE + 5)]
        refused = []
        while len(refused) < 5:  # those beyond are answered while the others wait for the network
            await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
            refused = [p.result() for p in posts if p.done()]
            assert all(response.status == 503 for response in refused)
            await asyncio.sleep(0.01)
        assert 'try again' in (await refused[0].json())['error'] and refused[0].headers['Retry-After'] == '1'
        engine.go.set()
        answers = [await p for p in posts]
        assert sorted(response.status for response in answers) == [200] * 2 * QUEUE + [503] * 5
        names = [(await a.json())['classes'][0]['name'] for a in answers if a.status == 200]
        served = [i for i, a in enumerate(answers) if a.status == 200]
        assert names == [('even', 'odd')[i % 2] for i in served]
        text = await (await client.get('/metrics')).text()
        assert 'mxsimmim_requests_total{path="/predict",status="503"} 5.0' in text
        assert f'mxsimmim_requests_total{{path="/predict",status="200"}} {2 * QUEUE}.0' in text
    with_service(use)


def test_room_is_free_again_after_each_kind_of_end():
    async def use(client, engine):
        engine.go.set()
        for _ in range(2 * QUEUE + 1):
            for body, status in ((b'1', 200), (b'x', 400), (b'1' * 101, 413)):
                assert (await client.post('/predict', data=body)).status == status
    with_service(use)


def test_multipart():
    async def use(client, engine):
        engine.go.set()
        for name, status in (('image', 200), ('picture', 400)):
            form = FormData()
            form.add_field('note', 'first')
            form.add_field(name, b'7', filename='7.png')
            response = await client.post('/predict', data=form)
            assert response.status == status
            assert (await response.json()).get('error') == (None if status == 200
                                                            else "the multipart body has no part called 'image'")
        for kind in ('', '; boundary=x', '; boundary=' + 99 * 'y'):
            kind = f'multipart/form-data{kind}'
            response = await client.post('/predict', data=b'--z\r\nno such thing', headers={'Content-Type': kind})
            assert response.status == 400, kind
    with_service(use, max_bytes=1000)


def test_an_upload_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(serve, 'UPLOAD_SECONDS', 0.2)

    async def use(client, engine):
        async def endless():
            yield b'1'
            await asyncio.sleep(DEADLINE)
        response = await client.post('/predict', data=endless())
        assert response.status == 408 and '0.2 seconds' in (await response.json())['error']
    with_service(use)


def test_a_failing_network_is_a_500(caplog):
    class Broken(FakeEngine):
        def answer(self, batch):
            raise ZeroDivisionError

    async def run():
        async with TestClient(TestServer(Service(Broken(), 2, 100).app())) as client:
            response = await client.post('/predict', data=b'4')
            return response.status, (await response.json())['error']
    assert asyncio.run(run()) == (500, 'the service failed; its log says how')
    assert 'ZeroDivisionError' in caplog.text


@pytest.mark.parametrize('host, loopback', [('127.0.0.1', True), ('localhost', True), ('127.1.2.3', True),
                                            ('0.0.0.0', False)])
def test_loopback(host, loopback):
    listener = web.listen(host, 0)
    try:
        assert web.is_loopback(listener) == loopback
        assert web.address(listener).startswith('http://')
    finally:
        listener.close()


@pytest.mark.parametrize('host, match', [('no.such.host.invalid', 'cannot listen on no.such.host.invalid:0'),
                                         ('203.0.113.5', 'cannot listen on 203.0.113.5:0')])
def test_addresses_that_cannot_be_had(host, match):
    with pytest.raises(ValueError, match=match):
        web.listen(host, 0)


def test_a_port_that_is_taken():
    listener = web.listen('127.0.0.1', 0)
    port = listener.getsockname()[1]
    try:
        with pytest.raises(ValueError, match=f'port {port} is taken, choose another with --port'):
            web.listen('127.0.0.1', port)
    finally:
        listener.close()


@pytest.mark.parametrize('package', ['aiohttp', 'prometheus_client'])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, 'mxsimmim.inference.serve')
    with pytest.raises(ValueError, match=rf"needs the package {package}: pip install 'mxsimmim\[deploy\]'"):
        importlib.import_module('mxsimmim.inference.serve')


def test_a_connection_at_the_end_is_answered_or_refused():
    """None is left that is neither read nor closed while the service waits for an upload."""
    def ask(address):
        with socket.create_connection(address, timeout=DEADLINE) as connection:
            connection.sendall(b'GET /healthz HTTP/1.0\r\n\r\n')
            return connection.recv(1000)

    def visit(address):
        ask(address)
        with socket.create_connection(address, timeout=DEADLINE) as upload:
            upload.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n1')
            ask(address)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises((ConnectionRefusedError, ConnectionResetError)):
                while ask(address).startswith(b'HTTP/1.0 200 OK'):
                    pass
            upload.sendall(b'1')
            return upload.recv(1000)

    async def run(listener):
        engine = FakeEngine()
        engine.go.set()
        visited = asyncio.get_running_loop().run_in_executor(None, visit, listener.getsockname())
        service = Service(engine, 2, 100)
        await web.serve(service.app(), listener, service.finish)
        assert (await visited).startswith(b'HTTP/1.1 200 OK')

    for _ in range(5):
        asyncio.run(run(web.listen('127.0.0.1', 0)))


def test_room_is_shared_in_order():
    """What needs all of it waits for those inside, those after it wait for it."""
    room, order, let_go = Room(10), [], threading.Event()

    def use(name, amount, until=None):
        with room.taken(amount):
            order.append(name)
            assert until is None or until.wait(DEADLINE)

    threads = []
    for name, amount, until in (('first', 4, let_go), ('second', 6, let_go), ('large', 10, None), ('small', 1, None)):
        threads.append(threading.Thread(target=use, args=(name, amount, until), daemon=True))
        threads[-1].start()
        threads[-1].join(0.1)
    assert order == ['first', 'second']
    let_go.set()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert order == ['first', 'second', 'large', 'small']
    with room.taken(10):  # nothing is lost
        pass
