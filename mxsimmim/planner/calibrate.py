"""Measures this machine for the planner: half blocks by width, memory, loopback. Takes less than a minute.

One process a device measures at the same time as the others, on the cores that a worker would have, so that what they
share is shared. A half block's time is the median of several, others are the least, and where other programs have taken
the cores meanwhile, that of the CPU counts.
"""
import contextlib
import io
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from ..config import Config, configfile
from ..runtime import environment, facts, memory
from ..system.paths import BUILT_IN
from .cluster import Cluster
from .costs import form_of, weight_bytes
from .model import Part, segments

if TYPE_CHECKING:
    from ..ops import OpBackend

SHARDS = (1, 2, 4, 8)  # parts into which an MLP's hidden columns are divided
SECONDS, REPEATS = 1.0, 100  # at most, of one measurement
WAITING = 1.05  # seconds of a call over those of its CPUs
ROWS = 800  # tokens of a measured half block, or one image's
RESIDENT = 0.36e9  # bytes of a process with MXNet and all that a run imports: 0.27 to 0.36, by machine (measured)
LATER = 0.045e9  # bytes that a run imports and has besides MXNet: threads, connections, compiled kernels (measured)
COLD = 128 << 20  # bytes of weights and activations that a measurement goes through in turn
CPU = Cluster(kind='cpu')
DEADLINE = 300  # seconds in which all must be done
CHUNK, TOTAL = 1 << 20, 256 << 20  # bytes through the loopback, at once and in all


def calibrate(config: Config, devices: int) -> Cluster:
    """Measure this machine as one host whose cores `devices` workers divide, for the network of `config`.

    Raises:
        ValueError: a process that measures has failed; the text has its last words.
    """
    code = 'from mxsimmim.planner import calibrate; calibrate.answer()'
    children = [subprocess.Popen([sys.executable, '-c', code, str(place), str(devices)], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
                for place in range(devices)]
    try:
        for child in children:
            assert child.stdin
            with contextlib.suppress(BrokenPipeError):  # `_read` says what became of it
                child.stdin.write(json.dumps(configfile.to_dict(config)))
                child.stdin.close()
            child.stdin = None
        found = [_read(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return machine(found, environment.cores())


def machine(found: Sequence[Mapping[str, Any]], cores: int) -> Cluster:
    """Return a host of so many cores, whose devices have measured what `measure` does, all at the same time."""
    # Where they are more than the cores, each was counted the seconds of the CPU that it had.
    devices, share = len(found), min(1.0, cores / len(found))
    stream, call, own, spread = (statistics.median(each[name] for each in found)
                                 for name in ('stream', 'call', 'resident', 'spread'))
    rates = tuple(((kind, width, shard), share * statistics.median(each['rates'][number][3] for each in found))
                  for number, (kind, width, shard, _) in enumerate(found[0]['rates']))
    bandwidth, latency = loopback()
    total, _ = facts._memory()
    images = share * sum(each['images'] for each in found) or math.inf
    speed = statistics.median(rate for (kind, _, shard), rate in rates if (kind, shard) == ('mlp', 1))
    return Cluster(1, devices, total * facts.GIB / devices, speed, bandwidth, latency, bandwidth, latency,
                   share * stream, call / share, images, kind='cpu', resident=own, share=share, spread=spread,
                   rates=rates)


def _read(child: 'subprocess.Popen[str]') -> Dict[str, Any]:
    """Return what a process has measured."""
    try:
        out, err = child.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        raise ValueError(f'--calibrate: not done after {DEADLINE} s: state --speed instead') from None
    lines = [line for line in out.splitlines() if line.startswith('{')]
    if child.returncode or not lines:
        raise ValueError(f'--calibrate: a process that measures ended with status {child.returncode} '
                         f'({" ".join(err.split()[-30:])}): state --speed instead')
    answer: Dict[str, Any] = json.loads(lines[-1])
    return answer


def loopback() -> Tuple[float, float]:
    """Return bytes/s that this machine sends to itself through TCP, and seconds of a small message."""
    listener = socket.create_server(('127.0.0.1', 0))
    sender = socket.create_connection(listener.getsockname())
    receiver, _ = listener.accept()
    for end in (sender, receiver):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    block, room = bytes(CHUNK), bytearray(CHUNK)
    with listener, sender, receiver:
        def send() -> None:
            for _ in range(TOTAL // CHUNK):
                sender.sendall(block)
        thread = threading.Thread(target=send, daemon=True)
        began, left = time.perf_counter(), TOTAL
        thread.start()
        while left:
            left -= receiver.recv_into(room)
        seconds = time.perf_counter() - began
        thread.join()

        def there_and_back() -> None:
            sender.sendall(b'?')
            receiver.recv(1)
            receiver.sendall(b'!')
            sender.recv(1)
        return TOTAL / seconds, least(there_and_back, 0.1, 1000) / 2


def least(function: Callable[[], Any], seconds: float = SECONDS, repeats: int = REPEATS) -> float:
    """Return the least seconds of a call, the first one left out, of as many as fit but two at least."""
    function()
    found: List[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 2 or len(found) < repeats and time.perf_counter() < end:
        found.append(undisturbed(function))
    return min(found)


def typical(function: Callable[[], Any]) -> Tuple[float, float]:
    """Return the median seconds of a call, as many blocks of a step take on average, and their spread as a part of it.

    The first call is left out. The spread is that of a normal distribution with the same quartiles, 1.35 of which are
    between these.
    """
    function()
    found: List[float] = []
    end = time.perf_counter() + SECONDS
    while len(found) < 3 or time.perf_counter() < end:
        found.append(undisturbed(function))
    first, median, last = statistics.quantiles(found, n=4, method='inclusive')
    return median, (last - first) / 1.35 / median


def undisturbed(function: Callable[[], Any]) -> float:
    """Return the seconds of a call, or those of the CPU for each of its threads where that says that others ran.

    Threads also wait for each other: up to `WAITING` of a call's seconds nobody else is blamed for.
    """
    threads = int(os.environ.get('OMP_NUM_THREADS') or 1)
    began, cpu = time.perf_counter(), time.process_time()
    function()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    return min(wall, WAITING * cpu / threads)


def answer() -> None:
    """Measure as one of the processes of `calibrate`, which gives the configuration, and print it as JSON."""
    config = configfile.from_dict(json.loads(sys.stdin.read()), '--calibrate')
    place, devices = map(int, sys.argv[1:3])
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, environment.cpus_of_part(place, devices))
    environment.prepare(config.runtime)
    print(json.dumps(measure(config)), flush=True)


def measure(config: Config) -> Dict[str, Any]:
    """Measure what a device's cores compute: JSON-ready, for `machine`."""
    import mxnet as mx

    from ..ops import select_backend
    backend, own = select_backend(config.runtime.precision, [mx.cpu()]), resident()
    wide, narrow = mx.nd.ones((1 << 23,)), mx.nd.ones((1,))
    others = wide.copy(), wide.copy()

    def add() -> None:
        mx.nd.elemwise_add(wide, others[0], out=others[1]).wait_to_read()

    def small() -> None:
        for _ in range(100):
            mx.nd.elemwise_add(narrow, narrow, out=narrow)
        narrow.wait_to_read()
    stream, call = 3 * 4 * wide.size / least(add), least(small, repeats=300) / 100
    rates, spreads = [], []
    for half in halves(config):
        part, images = half.part, max(1, round(ROWS / half.tokens))
        for shard in (shard for shard in SHARDS if half.hidden % shard == 0) if half.hidden else SHARDS[:1]:
            seconds, spread = typical(_pass(half, images, shard, backend))
            spreads.append(spread)
            fixed = 2 * weight_bytes(part, shard, False) / stream + 2 * call
            flops = 2 * images * (part.forward + part.backward) / shard
            rates.append((part.kind, part.width, shard, flops / max(seconds - fixed, 0.1 * seconds)))
    return {'stream': stream, 'call': call, 'rates': rates, 'spread': statistics.median(spreads),
            'images': _images(config), 'resident': own}


def resident() -> float:
    """Return the bytes of a process that has MXNet, and no network yet, plus what a run adds without one."""
    import mxnet as mx
    mx.nd.dot(mx.nd.ones((64, 64)), mx.nd.ones((64, 64))).wait_to_read()
    return memory.resident() + LATER if memory.resident() else RESIDENT


def _images(config: Config) -> float:
    """Return JPEGs of 500 x 375 that this process's cores decode, crop and mask in a second; 0 where they need not."""
    import numpy as np
    from PIL import Image

    from ..data.transforms import PretrainTransform, decode
    if BUILT_IN.fullmatch(config.data.path):
        return 0.0
    rng, file = np.random.default_rng(0), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, 'JPEG', quality=90)
    transform = PretrainTransform(config.data, config.mask, config.model)
    threads = int(os.environ['OMP_NUM_THREADS'])
    return threads / least(lambda: transform(decode(file.getvalue(), 'a JPEG'), rng), 0.3, 100)


class Half(NamedTuple):
    """A half block that is measured: attention of `tokens` to `side`^2 of a window, or an MLP of `hidden` columns."""
    part: Part
    tokens: int
    heads: int = 0
    window: int = 0  # side of a window, 0 for all tokens
    hidden: int = 0
    post_norm: bool = False  # SwinV2's, normalised at the end


def halves(config: Config) -> Iterator[Half]:
    """Yield one half block of each kind and width, of which all tokens are computed."""
    model = config.model
    all_tokens = config.mask.model_copy(update={'patch_size': 1})
    first = {(part.kind, part.width): part for segment in segments(model, all_tokens, form_of(config, CPU))
             for part in segment if part.is_divided}
    for (kind, width), part in first.items():
        stage, tokens = int(width // model.embed_dim).bit_length() - 1, round(part.output / width)
        if kind == 'mlp':
            yield Half(part, tokens, hidden=int(width * model.mlp_ratio), post_norm=model.type == 'swinv2')
        else:
            window = 0 if model.type == 'vit' else min(model.window_size, model.grid >> stage)
            yield Half(part, tokens, model.heads[stage], window, post_norm=model.type == 'swinv2')


def _pass(half: Half, images: int, shard: int, backend: 'OpBackend') -> Callable[[], None]:
    """Return a function that runs a half block forward and backward, as a cached graph, and waits for it."""
    import mxnet as mx
    from mxnet import autograd
    from mxnet.gluon import HybridBlock

    from ..ops import Windows
    width, hidden, side = half.part.width, half.hidden // shard, round(half.tokens ** 0.5)
    eps = 1e-6
    if half.hidden:
        shapes = [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,), (width,)]

        def run(F: Any, x: Any, n1: Any, n2: Any, w1: Any, b1: Any, w2: Any, b2: Any, more: Any) -> Any:
            if half.post_norm:
                y = backend.linear(F, x, w1, b1, gelu=True, units=hidden)
                y = backend.linear(F, y, w2, b2, units=width)
                return x + backend.layer_norm(F, y, n1, n2, eps, width=width)
            return backend.mlp(F, x, (n1, n2), (w1, b1), (w2, b2), more, width=width, hidden=hidden, eps=eps)
    else:
        seen = half.window ** 2 or half.tokens
        windows = Windows(side, side, half.window) if half.window else None
        shapes = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
                  (1, half.heads, seen, seen)]

        def run(F: Any, x: Any, n1: Any, n2: Any, w1: Any, b1: Any, w2: Any, b2: Any, more: Any) -> Any:
            if half.post_norm:
                assert windows
                scale = F.slice(more, begin=(0, 0, 0, 0), end=(1, half.heads, 1, 1))
                y = backend.cosine_attention(F, x, (w1, b1), (w2, b2), F.reshape(scale, shape=(half.heads, 1, 1)), more,
                                             width=width, heads=half.heads, size=width // half.heads, windows=windows)
                return x + backend.layer_norm(F, y, n1, n2, eps, width=width)
            return backend.attention(F, x, (n1, n2), (w1, b1), (w2, b2), more, width=width, heads=half.heads,
                                     tokens=half.tokens, eps=eps, windows=windows)

    class Graph(HybridBlock):
        def hybrid_forward(self, F: Any, x: Any, *arrays: Any) -> Any:
            return run(F, x, *arrays)
    block = Graph()
    block.hybridize(static_alloc=True, backward_bulk_size=1)
    shapes = [(images, half.tokens, width), *shapes]
    copies = min(8, max(1, COLD // sum(4 * math.prod(shape) for shape in shapes)))
    sets = [[mx.nd.random.normal(scale=0.02, shape=shape) for shape in shapes] for _ in range(copies)]
    for array in itertools.chain(*sets):
        array.attach_grad()
    turns = itertools.cycle(sets)  # as a step uses other weights in each block, which are in no cache

    def call() -> None:
        with autograd.record():
            y = block(*next(turns))
        y.backward()
        mx.nd.waitall()
    return call
