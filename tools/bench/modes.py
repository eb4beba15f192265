"""Trains the digits in each way workers can agree, on the same number of samples, and draws the curves.

    python tools/bench/modes.py --epochs 50 -o docs/modes.png

Prints a Markdown table of final validation losses and their ratio to dist_sync's; exits 1 if one exceeds --limit.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[2]
MODES: Dict[str, List[str]] = {
    'dist_sync': [],
    'dist_async': ['train.store=dist_async', 'optim.clip_grad=null'],
    'local_sgd': ['train.aggregation=local_sgd'],
    'elastic': ['train.aggregation=elastic', 'train.local_steps=2', 'train.elastic=1', 'optim.base_lr=2.4e-2'],
}


def train(mode: str, workers: int, epochs: int, further: List[str], folder: Path) -> List[Tuple[float, float]]:
    """(epoch, validation loss) of a run under `folder`.

    Raises:
        SystemExit: the run failed; its output was shown.
    """
    tenth = max(1, epochs // 10)
    keys = MODES[mode] + [f'name={mode}', f'train.length={epochs} epochs', f'optim.warmup={tenth} epochs',
                          f'validation.every={tenth} epochs', 'validation.pictures=0'] + further
    command = [sys.executable, '-W', 'ignore', '-m', 'mxsimmim', 'pretrain', str(ROOT / 'conf' / 'digits.yaml')] + keys
    result = subprocess.run([sys.executable, str(ROOT / 'tools' / 'launch.py'), '-n', str(workers), '-s', '1', '--']
                            + command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            universal_newlines=True)
    if result.returncode:
        sys.exit(f'{mode} failed:\n{result.stdout}')
    rows = map(json.loads, (folder / 'runs' / mode / 'metrics.jsonl').read_text().splitlines())
    return [(row['epoch'], row['val_loss']) for row in rows if 'val_loss' in row]


def draw(curves: Dict[str, List[Tuple[float, float]]], workers: int, path: Path) -> None:
    """Validation loss over epochs, one line a mode."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5))
    for mode, points in curves.items():
        axes.plot(*zip(*points), label=f'{mode}: {points[-1][1]:.4f}', marker='.')
    axes.set(xlabel='epochs of digits', ylabel='validation loss', yscale='log',
             title=f'{workers} workers, the same samples, agreeing in different ways')
    axes.grid(True, which='both', alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=50, help='length of each run (50)')
    parser.add_argument('--workers', type=int, default=2, help='of each run (2)')
    parser.add_argument('--limit', type=float, default=1.1, help='largest final loss over that of dist_sync (1.1)')
    parser.add_argument('-o', '--output', type=Path, help='PNG to draw the curves into')
    parser.add_argument('keys', nargs='*', metavar='key=value', help='of the configuration, for every mode')
    args = parser.parse_args()
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            curves[mode] = train(mode, args.workers, args.epochs, args.keys, Path(folder))
    if args.output:
        draw(curves, args.workers, args.output)
    reference = curves['dist_sync'][-1][1]
    print('| mode | final validation loss | over dist_sync |\n|---|---|---|')
    for mode, points in curves.items():
        print(f'| {mode} | {points[-1][1]:.4f} | {points[-1][1] / reference:.3f} |')
    return int(max(points[-1][1] for points in curves.values()) > args.limit * reference)


if __name__ == '__main__':
    sys.exit(main())
