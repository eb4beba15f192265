"""What is said where memory runs out, in every wording it is met in."""
import errno
import re
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from mxnet.base import MXNetError

from mxsimmim import cli, commands
from mxsimmim.config import Config, configfile
from mxsimmim.data.loader import Loader
from mxsimmim.data.transforms import BrokenImage
from mxsimmim.runtime import memory
from mxsimmim.training import checkpoint

SMALL = {'model': {'img_size': 64, 'patch_size': 8, 'embed_dim': 16, 'depth': 2, 'num_heads': 2},
         'mask': {'patch_size': 8}, 'train': {'batch_size': 32}}


def chained(outer, inner):
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize('error, expected', [
    (MemoryError(), True),
    (np.core._exceptions._ArrayMemoryError((1 << 40,), np.dtype('float32')), True),
    (OSError(errno.ENOMEM, 'Cannot allocate memory'), True),
    (MXNetError('MXNetError: Failed to allocate CPU Memory'), True),
    (MXNetError('MXNetError: cudaMalloc retry failed: out of memory'), True),
    (MXNetError('could not create a memory object'), True),
    (MXNetError('std::bad_alloc'), True),
    (MXNetError('CUDA: Check failed: e == cudaSuccess: CUBLAS_STATUS_ALLOC_FAILED'), True),
    (MXNetError('MXNetError: Resource temporarily unavailable'), True),
    (RuntimeError("can't start new thread"), True),
    (chained(BrokenImage('a.png: MemoryError'), MemoryError()), True),
    (ImportError('libgomp.so.1: cannot allocate memory in static TLS block'), False),
    (OSError('libgomp.so.1: cannot allocate memory in static TLS block'), False),
    (ValueError('out of memory.jpg: not an image'), False),
    (BrokenImage('bad_alloc/a.png: cut short'), False),
    (OSError(errno.ENOSPC, 'No space left on device'), False),
    (MXNetError('Check failed: shape mismatch'), False),
])
def test_what_is_a_shortage(error, expected):
    assert memory.ran_out(error) == expected


HELD = """
import numpy as np
from mxsimmim.runtime import memory

def resident():
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * 4096 / 2 ** 20

memory.share_heap()  # which keeps what is freed
blocks = [np.ones(2 << 20, 'float32') for _ in range(16)]
kept = np.ones(1 << 20, 'float32')
before = resident()
del blocks
if {called}:
    memory.give_back()
print(before - resident())
"""


def outputs(program):
    """What it prints with the call and without."""
    return [subprocess.run([sys.executable, '-c', program.format(called=called)], stdout=subprocess.PIPE,
                           universal_newlines=True, check=True).stdout for called in (True, False)]


def test_freed_memory_goes_back_to_the_system():
    """128 MiB below a block that stays."""
    given, kept = (float(megabytes) for megabytes in outputs(HELD))
    assert given > 120 and abs(kept) < 8


HEAPS = """
import ctypes, os, threading
from mxsimmim.runtime import memory

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
if {called}:
    memory.share_heap()
barrier = threading.Barrier(4)
def work():
    barrier.wait()
    libc.malloc(1 << 16)
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
stream = ctypes.c_void_p(libc.fdopen(1, b'w'))
libc.malloc_info(0, stream)
libc.fflush(stream)
"""


def test_threads_share_a_heap():
    """As glibc tells; without the call, each of four threads has one."""
    heaps = [told.count('<heap ') for told in outputs(HEAPS)]
    assert heaps[0] == 1 < heaps[1]


def test_a_chain_that_goes_round_ends():
    a, b = ValueError('a'), KeyError('b')
    a.__cause__, b.__cause__ = b, a
    assert not memory.ran_out(a)


def raised(function, *arguments):
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


def test_mxnet_and_numpy_themselves():
    """What they raise where there is no room, asynchronously and at once."""
    error = raised(lambda: mx.nd.zeros((1 << 30, 1 << 20)).wait_to_read())
    said = memory.explain(error, 'pretrain', Config(**SMALL))
    assert 'an array of 1,125,899,906,842,624 numbers was asked for' in said
    error = raised(np.empty, (1 << 50,))
    said = memory.explain(error, 'features', Config(**SMALL))
    assert said.startswith('out of memory in features; vit of about 9,216 parameters, 64x64 pixels; an array '
                           '(1125899906842624,) of 8.00 PiB was asked for; this process may have ')
    assert said.endswith(': end other programs, or take a machine with more memory; nothing was changed')


@pytest.mark.parametrize('command, changes, doing, expected', [
    ('pretrain', {}, '', 'train.batch_size=32; this process may have '),
    ('pretrain', {}, '', 'set model.recompute=true (on CPUs), or set train.accumulate=2, which computes the same batch '
     'in 2 parts, or lower train.batch_size or model.img_size; checkpoints saved before are whole'),
    ('finetune', {'train.accumulate': 4, 'model.recompute': True}, '',
     'train.batch_size=32 in 4 parts; this process'),
    ('finetune', {'train.accumulate': 4, 'model.recompute': True}, '', ': set train.accumulate=8, which'),
    ('pretrain', {'train.accumulate': 32}, '', ': set model.recompute=true (on CPUs), or lower train.batch_size'),
    ('pretrain', {}, 'loader._fill', 'out of memory while reading images; '),
    ('pretrain', {}, 'loader._fill', ': lower data.prefetch, data.threads or train.batch_size, or make'),
    ('pretrain', {}, 'build.build_trainer', ': take a smaller model.embed_dim, depth or img_size: training keeps 16 '),
    ('pretrain', {}, 'trainer.save', 'out of memory while saving a checkpoint; '),
    ('serve', {}, '', ': lower --max-batch or --max-bytes; nothing was changed'),
    ('probe', {}, '', ': set data.threads=1; nothing was changed'),
    ('reconstruct', {}, '', ': give fewer images, '),
    ('export', {}, 'quantise.quantised', 'out of memory while quantising; '),
    ('export', {}, '', ': give fewer images to --images if this is --int8, or take'),
])
def test_what_is_said(monkeypatch, command, changes, doing, expected):
    config = configfile.from_dict({**configfile.to_dict(Config(**SMALL)), **changes}, 'here')
    error = MemoryError()
    monkeypatch.setattr(memory, '_doing', lambda _: memory.DOING.get(doing, ''))
    said = memory.explain(error, command, config)
    assert expected in said and '\n' not in said


def test_the_innermost_known_function_counts(monkeypatch):
    """Also in another thread, whose error the consumer raises."""
    class Source:
        __len__ = lambda self: 4  # noqa: E731
        name = staticmethod(str)

        def read(self, index):
            raise MemoryError

    class Transform:
        group = 1

        def allocate(self, count):
            return {'image': np.zeros((count, 1))}

    said = []
    loader = Loader(Source(), Transform(), lambda step: (0, [0, 1]), 0, 2, 1, 100, said.append)
    error = raised(next, loader.iterate(0, 1))
    assert memory.explain(error, 'pretrain', None).startswith('out of memory while reading images; this process')
    assert loader.broken == 0 and said == []


def test_an_image_that_does_not_fit_is_not_broken():
    """Replaced by another it would change the run."""
    class Source:
        __len__ = lambda self: 4  # noqa: E731
        name = staticmethod(str)

        def read(self, index):
            raise BrokenImage('a.png: MemoryError') from MemoryError()

    loader = Loader(Source(), None, None, 0, 1, 1, 100, print)
    assert isinstance(raised(loader._sample, 0, 0), BrokenImage) and loader.broken == 0


def test_a_checkpoint_that_does_not_fit_is_not_passed_over(tmp_path, monkeypatch):
    """Training would go on from an older one."""
    arrays = {'weights': {'a': np.zeros(3, 'float32')}}
    for step in (1, 2):
        checkpoint.save(tmp_path, step, arrays, {}, keep=2)

    def fail(path, framework):
        raise OSError(errno.ENOMEM, 'Cannot allocate memory')
    monkeypatch.setattr('mxsimmim.system.stored.safe_open', fail)
    said = []
    assert memory.ran_out(raised(checkpoint.newest, tmp_path, said.append)) and said == []


@pytest.mark.parametrize('key', ['accumulate', 'recompute'])
def test_the_advice_is_the_same_update(key):
    """train.accumulate and model.recompute are keys that exist; the latter may change when a run goes on."""
    config = Config(**SMALL)
    advised = dict(re.findall(r'set (\S+)=(\w+)', memory.advice('pretrain', '', False, config)))
    assert set(advised) == {'train.accumulate', 'model.recompute'}
    name = next(name for name in advised if name.endswith(key))
    changed = configfile.from_dict({**configfile.to_dict(config), name: {'true': True, '2': 2}[advised[name]]}, 'here')
    assert configfile.differences(config, changed) == ([] if key == 'recompute' else [('train.accumulate', 1, 2)])


def test_the_command_says_it_in_one_line(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise MXNetError('Traceback (most recent call last):\n  File "x.h", line 74\nMXNetError: Failed to allocate')
    monkeypatch.setattr(commands, '_train', fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.yaml').write_text('train: {batch_size: 96}\n')
    assert cli.main(['pretrain', 'a.yaml']) == 1
    said = capsys.readouterr().err
    assert said.startswith('mxsimmim: error: out of memory in pretrain; vit of about 85,') and said.count('\n') == 1
    assert 'train.batch_size=96; ' in said
