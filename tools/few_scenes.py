"""Does pre-training help? Digit scenes of which few are labelled, from a pre-trained encoder and from random weights.

    few_scenes.py [RUN] [--config conf/segment_digits.yaml] [--scenes 50,500] [--seeds 5] [KEY=VALUE ...]

Both with the same recipe and number of updates, each seed with labelled scenes and initial weights of its own, the same
for both. Prints each run's measure on the held-out scenes, in percent, as it ends; then mean and standard deviation.
"""
import argparse
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Sequence

from few_labels import described, evaluation

from mxsimmim.config import configfile
from mxsimmim.runtime import environment
from mxsimmim.runtime.mxnet_private import light_import
from mxsimmim.system import text
from mxsimmim.system.guards import alone, name_crashes

RECIPE = Path(__file__).parents[1] / 'conf' / 'segment_digits.yaml'
MEASURES = {'segment': 'val_miou', 'detect': 'val_box_ap50'}  # task -> the name in evaluation.json


def measured(recipe: Path, overrides: Sequence[str], encoder: str, scenes: int, seed: int) -> Dict[str, float]:
    """What the last weights of one fine-tuned network measure."""
    own = [f'seed={seed}', f'model.pretrained={encoder}', f'data.train_images={scenes}']
    return evaluation(recipe, [*overrides, *own])


def counts(word: str) -> List[int]:
    """The numbers of a list such as 50,500."""
    return [int(number) for number in word.split(',')]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('run', nargs='?', default='runs/scenes', help='folder of the pre-training (runs/scenes)')
    parser.add_argument('overrides', nargs='*', default=[], help='keys of the recipe, such as runtime.threads=1')
    parser.add_argument('--config', type=Path, default=RECIPE, help='recipe of fine-tuning (segment_digits)')
    # No nargs='+': it would take the keys that follow, too.
    parser.add_argument('--scenes', type=counts, default=[50, 500], help='labelled scenes (50,500)')
    parser.add_argument('--seeds', type=int, default=5, help='runs a number (5)')
    args = parser.parse_intermixed_args()
    config = configfile.load(args.config, args.overrides)
    if config.task not in MEASURES:
        sys.exit(f'{args.config}: task={config.task}, but this compares networks for {", ".join(MEASURES)}')
    environment.prepare(config.runtime)
    sources = {'random weights': '', f'from {args.run}': args.run}
    title = f'{MEASURES[config.task]}, %, {args.seeds} seeds'
    lines = [title + ''.join(f'{name:>24}' for name in sources) + '    gain']
    for scenes in args.scenes:
        columns: List[List[float]] = [[], []]
        for seed in range(args.seeds):
            for column, (name, encoder) in zip(columns, sources.items()):
                column.append(100 * measured(args.config, args.overrides, encoder, scenes, seed)[MEASURES[config.task]])
                print(f'{scenes} scenes, seed {seed}, {name}: {column[-1]:.1f}', flush=True)
        gain = statistics.mean(columns[1]) - statistics.mean(columns[0])
        lines.append(f'{scenes} scenes'.ljust(len(title))
                     + ''.join(f'{described(column):>24}' for column in columns) + f'{gain:>+8.1f}')
    print('\n'.join(lines))


if __name__ == '__main__':
    name_crashes()
    text.open_streams()
    with alone(), light_import():
        main()
