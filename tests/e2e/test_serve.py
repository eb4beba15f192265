"""A classifier and a pre-training as a user gets at their answers: `predict` and `serve`."""
import io
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from support.running import BASE, DEADLINE, command, rounds
from support.tiny import TINY

SEED = 21
SHORT = TINY + ['train.length=40', 'optim.warmup=1', 'optim.base_lr=0.1', 'validation.every=100', 'model.drop_path=0']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two runs, classifier and pretraining, and 16 noisy pictures of many shapes."""
    folder = tmp_path_factory.mktemp('serve')
    for name, task in (('classifier', 'finetune'), ('pretraining', 'pretrain')):
        subprocess.run(command(task, BASE, *SHORT, f'name={name}'), cwd=folder, check=True, timeout=DEADLINE,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print('seed', SEED)
    rng = np.random.default_rng(SEED)
    (folder / 'images').mkdir()
    for number in range(16):
        shape = (*rng.integers(20, 60, 2), 3)
        pixels = (rng.random(3) * rng.integers(64, 256, shape)).astype('uint8')
        Image.fromarray(pixels).save(folder / 'images' / f'{number:02d}.png')
    return folder


class Server:
    """`mxsimmim serve` on a free port."""

    def __init__(self, folder, run, *options):
        self.process = subprocess.Popen(command('serve', f'runs/{run}', '--port', 0, *options), cwd=folder,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        killer = threading.Timer(DEADLINE, self.process.kill)
        killer.start()
        self.said = self.process.stdout.readline()
        killer.cancel()
        assert 'http://' in self.said, self.process.communicate()
        address = urlsplit(re.search(r'http://\S+', self.said)[0])
        self.host, self.port = address.hostname, address.port

    def ask(self, method, path, body=None, headers=()):
        """(status, content type, body)."""
        connection = HTTPConnection(self.host, self.port, timeout=DEADLINE)
        try:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            return response.status, response.headers['Content-Type'], response.read()
        finally:
            connection.close()

    def metric(self, name):
        text = self.ask('GET', '/metrics')[2].decode()
        return float(re.search(rf'^{re.escape(name)} (\S+)$', text, re.MULTILINE)[1])

    def end(self):
        """Exit status and what it wrote to standard error."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            _, errors = self.process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, errors


@pytest.fixture(scope='module')
def classifier(folder):
    server = Server(folder, 'classifier', '--max-batch', 8, '--max-bytes', 100_000)
    yield server
    assert server.end() == (0, '')


@pytest.fixture(scope='module')
def predicted(folder):
    """File name -> class -> probability, of `predict`."""
    done = subprocess.run(command('predict', 'runs/classifier', 'images', '--top', 10), cwd=folder, check=True,
                          timeout=DEADLINE, stdout=subprocess.PIPE, universal_newlines=True)
    rows = {}
    for line in done.stdout.splitlines():
        file, *pairs = line.split()
        rows[file] = dict(zip(pairs[::2], map(float, pairs[1::2])))
    return rows


def test_predict(folder, predicted):
    assert list(predicted) == [f'images/{number:02d}.png' for number in range(16)]
    for row in predicted.values():
        assert sorted(row) == [str(digit) for digit in range(10)]
        assert sum(row.values()) == pytest.approx(1, abs=1e-5)
        assert list(row.values()) == sorted(row.values(), reverse=True)
    assert np.ptp([row['0'] for row in predicted.values()]) > 1e-3  # the images matter


def test_predict_goes_on_after_images_it_cannot_read(folder):
    (folder / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\nno')
    done = subprocess.run(command('predict', 'runs/classifier', 'broken.png', 'none.png', 'images/03.png', '--top', 2),
                          cwd=folder, timeout=DEADLINE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1 and re.fullmatch(r'images/03.png( +\d +0\.\d{6}){2}\n', done.stdout)
    assert [line.split(': ')[:3][-1].split()[0] for line in done.stderr.splitlines()] == ['none.png', 'broken.png']


def test_predict_of_a_pretraining(folder):
    done = subprocess.run(command('predict', 'runs/pretraining', 'images'), cwd=folder, timeout=DEADLINE,
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 1 and 'pre-training, which knows no classes' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_sixteen_at_once_share_batches_and_each_gets_its_own(folder, classifier, predicted):
    """The answers are those of `predict`."""
    files = sorted(predicted)
    barrier = threading.Barrier(len(files))

    def post(file):
        body = (folder / file).read_bytes()
        barrier.wait(DEADLINE)
        return classifier.ask('POST', '/predict', body)

    before = classifier.metric('mxsimmim_batch_size_count'), classifier.metric('mxsimmim_batch_size_sum')
    with ThreadPoolExecutor(len(files)) as threads:
        answers = list(threads.map(post, files))
    for file, (status, kind, body) in zip(files, answers):
        assert (status, kind) == (200, 'application/json; charset=utf-8')
        found = {entry['name']: entry['probability'] for entry in json.loads(body)['classes']}
        assert found == pytest.approx(predicted[file], abs=1e-5)
    batches, images = (classifier.metric(f'mxsimmim_batch_size_{what}') - old
                       for what, old in zip(('count', 'sum'), before))
    assert images == 16 and 2 <= batches < 16
    assert classifier.metric('mxsimmim_queue_length') == 0
    assert classifier.metric('mxsimmim_requests_total{path="/predict",status="200"}') >= 16
    assert classifier.metric('mxsimmim_request_seconds_count{path="/predict"}') >= 16


def bomb():
    """A PNG of a few hundred bytes that says it has 10^10 pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 100_000, 100_000, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


def probabilities(answer):
    status, _, body = answer
    assert status == 200, body
    return {entry['name']: entry['probability'] for entry in json.loads(body)['classes']}


@pytest.mark.soak
def test_images_that_are_small_as_files_only(classifier):
    """Thin and huge ones: right answers, and a memory that is bounded however many of them come at once.

    Two of each; four in `make soak`.
    """
    def png(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, 'PNG')
        return file.getvalue()

    middle, thin = np.random.default_rng(SEED).integers(0, 256, (20, 1, 3), 'uint8'), np.zeros((60_000, 1, 3), 'uint8')
    thin[29_990:30_010] = middle
    # 9400 x 9400 pixels of one colour, lossless WebP: 1.4 GB each, two at once 2.8.
    huge = bytes.fromhex('524946461e000000574542505650384c110000002fb7e42d090750b22257a6ff8188e87f0000')
    want = {kind: probabilities(classifier.ask('POST', '/predict', png(pixels))) for kind, pixels in (
        ('thin', middle), ('huge', np.full((9, 9, 3), (200, 100, 50), 'uint8')))}
    before = peak(classifier)
    with ThreadPoolExecutor(8) as threads:
        sent = [('thin', png(thin)), ('huge', huge)] * rounds(2, 4)
        answers = list(threads.map(lambda item: (item[0], classifier.ask('POST', '/predict', item[1])), sent))
    for kind, answer in answers:
        assert probabilities(answer) == pytest.approx(want[kind], abs=1e-5), kind
    assert peak(classifier) - before < 24 * 89_500_000


def peak(server):
    """The most memory that a server has had, bytes."""
    with open(f'/proc/{server.process.pid}/status') as file:
        return 1024 * int(re.search(r'VmHWM:\s*(\d+)', file.read())[1])


@pytest.mark.parametrize('run, turned', [('classifier', True), ('ignoring', False)])
def test_photographs_are_turned_upright_unless_the_run_was_trained_without(folder, run, turned):
    if run == 'ignoring':
        shutil.copytree(folder / 'runs' / 'classifier', folder / 'runs' / 'ignoring')
        config = folder / 'runs' / 'ignoring' / 'config.yaml'
        config.write_text(config.read_text().replace('exif_orientation: null', 'exif_orientation: false'))
    exif, photos = Image.Exif(), folder / f'photos-{run}'
    exif[0x0112] = 6
    photos.mkdir()
    image = Image.open(folder / 'images' / '05.png')
    image.transpose(Image.ROTATE_90).save(photos / 'lying.png', exif=exif)
    image.transpose(Image.ROTATE_90).save(photos / 'lying-plain.png')
    image.save(photos / 'upright.png')
    done = subprocess.run(command('predict', f'runs/{run}', photos, '--top', 10), cwd=folder, check=True,
                          timeout=DEADLINE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    plain, lying, upright = (line.split(None, 1)[1] for line in done.stdout.splitlines())
    assert lying == (upright if turned else plain) and plain != upright
    note = 'EXIF orientation is ignored, as in training: the run has data.exif_orientation=false'
    assert done.stderr.count(note) == (not turned) and len(done.stderr.splitlines()) == (not turned)


def test_reconstruct_and_features_turn_upright(folder, here, monkeypatch):
    monkeypatch.chdir(folder)
    exif, image = Image.Exif(), Image.open(folder / 'images' / '07.png')
    exif[0x0112] = 8
    image.transpose(Image.ROTATE_270).save(folder / 'lying.png', exif=exif)
    found = []
    for file in ('lying.png', 'images/07.png'):
        for what, out in (('reconstruct', 'grid.png'), ('features', 'features.npz')):
            here(what, 'runs/pretraining', file, '-o', out)
        found.append((np.asarray(Image.open(folder / 'grid.png')), np.load(folder / 'features.npz')['features']))
    assert all((lying == upright).all() for lying, upright in zip(*found))


def half_a_jpeg():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (64, 64, 3), 'uint8')).save(file, 'JPEG')
    return file.getvalue()[:600]


@pytest.mark.parametrize('method, path, body, status, sentence', [
    ('POST', '/predict', b'', 400, 'empty'),
    ('POST', '/predict', b'GIF89a' + bytes(50), 400, 'the upload: '),
    ('POST', '/predict', half_a_jpeg(), 400, 'the upload: '),
    ('POST', '/predict', bomb(), 400, 'pixels'),
    ('POST', '/predict', bytes(100_001), 413, '100,000 bytes'),
    ('POST', '/reconstruct', b'', 409, 'POST to /predict'),
    ('GET', '/predict', None, 405, 'takes POST'),
    ('GET', '/../../etc/passwd', None, 404, 'there is no'),
], ids=['empty', 'no image', 'cut short', 'bomb', 'too large', 'wrong task', 'wrong method', 'no such path'])
def test_bad_requests(classifier, method, path, body, status, sentence):
    found, kind, answer = classifier.ask(method, path, body)
    assert found == status and kind.startswith('application/json')
    assert sentence in json.loads(answer)['error']


def test_an_upload_without_length_is_cut_off(classifier):
    """Of one that never ends the server reads no more than it must."""
    with socket.create_connection((classifier.host, classifier.port), timeout=DEADLINE) as connection:
        connection.sendall(b'POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n')
        sent, deadline = 0, time.monotonic() + DEADLINE
        try:
            while time.monotonic() < deadline:
                connection.sendall(b'2710\r\n' + bytes(10_000) + b'\r\n')
                sent += 10_000
        except OSError:  # it hung up
            pass
        assert time.monotonic() < deadline, f'the server still reads after {sent:,} bytes'
    assert classifier.ask('GET', '/healthz')[0] == 200


POST = b'POST /predict HTTP/1.1\r\nHost: x\r\n'


@pytest.mark.parametrize('text', [b'nonsense\r\n\r\n', POST + b'Content-Length: -1\r\n\r\n',
                                  POST + b'Content-Length: 9\r\n\r\nabc',
                                  POST + b'Transfer-Encoding: chunked\r\n\r\n5\r\nab',
                                  POST + b'Transfer-Encoding: chunked\r\n\r\nzz\r\nab',
                                  b'GET / HTTP/1.1\r\nX: ' + bytes(99_999)], ids=range(6))
def test_strangers(classifier, text):
    """Nonsense, and uploads that break off, leave the service as it was, and nothing in its log (see `classifier`)."""
    with socket.create_connection((classifier.host, classifier.port), timeout=DEADLINE) as connection:
        connection.sendall(text)
    assert classifier.ask('GET', '/healthz')[0] == 200


def test_health(classifier):
    assert classifier.ask('GET', '/healthz') == (200, 'application/json; charset=utf-8', b'{"status": "ok"}')
    assert re.fullmatch(r'runs/classifier, step 40: 10 classes, POST /predict, on http://127.0.0.1:\d+\n',
                        classifier.said)


def test_reconstruction_and_the_end(folder):
    """The masked cells of the picture are grey, the end waits for an upload under way."""
    server = Server(folder, 'pretraining', '--host', '0.0.0.0')
    server.host = '127.0.0.1'
    body = (folder / 'images' / '05.png').read_bytes()
    try:
        status, kind, png = server.ask('POST', '/reconstruct', body)
        assert (status, kind) == (200, 'image/png')
        picture = np.asarray(Image.open(io.BytesIO(png)))
        middle = picture[-98:-2, picture.shape[1] // 3:-picture.shape[1] // 3]
        assert (middle == 128).all(axis=2).mean() == pytest.approx(0.6, abs=0.08)
        assert server.ask('POST', '/reconstruct', body)[2] == png  # the mask is always the same
        assert server.ask('POST', '/predict', body)[0] == 409

        with socket.create_connection((server.host, server.port), timeout=DEADLINE) as connection:
            connection.sendall(b'POST /reconstruct HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n' % len(body)
                               + body[:-9])
            before = server.metric('mxsimmim_requests_total{path="/reconstruct",status="200"}')
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + DEADLINE
            while time.monotonic() < deadline:  # until it takes no new connections
                try:
                    server.ask('GET', '/healthz')
                except OSError:
                    break
                time.sleep(0.02)
            assert before == 2 and server.process.poll() is None
            connection.sendall(body[-9:])
            answer = b''
            for part in iter(lambda: connection.recv(65536), b''):
                answer += part
        assert answer.startswith(b'HTTP/1.1 200 OK') and answer.endswith(png)
        server.process.wait(DEADLINE)  # a second signal would end it by force
    finally:
        status, errors = server.end()
    assert status == 0
    assert len(errors.splitlines()) == 1 and 'whoever reaches 0.0.0.0 can use this service' in errors


def test_a_port_that_is_taken(folder, classifier):
    done = subprocess.run(command('serve', 'runs/classifier', '--port', classifier.port), cwd=folder, timeout=DEADLINE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr == (f'mxsimmim: error: cannot listen on 127.0.0.1:{classifier.port}: port {classifier.port} is '
                           'taken, choose another with --port\n')
