#!/usr/bin/env python
"""Packs a folder of images into a RecordIO file, which is read much faster than many small files.

IMAGES is searched at any depth and taken in the order of the paths; with class folders, the label of an image is the
number of its folder in the sorted list of them, else 0. OUT.idx, beside OUT.rec, says where each image begins. Both
can be given to mxsimmim (data.path=OUT.rec) and to MXNet's own readers. Unreadable images are named and left out.
Orientations (EXIF) are kept, not applied: data.exif_orientation decides about them later.

    python tools/pack_records.py /data/imagenet/train train.rec --size 256
"""
import argparse
import io
import os
import signal
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Deque, Iterator, List, Optional, Tuple

from PIL import Image
from tqdm import tqdm

from mxsimmim.data.decode import ORIENTATION, decode, orientation
from mxsimmim.data.sources import RecordWriter, image_files, tell
from mxsimmim.data.transforms import resize_short_side
from mxsimmim.system.guards import alone, name_crashes
from mxsimmim.system.text import open_streams, show

LONGEST = 65500  # pixels of a side of a JPEG


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', metavar='IMAGES', help='folder of images')
    parser.add_argument('out', metavar='OUT.rec', help='file to write')
    parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)), metavar='N',
                        help='default: one a core; the result is the same for any number')
    parser.add_argument('--size', type=int, metavar='S', help='shrink the short side of larger images to S pixels, as '
                        'JPEG; without it, files are copied unchanged')
    parser.add_argument('--quality', type=int, default=95, metavar='Q', help='of these JPEGs (default: 95)')
    args = parser.parse_args()
    for option, value, most in (('threads', args.threads, 1024), ('size', args.size, LONGEST),
                                ('quality', args.quality, 100)):
        if value is not None and not 1 <= value <= most:
            parser.error(f'--{option} {value} is not between 1 and {most}')
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # through the clean-up, like Ctrl-C
    try:
        return pack(args.images, args.out, args.threads, args.size, args.quality)
    except UnicodeError:
        raise  # nothing that a user could answer
    except ValueError as error:
        show(f'error: {error}', sys.stderr)
    except KeyboardInterrupt:
        print('interrupted, nothing written', file=sys.stderr)
    return 1


def pack(folder: str, out: str, threads: int, size: Optional[int], quality: int) -> int:
    """Writes OUT.rec and OUT.idx; the exit status.

    Raises:
        ValueError: no image, none that can be read, no place to write to, or not enough of it.
    """
    if not os.path.isdir(folder):
        raise ValueError(f'{folder} is not a folder: give the folder that holds the images')
    notes: List[str] = []
    paths = image_files([folder], notes)
    tell(notes)
    plain, tenth, broken = not sys.stderr.isatty(), -(-len(paths) // 10), 0
    with RecordWriter(out) as writer, tqdm(total=len(paths), unit=' images', disable=plain) as bar:
        results = encoded(paths, threads, size, quality)
        for done, (label, (data, error)) in enumerate(zip(labels(folder, paths), results), 1):
            if error:
                broken += 1
                tqdm.write(f'warning: left out: {error}', file=sys.stderr)
            else:
                writer.write(data, label)
            bar.update()
            if plain and done % tenth == 0:
                print(f'{done:,} of {len(paths):,} images', flush=True)
        if not writer.records:
            raise ValueError(f'none of the {len(paths)} images in {folder} can be read: nothing written')
        writer.commit()
    print(f'{out}: {writer.records:,} images, {writer.bytes / 1e6:,.1f} MB, {broken:,} left out')
    return 0


def labels(folder: str, paths: List[str]) -> List[int]:
    """The number of each file's class folder, 0 for files that are in none."""
    parts = [Path(path).relative_to(folder).parts for path in paths]
    classes = sorted({inner[0] for inner in parts if len(inner) > 1})
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[inner[0]] if len(inner) > 1 else 0 for inner in parts]


def encoded(paths: List[str], threads: int, size: Optional[int], quality: int) -> Iterator[Tuple[bytes, str]]:
    """What `encode` makes of each file, in order, computed by threads a little ahead."""
    pending: Deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        for path in paths:
            pending.append(pool.submit(encode, path, size, quality))
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


def encode(path: str, size: Optional[int], quality: int) -> Tuple[bytes, str]:
    """(the file's own bytes or a smaller JPEG, '') or (b'', what is wrong with the image)."""
    try:
        with open(path, 'rb') as file:
            data = file.read()
        image = decode(data, path)
    except (ValueError, OSError) as error:
        return b'', str(error)
    if size is None or min(image.shape[:2]) <= size:
        return data, ''
    smaller = resize_short_side(Image.fromarray(image), size)
    if max(smaller.size) > LONGEST:
        return data, ''
    buffer, exif, turn = io.BytesIO(), Image.Exif(), orientation(data)
    if turn > 1:
        exif[ORIENTATION] = turn
    smaller.save(buffer, 'JPEG', quality=quality, **({'exif': exif} if turn > 1 else {}))
    return buffer.getvalue(), ''


if __name__ == '__main__':
    name_crashes()
    open_streams()
    with alone():
        sys.exit(main())
