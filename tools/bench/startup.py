#!/usr/bin/env python
"""Seconds from a command to its first visible work: help, a configuration error, the first training step of ViT-B.

The last one is `mxsimmim pretrain conf/vit_base.yaml` on a folder of small JPEGs made first, up to the moment when the
first batch reaches the network. Prints a table for docs/benchmarks.md.

    python tools/bench/startup.py
"""
import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

import numpy as np
from PIL import Image

CONF = Path(__file__).resolve().parents[2] / 'conf'
BATCH = 8
COMMAND = [sys.executable, '-m', 'mxsimmim']
# The command itself, except that the first step ends the process instead of beginning.
UNTIL_FIRST_STEP = """
import os, sys
from mxsimmim import cli
from mxsimmim.config import configfile
from mxsimmim.runtime import environment
environment.prepare(configfile.load(sys.argv[2], sys.argv[3:]).runtime)
from mxsimmim.parallel.placement import Replicated
Replicated.forward_backward = lambda *_: os._exit(42)
sys.exit(cli.main())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=5, help='of which the median is taken (default: 5)')
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder) / 'images', 2 * BATCH)
        vit = ['pretrain', str(CONF / 'vit_base.yaml')]
        run = [f'data.path={folder}/images', f'output={folder}/runs', f'train.batch_size={BATCH}', 'resume=none']
        print('| from the command to | seconds | slowest | target |\n|---|--:|--:|--:|')
        for title, target, status, command in (
                ('`mxsimmim --help`', 0.5, 0, COMMAND + ['--help']),
                ('a configuration error', 0.5, 2, COMMAND + vit + ['optim.base_lrr=1']),
                ('the first step of ViT-B', 8, 42, [sys.executable, '-c', UNTIL_FIRST_STEP] + vit + run)):
            seconds = [clock(command + ([f'name=run{i}'] if status == 42 else []), status) for i in range(repeats)]
            print(f'| {title} | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {target} |', flush=True)


def write_pictures(folder: Path, count: int) -> None:
    """Random JPEGs of 500 x 375 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f'{i}.jpg')


def clock(command: List[str], status: int) -> float:
    """Seconds until the command ended; ends the program with its output if its exit status is another."""
    began = time.perf_counter()
    child = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    seconds = time.perf_counter() - began
    if child.returncode != status:
        sys.exit(f"{' '.join(command[-6:])}: exit status {child.returncode}, expected {status}:\n{child.stdout}")
    return seconds


if __name__ == '__main__':
    main()
