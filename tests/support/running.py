"""The command as tests call it, and what a run left."""
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE, DIGITS = ROOT / 'conf' / 'base.yaml', ROOT / 'conf' / 'digits.yaml'
DATA = ROOT / 'tests' / 'data'
DEADLINE = 120  # seconds, for any one command


def rounds(here, soak):
    """How often, or how long, a test marked `soak` does what it does: `soak` under `make soak`, else `here`."""
    return soak if os.environ.get('SOAK') else here


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


def last_step(run):
    """The last step that was logged; 0 before any."""
    try:
        lines = (run / 'metrics.jsonl').read_bytes().splitlines()
        return int(lines[-1].split(b'"step": ')[1].split(b',')[0]) if lines else 0
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def wait_for(process, condition):
    """Until the condition holds or the process has ended; whether it held."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError('nothing happened in time')
