"""Files of torch.save without PyTorch: what real ones hold, what poisoned and damaged ones do, what we write."""
import copyreg
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mxsimmim.interop import files, pth

DATA = Path(__file__).parents[1] / 'data'
PROGRAM = Path(__file__).parents[1] / 'support' / 'torch_files.py'
PYTHON = os.environ.get('TORCH_PYTHON', sys.executable)  # may be another one that has PyTorch
INTEGERS = np.arange(6).reshape(2, 3) - 2
TABLE = np.arange(24, dtype='float32').reshape(4, 6)
TYPES = ['float64', 'float32', 'float16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool']
STORAGE = b'((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ'
TENSOR = b'ctorch._utils\n_rebuild_tensor_v2\n' + STORAGE + b'K\x00(K\x02K\x03t(K\x03K\x01t\x89)tR'


def need_torch():
    if subprocess.run([PYTHON, '-c', 'import torch'], capture_output=True).returncode:
        pytest.skip(f'{PYTHON} has no PyTorch; TORCH_PYTHON=/path/to/python names one that has')


def zipped(path, tree, entries=(), compression=zipfile.ZIP_STORED):
    """A file with this pickle and one storage of six floats."""
    with zipfile.ZipFile(path, 'w', compression) as archive:
        content = {'data.pkl': tree, 'data/0': np.arange(6, dtype='<f4').tobytes(), **dict(entries)}
        for name, data in content.items():
            archive.writestr(f'archive/{name}', data)
    return path


def legacy(path, tree, storages=b''):
    parts = [pickle.dumps(pth.LEGACY_MAGIC, 2), pickle.dumps(1001, 2), pickle.dumps({'little_endian': True}, 2), tree]
    path.write_bytes(b''.join(parts) + pickle.dumps([], 2) + storages)
    return path


@pytest.mark.parametrize('file', ['kinds.pth', 'kinds_legacy.pth'])
def test_reads_every_type_and_view_that_pytorch_wrote(file):
    arrays = pth.read_pth(DATA / file)
    for name in TYPES:
        assert arrays[name].dtype == name
        np.testing.assert_array_equal(arrays[name], INTEGERS.astype(name), err_msg=name)
    expected = dict(bfloat16=INTEGERS.astype('float32'), table=TABLE, transposed=TABLE.T, column=TABLE[:, 1],
                    corner=TABLE[1:3, 2:5:2], tied=TABLE, parameter=np.arange(3, dtype='float32'),
                    scalar=np.float32(2.5), empty=np.zeros((0, 3), 'float32'))
    assert set(arrays) == {*TYPES, *expected}
    for name, value in expected.items():
        assert arrays[name].shape == value.shape and arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)
    assert all(array.flags.c_contiguous and array.flags.writeable for array in arrays.values())


@pytest.mark.parametrize('kind', ['vit', 'swin'])
def test_reads_an_official_checkpoint(kind):
    arrays, recorded = pth.read_pth(DATA / f'finetune_{kind}.pth'), np.load(DATA / f'finetune_{kind}.npz')
    name = 'patch_embed.proj.weight'  # which loading for fine-tuning leaves as it is
    np.testing.assert_array_equal(arrays[f'encoder.{name}'], recorded[f'param/{name}'])


def test_the_dict_is_found_under_either_name_or_at_the_top(tmp_path):
    entry = b'X\x01\x00\x00\x00w' + TENSOR + b's'
    for tree in (b'}' + entry + b'.', b'}X\x05\x00\x00\x00model}' + entry + b's.',
                 b'}X\x0a\x00\x00\x00state_dict}' + entry + b's.'):
        arrays = pth.read_pth(zipped(tmp_path / 'a.pth', b'\x80\x02' + tree))
        np.testing.assert_array_equal(arrays['w'], np.arange(6).reshape(2, 3))


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.parts = function, args

    def __reduce__(self):
        return self.parts


def poisons(marker):
    """name -> (pickle that makes the file `marker` when the stock unpickler runs it, the global to be named)."""
    shell = f'touch {marker}'
    code = f"open({str(marker)!r}, 'w').close()"

    def text(value):
        return b'X' + len(value).to_bytes(4, 'little') + value.encode()

    system, line = Call(os.system, shell), text(shell)
    named = f'{os.system.__module__}.system'
    return {
        'system, protocol 0': (pickle.dumps(system, 0), named),
        'system, protocol 2': (pickle.dumps({'model': {'w': system}}, 2), named),
        'system, protocol 4': (pickle.dumps(system, 4), named),
        'eval': (pickle.dumps({'model': {}, 'config': Call(eval, f'__import__("os").system({shell!r})')}, 2),
                 '__builtin__.eval'),
        'exec, protocol 4': (pickle.dumps([Call(exec, code)], 4), 'builtins.exec'),
        'chain of getattr': (b'cbuiltins\ngetattr\n(cbuiltins\n__import__\n' + text('os') + b'\x85R' + text('system')
                             + b'tR' + line + b'\x85R.', 'builtins.getattr'),
        'INST': (b'(' + line + b'ios\nsystem\n.', 'os.system'),
        'OBJ': (b'(cos\nsystem\n' + line + b'o.', 'os.system'),
        'NEWOBJ': (b'\x80\x02csubprocess\nPopen\n' + text('touch') + text(str(marker)) + b'\x86\x85\x81.',
                   'subprocess.Popen'),
        'dotted name': (b'\x80\x04' + text('collections') + text('_sys.modules') + b'\x93' + b'0cos\nsystem\n' + line
                        + b'\x85R.', 'collections._sys.modules'),
        'reconstructor': (b'ccopyreg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.',
                          'copyreg._reconstructor'),
        'state': (b'\x80\x02ccollections\nOrderedDict\n)Rcos\nsystem\n' + line + b'\x85Rb.', 'os.system'),
        'bytes for torch.load': (b'\x80\x02ctorch.storage\n_load_from_bytes\nX\x01\x00\x00\x00a\x85R.',
                                 'torch.storage._load_from_bytes'),
        'inside a tensor': (TENSOR[:-4] + b'cos\nsystem\n' + line + b'\x85RtR.', 'os.system'),
    }


NAMES = list(poisons('x'))


@pytest.mark.parametrize('container', ['zip', 'legacy', 'bare'])
@pytest.mark.parametrize('name', NAMES)
def test_a_poisoned_file_is_refused_and_nothing_runs(name, container, tmp_path):
    marker, file = tmp_path / 'marker', tmp_path / 'poisoned.pth'
    content, culprit = poisons(marker)[name]
    if container == 'bare':
        file.write_bytes(content)
    else:
        (zipped if container == 'zip' else legacy)(file, content)
    with pytest.raises(ValueError) as caught:
        pth.read_pth(file)
    assert not marker.exists()
    for part in (str(file), repr(culprit), 'torch.save'):
        assert part in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', [name for name in NAMES if name not in (
    'bytes for torch.load', 'inside a tensor', 'reconstructor')])  # these need PyTorch, or end in a TypeError
def test_the_poison_is_real(name, tmp_path):
    marker = tmp_path / 'marker'
    content, _ = poisons(marker)[name]
    try:
        pickle.loads(content)
    except Exception:
        pass  # after the deed
    assert marker.exists() or name == 'NEWOBJ'  # which starts it only in __init__


def test_an_extension_that_the_stock_unpickler_has_in_store_is_refused(tmp_path):
    copyreg.add_extension('os', 'system', 77)
    try:
        pickle.loads(b'\x80\x02\x82M.')  # now it is cached, and find_class is not asked any more
        with pytest.raises(ValueError, match="would run 'copyreg extension 77'"):
            pth.read_pth(zipped(tmp_path / 'a.pth', b'\x80\x02\x82MX\x02\x00\x00\x00ls\x85R.'))
    finally:
        copyreg.remove_extension('os', 'system', 77)


def test_what_a_file_says_cannot_change_the_reader(tmp_path):
    before = {name: getattr(value, '__defaults__', value) for name, value in pth.GLOBALS.items()}
    rebuild = b'ctorch._utils\n_rebuild_tensor_v2\n'
    for state in (b'}X\x0c\x00\x00\x00__defaults__Nsb', b'}}X\x0c\x00\x00\x00__defaults__Ns\x86b', b'K\x01K\x02s',
                  b'K\x01a'):
        tree = b'\x80\x02' + rebuild + state + b'0}X\x01\x00\x00\x00w' + TENSOR + b's.'
        try:
            pth.read_pth(zipped(tmp_path / 'a.pth', tree))
        except ValueError as error:
            assert 'damaged' in str(error)
        assert {name: getattr(value, '__defaults__', value) for name, value in pth.GLOBALS.items()} == before
        assert not any(getattr(value, '__dict__', {}) for value in pth.GLOBALS.values())


def damaged():
    whole = (DATA / 'kinds.pth').read_bytes()
    old = (DATA / 'kinds_legacy.pth').read_bytes()
    broken = bytearray(whole)
    broken[whole.index(TABLE.tobytes())] ^= 255
    return {'cut short': whole[:-400], 'cut in the middle': whole[:3000], 'a byte changed': bytes(broken),
            'legacy, cut short': old[:-5], 'legacy, cut in its pickle': old[:500], 'legacy, longer': old + b'x',
            'empty': b'', 'text': b'hello\nworld\n', 'PNG': b'\x89PNG\r\n\x1a\n' + bytes(50),
            'pickle of a list': pickle.dumps([1, 2]), 'no tensors': b'\x80\x02}.', 'nonsense': bytes(range(256))}


@pytest.mark.parametrize('name', list(damaged()))
def test_damaged_files_get_one_line(name, tmp_path):
    file = tmp_path / 'file.pth'
    file.write_bytes(damaged()[name])
    with pytest.raises(ValueError) as caught:
        pth.read_pth(file)
    assert str(caught.value).startswith(str(file)) and '\n' not in str(caught.value) and len(str(caught.value)) < 400


def tensor(elements=6, offset=0, shape=(2, 3), strides=(3, 1)):
    """The instructions of {'w': a tensor} over storage 0."""
    def numbers(*values):
        return b''.join(pickle.dumps(value, 2)[2:-1] for value in values)

    return (b'\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n' + STORAGE[:-4] + numbers(elements) + b'tQ'
            + numbers(offset) + b'(' + numbers(*shape) + b't(' + numbers(*strides) + b't\x89)tRs.')


@pytest.mark.parametrize('keys, words', [
    (dict(elements=10 ** 12), 'would fill 4,000,000,000,024 bytes'),
    (dict(elements=10 ** 12, shape=(10 ** 12,), strides=(1,)), 'would fill 8,000,000,000,000 bytes'),
    (dict(shape=(10 ** 12,), strides=(0,)), 'does not fit into its storage of 6 elements'),
    (dict(offset=1), r'shape \(2, 3\), strides \(3, 1\) and offset 1 does not fit into its storage of 6'),
    (dict(offset=-1), 'not a tensor'), (dict(strides=(-3, 1)), 'not a tensor'), (dict(strides=(1,)), 'not a tensor'),
    (dict(shape=(1,) * 40, strides=(1,) * 40), 'not a tensor'),
    (dict(shape=(2, 'x')), 'not a tensor')], ids=str)
def test_sizes_are_compared_with_the_file_before_anything_is_allocated(keys, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        pth.read_pth(zipped(tmp_path / 'a.pth', tensor(**keys)))


def test_nothing_nested_is_hashed_or_printed(tmp_path):
    """A tuple of twice the same tuple of twice the same …: 60 levels take 2^60 operations to hash or print."""
    nested = b'K\x00K\x00\x86' + b'2\x86' * 60
    for tree in (b'}' + nested + b'K\x00s.', b'(' + nested + b'd.', b'\x8f(' + nested + b'\x90.', nested + b'Q.',
                 b'ctorch._utils\n_rebuild_tensor_v3\n' + STORAGE + b'K\x00))\x89N' + nested + b'tR.',
                 b'ctorch._utils\n_rebuild_tensor_v2\n' + STORAGE + b'K\x00' + nested + b')tR.'):
        for write in (zipped, legacy):
            with pytest.raises(ValueError, match='damaged'):
                pth.read_pth(write(tmp_path / 'a.pth', b'\x80\x02' + tree))
    nothing = pickle.dumps({}, 2)
    for version, keys in ((nested + b'.', nothing), (pickle.dumps(1001), b'](' + nested + b'e.')):
        (tmp_path / 'a.pth').write_bytes(pickle.dumps(pth.LEGACY_MAGIC, 2) + version + nothing + nothing + keys)
        with pytest.raises(ValueError, match='damaged'):
            pth.read_pth(tmp_path / 'a.pth')


def test_other_zip_files(tmp_path):
    file, tree = tmp_path / 'a.pth', tensor()
    assert pth.read_pth(zipped(file, tree))['w'].tolist() == [[0, 1, 2], [3, 4, 5]]
    for entries, compression, words in [
            ({'constants.pkl': b''}, zipfile.ZIP_STORED, 'is a TorchScript program'),
            ({'data.pkl': tree + bytes(10 ** 6)}, zipfile.ZIP_DEFLATED, 'has a compressed entry'),
            ({'byteorder': b'big'}, zipfile.ZIP_STORED, 'big-endian'),
            ({'data/0': bytes(20)}, zipfile.ZIP_STORED, "'archive/data/0' has 20 bytes, its tensors need 24")]:
        with pytest.raises(ValueError, match=words):
            pth.read_pth(zipped(file, tree, entries, compression))
    outside = tree.replace(b'X\x01\x00\x00\x000', b'X\x0f\x00\x00\x00../../etc/hosts')
    with pytest.raises(ValueError, match="has no entry 'archive/data/../../etc/hosts'"):
        pth.read_pth(zipped(file, outside))
    with zipfile.ZipFile(file, 'w') as archive:
        archive.writestr('notes.txt', 'hello')
    with pytest.raises(ValueError, match='a zip file that torch.save did not write'):
        pth.read_pth(file)
    with pytest.raises(ValueError, match='none.pth: cannot be read: No such file'):
        pth.read_pth(tmp_path / 'none.pth')


def samples():
    rng = np.random.default_rng(0)
    arrays = {name: (rng.standard_normal((2, 3)) * 9).astype(name) for name in TYPES}
    arrays.update({'transposed.weight': TABLE.T, 'scalar': np.array(2.5), 'empty': np.zeros((0, 3), 'float32'),
                   'long': np.arange(70000), 'größe': np.ones(300, 'float32')[::2],
                   'swapped': np.arange(3, dtype='>f4')})
    return arrays


def test_written_files_read_back_and_name_nothing_but_tensors(tmp_path):
    file, arrays = tmp_path / 'a.pth', samples()
    pth.write_pth(file, arrays)
    back = pth.read_pth(file)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].shape == array.shape and back[name].dtype == array.dtype.newbyteorder('=')
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        content = archive.read('a/data.pkl')
        for entry in archive.infolist():
            assert entry.compress_type == zipfile.ZIP_STORED
            header = file.read_bytes()[entry.header_offset:][:30]
            begin = entry.header_offset + 30 + int.from_bytes(header[26:28], 'little') \
                + int.from_bytes(header[28:30], 'little')
            assert begin % 64 == 0
    named = {argument for code, argument, _ in pickletools.genops(content) if 'GLOBAL' in code.name}
    assert named - {f'torch {name}' for name in pth.STORAGES} == {'collections OrderedDict',
                                                                 'torch._utils _rebuild_tensor_v2'}
    assert list(tmp_path.iterdir()) == [file]
    first = file.read_bytes()
    pth.write_pth(file, arrays)
    assert file.read_bytes() == first


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / 'a.pth'
    pth.write_pth(file, {'w': TABLE})
    before = file.read_bytes()
    with pytest.raises(ValueError, match="c is of type complex64; the file can hold float64, float32"):
        pth.write_pth(file, {'w': TABLE, 'c': np.zeros(2, 'complex64')})
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match='none/a.pth: cannot be written: No such file or directory'):
        pth.write_pth(tmp_path / 'none' / 'a.pth', {'w': TABLE})


def test_pytorch_loads_what_we_write(tmp_path):
    need_torch()
    arrays = {name: array for name, array in samples().items() if name != 'swapped'}
    pth.write_pth(tmp_path / 'a.pth', arrays)
    np.savez(tmp_path / 'a.npz', **arrays)
    subprocess.run([PYTHON, PROGRAM, 'check', tmp_path / 'a.pth', tmp_path / 'a.npz'], check=True)


def test_we_read_what_this_pytorch_writes(tmp_path):
    need_torch()
    subprocess.run([PYTHON, PROGRAM, 'record', tmp_path], check=True)
    for file in ('kinds.pth', 'kinds_legacy.pth'):
        new, recorded = pth.read_pth(tmp_path / file), pth.read_pth(DATA / file)
        assert list(new) == list(recorded)
        for name in recorded:
            np.testing.assert_array_equal(new[name], recorded[name], err_msg=name)


def test_safetensors(tmp_path):
    from safetensors import serialize_file
    from safetensors.numpy import save_file
    file, arrays = tmp_path / 'a.safetensors', {name: INTEGERS.astype(name) for name in TYPES}
    save_file(arrays, file)
    back = files.read_weights(file)
    assert {name: value.dtype.name for name, value in back.items()} == {name: name for name in TYPES}
    assert all(np.array_equal(back[name], arrays[name]) for name in TYPES)
    serialize_file({'b': {'dtype': 'bfloat16', 'shape': [2], 'data': b'\x80\x3f\x20\xc0'}}, file)
    np.testing.assert_array_equal(files.read_weights(file)['b'], np.array([1.0, -2.5], 'float32'))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match='a.safetensors is cut short, damaged or no safetensors file'):
        files.read_weights(file)
