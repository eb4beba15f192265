#!/usr/bin/env python
"""Images per second from a RecordIO file of JPEGs to normalised float32 (B, 3, 224, 224) batches with masks.

Compares mxsimmim's loader, MXNet's ImageRecordIter, and a pipeline of Pillow and NumPy in a pool of threads that
computes what torchvision's RandomResizedCrop (bilinear, antialiased), RandomHorizontalFlip, ToTensor and Normalize
compute. All three read the same file of random pictures of about 500 x 375 pixels, made first. They run in turn, one
epoch a round, confined to one core with one thread and to two cores with two. Takes about a minute.

ImageRecordIter resizes without antialiasing, which is less work. Asked for two threads on two cores it uses one, so
there two of them share the file.

    python tools/bench/data.py
"""
import argparse
import io
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from multiprocessing.pool import ThreadPool
from typing import Callable, Dict, Iterator, List, Tuple

import cv2
import numpy as np
import PIL
from PIL import Image

from mxsimmim.config import DataConfig, MaskConfig, ModelConfig
from mxsimmim.data.loader import Loader
from mxsimmim.data.masks import random_mask
from mxsimmim.data.sampling import batch_at, epoch_order, generator
from mxsimmim.data.sources import Records, RecordWriter
from mxsimmim.data.transforms import PretrainTransform, random_crop

SEED, BATCH, DISTINCT = 5, 64, 128
DATA, MASK, MODEL = DataConfig(), MaskConfig(), ModelConfig()
SIZE = MODEL.side
MEAN, STD = np.array(DATA.mean, np.float32), np.array(DATA.std, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=1024, help='images a round (default: 1024)')
    parser.add_argument('--rounds', type=int, default=5, help='rounds, of which the median is taken (default: 5)')
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'bench.rec')
        size = write_pictures(path, args.images)
        print(f'{args.images} JPEGs of about 500 x 375, {size / 1e3:.1f} kB on average; Python '
              f'{platform.python_version()}, Pillow {PIL.__version__}; median of {args.rounds} rounds\n')
        print(f'{"":24}{"threads":>8}{"images/s":>10}{"slowest":>9}{"fastest":>9}{"mxsimmim is":>14}')
        for threads in (1, 2)[:len(cores)]:
            with multiprocessing.get_context('spawn').Pool(1) as process:  # a fresh one, to confine all its threads
                speeds = process.apply(measure, (path, args.rounds, threads, cores[:threads]))
            ours = statistics.median(speeds['mxsimmim'])
            for name, values in speeds.items():
                median = statistics.median(values)
                print(f'{name:24}{threads:>8}{median:>10.0f}{min(values):>9.0f}{max(values):>9.0f}'
                      f'{ours / median:>8.2f} times')


def write_pictures(path: str, count: int) -> float:
    """Packs `count` JPEGs, some of them more than once; the mean length in bytes."""
    rng = np.random.default_rng(SEED)
    pictures = [jpeg(rng) for _ in range(min(count, DISTINCT))]
    with RecordWriter(path) as writer:
        for number in range(count):
            writer.write(pictures[number % len(pictures)], 0)
        writer.commit()
    return sum(map(len, pictures)) / len(pictures)


def jpeg(rng: np.random.Generator) -> bytes:
    """A picture with detail at every scale, as photographs have, and about as long as theirs."""
    width, height = int(rng.integers(470, 531)), int(rng.integers(345, 406))
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        for channels, strength in ((1, 100), (3, 40)):  # mostly grey detail, some colour
            layer = rng.normal(0, strength / math.sqrt(cells), (cells, cells, channels)).astype(np.float32)
            pixels += np.stack([np.asarray(Image.fromarray(layer[..., c]).resize((width, height),
                                                                                 Image.Resampling.BICUBIC))
                                for c in range(channels)], axis=-1)
    pixels += rng.normal(0, 2, (height, width, 1))  # grain
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, 'JPEG', quality=90)
    return buffer.getvalue()


def measure(path: str, rounds: int, threads: int, cores: List[int]) -> Dict[str, List[float]]:
    """Images per second of each pipeline in each round, in a process that may use these cores only."""
    os.sched_setaffinity(0, cores)
    pipelines = {'mxsimmim': mxsimmim(path, threads), 'ImageRecordIter': image_record_iter(path, threads),
                 'Pillow and NumPy': pillow(path, threads)}
    speeds: Dict[str, List[float]] = {name: [] for name in pipelines}
    for turn in range(rounds + 1):
        for name, run in pipelines.items():
            began, images = time.perf_counter(), 0
            for batch in run(turn):
                assert batch.shape[1:] == (3, SIZE, SIZE) and batch.dtype == np.float32
                images += len(batch)
            if turn:  # the first one warms up
                speeds[name].append(images / (time.perf_counter() - began))
    return speeds


Pipeline = Callable[[int], Iterator]  # number of the round -> its batches


def mxsimmim(path: str, threads: int) -> Pipeline:
    """The project's loader; normalisation, which training leaves to the device, is added here."""
    source = Records(path)
    steps = len(source) // BATCH
    loader = Loader(source, PretrainTransform(DATA, MASK, MODEL), lambda step: batch_at(step, len(source), BATCH, SEED),
                    SEED, threads, DATA.prefetch, 0, print)
    factor, offset, result = 1 / (255 * STD), MEAN / STD, np.empty((BATCH, 3, SIZE, SIZE), np.float32)

    def run(turn: int) -> Iterator[np.ndarray]:
        for _, batch in loader.iterate(turn * steps, (turn + 1) * steps):
            for image, target in zip(batch.fields['image'], result):
                for channel, plane in enumerate(cv2.split(image)):
                    np.multiply(plane, factor[channel], out=target[channel])
                    target[channel] -= offset[channel]
            yield result
    return run


def image_record_iter(path: str, threads: int) -> Pipeline:
    """MXNet's reader, one for each thread; masks, which it knows nothing of, are drawn beside it."""
    import mxnet as mx
    numbers = {f'{kind}_{channel}': float(value) * 255 for kind, values in (('mean', MEAN), ('std', STD))
               for channel, value in zip('rgb', values)}
    readers = [mx.io.ImageRecordIter(
        path_imgrec=path, data_shape=(3, SIZE, SIZE), batch_size=BATCH, preprocess_threads=1, num_parts=threads,
        part_index=part, shuffle=True, rand_mirror=True, random_resized_crop=True, min_random_area=DATA.crop_scale[0],
        max_random_area=DATA.crop_scale[1], min_aspect_ratio=DATA.crop_ratio[0], max_aspect_ratio=DATA.crop_ratio[1],
        round_batch=False, verbose=False, **numbers) for part in range(threads)]

    def run(turn: int) -> Iterator['mx.nd.NDArray']:
        for reader in readers:
            reader.reset()
        rng, live = generator(SEED, turn), list(readers)
        while live:
            for reader in list(live):
                try:
                    batch = reader.next().data[0]
                except StopIteration:
                    live.remove(reader)
                    continue
                batch.wait_to_read()
                np.stack([mask(rng) for _ in range(len(batch))])
                yield batch
    return run


def pillow(path: str, threads: int) -> Pipeline:
    """Decoding, cropping, resizing and converting an image at a time, as torchvision's transforms do."""
    source, pool, result = Records(path), ThreadPool(threads), np.empty((BATCH, 3, SIZE, SIZE), np.float32)

    def sample(key: Tuple[int, int]) -> tuple:
        rng = generator(SEED, *key)
        image = Image.open(io.BytesIO(source.read(key[1]))).convert('RGB')
        top, left, height, width = random_crop(rng, image.height, image.width, DATA.crop_scale, DATA.crop_ratio)
        image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        if rng.random() < DATA.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
        pixels /= 255
        pixels -= MEAN[:, None, None]
        pixels /= STD[:, None, None]
        return pixels, mask(rng)

    def run(turn: int) -> Iterator[np.ndarray]:
        order = epoch_order(len(source), SEED, turn)
        keys = [[(turn, int(i)) for i in order[s * BATCH:][:BATCH]] for s in range(len(order) // BATCH)]
        pending = [pool.map_async(sample, part) for part in keys[:DATA.prefetch]]
        for ahead in range(len(keys)):
            if ahead + DATA.prefetch < len(keys):
                pending.append(pool.map_async(sample, keys[ahead + DATA.prefetch]))
            pixels, masks = zip(*pending.pop(0).get())
            np.stack(masks)
            yield np.stack(pixels, out=result)
    return run


def mask(rng: np.random.Generator) -> np.ndarray:
    return random_mask(rng, SIZE, MASK.patch_size, MASK.ratio, MODEL.patch_size)


if __name__ == '__main__':
    main()
