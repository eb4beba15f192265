"""Does pre-training help? Digits with few labels, from a pre-trained encoder and from random weights.

    few_labels.py [RUN] [--labels 10 0] [--seeds 5]

Both with the recipe of conf/finetune_digits.yaml, each seed with labels and initial weights of its own, the same for
both. Prints mean and standard deviation of the top-1 accuracy on the digits that were held out, from pre-training, too.
"""
import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Sequence

from mxsimmim.config import configfile
from mxsimmim.runtime import environment
from mxsimmim.runtime.mxnet_private import light_import
from mxsimmim.system import text
from mxsimmim.system.guards import alone, name_crashes

RECIPE = Path(__file__).parents[1] / 'conf' / 'finetune_digits.yaml'


def evaluation(recipe: Path, overrides: Sequence[str]) -> Dict[str, float]:
    """What a run measures at its end, in a folder that is then removed; one that is told to stop ends the program."""
    from mxsimmim.training.start import start
    with tempfile.TemporaryDirectory() as folder:
        config = configfile.load(recipe, ['validation.every=100%', *overrides, f'output={folder}'])
        with open(Path(folder) / 'log', 'w', encoding='utf-8', errors=text.ERRORS) as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                status = start(config)
        if status:
            sys.exit(status)
        return json.loads((Path(folder) / config.name / 'evaluation.json').read_text())


def accuracy(encoder: str, labels: int, seed: int) -> float:
    """Top-1, in percent, of one fine-tuned classifier; `labels` a class, 0 for all."""
    length = [] if labels else ['train.length=20 epochs']
    own = [f'seed={seed}', f'model.pretrained={encoder}', f'data.labels_per_class={labels}', *length]
    return evaluation(RECIPE, own)['val_top1']


def described(values: List[float]) -> str:
    return f'{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', nargs='?', default='runs/digits', help='folder of the pre-training (runs/digits)')
    parser.add_argument('--labels', type=int, nargs='+', default=[10], help='labels a class; 0: all (10)')
    parser.add_argument('--seeds', type=int, default=5, help='runs a number (5)')
    args = parser.parse_args()
    environment.prepare(configfile.load(RECIPE).runtime)
    print(f'top-1 on held-out digits, %, {args.seeds} seeds     random weights    from {args.run}     gain')
    for labels in args.labels:
        columns: List[List[float]] = [[], []]
        for seed in range(args.seeds):
            for column, encoder in zip(columns, ('', args.run)):
                column.append(accuracy(encoder, labels, seed))
                if sys.stderr.isatty():
                    print(f'\r{len(columns[0]) + len(columns[1])} of {2 * args.seeds} runs', end='\r', file=sys.stderr)
        name = f'{labels} labels a class' if labels else 'all labels'
        gain = statistics.mean(columns[1]) - statistics.mean(columns[0])
        print(f'{name:<40}{described(columns[0]):>14}{described(columns[1]):>{8 + len(args.run) + 6}}{gain:>+9.1f}')


if __name__ == '__main__':
    name_crashes()
    text.open_streams()
    with alone(), light_import():
        main()
