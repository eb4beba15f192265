"""Checkpoints: exact round trips, every kind of damage named, nothing lost to a kill or a full disk at any moment."""
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import arrays_of
from support.running import rounds

from mxsimmim.system.arrays import Gathered
from mxsimmim.training import checkpoint
from mxsimmim.training.checkpoint import CheckpointError


def consistent_value(found):
    """The one value a checkpoint of `arrays_of` consists of."""
    values = {float(number) for named in found.arrays.values() for array in named.values() for number in array.flat}
    assert values == {float(found.state['value'])}
    return found.state['value']


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith('.'))


def steps(folder):
    return sorted(int(path.name[len('step-'):]) for path in folder.glob('step-*'))


def never(text):
    raise AssertionError(f'nothing to say, and yet: {text}')


def test_arrays_on_their_way_are_written_like_those_in_memory(tmp_path):
    random_state = np.random.RandomState(1)
    arrays = {'b': random_state.randn(3, 5).astype('float32'), 'a': np.array(5), 'half': np.zeros((0, 3), 'float32'),
              'transposed': random_state.randn(2, 3).astype('float32').T}
    kinds = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    gathered = Gathered(kinds, iter(arrays.values()))
    assert gathered.nbytes == 4 * 15 + 8 + 0 + 4 * 6
    found = checkpoint.load(checkpoint.save(tmp_path, 3, {'gathered': gathered, 'plain': arrays}, {}, keep=1)).arrays
    for group in found.values():
        assert group.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (group[name].dtype, group[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(group[name], array)


def test_round_trip(tmp_path):
    random_state = np.random.RandomState(0)
    arrays = {'weights': {'a.b/c': random_state.randn(3, 4, 5).astype('float32'),
                          'transposed': random_state.randn(6, 2).astype('float32').T,
                          'half': random_state.randn(7).astype('float16'),
                          'empty': np.zeros((0, 3), 'float32')},
              'sampler': {'order': random_state.permutation(100), 'scalar': np.array(5, 'int64'),
                          'mask': random_state.randint(0, 2, (4, 4)).astype('uint8')},
              'nothing': {}}
    state = {'rate': 0.1 + 0.2, 'name': 'Größe', 'list': [1, None, True], 'nested': {'x': 1e-300}}
    path = checkpoint.save(tmp_path / 'new' / 'checkpoints', 1234, arrays, state, keep=1)
    assert path == tmp_path / 'new' / 'checkpoints' / 'step-00001234'
    found = checkpoint.load(path)
    assert (found.step, found.state, found.path) == (1234, state, path)
    assert found.arrays.keys() == arrays.keys()
    for group, named in arrays.items():
        assert found.arrays[group].keys() == named.keys()
        for name, array in named.items():
            copy = found.arrays[group][name]
            assert (copy.dtype, copy.shape) == (array.dtype, array.shape)
            assert copy.tobytes() == array.tobytes()
            assert copy.flags.writeable and copy.flags.c_contiguous
    found.arrays['weights']['half'][:] = 0
    assert checkpoint.load(path).arrays['weights']['half'].tobytes() == arrays['weights']['half'].tobytes()
    assert sorted(p.name for p in path.iterdir()) == ['manifest.json', 'nothing.safetensors', 'sampler.safetensors',
                                                      'state.json', 'weights.safetensors']


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        checkpoint.save(tmp_path, step, arrays_of(step), {'value': step}, keep=2)
    return tmp_path


FILES = ('weights.safetensors', 'optimizer.safetensors', 'state.json', 'manifest.json')


def assert_damaged(folder, *parts):
    """Step 2 is refused with a message that has all `parts`, and `newest` falls back to step 1."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder / 'step-00000002')
    said = []
    assert consistent_value(checkpoint.newest(folder, said.append)) == 1
    assert len(said) == 1 and said[0].startswith('passing over the checkpoint of step 2: ')
    for part in (str(folder / 'step-00000002'),) + parts:
        assert part in str(caught.value) and part in said[0]
    assert 'resume=auto' in str(caught.value)


@pytest.mark.parametrize('name', FILES)
def test_flipped_bits(two, name):
    seed = random.randrange(2 ** 32)
    print(f'seed {seed}')
    draw = random.Random(seed)
    file = two / 'step-00000002' / name
    whole = file.read_bytes()
    for _ in range(25):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        assert_damaged(two, *([] if name == 'manifest.json' else [str(file), 'SHA-256']))
    file.write_bytes(whole)
    assert consistent_value(checkpoint.newest(two, never)) == 2


@pytest.mark.parametrize('name', FILES)
def test_truncated_and_missing_files(two, name):
    seed = random.randrange(2 ** 32)
    print(f'seed {seed}')
    file = two / 'step-00000002' / name
    whole = file.read_bytes()
    for length in [0, len(whole) - 1] + [random.Random(seed).randrange(len(whole)) for _ in range(5)]:
        file.write_bytes(whole[:length])
        numbers = ('damaged',) if name == 'manifest.json' else (f'{length:,} bytes', f'says {len(whole)}')
        assert_damaged(two, str(file), *numbers)
    file.unlink()
    assert_damaged(two, str(file), 'missing' if name == 'manifest.json' else 'cannot be read: No such file')


def test_newer_format(two):
    file = two / 'step-00000002' / 'manifest.json'
    file.write_text(json.dumps({'format': 2, 'parts': []}))
    assert_damaged(two, str(file), 'format 2', 'reads 1 to 1', 'newer mxsimmim')


def test_not_a_checkpoint(two):
    for path in (two, two / 'nowhere', two / 'step-00000001' / 'state.json'):
        expected = re.escape(str(path / 'manifest.json')) + '.*such as checkpoints/step-'
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.load(path)


def test_newest_without_any(tmp_path):
    assert checkpoint.newest(tmp_path / 'nowhere', never) is None
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'step-12').mkdir()  # not a name `save` gives
    assert checkpoint.newest(tmp_path / 'empty', never) is None


def test_newest_when_all_are_damaged(two):
    for step in (1, 2):
        (two / f'step-{step:08d}' / 'weights.safetensors').unlink()
    said = []
    with pytest.raises(CheckpointError, match=r'none of its 2 checkpoints is whole \(step-00000001, step-00000002\).*'
                                              'restore one.*train again'):
        checkpoint.newest(two, said.append)
    assert [text[:39] for text in said] == [f'passing over the checkpoint of step {step}: ' for step in (2, 1)]


@pytest.mark.parametrize('present, keep, keep_every, expected', [
    ([10], 1, None, {10}),
    ([10, 20, 30], 1, None, {30}),
    ([30, 10, 20], 2, None, {20, 30}),
    ([10, 20, 30], 5, None, {10, 20, 30}),
    ([10, 20, 30, 40, 50], 1, 20, {20, 40, 50}),
    ([10, 20, 30, 40, 50], 2, 30, {30, 40, 50}),
    ([7, 14, 15], 1, 100, {15}),
    ([0, 10, 20], 1, 15, {0, 20}),
])
def test_retention_rule(present, keep, keep_every, expected):
    assert checkpoint.kept(present, keep, keep_every) == expected


def test_later_checkpoints_are_discarded(tmp_path):
    for step in (5, 10, 35):
        checkpoint.save(tmp_path, step, arrays_of(step), {}, keep=9)
    checkpoint.discard_after(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['step-00000005', 'step-00000010']
    checkpoint.discard_after(tmp_path / 'nowhere', 10)


def test_retention(tmp_path):
    left = []
    for step in (10, 20, 30, 40, 50):
        checkpoint.save(tmp_path, step, arrays_of(step), {'value': step}, keep=2, keep_every=30)
        left.append(steps(tmp_path))
    assert left == [[10], [10, 20], [20, 30], [30, 40], [30, 40, 50]]
    # Going on from step 30 must not delete what it has just written, nor the later ones.
    checkpoint.save(tmp_path, 31, arrays_of(31), {'value': 31}, keep=1)
    assert steps(tmp_path) == [31, 40, 50]
    assert hidden(tmp_path) == []


def test_same_step_again(tmp_path):
    checkpoint.save(tmp_path, 5, arrays_of(1), {'value': 1}, keep=1)
    (tmp_path / 'step-00000005' / 'state.json').write_text('damaged')
    path = checkpoint.save(tmp_path, 5, {'weights': {'w': np.full(3, 2.0)}}, {'value': 2}, keep=1)
    assert consistent_value(checkpoint.load(path)) == 2
    assert sorted(file.name for file in path.iterdir()) == ['manifest.json', 'state.json', 'weights.safetensors']
    assert os.listdir(tmp_path) == ['step-00000005']


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path):
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    for name in (f'.step-00000001.tmp-{gone.pid}', f'.step-00000001.tmp-{os.getppid()}', '.step-notes'):
        (tmp_path / name).mkdir()
    checkpoint.save(tmp_path, 2, arrays_of(2), {'value': 2}, keep=1)
    assert hidden(tmp_path) == [f'.step-00000001.tmp-{os.getppid()}', '.step-notes']


def test_a_state_that_is_not_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, arrays_of(1), {'value': np.zeros(3)}, keep=1)
    assert os.listdir(tmp_path) == []


SAVE_FOR_EVER = '''
import sys
from pathlib import Path
from mxsimmim.training import checkpoint
from support.checkpoints import arrays_of
folder, step = Path(sys.argv[1]), int(sys.argv[2])
print('ready', flush=True)
while True:
    for _ in range(2):  # the second replaces the first
        checkpoint.save(folder, step, arrays_of(step, 300_000), {'value': step}, keep=1)
    print(step, flush=True)
    step += 1
'''


def python(program, *arguments, **options):
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(checkpoint.__file__).parents[2])])
    return subprocess.Popen([sys.executable, '-c', program, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, 'PYTHONPATH': path}, **options)


@pytest.mark.soak
def test_sigkill_at_random_moments(tmp_path):
    seed = random.randrange(2 ** 32)
    print(f'seed {seed}')
    draw = random.Random(seed)
    checkpoint.save(tmp_path, 1, arrays_of(1), {'value': 1}, keep=1)
    last = 1
    for _ in range(rounds(6, 20)):
        process = python(SAVE_FOR_EVER, tmp_path, last + 1)
        assert process.stdout.readline() == 'ready\n'
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        reported = [int(line) for line in process.communicate(timeout=60)[0].split()]
        found = checkpoint.newest(tmp_path, never)
        assert consistent_value(found) == found.step >= max(reported + [last])
        last = found.step
    checkpoint.save(tmp_path, last + 1, arrays_of(last + 1), {'value': last + 1}, keep=1)
    assert os.listdir(tmp_path) == [f'step-{last + 1:08d}']


# Saves step 20 over an older step 20 (or 10) in copies of a folder, killing itself before the first, second, …
# operation on the file system, until a save gets through.
KILL_EVERYWHERE = '''
import itertools, os, shutil, signal, sys
from pathlib import Path
from mxsimmim.training import checkpoint
from support.checkpoints import arrays_of
folder = Path(sys.argv[1])
count = 0
def hook(event, _):
    global count
    if event in ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir'):
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
for fatal in itertools.count(1):
    copy = folder / str(fatal)
    shutil.copytree(folder / 'start', copy)
    child = os.fork()
    if not child:
        sys.addaudithook(hook)
        checkpoint.save(copy, 20, arrays_of(20), {'value': 20}, keep=1)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(fatal)
'''


@pytest.mark.parametrize('before', [10, 20])
def test_sigkill_before_every_operation(tmp_path, before):
    checkpoint.save(tmp_path / 'start', before, arrays_of(1), {'value': 1}, keep=1)
    process = python(KILL_EVERYWHERE, tmp_path)
    last = int(process.communicate(timeout=120)[0])
    values = []
    for trial in range(1, last + 1):
        folder = tmp_path / str(trial)
        values.append(consistent_value(checkpoint.newest(folder, never)))
        checkpoint.save(folder, 30, arrays_of(30), {'value': 30}, keep=2)
        assert hidden(folder) == []
        assert consistent_value(checkpoint.newest(folder, never)) == 30
        older = steps(folder)[:-1]
        assert older in ([10], [20]) and consistent_value(checkpoint.load(folder / f'step-{older[0]:08d}')) in (1, 20)
    assert last > 15 and values == sorted(values) and set(values) == {1, 20}  # once there, the new one stays


def assert_failed_save(folder, reason, needed):
    """Saving 4 MB fails for `reason`, and says so; what was there before is as it was."""
    before = sorted(os.listdir(folder))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, 8, arrays_of(8, 500_000), {'value': 8}, keep=1)
    text = str(caught.value)
    assert text.startswith(f'{folder / "step-00000008"}: cannot save this checkpoint: ') and reason in text
    assert f'It needs {needed:,} bytes, and ' in text and 'the newest is step 7' in text
    free = int(re.search(r'([\d,]+) are free in', text)[1].replace(',', ''))
    assert abs(free - shutil.disk_usage(folder).free) < 1e9
    assert sorted(os.listdir(folder)) == before
    assert consistent_value(checkpoint.newest(folder, never)) == 7
    return free


NEEDED = 2 * 500_000 * 4 + 8


def test_file_size_limit(tmp_path):
    checkpoint.save(tmp_path, 7, arrays_of(7), {'value': 7}, keep=1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))
    try:
        assert_failed_save(tmp_path, 'File too large', NEEDED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    checkpoint.save(tmp_path, 8, arrays_of(8, 500_000), {'value': 8}, keep=1)
    assert steps(tmp_path) == [8]


def test_full_and_read_only_disk(tmp_path):
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'none', str(folder)], capture_output=True,
                             check=False) if shutil.which('mount') else None
    if mounted is None or mounted.returncode:
        pytest.skip('mounting a small tmpfs needs root; test_file_size_limit stands in')
    try:
        checkpoint.save(folder, 7, arrays_of(7), {'value': 7}, keep=1)
        assert assert_failed_save(folder, 'No space left on device', NEEDED) == shutil.disk_usage(folder).free
        checkpoint.save(folder, 7, arrays_of(7), {'value': 7}, keep=1)
        subprocess.run(['mount', '-o', 'remount,ro', str(folder)], check=True)
        assert_failed_save(folder, 'Read-only file system', NEEDED)
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(CheckpointError, match=r'Not a directory.*It needs 8,008 bytes, and [\d,]+ are free.*none yet'):
        checkpoint.save(tmp_path / 'file' / 'checkpoints', 1, arrays_of(1), {'value': 1}, keep=1)
