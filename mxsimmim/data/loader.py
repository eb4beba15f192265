"""Batches ahead of time, by threads, the same for any number of them."""
import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from typing import Callable, Container, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from ..runtime import watchdog
from ..runtime.memory import ran_out
from ..system.text import one_line
from .sampling import generator, split
from .sources import Source
from .transforms import DRAWN, BrokenImage, Fields, Transform, decode

SHOWN = 4  # images in work that an error names
GRACE = 5.0  # seconds that the images in work may take at the end


class Batch(NamedTuple):
    """What one update, or one worker's part of it, is computed from."""
    fields: Fields  # (B, …) each: what the task's transform returns of B images, stacked
    epoch: int
    index: np.ndarray  # type: ignore[assignment]  # (B,), images of the source asked for; hides tuple.index


class TooManyBroken(ValueError):
    """More unreadable images than the configuration tolerates."""


class Loader:
    """Reads, decodes and transforms samples in threads, a few batches ahead of the consumer.

    A sample's generator is keyed by (seed, epoch, sample): batches are bit-identical for any number of threads and
    from whichever step they are started. Where the transform mixes, the samples at positions 0 and 1, 2 and 3, … of a
    batch are partners, with a generator keyed by (seed, epoch, one, other); an odd last one stays as it is.

    Where nothing that depends on the images is needed, none is read: a worker that computes a later stage of a pipeline
    has the same draws as the first, which meets the broken images, replaces and counts them.
    """

    def __init__(self, source: Source, transform: Transform,
                 batches: Callable[[int], Tuple[int, Union[Sequence[int], np.ndarray]]], seed: int, threads: int,
                 prefetch: int, max_broken: int, log: Callable[[str], None], needed: Optional[Container[str]] = None):
        """Keep what batches are made of; nothing is read before `iterate`.

        Args:
            source: the images.
            transform: what is done to each.
            batches: (epoch, sample indices) of a step.
            seed: of everything random.
            threads: how many; 0 for one a core.
            prefetch: batches prepared ahead of the one in use.
            max_broken: unreadable images tolerated.
            log: told about each of them, in the consumer's thread.
            needed: fields of a batch that are used; None for all. If they are DRAWN ones, batches have only these.
        """
        self._source, self._transform, self._batches, self._seed = source, transform, batches, seed
        self._threads = threads or len(os.sched_getaffinity(0))
        self._prefetch, self._max_broken, self._log = prefetch, max_broken, log
        self._reads = needed is None or any(name in needed for name in transform.allocate(0) if name not in DRAWN)
        self._broken: Dict[int, str] = {}  # sample -> what is wrong with it
        self._unsaid: Deque[str] = deque()
        self._reading: Dict[int, Tuple[int, float]] = {}  # thread -> sample that it reads, and since when
        self._lock = threading.Lock()

    @property
    def broken(self) -> int:
        """Unreadable images met so far."""
        return len(self._broken)

    def iterate(self, start: int, stop: int) -> Iterator[Tuple[int, Batch]]:
        """Yields (step, batch) for the steps from `start` up to, not including, `stop`.

        Its threads end when it does, is closed or fails. One that hangs in a read (a file system whose server is gone)
        is left behind after a while, since what is to be said may be why.

        Raises:
            TooManyBroken: see `max_broken`.
            Exception: whatever a thread met.
        """
        tasks: queue.SimpleQueue = queue.SimpleQueue()  # (step, batch, positions in it), None to end a thread
        finished: queue.SimpleQueue = queue.SimpleQueue()  # (step, None or an exception)
        threads = [threading.Thread(target=self._work, args=(tasks, finished), name=f'loader-{number}', daemon=True)
                   for number in range(self._threads)]
        for thread in threads:
            thread.start()
        try:
            ahead: Dict[int, Batch] = {}
            missing: Dict[int, int] = {}  # step -> groups of samples still in work
            for step in range(start, stop):
                for new in range(step + len(ahead), min(step + self._prefetch + 1, stop)):
                    ahead[new] = self._submit(new, tasks)
                    missing[new] = len(self._groups(len(ahead[new].index)))
                while missing[step]:
                    with watchdog.doing('data', self._in_work):
                        number, error = finished.get()
                    self._say()
                    if error:
                        raise error
                    missing[number] -= 1
                del missing[step]
                yield step, ahead.pop(step)
        finally:
            with contextlib.suppress(queue.Empty):
                while True:
                    tasks.get_nowait()
            for _ in threads:
                tasks.put(None)
            deadline = time.monotonic() + GRACE
            for thread in threads:
                thread.join(max(0, deadline - time.monotonic()))

    def _submit(self, step: int, tasks: queue.SimpleQueue) -> Batch:
        """Queues a step's samples; returns the batch that the threads will fill."""
        epoch, index = self._batches(step)
        fields = {name: array for name, array in self._transform.allocate(len(index)).items()
                  if self._reads or name in DRAWN}
        batch = Batch(fields, epoch, np.asarray(index))
        for positions in self._groups(len(index)):
            tasks.put((step, batch, positions))
        return batch

    def _groups(self, count: int) -> List[range]:
        """Positions in a batch that one thread fills in one go."""
        size = self._transform.group
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _work(self, tasks: queue.SimpleQueue, finished: queue.SimpleQueue) -> None:
        for step, batch, positions in iter(tasks.get, None):
            try:
                self._fill(batch, positions)
                finished.put((step, None))
            except BaseException as error:  # the consumer raises it
                finished.put((step, error))

    def _fill(self, batch: Batch, positions: range) -> None:
        asked = [int(batch.index[position]) for position in positions]
        for position, index in zip(positions, asked):
            fields = (self._sample(index, batch.epoch) if self._reads else
                      self._transform.draw(generator(self._seed, batch.epoch, index)))
            for name, value in fields.items():
                batch.fields[name][position] = value
        if len(positions) == 2 and self._reads:
            pair = slice(positions.start, positions.stop)
            self._transform.mix({name: array[pair] for name, array in batch.fields.items()},
                                generator(self._seed, batch.epoch, *asked))

    def _sample(self, index: int, epoch: int) -> Fields:
        """The fields of this image, or of the next one after it that can be read, as can what is known of it."""
        count = len(self._source)
        for candidate in range(index, index + count):
            candidate %= count
            if candidate not in self._broken:
                self._reading[threading.get_ident()] = candidate, time.monotonic()
                try:
                    return self._transform(self._pixels(candidate), generator(self._seed, epoch, index), candidate)
                except BrokenImage as error:
                    if ran_out(error):  # an image that another machine can read: replaced, it would change the run
                        raise
                    self._note(candidate, error)
                finally:
                    del self._reading[threading.get_ident()]
        raise TooManyBroken(f'none of the {count} images can be read; the last: {self._last()}')

    def _pixels(self, index: int) -> np.ndarray:
        try:
            data = self._source.read(index)
        except (ValueError, OSError) as error:
            raise BrokenImage(str(error)) from error
        return decode(data, self._source.name(index), self._transform.upright, self._unsaid.append)

    def _note(self, index: int, error: Exception) -> None:
        with self._lock:
            if index in self._broken:  # another thread was faster
                return
            self._broken[index] = str(error)
            self._unsaid.append(f'broken image {len(self._broken)}, replaced by the next one: {error}')
            if len(self._broken) > self._max_broken:
                raise TooManyBroken(f'{len(self._broken)} images cannot be read, more than data.max_broken='
                                    f'{self._max_broken}: remove or repair them, or raise data.max_broken; '
                                    f'the last: {self._last()}')

    def _last(self) -> str:
        return '; '.join(list(self._broken.values())[-3:])

    def _in_work(self) -> str:
        """Say which images are being read, those that take longest first."""
        now, reading = time.monotonic(), sorted(self._reading.copy().values(), key=lambda item: item[1])
        return ', '.join(f'{one_line(self._source.name(index))} is being read for {now - since:.3g} s'
                         for index, since in reading[:SHOWN])

    def _say(self) -> None:
        while self._unsaid:
            self._log(self._unsaid.popleft())


def fixed_batches(source: Source, transform: Transform, batch: int, images: int, seed: int, threads: int,
                  max_broken: int = 100, log: Callable[[str], None] = logging.getLogger(__name__).warning,
                  part: int = 0, parts: int = 1, needed: Optional[Container[str]] = None) -> Iterator[Batch]:
    """The same images with the same masks every time, the last batch as small as need be.

    Args:
        source: the held-out images.
        transform: what is done to each.
        batch: images a batch.
        images: how many are taken, at random but in their order; all if there are no more.
        seed: of the choice and of the masks.
        threads, max_broken, log, needed: as for `Loader`.
        part, parts: which of as many parts, as equal as can be, is taken of them: a worker's data coordinate and
            the size of that axis.
    """
    chosen = np.sort(generator(seed).permutation(len(source))[:images])
    chosen = chosen[split(len(chosen), parts)[part]]
    steps = -(-len(chosen) // batch)
    loader = Loader(source, transform, lambda step: (0, chosen[step * batch:(step + 1) * batch]), seed, threads, 1,
                    max_broken, log, needed)
    for _, filled in loader.iterate(0, steps):
        yield filled


def every_image(source: Source, transform: Transform, batch: int, threads: int, part: int = 0, parts: int = 1,
                needed: Optional[Container[str]] = None) -> Iterator[Batch]:
    """All images in their order, or part number `part` of `parts`; none is replaced by another. `needed` as `Loader`'s.

    Raises:
        ValueError: naming an image that cannot be read.
    """
    try:
        yield from fixed_batches(source, transform, min(batch, len(source)), len(source), 0, threads, 0,
                                 log=lambda text: None, part=part, parts=parts, needed=needed)
    except TooManyBroken as error:
        raise ValueError(f'every image counts here, so each must be readable: remove or repair '
                         f'{error.__context__ or error}') from None
