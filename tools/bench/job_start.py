#!/usr/bin/env python
"""Seconds and network traffic from a job's command to its first step, on a long list of images.

Each job is tools/launch.py on a RecordIO file of one-pixel images, with a tiny network, in a network of its own: every
byte on its loopback device is the job's, headers too. Ends a job when it begins to train. Needs root, for the network,
and 0.2 GB a worker. Prints a table for docs/LOG.md; another checkout, with its own interpreter, can stand beside this:

    python tools/bench/job_start.py --workers 8 16 32 --trees . ../before
"""
import argparse
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List, Tuple

import numpy as np
from mxnet import recordio
from PIL import Image

INSIDE = 'MXSIMMIM_BENCH_NETWORK'  # set in the process that has a network of its own
BEGINS = 'training images, '  # said by rank 0 right before the first step
SECONDS = 900  # at most a job
KEYS = ['model.img_size=16', 'model.patch_size=4', 'model.embed_dim=16', 'model.depth=1', 'model.num_heads=2',
        'mask.patch_size=4', 'data.val_fraction=0', 'data.threads=1', 'data.prefetch=1', 'train.length=2',
        'optim.warmup=0', 'runtime.threads=1', 'resume=none']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workers', type=int, nargs='+', default=[8, 64], help='of each job (default: 8 64)')
    parser.add_argument('--images', type=int, nargs='+', default=[1_281_000], help='of the list (default: 1281000)')
    parser.add_argument('--trees', type=Path, nargs='+', default=[Path(__file__).parents[2]], metavar='FOLDER',
                        help='checkouts to measure, each with .venv/bin/python (default: this one)')
    parser.add_argument('--horovod', action='store_true', help='Horovod ranks instead of a parameter server')
    args = parser.parse_args()
    if INSIDE not in os.environ:
        os.execvpe('unshare', ['unshare', '--net', sys.executable, *sys.argv], {**os.environ, INSIDE: '1'})
    subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)
    print('| checkout | workers | images | seconds | KB a worker |\n|---|--:|--:|--:|--:|', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for images in args.images:
            write_records(Path(folder) / f'{images}.rec', images)
            for workers in args.workers:
                for tree in args.trees:
                    seconds, sent = started(tree.resolve(), Path(folder), images, workers, args.horovod)
                    print(f'| {tree.resolve().name} | {workers} | {images:,} | {seconds:.0f} '
                          f'| {sent / workers / 1e3:,.0f} |', flush=True)


def write_records(path: Path, count: int) -> None:
    """The same image again and again, with its index."""
    picture = io.BytesIO()
    Image.new('RGB', (1, 1)).save(picture, 'PNG')
    writer = recordio.MXRecordIO(str(path), 'w')
    writer.write(recordio.pack(recordio.IRHeader(0, 0.0, 0, 0), picture.getvalue()))
    writer.close()
    record = np.fromfile(path, np.uint8)
    np.tile(record, count).tofile(path)
    path.with_suffix('.idx').write_text(''.join(f'{i}\t{i * len(record)}\n' for i in range(count)))


def started(tree: Path, folder: Path, images: int, workers: int, horovod: bool) -> Tuple[float, int]:
    """Seconds until a job begins to train, and the bytes that its processes have sent each other until then."""
    python = str(tree / '.venv' / 'bin' / 'python')
    command: List[str] = [python, str(tree / 'tools' / 'launch.py'), '-n', str(workers),
                          *(['--horovod'] if horovod else ['-s', '1']), '--', python, '-W', 'ignore', '-m', 'mxsimmim',
                          'pretrain', str(tree / 'conf' / 'digits.yaml'), *KEYS, f'data.path={folder}/{images}.rec',
                          f'train.batch_size={workers}', f'output={folder}/runs', f'name={tree.name}-{workers}']
    before, began, said = loopback(), time.monotonic(), []
    job = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           universal_newlines=True)
    signal.signal(signal.SIGALRM, lambda *_: job.terminate())
    signal.alarm(SECONDS)
    try:
        assert job.stdout
        for line in job.stdout:
            said.append(line)
            if BEGINS in line:
                return time.monotonic() - began, loopback() - before
        sys.exit(f'the job did not begin to train:\n{"".join(said[-20:])}')
    finally:
        signal.alarm(0)
        job.terminate()
        job.communicate()


def loopback() -> int:
    """Bytes sent so far in this network; each is received there, too."""
    line, = (line for line in Path('/proc/net/dev').read_text().splitlines() if line.strip().startswith('lo:'))
    return int(line.split(':')[1].split()[8])


if __name__ == '__main__':
    main()
