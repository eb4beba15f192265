"""RecordIO as MXNet's own tools write it: chunks, headers of face data sets, labels from 1, indices of all sorts."""
import gc
import io
import os
import runpy
import shutil
from pathlib import Path

import mxnet
import numpy as np
import pytest
from mxnet import recordio
from PIL import Image

from mxsimmim.cluster.inspection import unreadable
from mxsimmim.config import DataConfig
from mxsimmim.data import recordio as ours
from mxsimmim.data.labels import labelled_source, open_labelled
from mxsimmim.data.loader import every_image
from mxsimmim.data.sources import ImageFiles, Records, notes_of, open_source
from mxsimmim.data.transforms import decode
from mxsimmim.inference import features

IM2REC = Path(mxnet.__file__).parent / 'tools' / 'im2rec.py'


def encoded(value, kind='JPEG'):
    """A small image, all of one grey."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, kind)
    return file.getvalue()


def write(path, records, index=True, keys=None):
    """Records (label, bytes) by MXNet's own writer, an index beside it or not."""
    if index:
        writer = recordio.MXIndexedRecordIO(str(path.with_suffix('.idx')), str(path), 'w')
    else:
        writer = recordio.MXRecordIO(str(path), 'w')
    for number, (label, data) in enumerate(records):
        packed = recordio.pack(recordio.IRHeader(0, label, number, 0), data)
        writer.write_idx(keys[number] if keys else number, packed) if index else writer.write(packed)
    writer.close()
    return str(path)


def contents(source):
    return [source.read(index) for index in range(len(source))]


def greys(source):
    return [round(decode(data, '').mean()) for data in contents(source)]


@pytest.mark.parametrize('chunks', [3, 80], ids=['kept open', 'opened to read'])
def test_chunks(tmp_path, monkeypatch, chunks):
    assert 3 <= ours.KEPT_OPEN < 80
    for number in range(chunks):
        images = [(number % 3, b'%d %d' % (number, item)) for item in range(number % 4 + 1)]
        write(tmp_path / f'a_{number:02}.rec', images, index=number % 2)
    (tmp_path / 'a_00.lst').write_text('')
    want = [b'%d %d' % (number, item) for number in range(chunks) for item in range(number % 4 + 1)]
    files = sorted(map(str, tmp_path.glob('*.rec')))
    before = len(os.listdir('/proc/self/fd'))
    for path in (str(tmp_path), ';'.join(files), ' ; '.join(files) + ';'):
        source = open_source(path)
        assert contents(source) == want
        assert source.name(len(want) - 1) == f'{files[-1]}#{(chunks - 1) % 4}' and source.name(0) == f'{files[0]}#0'
        assert source.notes == [f'{chunks} RecordIO files, {files[0]} to {files[-1]}: {len(want):,} images']
        assert labelled_source(path, tuple('abc'))[1].tolist() == [int(data.split()[0]) % 3 for data in want]
    assert len(os.listdir('/proc/self/fd')) <= before + (3 if chunks == 3 else 0)
    backwards = open_source(';'.join(reversed(files[:2])))
    assert contents(backwards) == [b'1 0', b'1 1', b'0 0']
    single = tmp_path / 'single'
    single.mkdir()
    write(single / 'UPPER.REC', [(0, b'x')])
    assert isinstance(open_source(str(single)), Records) and open_source(str(single)).notes == []


def test_chunks_that_do_not_belong_together(tmp_path):
    for name in ('data_train.rec', 'data_val.rec'):
        write(tmp_path / name, [(0, b'x')])
    with pytest.raises(ValueError, match="different purposes, .*/data_train.rec and .*/data_val.rec: name the one"):
        open_source(str(tmp_path))
    for path, complaint in ((f'{tmp_path}/data_train.rec;{tmp_path}/none.rec', 'none.rec, a part of .*, is no RecordI'),
                            (f'{tmp_path};{tmp_path}/data_val.rec', ', a part of .*, is no RecordIO'),
                            (f'{tmp_path}/none;', 'none, a part of'), (';', '; does not exist')):
        with pytest.raises(ValueError, match=complaint):
            open_source(path)
    both = f'{tmp_path}/data_train.rec;{tmp_path}/data_val.rec'
    assert unreadable(both) == '' and "data 'x.rec' cannot be read (No such" in unreadable(f'{both};x.rec')
    (tmp_path / 'all').mkdir()
    for name in ('train_val_0.rec', 'train_val_1.rec', 'more.rec'):
        write(tmp_path / 'all' / name, [(0, name.encode())])
    assert contents(open_source(str(tmp_path / 'all'))) == [b'more.rec', b'train_val_0.rec', b'train_val_1.rec']
    shutil.rmtree(tmp_path / 'all')
    (tmp_path / 'image.jpg').write_bytes(encoded(1))
    source = open_source(str(tmp_path))  # images, as ever
    assert isinstance(source, ImageFiles) and len(source) == 1
    assert source.notes == [f'{tmp_path}: 4 other files left out: .idx (2), .rec (2)']
    (tmp_path / 'part_0.rec').touch()
    with pytest.raises(ValueError, match='part_0.rec holds no record'):
        open_source(f'{tmp_path}/data_val.rec;{tmp_path}/part_0.rec')


def face_set(path, index=True, second_label=False):
    """Six images of three people as InsightFace packs them: record 0 says where, at the end, those of people are."""
    people = [([1., 3.], b''), ([3., 6.], b''), ([6., 7.], b'')]
    images = [([float(who), 9.] if second_label else float(who), encoded(40 * number))
              for number, who in enumerate([0, 0, 1, 1, 1, 2])]
    return write(path, [([7., 10.], b''), *images, *people], index)


@pytest.mark.parametrize('index', [True, False])
@pytest.mark.parametrize('second_label', [True, False])
def test_headers_of_face_data_sets_are_passed_over(tmp_path, index, second_label):
    path = face_set(tmp_path / 'train.rec', index, second_label)
    source, labels, classes = labelled_source(path)
    assert greys(source) == [0, 40, 80, 120, 160, 200] and labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert classes == ('0', '1', '2') and source.name(0) == f'{path}#1' and source.name(5) == f'{path}#6'
    note = '4 records without an image, as the headers of face data sets, passed over'
    assert source.notes == [f'{path}: {note}']
    reader = recordio.MXIndexedRecordIO(str(tmp_path / 'train.idx'), path, 'r') if index else None
    for number in range(6) if index else ():  # as InsightFace reads them
        header, data = recordio.unpack(reader.read_idx(number + 1))
        assert data == source.read(number) and np.atleast_1d(header.label)[0] == labels[number]
    other = write(tmp_path / 'other.rec', [(2., encoded(7))])
    both = open_source(f'{path};{other}')
    assert greys(both)[-2:] == [200, 7] and note in both.notes[1] and both.labels().tolist() == [0, 0, 1, 1, 1, 2, 2]


def test_only_records_with_labels_and_nothing_else_are_headers(tmp_path):
    images = [b'', b'x', b'y' * 40, b'\x0a\x23\xd7\xce' * 3]
    path = write(tmp_path / 'a.rec', [(0, images[0]), *([[1., 2.], data] for data in images[1:])])
    source = open_source(path)
    assert contents(source) == images and source.notes == []  # the empty one is a broken image, with its name
    with pytest.raises(ValueError, match='a.rec#1 has 2 labels, not a class number'):
        source.labels()
    with pytest.raises(ValueError, match='b.rec holds no image: each of its 2 records has labels, but no bytes'):
        open_source(write(tmp_path / 'b.rec', [([1., 2.], b'')] * 2))
    raw = recordio.MXRecordIO(str(tmp_path / 'raw.rec'), 'w')
    raw.write(encoded(3))  # without the header that says what it is
    raw.close()
    with pytest.raises(ValueError, match='raw.rec#0: no image record: its [0-9]+ bytes cannot begin with .* labels'):
        open_source(str(tmp_path / 'raw.rec')).read(0)


@pytest.mark.parametrize('labels, note', [
    ([1, 2, 3, 3], 'no image has label 0 (labels seem to begin at 1); this class stays empty'),
    ([0, 3, 1, 3], 'no image has label 2; this class stays empty'),
    ([7, 7, 0, 7, 7, 0, 7, 7], 'no image has label 1, 2, 3, 4, 5, …; these 6 classes stay empty'),
    ([3., 0., 1., 2.], '')])
def test_labels_with_gaps(tmp_path, labels, note):
    path = write(tmp_path / 'a.rec', [(label, b'x') for label in labels])
    source, found, classes = labelled_source(path)
    assert found.tolist() == labels and classes == tuple(map(str, range(int(max(labels)) + 1)))
    assert source.notes == ([f'{path}: {note}'] if note else [])
    train = open_labelled(DataConfig(path=path, val_fraction=0.25), 0)
    assert notes_of(train.train, train.held_out) == source.notes
    assert labelled_source(path, tuple('abcdefgh'))[0].notes == []  # who named them knows


def test_labels_from_one_with_named_classes(tmp_path):
    path = write(tmp_path / 'a.rec', [(label, b'x') for label in [1, 2, 2, 3]])
    with pytest.raises(ValueError, match=r'has label 3, but there are only 3 classes, 0 to 2 \(labels seem to beg'):
        labelled_source(path, ('a', 'b', 'c'))
    with pytest.raises(ValueError, match="labels_per_class=1, but class '0' has no training image: .*labels from 0"):
        open_labelled(DataConfig(path=path, labels_per_class=1), 0)


def test_indices_of_all_sorts(tmp_path):
    path = write(tmp_path / 'a.rec', [(number, b'%d' % number) for number in range(4)], keys=[30, 7, 7000, 1])
    assert contents(open_source(path)) == [b'0', b'1', b'2', b'3']
    index = tmp_path / 'a.idx'
    lines = index.read_text().splitlines()
    index.write_text('\r\n'.join(lines[::-1]) + '\n\n')
    assert contents(open_source(path)) == [b'3', b'2', b'1', b'0']  # its order is the images'
    index.write_text('\n'.join(f'{number}.5\t{line.split()[1]}' for number, line in enumerate(lines)))
    assert contents(open_source(path)) == [b'0', b'1', b'2', b'3']


@pytest.mark.parametrize('options', [(), ('--pass-through',), ('--encoding', '.png', '--quality', '3')], ids=str)
def test_im2rec(tmp_path, options, monkeypatch):
    """The tool that comes with MXNet, as its page says: a list in chunks, then a file of each chunk."""
    pytest.importorskip('cv2')
    for number in range(7):
        file = tmp_path / 'images' / 'abc'[number % 3] / f'{number}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(30 * number))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'packed').mkdir()
    for words in (['--list', '--recursive', '--chunks', '2'], list(options)):
        monkeypatch.setattr('sys.argv', ['im2rec.py', *words, 'packed/set', 'images'])
        runpy.run_path(str(IM2REC), run_name='__main__')
        gc.collect()  # it leaves closing its files to their destructors
    files = ['packed/set_0.rec', 'packed/set_1.rec']
    lines = [line.split('\t') for file in files for line in Path(file).with_suffix('.lst').read_text().splitlines()]
    for path in ('packed', ';'.join(files)):
        source, labels, classes = labelled_source(path)
        assert labels.tolist() == [float(label) for _, label, _ in lines] and classes == ('0', '1', '2')
        assert [grey // 30 for grey in greys(source)] == [int(Path(name).stem) for _, _, name in lines]


def test_features_of_a_folder_of_chunks(tmp_path):
    for number in range(2):
        write(tmp_path / f'{number}.rec', [(number, encoded(90 * number + item)) for item in range(2)])
    source, labels, classes = features.open_images([str(tmp_path)])
    assert len(source) == 4 and labels.tolist() == [0, 0, 1, 1] and classes == ('0', '1')
    assert len(features._images(source)) == 64  # what the cache knows them by


def test_threads_read_chunks(tmp_path):
    """Files that are opened to read, by several threads at once."""
    from mxsimmim.config import ModelConfig
    from mxsimmim.data.transforms import ClassifyEvalTransform
    count = ours.KEPT_OPEN + 6
    for number in range(count):
        write(tmp_path / f'{number:03}.rec', [(0, encoded(3 * number, 'PNG'))])
    transform = ClassifyEvalTransform(DataConfig(), ModelConfig(img_size=16, patch_size=4))
    batches = list(every_image(open_source(str(tmp_path)), transform, 16, threads=4))
    seen = np.concatenate([batch.fields['image'][:, 5, 5, 0] for batch in batches])
    assert seen.tolist() == [3 * n for n in range(count)]
