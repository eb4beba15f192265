"""What our server makes of commands and pushes, without a network."""
import os
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from mxnet.gluon import Parameter
from support import machine
from support.specs import specs_of

from mxsimmim.config import Config, OptimConfig, TrainConfig, configfile
from mxsimmim.ops import OpBackend
from mxsimmim.optim import AdamW, learning_rates
from mxsimmim.parallel import protocol
from mxsimmim.parallel.server import Server

KEY = bytes(range(32))
SEED = 6
SHAPES = (9, 37), (5,)  # one is long enough for whole vectors, and has a rest
DECAYS = [0.3, 0.0]


class FakeStore:
    """Holds arrays as MXNet's server does: the first push of a key is its value, later ones go to the updater."""

    def __init__(self):
        self.updater, self.arrays = None, {}

    def _set_updater(self, updater):
        self.updater = updater

    def push(self, key, values):
        if key in self.arrays:
            self.updater(key, mx.nd.array(values), self.arrays[key])
        else:
            self.arrays[key] = mx.nd.array(values)

    def __getitem__(self, key):
        return self.arrays[key].asnumpy()


def config(**keys):
    return Config(optim=OptimConfig(**{'schedule': 'cosine', 'warmup': '3 steps', 'base_lr': 1e-1, **keys}),
                  train=TrainConfig(batch_size=512))


def started(workers=1, updates=0, moments=None, servers=1, scales=(1.0, 1.0)):
    """A server that has had the worker's first commands, its store, and its layout."""
    print('seed', SEED)
    rng = np.random.default_rng(SEED)
    store, layout = FakeStore(), protocol.Layout(len(SHAPES), 3, servers)
    server = Server(lambda: store, KEY)
    weights = [rng.standard_normal(shape).astype('float32') for shape in SHAPES]
    server.control(0, protocol.sign({}, 1, KEY).encode())
    for key, weight in enumerate(weights):
        store.push(key, weight)
        for kind in (1, 2, 3):
            store.push(key + kind * layout.stride, np.zeros_like(weight))
    store.push(layout.board, np.zeros(protocol.BOARD_SHAPE))
    content = {'config': configfile.to_dict(config()), 'layout': list(layout), 'decays': DECAYS, 'workers': workers,
               'scales': list(scales), 'per_epoch': 5, 'total': 10, 'updates': updates}
    server.control(0, protocol.sign(content, 2, KEY).encode())
    for key, weight in enumerate(weights):
        for kind in (1, 2):
            store.push(key + kind * layout.stride, moments[key][kind - 1] if moments else np.zeros_like(weight))
        store.push(key + 3 * layout.stride, moments[key][2] if moments else weight)
        store.push(key, moments[key][3] if moments else weight)  # the first one after the command is no gradient
    return server, store, layout, weights, rng


def expected(weights, gradients, *rates, first=0):
    """Loshchilov and Hutter's algorithm 2 in float64: weights and moments after these gradients.

    `rates` are those of all keys, or one list a key.
    """
    (beta1, beta2), eps = OptimConfig().betas, OptimConfig().eps
    results = []
    for key, (w, decay, of_key) in enumerate(zip(weights, DECAYS, zip(*gradients))):
        w, m, v = w.astype('float64'), np.zeros(w.shape), np.zeros(w.shape)
        for t, (g, lr) in enumerate(zip(of_key, rates[key % len(rates)]), first + 1):
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            w = w - lr * decay * w - lr * m / (1 - beta1 ** t) / (np.sqrt(v / (1 - beta2 ** t)) + eps)
        results.append((w, m, v))
    return results


@pytest.mark.parametrize('servers', [1, 3])
@pytest.mark.parametrize('workers', [1, 2])
def test_pushes_are_updates_of_adamw(workers, servers):
    """With n workers, n pushes of a key move its schedule by one step, each at an n-th of the rate.

    What workers pull is n - 1 more of the last Adam step ahead, without decay.
    """
    _, store, layout, weights, rng = started(workers, servers=servers)
    gradients = [[rng.standard_normal(shape).astype('float32') for shape in SHAPES] for _ in range(8)]
    for of_all in gradients:
        for key, gradient in enumerate(of_all):
            store.push(key, gradient)
    rate = learning_rates(config().optim, config().train, 5, 10)
    rates = [rate(k / workers) / workers for k in range(8)]
    assert max(rates) > 0.02  # the warm-up is over: the weights have moved
    (beta1, beta2), eps = OptimConfig().betas, OptimConfig().eps
    for key, (w, m, v) in enumerate(expected(weights, gradients, rates)):
        np.testing.assert_allclose(store[key + 3 * layout.stride], w, rtol=1e-5, atol=1e-6)
        step = rates[-1] * m / (1 - beta1 ** 8) / (np.sqrt(v / (1 - beta2 ** 8)) + eps)
        np.testing.assert_allclose(store[key], w - (workers - 1) * step, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(store[key + layout.stride], m, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(store[key + 2 * layout.stride], v, rtol=1e-4, atol=1e-7)


def test_each_key_has_its_own_rate():
    """A layer's decayed rate is that of a run whose base rate alone is so much smaller, warm-up and end being equal."""
    scales, workers = (0.1, 1.0), 2
    _, store, layout, weights, rng = started(workers, scales=scales)
    gradients = [[rng.standard_normal(shape).astype('float32') for shape in SHAPES] for _ in range(8)]
    for of_all in gradients:
        for key, gradient in enumerate(of_all):
            store.push(key, gradient)
    rates = []
    for scale in scales:
        rate = learning_rates(config(base_lr=scale * config().optim.base_lr).optim, config().train, 5, 10)
        rates.append([rate(k / workers) / workers for k in range(8)])
    assert max(rates[0]) < max(rates[1]) / 5
    for key, (w, _, _) in enumerate(expected(weights, gradients, *rates)):
        np.testing.assert_allclose(store[key + 3 * layout.stride], w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('form', machine.FORMS)
@pytest.mark.parametrize('scales', [(1.0, 1.0), (0.25, 0.5)])
def test_it_computes_what_workers_compute(scales, form):
    """Bit by bit what MXNet's operator in a single process does with the same gradients; to rounding of its rates, and
    where native operators round otherwise."""
    _, store, _, weights, rng = started(scales=scales)
    parameters = {str(key): Parameter(str(key), shape=shape) for key, shape in enumerate(SHAPES)}
    for key, p in enumerate(parameters.values()):
        p.initialize()
        p.set_data(mx.nd.array(weights[key]))
    specs = specs_of(parameters, {str(key): decay for key, decay in enumerate(DECAYS)},
                     {str(key): scale for key, scale in enumerate(scales)})
    adamw = AdamW(specs, config().optim, OpBackend(form))
    rate = learning_rates(config().optim, config().train, 5, 10)
    for update in range(8):
        for key, p in enumerate(parameters.values()):
            gradient = rng.standard_normal(SHAPES[key]).astype('float32')
            store.push(key, gradient)
            p.list_grad()[0][:] = gradient
        adamw.update(update, rate(update), mx.nd.ones((1,)), rate(update, 0))
    for key, p in enumerate(parameters.values()):
        exactly = form == 'reference' and scales[key] == 1
        np.testing.assert_allclose(store[key], p.data().asnumpy(), rtol=0 if exactly else 1e-6)


@pytest.mark.parametrize('workers', [1, 3])
def test_moments_and_the_count_of_updates_can_be_restored(workers):
    """Four updates, then a new server with the weights and moments of the first and four more: as eight in one."""
    _, one, layout, _, rng = started(workers)
    gradients = [[rng.standard_normal(shape).astype('float32') for shape in SHAPES] for _ in range(8)]
    for of_all in gradients[:4]:
        for key, gradient in enumerate(of_all):
            one.push(key, gradient)
    moments = [[one[key + kind * layout.stride] for kind in (1, 2, 3, 0)] for key in range(len(SHAPES))]
    _, two, *_ = started(workers, updates=4, moments=moments)
    for of_all in gradients[4:]:
        for key, gradient in enumerate(of_all):
            one.push(key, gradient)
            two.push(key, gradient)
    for key in one.arrays:
        np.testing.assert_array_equal(one[key], two[key])


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf, 1e20])  # the last one's square is infinite
def test_a_gradient_that_is_not_finite_only_counts(bad):
    """In the schedule and in the bias correction, as it does without servers."""
    _, store, _, weights, rng = started()
    before = {key: store[key] for key in store.arrays}
    gradient = np.ones(SHAPES[0], 'float32')
    gradient[2, 1] = bad
    store.push(0, gradient)
    assert all(np.array_equal(before[key], store[key]) for key in before)
    gradient = rng.standard_normal(SHAPES[0]).astype('float32')
    store.push(0, gradient)
    [(w, _, _)] = expected(weights[:1], [[gradient]], [learning_rates(config().optim, config().train, 5, 10)(1)],
                            first=1)
    np.testing.assert_allclose(store[0], w, rtol=1e-5, atol=1e-6)


def test_the_board_adds_up_exactly_and_knows_staleness():
    """Images beyond 2**24, which float32 cannot count one by one; STALENESS of a push is how many came between."""
    _, store, layout, _, _ = started(workers=2)

    def post(images, seen):
        row = np.zeros(protocol.BOARD_SHAPE)
        row[0, [protocol.UPDATES, protocol.IMAGES, protocol.LOSS, protocol.STALENESS]] = 1, images, 0.5, seen
        store.push(layout.board, row)

    for images, seen in ((2 ** 24, 0), (1, 0), (1, 0), (1, 3)):
        post(images, seen)
    board = store[layout.board].astype('float64').sum(axis=0)
    assert board[protocol.UPDATES] == 4 and board[protocol.IMAGES] == 2 ** 24 + 3 and board[protocol.LOSS] == 2
    assert board[protocol.STALENESS] == 0 + 1 + 2 + 0
    post(1, np.nan)
    assert np.isfinite(store[layout.board]).all()


@pytest.mark.parametrize('body', [None, b'', b'cposix\nmkdir\n(S"poisoned"\ntR.', b'\xff\xfe' * 99, b'x' * (1 << 24),
                                  protocol.sign({}, 9, b'the key of another job').encode(),
                                  protocol.sign({}, 9, KEY).encode()[:-1], protocol.sign({}, 2, KEY).encode()])
def test_commands_that_are_dropped(body, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server, store, *_ = started()
    updater = store.updater
    server.control(0, body)
    assert store.updater is updater and list(tmp_path.iterdir()) == []
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(f'server: dropped a command (head 0, {len(body or b"")} bytes): ') and len(line) < 120


@pytest.mark.parametrize('act', ['store.push(layout.stride + 99, [1, 2]); store.push(layout.stride + 99, [1, 2, 3])',
                                 'store.push(0, [1] * 99)',
                                 'server.control(0, protocol.sign({"layout": 1}, 9, KEY).encode())'])
def test_a_server_that_cannot_go_on_ends(act):
    """ctypes, through which MXNet calls it, would swallow the exception, and workers would wait for ever."""
    code = f'from test_server import *; server, store, layout, *_ = started(); {act}; print("went on")'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=os.path.dirname(__file__), timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 1 and 'Traceback' in done.stderr and 'went on' not in done.stdout
