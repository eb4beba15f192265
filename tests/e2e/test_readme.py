"""The commands of the README and of the documentation, as typed, on a few small images; only lengths are cut."""
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.running import DEADLINE, ROOT
from support.tiny import TINY

from mxsimmim import commands

pytestmark = pytest.mark.unmeasured

README = (ROOT / 'README.md').read_text()
PAGES = README + ''.join(path.read_text() for path in sorted(ROOT.glob('docs/*.md')) if path.name != 'LOG.md')
SHORT = [key for key in TINY if not key.startswith(('data.', 'model.', 'mask.patch'))] + [
    'train.length=2', 'optim.warmup=1', 'train.batch_size=8', 'validation.images=4', 'validation.pictures=2']


def shell_lines():
    """Each command once, however many pages have it."""
    blocks = re.findall(r'^```sh\n(.*?)^```', PAGES, re.S | re.M)
    lines = (line.partition(' #')[0].strip() for block in blocks for line in block.splitlines() if line.strip())
    return list(dict.fromkeys(lines))


def small(config):
    """Overrides that make a recipe's network small, whatever its type."""
    if config.endswith('digits.yaml'):
        return SHORT + ['model.depth=1', 'data.val_fraction=0.01']
    return SHORT + ['model.img_size=64', 'model.embed_dim=24', 'model.num_heads=2', 'model.depth=2']


@pytest.fixture
def folder(tmp_path):
    """A checkout with images in /images, as far as the commands can tell; and the same in class folders."""
    shutil.copytree(ROOT / 'conf', tmp_path / 'conf')
    shutil.copytree(ROOT / 'tools', tmp_path / 'tools', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'images').mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), 'uint8')
        Image.fromarray(pixels).save(tmp_path / 'images' / f'{number}.jpg')
        (tmp_path / 'classes' / str(number % 2)).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / 'images' / f'{number}.jpg', tmp_path / 'classes' / str(number % 2))
    return tmp_path


def test_make_targets_exist():
    makefile = (ROOT / 'Makefile').read_text()
    targets = set(re.findall(r'^make (\w+)$', '\n'.join(shell_lines()), re.M) + re.findall(r'`make (\w+)`', PAGES))
    assert targets >= {'demo', 'test', 'bench'}
    for target in targets:
        assert re.search(rf'^{target}:', makefile, re.M), target


def test_commands(folder):
    ran = parsed = 0
    for line in sorted(shell_lines(), key=lambda line: 'pretrain conf/digits.yaml' not in line):  # as make demo did
        words = shlex.split(line.replace('/images', str(folder / 'images')))
        if re.search('imagenet|official|vit_base vit_base|cats|…', line):  # what this machine does not have
            if '…' not in line:
                commands.parser().parse_args(words[1:])
                parsed += 1
            continue
        if '-H' in words:
            continue  # tests/cluster/test_kinds.py has the hosts
        if words[0] in ('mxsimmim', 'tools/launch.py'):
            command = words.index('mxsimmim')
            words[command:command + 1] = [sys.executable, '-W', 'ignore', '-m', 'mxsimmim']
            if words[0] == 'tools/launch.py':
                words[:1] = [sys.executable, str(ROOT / 'tools' / 'launch.py')]
            if 'pretrain' in words or 'finetune' in words:
                config = words[words.index('pretrain' if 'pretrain' in words else 'finetune') + 1]
                words = [word.replace('gpu(', 'cpu(').replace('val_fraction=0.01', 'val_fraction=0.2')
                         for word in words] + small(config) + [f'name=run{ran}']
                if config.endswith('/digits.yaml'):
                    words[-1] = 'name=digits'
            if 'features' in words:  # t-SNE of the digits takes 18 s
                words[words.index('digits')] = 'classes'
            if 'probe' in words:
                words += ['data.labels_per_class=3', '--seeds', '1']
        elif words[0] == 'python':
            words[0] = sys.executable
        else:
            assert words[0] == 'make', line
            continue
        result = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                universal_newlines=True, timeout=DEADLINE)
        assert result.returncode == 0, f'{line}\n{result.stdout}'
        ran += 1
    assert (ran, parsed) == (17, 10)
    assert (folder / 'grid.png').stat().st_size > 1000 and (folder / 'curves.png').stat().st_size > 1000


def test_python_example():
    example = re.search(r'^```python\n(.*?)^```', README, re.S | re.M)[1]
    example = example.replace('embed_dim=768, depth=12', 'embed_dim=24, depth=1')
    names = {}
    exec(example, names)
    assert 0 < names['loss'].asscalar() < 5
    assert names['picture'].shape == (2, 3, 224, 224) and 'encoder.cls_token' in names['weights']
