"""What workers tell each other before the first step, in bytes on their connections."""
import os
import socket
import struct

import pytest
from support.workers import each

from mxsimmim.config import Config
from mxsimmim.tasks.registry import TASKS
from mxsimmim.tasks.task import check_same_job

WORKERS = 4
MANY = 1_281_000


class Names:
    """A source of so many images, without one."""

    def __init__(self, count, folder='n'):
        self._count, self._folder = count, folder

    def __len__(self):
        return self._count

    def name(self, index):
        return f'/images/train/{self._folder}{index // 1281:08d}/{self._folder}{index // 1281:08d}_{index}.JPEG'


def task(monkeypatch, *names):
    monkeypatch.setattr('mxsimmim.tasks.pretrain.open_source', lambda _path: Names(*names))
    config = Config(data={'path': '/images/train', 'val_fraction': 0})
    return config, TASKS['pretrain'](config)


def moved(connection):
    """Bytes that a TCP connection has sent and received: tcpi_bytes_acked and tcpi_bytes_received of linux/tcp.h."""
    return sum(struct.unpack_from('=QQ', connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 120))


def start(monkeypatch, count):
    """Bytes that each worker has moved when all know that they train on the same images."""
    config, ours = task(monkeypatch, count)

    def run(control):
        before = moved(control._connection)
        check_same_job(config, ours, control)
        return moved(control._connection) - before
    return each(WORKERS, run)


def test_bytes_do_not_grow_with_the_images(monkeypatch):
    """With 64 workers, rank 0, which sends them all the same, stays below 1 MB, too."""
    few, many = (start(monkeypatch, count) for count in (1281, MANY))
    print('bytes', few, many)
    assert max(many) < 1_000_000 / 64
    assert max(abs(ours - theirs) for ours, theirs in zip(few, many)) < 100


@pytest.mark.parametrize('others', [(MANY + 1,), (MANY, 'm'), (MANY, os.fsdecode(b'\xff'))])
def test_other_images_are_seen(monkeypatch, others):
    """Other names as well as another number."""
    config, ours = task(monkeypatch, MANY)
    _, theirs = task(monkeypatch, *others)
    results = each(2, lambda control: check_same_job(config, theirs if control.rank else ours, control))
    assert results[0] is None and 'rank 1 finds 1,281,00' in str(results[1])
