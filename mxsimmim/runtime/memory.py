"""Where memory runs out: whether an error says so; what was being done, with which sizes, and what to lower."""
import contextlib
import ctypes
import errno
import re
import resource
from pathlib import Path
from types import TracebackType
from typing import Iterator, List, Optional, Tuple

from ..config import Config, ModelConfig
from . import environment

# As MXNet's storage, cudaMalloc, the C++ library, oneDNN, OpenCV, ONNX Runtime and the kernel say it. MXNet counts
# elements in 32 bits, and an array of more is too large for most machines, too.
SIGNS = re.compile(
    r'failed to allocate|out[ _]of[ _]memory|cannot allocate memory(?! in static TLS)|bad[ _]alloc|alloc_failed'
    r'|could not create a memory|insufficient memory|larger than 2\^31 elements', re.IGNORECASE)
# For want of memory for its stack, or of a number for it: as Python and the C++ library say it.
THREADS = re.compile("can't start new thread|resource temporarily unavailable", re.IGNORECASE)
# Kinds of error whose text is what a library says. A ValueError's may be a user's file name.
FOREIGN = ('MXNetError', 'RuntimeError', 'SafetensorError', 'RuntimeException', 'Fail', 'error', 'OSError')

# What the functions of this package do in which it may happen.
DOING = {'build.build_trainer': 'making the network', 'trainer.fit': 'training',
         'trainer.validate': 'measuring on the held-out images', 'trainer.save': 'saving a checkpoint',
         'loader._fill': 'reading images', 'trained.load_run': 'loading the network',
         'start.conclude': 'measuring on the held-out images', 'quantise.quantised': 'quantising',
         'graph.trace': 'tracing the network'}
TRAINING = ('pretrain', 'finetune')
# M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h: one heap, for large blocks, too, that never shrinks.
MALLOC = (-8, 1), (-3, 1 << 30), (-1, 2 ** 31 - 1)
HERE = Path(__file__).parents[1]


def share_heap() -> None:
    """Has glibc serve all threads from one heap, and keep what they free for the next that asks.

    By itself it has a heap for each thread, of which none can use what another has kept: arrays that come and go with
    every step then need more than there are at any time. Threads that run already keep their heap. Another C library
    is left alone.
    """
    with contextlib.suppress(AttributeError):
        for parameter, value in MALLOC:
            ctypes.CDLL(None).mallopt(parameter, value)


def give_back() -> None:
    """Has glibc give what its heaps keep of freed memory back to the system."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    words = environment.contents(Path('/proc/self/statm')).split()
    return int(words[1]) * resource.getpagesize() if len(words) > 1 else 0


def ran_out(error: Optional[BaseException]) -> bool:
    """Whether memory, or room for a thread, was what an error, or one that it came from, lacked."""
    return any(_lacks(link) for link in _chain(error))


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    seen: List[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _lacks(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error)
    return type(error).__name__ in FOREIGN and bool(SIGNS.search(text) or THREADS.search(text))


def explain(error: BaseException, command: str, config: Optional[Config]) -> str:
    """One line about an error for which `ran_out`, in a command with this configuration (None: it is not known)."""
    cause = next(link for link in _chain(error) if _lacks(link))
    doing, threads = _doing(error), bool(THREADS.search(str(cause)))
    what = ('no room for another thread' if threads else 'out of memory') + (
        f' while {doing}' if doing else f' in {command}')
    numbers = ([sizes(command, config)] if config else []) + _asked(cause) + [f'this process may have {_limit()}']
    return f'{"; ".join([what] + numbers)}: {advice(command, doing, threads, config)}'


def _doing(error: BaseException) -> str:
    """What the innermost function that has a name in `DOING` does."""
    found = ''
    for link in reversed(list(_chain(error))):
        trace: Optional[TracebackType] = link.__traceback__
        while trace:
            code = trace.tb_frame.f_code
            file = Path(code.co_filename)
            if HERE in file.parents:
                found = DOING.get(f'{file.stem}.{code.co_name}', found)
            trace = trace.tb_next
    return found


def sizes(command: str, config: Config) -> str:
    """The numbers that memory depends on."""
    model, train = config.model, config.train
    network = f'{model.type} of about {parameters(model):,} parameters, {model.size[0]}x{model.size[1]} pixels'
    if command not in TRAINING:
        return network
    parts = f' in {train.accumulate} parts' if train.accumulate > 1 else ''
    return f'{network}, train.batch_size={train.batch_size}{parts}'


def parameters(model: ModelConfig) -> int:
    """Those of the encoder's products, which are nearly all."""
    width, total = model.embed_dim, 3 * model.patch_size ** 2 * model.embed_dim
    for blocks in (model.depth,) if model.type == 'vit' else model.depths:
        total += blocks * int(width * width * (4 + 2 * model.mlp_ratio))
        width *= 2
    return total


def _asked(cause: BaseException) -> List[str]:
    """How much was asked for, where the error says it."""
    text = str(cause)
    numpy = re.search(r'Unable to allocate ([\d.]+ \w+) for an array with shape (\(.*?\))', text)
    if numpy:
        return [f'an array {numpy[2]} of {numpy[1]} was asked for']
    elements = re.search(r'\((\d{10,}) vs\. \d+\)', text)
    return [f'an array of {int(elements[1]):,} numbers was asked for, 2,147,483,646 are the most'] if elements else []


def _limit() -> str:
    """What of memory this process may use, and who says so."""
    found: List[Tuple[int, str]] = []
    match = re.search(r'^MemTotal:\s*(\d+)', environment.contents(Path('/proc/meminfo')), re.MULTILINE)
    if match:
        found.append((int(match[1]) * 1024, "the machine's"))
    found += [(int(words[0]), "its container's or cgroup's limit") for name in ('memory.max', 'memory.limit_in_bytes')
              for words in environment.cgroup_values(Path('/'), name) if words[0] != 'max']
    for kind, who in ((resource.RLIMIT_AS, 'of addresses: `ulimit -v`'),
                      (resource.RLIMIT_DATA, 'of data: `ulimit -d`')):
        space = resource.getrlimit(kind)[0]
        if space != resource.RLIM_INFINITY:
            found.append((space, who))
    size, who = min(found, default=(0, ''))
    return f'{size / 1e9:,.1f} GB ({who})' if found else 'an unknown amount'


def advice(command: str, doing: str, threads: bool, config: Optional[Config]) -> str:
    """What to lower, and what became of the work."""
    if command not in TRAINING:
        ways = {'serve': 'lower --max-batch or --max-bytes', 'probe': 'set data.threads=1',
                'reconstruct': 'give fewer images, since all go into one picture',
                'export': 'give fewer images to --images if this is --int8, or take a machine with more memory'}
        way = 'end other programs, or raise the limits (`ulimit -u`, `ulimit -v`)' if threads else ways.get(
            command, 'end other programs, or take a machine with more memory')
        return f'{way}; nothing was changed'
    if threads:
        way = 'lower data.threads and runtime.threads, or raise the limits (`ulimit -u`, `ulimit -v`, the container\'s)'
    elif doing == 'reading images':
        way = 'lower data.prefetch, data.threads or train.batch_size, or make the largest images smaller'
    elif doing == 'making the network':
        way = 'take a smaller model.embed_dim, depth or img_size: training keeps 16 bytes a parameter'
    else:
        way = 'lower train.batch_size or model.img_size'
        parts = 2 * config.train.accumulate if config else 0
        if config and parts <= config.train.batch_size:
            way = f'set train.accumulate={parts}, which computes the same batch in {parts} parts, or {way}'
        if config and not config.model.recompute:
            way = f'set model.recompute=true (on CPUs), or {way}'
    return f'{way}; checkpoints saved before are whole'
