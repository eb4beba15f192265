"""Slots in shared memory: which are used, how they grow, and what happens where there is no memory."""
import os
import threading

import mxnet as mx
import numpy as np
import pytest
from support.workers import each

from mxsimmim.parallel import channels, slots
from mxsimmim.parallel.slots import SLOTS, Inbox, Outbox, open_boxes

pytestmark = pytest.mark.skipif(not hasattr(os, 'memfd_create'), reason='memory without a name is of Linux')


@pytest.fixture
def boxes():
    """Both ends, here in one process."""
    outbox = Outbox()
    inbox = Inbox(outbox.place)
    yield outbox, inbox
    outbox.close()
    inbox.close()


def put(outbox, values):
    """The slot in which these values are, or None."""
    array = mx.nd.array(values, dtype=values.dtype)
    taken = outbox.take(array)
    if taken:
        array.copyto(taken[1]).wait_to_read()
    return taken and taken[0]


def ramp(*shape, dtype='float32'):
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def test_the_first_free_slot_is_used(boxes):
    outbox, inbox = boxes
    sent = [ramp(3, 5) + number for number in range(SLOTS)]
    places = [put(outbox, values) for values in sent]
    assert [place.number for place in places] == list(range(SLOTS))
    assert put(outbox, sent[0]) is None  # all are taken
    for place, values in zip(places, sent):
        np.testing.assert_array_equal(inbox.values(place, 'float32', (3, 5)), values)
    inbox.free(places[2])
    inbox.free(places[1])
    assert put(outbox, sent[3]) == places[1] and put(outbox, sent[3]) == places[2]
    assert put(outbox, sent[0]) is None


def test_a_slot_becomes_as_large_as_it_must(boxes):
    """And of another type; a smaller array takes what is there. The file has a page for each size that there was."""
    outbox, inbox = boxes
    offsets = []
    for values in (ramp(4, 5), ramp(7), ramp(2, 3000), ramp(6000), ramp(9, dtype='int32'), ramp(1)):
        place = put(outbox, values)
        np.testing.assert_array_equal(inbox.values(place, values.dtype.name, values.shape), values)
        inbox.free(place)
        assert place.number == 0
        offsets.append(place.offset)
    assert offsets == [0, 0, 4096, 4096, 28672, 32768]


def test_values_stay_until_the_slot_is_freed(boxes):
    outbox, inbox = boxes
    first = put(outbox, ramp(8))
    values = inbox.values(first, 'float32', (8,))
    put(outbox, -ramp(8))
    np.testing.assert_array_equal(values, ramp(8))


def test_what_was_sent_survives_the_sender():
    outbox = Outbox()
    inbox = Inbox(outbox.place)
    place = put(outbox, ramp(5000))
    outbox.close()
    np.testing.assert_array_equal(inbox.values(place, 'float32', (5000,)), ramp(5000))
    inbox.free(place)  # which nobody hears
    inbox.close()


def test_nothing_is_left():
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(3):
        outbox = Outbox()
        inbox = Inbox(outbox.place)
        put(outbox, ramp(100))
        outbox.close()
        inbox.close()
        del outbox, inbox
    mx.nd.waitall()
    assert len(os.listdir('/proc/self/fd')) == before


def test_another_process_is_not_taken_for_the_sender():
    """In a container of its own a process has a number that another one has here."""
    outbox = Outbox()
    process, numbers, (file, pipe) = outbox.place
    for place in ((process, numbers, (file, pipe + '1')), (process, [0, 1], (file, pipe)),
                  (1 << 22, numbers, (file, pipe))):
        with pytest.raises(OSError):
            Inbox(place)
    assert put(outbox, ramp(3)) is None  # nobody has said that a slot is free
    outbox.close()


def neighbours(send, receive):
    def work(control):
        before, after = channels.pipeline_channels(control, mx.cpu())
        answer = receive(before) if before else send(after)
        control.barrier('end')
        (before or after).close()
        return answer
    return each(2, work, axis='pipeline')


def test_without_memory_arrays_go_over_tcp(monkeypatch, capfd):
    """It is said once, not for each array."""
    def fail(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(slots.os, 'posix_fallocate', fail)
    _, received = neighbours(lambda channel: [channel.send(mx.nd.array(ramp(4) + i)) for i in range(3)],
                             lambda channel: [channel.receive().asnumpy().tolist() for _ in range(3)])
    assert received == [(ramp(4) + i).tolist() for i in range(3)]
    said = capfd.readouterr().err
    assert said.count('\n') == 1 and said.startswith('mxsimmim: no shared memory for (4,): [Errno 28] No space left')


def test_where_memory_cannot_be_seen_rank_0_says_why(monkeypatch, capfd):
    def fail(*_):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(slots, 'Inbox', fail)
    found = each(3, lambda control: open_boxes(control, [rank for rank in (0, 1, 2) if rank != control.rank]))
    assert found == [{rank: (None, None) for rank in range(3) if rank != own} for own in range(3)]
    assert capfd.readouterr().err == ('mxsimmim: rank 0 cannot see memory of rank 1: [Errno 13] Permission denied: '
                                      'activations go over TCP\n')


def test_who_has_no_memory_to_share_says_so(monkeypatch, capfd):
    """A middle worker: its neighbours still share nothing with it, and nobody waits."""
    made, own = slots.Outbox, {}

    def work(control):
        own[threading.get_ident()] = control.rank
        return channels.open_boxes(control, [rank for rank in (0, 1, 2) if abs(rank - control.rank) == 1])

    def fail():
        if own[threading.get_ident()] == 1:
            raise PermissionError(1, 'Operation not permitted')
        return made()
    monkeypatch.setattr(slots, 'Outbox', fail)
    assert each(3, work) == [{1: (None, None)}, {0: (None, None), 2: (None, None)}, {1: (None, None)}]
    assert capfd.readouterr().err == ('mxsimmim: rank 1 has nothing to share with rank 0: [Errno 1] Operation not '
                                      'permitted: activations go over TCP\n')


def test_bytes_of_the_connection_are_few():
    """A megabyte an array goes past it: what it carries of each is less than 300 bytes."""
    counted = []

    def send(channel):
        sendall = channel._connection.sendall

        class Counting:
            def __getattr__(self, name):
                return getattr(connection, name)

            def sendall(self, data):
                counted.append(len(data))
                sendall(data)
        connection, channel._connection = channel._connection, Counting()
        for _ in range(20):
            channel.send(mx.nd.ones((1 << 18,)))

    neighbours(send, lambda channel: [channel.receive() for _ in range(20)])
    inline = [size for size in counted if size == 1 << 20]
    assert sum(counted) - sum(inline) < 20 * 300 and len(inline) <= 20 - SLOTS
