"""Folders, RecordIO against MXNet's own reader, digits, held-out images, and what is said when something is wrong."""
import io
import os
import random
import struct

import numpy as np
import pytest
from PIL import Image

from mxsimmim.data.sources import (
    Digits,
    ImageFiles,
    Records,
    RecordWriter,
    Source,
    Subset,
    extensions,
    found,
    hold_out,
    image_files,
    notes_of,
    open_source,
)
from mxsimmim.data.transforms import decode

MAGIC = struct.pack('<I', 0xced7230a)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def names(folder):
    return [os.path.relpath(path, folder) for path in image_files([str(folder)])]


def test_class_folders_and_flat_files_sorted(tmp_path):
    touch(tmp_path, 'b/2.JPG', 'b/10.jpeg', 'a/x.png', 'a/deep/er/y.WebP', 'z.tif', 'a.bmp', 'c.gif', 'notes.txt',
          'jpg', 'b/list.json', '.hidden.jpg', '.cache/1.jpg', 'folder.jpg/inside.tiff')
    assert names(tmp_path) == ['a.bmp', 'a/deep/er/y.WebP', 'a/x.png', 'b/10.jpeg', 'b/2.JPG', 'c.gif',
                               'folder.jpg/inside.tiff', 'z.tif']
    source = open_source(str(tmp_path))
    assert len(source) == 8
    assert source.name(2) == str(tmp_path / 'a/x.png') and source.read(2) == b'a/x.png'


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, 'images/a/1.jpg', 'elsewhere/2.jpg')
    images = tmp_path / 'images'
    (images / 'b').symlink_to(tmp_path / 'elsewhere')
    (images / 'a' / 'up').symlink_to(images)
    (tmp_path / 'elsewhere' / 'back').symlink_to(images)
    (images / '3.jpg').symlink_to(tmp_path / 'elsewhere' / '2.jpg')
    (images / 'gone.jpg').symlink_to(tmp_path / 'nothing')
    assert names(images) == ['3.jpg', 'a/1.jpg', 'b/2.jpg', 'gone.jpg']
    source = open_source(str(images))
    assert source.read(0) == b'elsewhere/2.jpg'
    with pytest.raises(OSError, match='gone.jpg'):
        source.read(3)


def test_files_and_folders_given_by_name(tmp_path):
    touch(tmp_path, 'one', 'f/b.jpg', 'f/a.jpg')
    assert image_files([str(tmp_path / 'one'), str(tmp_path / 'f')]) == [
        str(tmp_path / name) for name in ('one', 'f/a.jpg', 'f/b.jpg')]
    assert len(ImageFiles([])) == 0


def test_every_extension_is_of_an_image_that_can_be_read():
    """Pillow writes one of each kind, the reader of images reads it; nothing else is taken for an image."""
    known = extensions()
    assert list(known)[:3] == ['jpg', 'jpeg', 'png']
    assert {'ppm', 'pgm', 'pbm', 'pnm', 'jfif', 'jpe', 'jp2', 'j2k', 'tga', 'ico', 'dib', 'mpo', 'pcx'} <= set(known)
    assert not {'eps', 'ps', 'pdf', 'wmf', 'emf', 'h5', 'grib', 'mpg', 'txt', 'heic', ''} & set(known)
    Image.init()
    assert ('avif' in known) == ('AVIF' in Image.OPEN and '.avif' in Image.registered_extensions())
    gradient = np.add.outer(np.arange(40), np.arange(32)).astype(np.uint8) * 3
    for name in known:
        kind = Image.registered_extensions()[f'.{name}']
        if kind not in Image.SAVE:
            assert name == 'qoi', name
            continue
        file = io.BytesIO()
        options = {'sizes': [(32, 40)]} if name == 'ico' else {}
        Image.fromarray(gradient).convert('1' if name == 'pbm' else 'RGB').save(file, kind, **options)
        pixels = decode(file.getvalue(), name)
        assert pixels.shape == (40, 32, 3), name
        if name != 'pbm':
            assert np.abs(pixels - gradient[:, :, None].astype(int)).max() <= 8, name


def test_other_files_are_counted_by_name(tmp_path):
    touch(tmp_path, 'a/1.PPM', 'a/2.jpe', 'b/3.JP2', 'a/4.heic', 'b/5.HEIC', 'b/6.heic', 'a/notes.txt', 'README', 'b/7',
          'a/8.JPEG.1', 'a/9.jpg.tmp', 'Dr. Who', '.hidden.txt', 'Thumbs.db', 'a/desktop.ini', '.DS_Store', 'a/._1.PPM')
    source = open_source(str(tmp_path))
    assert [os.path.relpath(source.name(i), tmp_path) for i in range(len(source))] == ['a/1.PPM', 'a/2.jpe', 'b/3.JP2']
    assert source.notes == [f'{tmp_path}: 9 other files left out: .heic (3), without extension (3), .1 (1), .tmp (1), '
                            '.txt (1)']
    parts = hold_out(source, 0.4, seed=0)
    assert notes_of(*parts, None) == notes_of(source) == source.notes
    (tmp_path / 'one').mkdir()
    touch(tmp_path / 'one', 'a.jpg', 'list.csv')
    assert open_source(str(tmp_path / 'one')).notes == [f'{tmp_path}/one: 1 other file left out: .csv (1)']
    assert open_source(str(tmp_path / 'one' / '..' / 'b')).notes[0].endswith('.heic (2), without extension (1)')
    touch(tmp_path, *(f'many/x.k{number}' for number in range(10)), 'many/x.jpg', 'many/y.k7')
    assert open_source(str(tmp_path / 'many')).notes[0].endswith(
        '11 other files left out: .k7 (2), .k0 (1), .k1 (1), .k2 (1), .k3 (1), .k4 (1), .k5 (1), .k6 (1), …')


def test_a_folder_of_unreadable_formats_says_so(tmp_path):
    touch(tmp_path, 'a/1.heic', 'a/2.HEIC', 'n1.tar')
    with pytest.raises(ValueError, match=r'has no images: no file .* ends in .jpg, .*, .ppm, .*; it has 3 other files: '
                       r'.heic \(2\), .tar \(1\): unpack archives, convert images to .jpg or .png$'):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match='has no images: no file[^;]*$'):
        touch(tmp_path, 'b/.DS_Store')
        open_source(str(tmp_path / 'b'))


def test_what_systems_leave_is_no_image(tmp_path, monkeypatch):
    touch(tmp_path, 'cat/1.jpg', 'cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg', 'cat/._1.jpg', '@eaDir/x.jpg',
          '#recycle/x.jpg', 'lost+found/x.jpg', '.Trash-1000/files/x.jpg', '$RECYCLE.BIN/S-1-5/x.jpg',
          'System Volume Information/x.jpg',
          '__MACOSX/cat/x.jpg', '.ipynb_checkpoints/x.jpg', '.AppleDouble/x.jpg', '@Recycle/x.jpg', '@tmp/x.jpg',
          'dog/2.jpg', 'recycled/3.jpg')

    def scan(path, listed=os.scandir):  # root, who may run the tests, can list everything
        if path.endswith('lost+found'):
            raise PermissionError(13, 'Permission denied', path)
        return listed(path)
    monkeypatch.setattr(os, 'scandir', scan)
    assert names(tmp_path) == ['cat/1.jpg', 'dog/2.jpg', 'recycled/3.jpg']
    assert open_source(str(tmp_path)).notes == []
    assert image_files([str(tmp_path / '@eaDir')]) == [str(tmp_path / '@eaDir/x.jpg')]  # where it was asked for


def test_found_goes_on_after_what_is_missing(tmp_path, capfd, caplog):
    touch(tmp_path, 'a/1.jpg', 'a/x.txt', 'b/y.txt')
    files, problems = found([str(tmp_path / name) for name in ('none', 'a', 'b')])
    assert files == [str(tmp_path / 'a/1.jpg')] and len(problems) == 2
    assert 'none does not exist' in problems[0] and 'b has no images' in problems[1]
    assert [record.getMessage() for record in caplog.records] == [f'{tmp_path}/a: 1 other file left out: .txt (1)']


def test_digits():
    from sklearn.datasets import load_digits
    source: Source = open_source('digits')
    image = source.read(5)
    assert len(source) == 1797 and source.name(5) == 'digits#5'
    digits = load_digits()
    assert (source.labels() == digits.target).all()
    assert all((source.read(i) == np.round(digits.images[i] * 255 / 16)).all() for i in range(1797))
    assert image.dtype == np.uint8 and image.shape == (8, 8)
    assert np.abs(image / 255 * 16 - load_digits().images[5]).max() <= 8 / 255 + 1e-9  # half a grey level
    assert max(source.read(i).max() for i in range(1797)) == 255


def test_open_source_messages(tmp_path):
    touch(tmp_path, 'a.csv', 'empty/readme.md', 'junk.rec')
    for path, message in (('', 'no images: set data.path to a folder of images, a RecordIO file'),
                          (tmp_path / 'none', 'none does not exist: give a folder of images'),
                          (tmp_path / 'none.rec', 'none.rec does not exist'),
                          (tmp_path / 'a.csv', 'a.csv is a file, but not a RecordIO file'),
                          (tmp_path / 'empty', 'empty has no images: no file in or below it ends in .jpg, .jpeg, .png'),
                          (tmp_path / 'junk.rec', 'junk.rec: no record at byte 0 of 8: not a RecordIO file')):
        with pytest.raises(ValueError, match=message):
            open_source(str(path))


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def forbidden(path):  # root, who may run the tests, can list everything
        raise PermissionError(13, 'Permission denied', path)
    (tmp_path / 'a').mkdir()
    monkeypatch.setattr(os, 'scandir', lambda path, scan=os.scandir: (forbidden if path.endswith('a') else scan)(path))
    with pytest.raises(ValueError, match='a: cannot list the folder: Permission denied'):
        open_source(str(tmp_path))


@pytest.mark.parametrize('fraction, held_out', [(0.2, 359), (0.5, 898), (0.001, 2)])
def test_hold_out_is_disjoint_and_repeatable(fraction, held_out):
    digits = Digits()
    train, validation = hold_out(digits, fraction, seed=3)
    assert (len(train), len(validation)) == (1797 - held_out, held_out)
    parts = [[part.name(i) for i in range(len(part))] for part in (train, validation)]
    assert sorted(parts[0] + parts[1]) == sorted(f'digits#{i}' for i in range(1797))
    again, other = (hold_out(digits, fraction, seed)[1] for seed in (3, 4))
    assert [again.name(i) for i in range(held_out)] == parts[1]
    assert [other.name(i) for i in range(held_out)] != parts[1]
    assert (train.read(7) == digits.read(int(train.name(7).split('#')[1]))).all()


@pytest.mark.parametrize('count, fraction, message', [
    (10, 0.01, r'data.val_fraction=0.01 of 10 images holds out 0, which leaves nothing to validate with'),
    (3, 0.9, r'data.val_fraction=0.9 of 3 images holds out 3, which leaves nothing to train on')])
def test_hold_out_of_too_little(count, fraction, message):
    with pytest.raises(ValueError, match=message):
        hold_out(Subset(Digits(), np.arange(count)), fraction, seed=0)


def payloads():
    """Images of awkward lengths, and some that hold the magic number where it matters and where it does not."""
    rng = random.Random(19)
    plain = [rng.randbytes(n) if hasattr(rng, 'randbytes') else bytes(rng.getrandbits(8) for _ in range(n))
             for n in (1, 2, 3, 4, 5, 1000, 4097)]
    return plain + [MAGIC, MAGIC * 3, b'a' * 8 + MAGIC + b'b' * 5, b'abc' + MAGIC + b'x', b'a' * 4 + MAGIC * 2 + b'b',
                    b'x' + MAGIC + b'yyy' + MAGIC, MAGIC + MAGIC[:3], b'']


def write(path, images):
    with RecordWriter(str(path)) as writer:
        for number, image in enumerate(images):
            writer.write(image, number % 5)
        writer.commit()


def test_records_round_trip(tmp_path):
    path = tmp_path / 'a.rec'
    write(path, payloads())
    for index in (True, False):
        source = open_source(str(path))
        assert [source.read(i) for i in range(len(source))] == payloads()
        assert source.name(3) == f'{path}#3'
        if index:
            (tmp_path / 'a.idx').unlink()
    assert os.listdir(tmp_path) == ['a.rec']


def test_records_are_those_of_mxnet(tmp_path):
    from mxnet import recordio
    ours, theirs = tmp_path / 'ours.rec', tmp_path / 'theirs.rec'
    write(ours, payloads())
    writer = recordio.MXIndexedRecordIO(str(theirs.with_suffix('.idx')), str(theirs), 'w')
    for number, image in enumerate(payloads()):
        writer.write_idx(number, recordio.pack(recordio.IRHeader(0, number % 5, number, 0), image))
    writer.close()
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.with_suffix('.idx').read_text() == theirs.with_suffix('.idx').read_text()
    reader = recordio.MXIndexedRecordIO(str(ours.with_suffix('.idx')), str(ours), 'r')
    for number, image in enumerate(payloads()):
        header, data = recordio.unpack(reader.read_idx(number))
        assert (header.label, header.id, data) == (number % 5, number, image)
    reader.close()


def test_several_labels_are_skipped(tmp_path):
    from mxnet import recordio
    writer = recordio.MXRecordIO(str(tmp_path / 'a.rec'), 'w')
    writer.write(recordio.pack(recordio.IRHeader(0, [1., 2., 3.], 0, 0), b'image'))
    writer.close()
    assert open_source(str(tmp_path / 'a.rec')).read(0) == b'image'


@pytest.mark.parametrize('with_index', [True, False])
@pytest.mark.parametrize('missing', [1, 100, 4000, 4130])
def test_truncated_records(tmp_path, with_index, missing):
    path = tmp_path / 'a.rec'
    write(path, [b'x' * 4000, b'y' * 4096])
    size = path.stat().st_size
    os.truncate(path, size - missing)
    if not with_index:
        path.with_suffix('.idx').unlink()
    with pytest.raises(ValueError, match=f'a.rec is cut short: .* byte .*{size - missing}.*: copy or pack it again'):
        open_source(str(path))


def test_empty_records(tmp_path):
    (tmp_path / 'a.rec').touch()
    with pytest.raises(ValueError, match='a.rec holds no record'):
        open_source(str(tmp_path / 'a.rec'))


@pytest.mark.parametrize('index, message', [
    ('0\t0\n', 'a.idx ends at byte 4032 of the 4068 of .*a.rec: it belongs to another file'),
    ('0\t0\n1\t4\n', 'no record at byte 4 of 4068'),
    ('0\t0\n1\t99999\n', 'a.rec is cut short: a record is missing at byte 99999 of 4068'),
    ('0 0\n', 'a.idx cannot be read as key, tab, offset'), ('', 'a.rec holds no record')])
def test_index_of_another_file(tmp_path, index, message):
    write(tmp_path / 'a.rec', [b'x' * 4000, b'y' * 4])
    (tmp_path / 'a.idx').write_text(index)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / 'a.rec'))


def test_a_damaged_record_is_found_when_read(tmp_path):
    path = tmp_path / 'a.rec'
    write(path, [b'x' * 40, b'y' * 40, b'z' * 40])
    source = Records(str(path))
    with open(path, 'r+b') as file:
        file.seek(72)  # 8 + 24 + 40
        file.write(b'????')
    assert source.read(0) == b'x' * 40 and source.read(2) == b'z' * 40
    with pytest.raises(ValueError, match='a.rec: no record at byte 72'):
        source.read(1)


def test_writer_leaves_nothing_behind_unless_committed(tmp_path):
    path = tmp_path / 'a.rec'
    write(path, [b'old'])
    with pytest.raises(RuntimeError):
        with RecordWriter(str(path)) as writer:
            writer.write(b'new', 0)
            raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ['a.idx', 'a.rec'] and open_source(str(path)).read(0) == b'old'
    write(path, [b'new', b'newer'])
    assert sorted(os.listdir(tmp_path)) == ['a.idx', 'a.rec'] and len(open_source(str(path))) == 2


def test_writer_messages(tmp_path):
    with pytest.raises(ValueError, match='a.bin: the name of a RecordIO file ends in .rec'):
        RecordWriter(str(tmp_path / 'a.bin'))
    with pytest.raises(ValueError, match='a.rec: No such file or directory .*choose another place'):
        RecordWriter(str(tmp_path / 'none' / 'a.rec'))
