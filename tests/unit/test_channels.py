"""Arrays between neighbours of a pipeline: exactly, in order, with deadlines, and only among the job's workers."""
import socket
import threading
import time

import mxnet as mx
import numpy as np
import pytest
from support.workers import KEY, each

from mxsimmim.parallel import channels
from mxsimmim.parallel.channels import local_channel, pipeline_channels
from mxsimmim.parallel.control import ControlError

DEPTH, IMAGES, WIDTH, MICRO_BATCHES = 3, 4, 5, 6


@pytest.fixture(params=['shared memory', 'tcp'])
def way(request, monkeypatch):
    """How arrays go between two workers, here of one host."""
    if request.param == 'tcp':
        monkeypatch.setattr(channels, 'open_boxes', lambda *_: {})


def weights_and_images(seed=7):
    print(f'seed {seed}')
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(DEPTH, WIDTH, WIDTH)).astype('float32'),
            rng.normal(size=(MICRO_BATCHES, IMAGES, WIDTH)).astype('float32'))


def stage(weight, before, after, images):
    """Gradient of one stage's weight, all micro-batches forward before the first goes backward."""
    weight = mx.nd.array(weight)
    weight.attach_grad('add')
    passes = []
    for values in images:
        given = before.receive() if before else mx.nd.array(values)
        given.attach_grad()
        with mx.autograd.record():
            made = mx.nd.tanh(mx.nd.dot(given, weight))
            made = made if after else (made * made).sum()
        passes.append((given, made))
        if after:
            after.send(made)
    for given, made in passes:
        made.backward(after.receive() if after else None)
        if before:
            before.send(given.grad)
    return weight.grad.asnumpy()


@pytest.fixture(scope='module')
def expected():
    """Gradients of one device, without any channel."""
    weights, images = weights_and_images()
    weights = [mx.nd.array(weight) for weight in weights]
    for weight in weights:
        weight.attach_grad('add')
    for values in images:
        with mx.autograd.record():
            made = mx.nd.array(values)
            for weight in weights:
                made = mx.nd.tanh(mx.nd.dot(made, weight))
            loss = (made * made).sum()
        loss.backward()
    return np.stack([weight.grad.asnumpy() for weight in weights])


@pytest.mark.usefixtures('way')
def test_three_workers_make_the_gradients_of_one_device(expected):
    def work(control):
        weights, images = weights_and_images()
        before, after = pipeline_channels(control, mx.cpu())
        assert (before is None, after is None) == (control.rank == 0, control.rank == DEPTH - 1)
        gradient = stage(weights[control.rank], before, after, images)
        control.barrier('end')
        for channel in filter(None, (before, after)):
            channel.close()
        return gradient
    np.testing.assert_array_equal(np.stack(each(DEPTH, work, axis='pipeline')), expected)


def test_three_devices_make_the_gradients_of_one(expected):
    """Of one worker: stage by stage, as its program would do."""
    weights, images = weights_and_images()
    contexts = [mx.cpu(n) for n in range(DEPTH)]
    ends = [local_channel(*pair) for pair in zip(contexts, contexts[1:])]
    weights = [mx.nd.array(weight, context) for weight, context in zip(weights, contexts)]
    for weight in weights:
        weight.attach_grad('add')
    for values in images:
        passes, given = [], mx.nd.array(values, contexts[0])
        for n, weight in enumerate(weights):
            if n:
                given = ends[n - 1][1].receive()
                assert given.context == contexts[n]
            given.attach_grad()
            with mx.autograd.record():
                made = mx.nd.tanh(mx.nd.dot(given, weight))
                made = (made * made).sum() if n == DEPTH - 1 else made
            passes.append((given, made))
            if n < DEPTH - 1:
                ends[n][0].send(made)
        for n in reversed(range(DEPTH)):
            given, made = passes[n]
            made.backward(ends[n][0].receive() if n < DEPTH - 1 else None)
            if n:
                ends[n - 1][1].send(given.grad)
    np.testing.assert_array_equal(np.stack([weight.grad.asnumpy() for weight in weights]), expected)


def pair(first, second):
    """What both ends of a channel between two workers do; the results, or exceptions."""
    def work(control):
        before, after = pipeline_channels(control, mx.cpu())
        try:
            answer = (second if before else first)(before or after)
            control.barrier('end')
            return answer
        finally:
            (before or after).close()
    return each(2, work, axis='pipeline')


@pytest.mark.usefixtures('way')
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64', 'int32', 'uint8'])
def test_values_arrive_exactly_and_in_order(dtype):
    rng = np.random.default_rng(3)
    sent = [rng.integers(0, 200, shape).astype(dtype) / np.array(7, dtype) for shape in [(1,), (3, 4), (2, 3, 5)]]
    sent = [array.astype(dtype) for array in sent + [rng.integers(0, 99, (1 << 20,))]]  # more than a socket takes

    def send(channel):
        for array in sent:
            channel.send(mx.nd.array(array, dtype=dtype))

    _, received = pair(send, lambda channel: [channel.receive() for _ in sent])
    for array, expected in zip(received, sent):
        assert array.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(array.asnumpy(), expected)


@pytest.mark.usefixtures('way')
def test_what_is_written_after_sending_does_not_travel():
    def send(channel):
        array = mx.nd.ones((1000,))
        for value in range(20):
            array[:] = value
            channel.send(array)

    _, received = pair(send, lambda channel: [channel.receive().asnumpy() for _ in range(20)])
    np.testing.assert_array_equal(np.stack(received), np.repeat(np.arange(20)[:, None], 1000, 1))


@pytest.mark.usefixtures('way')
def test_both_ends_send_much_before_they_receive():
    """Neither waits for the other to read."""
    def both(channel):
        for value in range(8):
            channel.send(mx.nd.full((1 << 18,), value))
        return [channel.receive()[0].asscalar() for _ in range(8)]
    assert pair(both, both) == [list(range(8))] * 2


@pytest.mark.usefixtures('way')
def test_who_ends_is_missed_and_who_is_late_is_named(capfd):
    def ends(channel):
        channel.send(mx.nd.ones((2,)))
        channel.close()
        raise RuntimeError('the cause')

    def waits(channel):
        assert channel.receive().asnumpy().tolist() == [1, 1]
        for _ in range(2):  # also the second time
            with pytest.raises(ControlError, match='channel: rank 0 has ended: its log says why'):
                channel.receive()
        with pytest.raises(ControlError, match='rank 0 has ended'):
            channel.send(mx.nd.ones((2,)))

    began = time.monotonic()
    pair(ends, waits)
    assert time.monotonic() - began < 10

    def late(channel):
        with pytest.raises(ControlError, match=r'channel: rank \d has sent nothing for 0.2 s: its log says'):
            channel.receive(0.2)
        return 'missed'
    assert pair(late, late) == ['missed'] * 2


def test_a_stranger_is_turned_away(monkeypatch):
    """Who connects first without the key does not get in, and the neighbour still does."""
    monkeypatch.setattr(channels, 'GREETING', 0.5)
    heard = []

    def work(control):
        def gather(name, value):
            places = all_gather(name, value)
            if name == 'channels' and control.rank == 1:
                stranger = socket.create_connection(places[0], 10)
                stranger.sendall(b'0' * 32)
                heard.append(len(stranger.recv(16)))
                heard.append(stranger.recv(1))
            return places
        all_gather, control.all_gather = control.all_gather, gather
        before, after = pipeline_channels(control, mx.cpu())
        if after:
            after.send(mx.nd.ones((3,)))
        answer = before.receive().asnumpy().tolist() if before else None
        control.barrier('end')
        (before or after).close()
        return answer
    assert each(2, work, axis='pipeline') == [None, [1, 1, 1]]
    assert heard == [16, b'']


def test_what_is_not_signed_is_refused():
    ours, theirs = socket.socketpair()
    channel = channels.SocketChannel(ours, KEY, 4, mx.cpu(), True)
    head = b'["float32", [2]]'
    theirs.sendall(len(head).to_bytes(2, 'big') + head + bytes(32) + bytes(8) + bytes(32))
    with pytest.raises(ControlError, match='channel: what arrives is not signed by rank 4'):
        channel.receive(10)
    channel.close()
    theirs.close()
    assert not [thread for thread in threading.enumerate() if thread.name == 'channel to rank 4']


@pytest.mark.usefixtures('way')
def test_sending_does_not_wait_for_computing():
    """What is sent takes 0.2 s or more to compute; `send` returns before half of that."""
    def sends(channel):
        weight = mx.nd.ones((1 << 8, 1 << 8)) / (1 << 8)
        weight.wait_to_read()
        began, y = time.monotonic(), weight
        for _ in range(400):
            y = mx.nd.dot(y, weight)
        channel.send(y)
        return time.monotonic() - began, began

    (issued, began), (values, arrived) = pair(sends, lambda channel: (channel.receive().asnumpy(), time.monotonic()))
    np.testing.assert_allclose(values, 1 / (1 << 8), rtol=1e-4)
    assert issued < 0.5 * (arrived - began)
