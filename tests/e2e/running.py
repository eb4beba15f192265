"""What the tests of the command share: how it is called, a small network, what a run left."""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEADLINE = 120  # seconds, for any one command
# A network that trains in milliseconds a step, on digits.
TINY = ['model.img_size=16', 'model.patch_size=4', 'model.embed_dim=16', 'model.depth=2', 'model.num_heads=2',
        'model.drop_path=0.2', 'mask.patch_size=4', 'data.path=digits', 'data.val_fraction=0.1', 'train.batch_size=32',
        'train.length=60', 'optim.warmup=5', 'optim.milestones=[40]', 'validation.every=20', 'validation.images=16',
        'validation.pictures=2', 'checkpoint.every=5', 'log.every=3', 'runtime.threads=1', 'data.threads=2']


def command(*arguments):
    return [sys.executable, '-W', 'ignore', '-m', 'mxsimmim', *map(str, arguments)]


def metrics(run):
    """Records without what depends on the clock."""
    with open(run / 'metrics.jsonl') as file:
        return [{k: v for k, v in json.loads(line).items() if k != 'time'
                 and not k.endswith(('_seconds', 'images_per_second'))} for line in file]


def weights(run, folder='checkpoints'):
    """Checksums of the newest checkpoint's arrays."""
    manifest = json.loads((sorted((run / folder).glob('step-*'))[-1] / 'manifest.json').read_text())
    return {name: entry['sha256'] for name, entry in manifest['files'].items() if name.endswith('.safetensors')}
