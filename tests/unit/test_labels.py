"""Classes from folders, tables, RecordIO and the digits; few labels a class; what is said when they do not match."""
import os

import numpy as np
import pytest

from mxsimmim.config import DataConfig
from mxsimmim.data.labels import Labelled, labelled_source, open_labelled, read_classes
from mxsimmim.data.sources import SEED, Digits, RecordWriter, hold_out


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def listed(source, labels, classes):
    """{file name: class} of a source."""
    assert labels.dtype == np.int64 and len(labels) == len(source)
    return {os.path.basename(source.name(i)): classes[labels[i]] for i in range(len(source))}


@pytest.fixture
def animals(tmp_path):
    touch(tmp_path / 'train', 'cat/1.jpg', 'cat/old/2.jpg', 'ant/3.jpg', 'dog/4.jpg', 'dog/5.png', '.cache/x.jpg',
          'notes.txt', 'dog/list.csv')
    return tmp_path / 'train'


def test_class_folders(animals):
    train, labels, held_out, held_out_labels, classes = open_labelled(DataConfig(path=f'{animals}/'), 0)
    assert classes == ('ant', 'cat', 'dog') and held_out is None and held_out_labels is None
    assert listed(train, labels, classes) == {'1.jpg': 'cat', '2.jpg': 'cat', '3.jpg': 'ant', '4.jpg': 'dog',
                                              '5.png': 'dog'}


def test_held_out_folders_are_numbered_as_the_training_ones(animals, tmp_path):
    touch(tmp_path / 'val', 'dog/a.jpg', 'cat/b.jpg')
    found = open_labelled(DataConfig(path=str(animals), val_path=str(tmp_path / 'val')), 0)
    assert isinstance(found, Labelled) and found.held_out_labels.tolist() == [1, 2]  # cat, dog
    assert listed(found.held_out, found.held_out_labels, found.classes) == {'a.jpg': 'dog', 'b.jpg': 'cat'}
    touch(tmp_path / 'val', 'cow/c.jpg')
    with pytest.raises(ValueError, match='val/cow is not one of the 3 classes ant, cat, dog: rename or remove'):
        open_labelled(DataConfig(path=str(animals), val_path=str(tmp_path / 'val')), 0)


def test_order_from_a_file_of_classes(animals, tmp_path):
    names = tmp_path / 'classes.txt'
    names.write_text('\ufeffdog\n\nemu\ncat \r\nant\n', encoding='utf-8')
    _, labels, _, _, classes = open_labelled(DataConfig(path=str(animals), classes=str(names)), 0)
    assert classes == ('dog', 'emu', 'cat', 'ant') and labels.tolist() == [3, 2, 2, 0, 0]
    names.write_text('dog\ncat\n')
    with pytest.raises(ValueError, match='train/ant is not one of the 2 classes dog, cat: rename or remove the folder'):
        open_labelled(DataConfig(path=str(animals), classes=str(names)), 0)


@pytest.mark.parametrize('content, message', [
    (b'a\nb\na\n', "classes.txt, line 3: class 'a' is already in line 1: remove one"),
    (b'\n \n', 'classes.txt names no class: write one a line'),
    (b'\xff\xfea', 'data.classes=.*classes.txt cannot be read: not UTF-16 text'),
    (None, 'data.classes=.*classes.txt cannot be read: No such file')])
def test_bad_files_of_classes(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'classes.txt').write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_classes(str(tmp_path / 'classes.txt'))


def test_folders_of_systems_are_no_classes(animals):
    touch(animals, '@eaDir/x.jpg', 'cat/@eaDir/1.jpg/thumb.jpg', '__MACOSX/cat/._1.jpg')
    for name in ('lost+found', 'System Volume Information', '$RECYCLE.BIN', '.Trash-1000', '#recycle'):
        (animals / name).mkdir()
    train, labels, _, _, classes = open_labelled(DataConfig(path=str(animals)), 0)
    assert classes == ('ant', 'cat', 'dog') and labels.tolist() == [0, 1, 1, 2, 2]
    assert train.notes == [f'{animals}: 2 other files left out: .csv (1), .txt (1)']


@pytest.mark.parametrize('extra, message', [
    ('bird/readme.txt', r'class folder .*train/bird has no images, but 1 other file: .txt \(1\): add some or remove'),
    ('6.jpg', '1 of the 6 images in .*train are in no class folder, the first is .*train/6.jpg: move images to '
     '.*train/CLASS/, or name their classes in a file, data.labels')])
def test_folders_that_do_not_divide_into_classes(animals, extra, message):
    touch(animals, extra)
    with pytest.raises(ValueError, match=message):
        open_labelled(DataConfig(path=str(animals)), 0)


def test_messages_count_and_a_single_class(tmp_path):
    touch(tmp_path, 'flat/1.jpg', 'flat/2.jpg', 'flat/3.jpg')
    with pytest.raises(ValueError, match='3 of the 3 images in .*flat are in no class folder, the first is .*/1.jpg'):
        open_labelled(DataConfig(path=str(tmp_path / 'flat')), 0)
    with pytest.raises(ValueError, match="has one class, 'flat': a classifier needs two or more"):
        open_labelled(DataConfig(path=str(tmp_path)), 0)


FLAT = ('a.jpg', 'b.jpg', 'deep/c.jpg')


@pytest.mark.parametrize('name, text', [
    ('labels.csv', 'b.jpg,yes\na.jpg,no\n\ndeep/c.jpg, yes \n'),
    ('labels.tsv', 'deep/c.jpg\tyes\na.jpg\tno\n./b.jpg\tyes'),
    ('labels.csv', 'image_id,label\na.jpg,no\nb.jpg,yes\ndeep\\c.jpg,yes\n'),
    ('labels.txt', 'a.jpg,no\nb.jpg,yes\ndeep/c.jpg,yes\n'), ('labels', 'a.jpg\tno\nb.jpg\tyes\ndeep/c.jpg\tyes\n'),
    ('labels.txt', 'path class\n\na.jpg no\nb.jpg  yes\n./deep/c.jpg\tyes\n'),
    ('labels.csv', '\ufeff"a.jpg","no"\r\nb.jpg,yes\r\ndeep//c.jpg,yes\r\n')])
def test_table(tmp_path, name, text):
    touch(tmp_path / 'images', *FLAT)
    (tmp_path / name).write_text(text, encoding='utf-8')
    found = open_labelled(DataConfig(path=str(tmp_path / 'images'), labels=str(tmp_path / name)), 0)
    assert found.classes == ('no', 'yes')
    assert listed(found.train, found.train_labels, found.classes) == {'a.jpg': 'no', 'b.jpg': 'yes', 'c.jpg': 'yes'}


@pytest.mark.parametrize('text, message', [
    ('path,class\nb,no\n', 'labels.csv, line 2: there is no image b in .*images, below which paths are: remove'),
    ('a.jpg,no\n\nx.jpg,no\n', 'labels.csv, line 3: there is no image x.jpg in .*images'),
    ('../out.jpg,no\n', 'line 1: there is no image ../out.jpg in'),
    ('a.jpg,no\nb.jpg,no\n./a.jpg,yes\n', 'labels.csv, line 3: a.jpg is already in line 1: remove one'),
    ('a.jpg,no\nb.jpg,maybe\n', "labels.csv, line 2: class 'maybe' is not one of the 2 of data.classes, no, yes: corr"),
    ('a.jpg,no\nb.jpg\n', r"labels.csv, line 2 is not 'relative path,class' \(separated by a tab .*\): found 'b.jpg'"),
    ('a.jpg,no\n"b.jpg,yes\ndeep/c.jpg,yes\n', "line 4 is not 'relative path,class' .*: found 'b.jpg,yes..deep"),
    ('a.jpg,' + 'n' * 200000, 'labels.csv, line 1: field larger than field limit'),
    ('a.jpg,no,1\n', "line 1 is not 'relative path,class'"), ('a.jpg,\n', "line 1 is not 'relative path,class'"),
    ('a.jpg,no\n', '2 of the 3 images in .*images have no line in .*labels.csv, the first is b.jpg: add'),
    ('a.jpg,no\nb.jpg,yes\n', '1 of the 3 images .* the first is deep/c.jpg'), ('', '3 of the 3 images')])
def test_tables_that_do_not_match(tmp_path, text, message):
    touch(tmp_path / 'images', *FLAT)
    touch(tmp_path, 'out.jpg')
    (tmp_path / 'classes.txt').write_text('no\nyes\n')
    (tmp_path / 'labels.csv').write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_labelled(DataConfig(path=str(tmp_path / 'images'), labels=str(tmp_path / 'labels.csv'),
                                 classes=str(tmp_path / 'classes.txt')), 0)
    assert '\n' not in str(caught.value)


def test_a_table_needs_a_folder(tmp_path):
    with pytest.raises(ValueError, match='data.labels=a.csv names the classes of files in a folder, but digits is not'):
        open_labelled(DataConfig(path='digits', labels='a.csv'), 0)
    touch(tmp_path, *FLAT)
    with pytest.raises(ValueError, match='data.labels=.*none.csv cannot be read: No such file'):
        open_labelled(DataConfig(path=str(tmp_path), labels=str(tmp_path / 'none.csv')), 0)


def records(path, labels, image=b'image'):
    with RecordWriter(str(path)) as writer:
        for number, label in enumerate(labels):
            writer.write(image + b'\n#\xd7\xce' * (number % 2), label)  # every other one in several parts
        writer.commit()
    return str(path)


def test_records(tmp_path):
    path = records(tmp_path / 'a.rec', [2, 0, 5, 2, 0, 1])
    _, labels, _, _, classes = open_labelled(DataConfig(path=path), 0)
    assert labels.tolist() == [2, 0, 5, 2, 0, 1] and labels.dtype == np.int64
    assert classes == ('0', '1', '2', '3', '4', '5')
    (tmp_path / 'names').write_text('a\nb\nc\nd\ne\nf\ng\n')
    assert open_labelled(DataConfig(path=path, classes=str(tmp_path / 'names')), 0).classes == tuple('abcdefg')
    (tmp_path / 'names').write_text('a\nb\n')
    with pytest.raises(ValueError, match='a.rec#2 has label 5, but there are only 2 classes, 0 to 1: complete'):
        open_labelled(DataConfig(path=path, classes=str(tmp_path / 'names')), 0)


@pytest.mark.parametrize('labels, message', [
    ([0, 1.5], r'a.rec#1 has the label 1.5, not a class number such as 0, 1, 2'),
    ([0, -1], 'a.rec#1 has the label -1, not'), ([0, float('nan')], 'a.rec#1 has the label nan'),
    ([0, 1e6], 'a.rec has labels up to 1000000, but only 2 images: pack it again, or name all classes in data.cl')])
def test_records_with_other_labels(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        labelled_source(records(tmp_path / 'a.rec', labels))


def test_records_with_a_list_of_labels(tmp_path):
    from mxnet import recordio
    path = str(tmp_path / 'a.rec')
    for row, message in (([3.], None), ([3., 1.], 'a.rec#0 has 2 labels, not a class number')):
        writer = recordio.MXRecordIO(path, 'w')
        for _ in range(4):
            writer.write(recordio.pack(recordio.IRHeader(0, row, 0, 0), b'image'))
        writer.close()
        if message is None:
            assert labelled_source(path)[1].tolist() == [3] * 4
        else:
            with pytest.raises(ValueError, match=message):
                labelled_source(path)


def test_digits_hold_out_the_images_of_pre_training():
    from mxsimmim.tasks import pretrain
    assert SEED == pretrain.SEED
    found = open_labelled(DataConfig(path='digits', val_fraction=0.2), seed=7)
    train, held_out = hold_out(Digits(), 0.2, pretrain.SEED)
    assert found.classes == tuple('0123456789')
    for mine, want, labels in ((found.train, train, found.train_labels),
                               (found.held_out, held_out, found.held_out_labels)):
        assert [mine.name(i) for i in range(len(mine))] == [want.name(i) for i in range(len(want))]
        assert (labels == Digits().labels()[want.indices]).all()
    assert len(found.train_labels) == 1438 and np.bincount(Digits().labels())[:3].tolist() == [178, 182, 177]


def test_few_labels_a_class():
    digits = Digits().labels()

    def kept(count, seed):
        data = DataConfig(path='digits', val_fraction=0.2, labels_per_class=count)
        train, labels, held_out, held_out_labels, _ = open_labelled(data, seed)
        names = [train.name(i) for i in range(len(train))]
        assert np.bincount(labels).tolist() == [count] * 10 and len(held_out) == len(held_out_labels) == 359
        assert all(digits[int(name.split('#')[1])] == label for name, label in zip(names, labels))
        assert not set(names) & {held_out.name(i) for i in range(359)}
        return set(names)

    assert kept(10, seed=1) == kept(10, seed=1) and kept(10, seed=1) < kept(25, seed=1)
    assert len(kept(10, seed=1) & kept(10, seed=2)) < 30
    with pytest.raises(ValueError, match="data.labels_per_class=160, but class '0' has 139 training images: lower it"):
        kept(160, seed=1)


CLASSES = 13  # more than ten: numbers sort otherwise than names


@pytest.fixture
def imagenet(tmp_path):
    """Class folders for training, the same held-out images in class folders and flat; {flat name: class number}."""
    rng, numbers = np.random.default_rng(5), {}
    for number in range(CLASSES):
        touch(tmp_path, *(f'train/n{number * 7:03}/{item}.JPEG' for item in range(2)))
    for item in rng.permutation(CLASSES * 3):
        numbers[f'val_{item:05}.JPEG'] = int(item % CLASSES)
        touch(tmp_path, f'val/val_{item:05}.JPEG', f'folders/n{item % CLASSES * 7:03}/val_{item:05}.JPEG')
    return numbers


def by_file(source, labels):
    return {os.path.basename(source.name(i)): int(labels[i]) for i in range(len(source))}


@pytest.mark.parametrize('name, line', [
    ('val_map.txt', '{file}\t{number}\n'), ('val.csv', '{file},{wnid}\n'), ('val.csv', '{file},{number}\n'),
    ('val.txt', '{file} {number}\n'), ('list', '{file} {wnid}\r\n'), ('val.tsv', '{file}\t{wnid}\n'),
    ('val.lst', '{item}\t{number}.000000\t{file}\n')])
def test_a_flat_validation_folder_has_the_labels_of_class_folders(imagenet, tmp_path, name, line):
    (tmp_path / name).write_text(''.join(line.format(file=file, number=number, wnid=f'n{number * 7:03}', item=item)
                                         for item, (file, number) in enumerate(imagenet.items())))
    train = str(tmp_path / 'train')
    flat = open_labelled(DataConfig(path=train, val_path=str(tmp_path / 'val'), val_labels=str(tmp_path / name)), 0)
    inside = open_labelled(DataConfig(path=train, val_path=str(tmp_path / 'folders')), 0)
    assert flat.classes == inside.classes == tuple(f'n{number * 7:03}' for number in range(CLASSES))
    assert by_file(flat.held_out, flat.held_out_labels) == by_file(inside.held_out, inside.held_out_labels) == imagenet
    assert flat.held_out_labels.dtype == np.int64 and flat.train_labels.tolist() == inside.train_labels.tolist()


def test_both_maps_of_swin_give_the_labels_of_class_folders(imagenet, tmp_path):
    """Its train_map.txt numbers the sorted class folders, which is what numbers in a list mean here."""
    inside = open_labelled(DataConfig(path=str(tmp_path / 'train'), val_path=str(tmp_path / 'folders')), 0)
    (tmp_path / 'train_map.txt').write_text(''.join(
        f'n{number * 7:03}/{item}.JPEG\t{number}\n' for number in range(CLASSES) for item in range(2)))
    (tmp_path / 'val_map.txt').write_text(''.join(f'{file}\t{number}\n' for file, number in imagenet.items()))
    keys = dict(path=str(tmp_path / 'train'), labels=str(tmp_path / 'train_map.txt'), val_path=str(tmp_path / 'val'),
                val_labels=str(tmp_path / 'val_map.txt'))
    maps = open_labelled(DataConfig(**keys), 0)
    assert maps.train_labels.tolist() == inside.train_labels.tolist() and maps.classes == tuple(map(str, range(13)))
    assert by_file(maps.held_out, maps.held_out_labels) == imagenet
    (tmp_path / 'names').write_text('\n'.join(inside.classes))
    named = open_labelled(DataConfig(classes=str(tmp_path / 'names'), **keys), 0)
    assert named.classes == inside.classes and named.train_labels.tolist() == inside.train_labels.tolist()
    assert by_file(named.held_out, named.held_out_labels) == imagenet


def test_numbers_in_a_csv_are_names_as_ever(tmp_path):
    touch(tmp_path / 'images', *(f'{number}.jpg' for number in range(11)))
    (tmp_path / 'labels.csv').write_text(''.join(f'{number}.jpg,{number}\n' for number in range(11)))
    found = open_labelled(DataConfig(path=str(tmp_path / 'images'), labels=str(tmp_path / 'labels.csv')), 0)
    assert found.classes[:3] == ('0', '1', '10')
    assert all(found.classes[label] == name[:-4] for name, label in by_file(found.train, found.train_labels).items())
    (tmp_path / 'list.txt').write_text(''.join(f'{number}.jpg {number % 4 + 1}\n' for number in range(11)))
    source, labels, classes = labelled_source(str(tmp_path / 'images'), table=str(tmp_path / 'list.txt'), key='x')
    assert classes == tuple('01234') and by_file(source, labels) == {f'{n}.jpg': n % 4 + 1 for n in range(11)}
    assert 'no image has label 0 (labels seem to begin at 1); this class stays empty' in source.notes[0]


@pytest.mark.parametrize('name, text, message', [
    (None, '', '4 of the 4 images in .*val are in no class folder, .*: move images to .*val/CLASS/, or name their '
     'classes in a file, data.val_labels$'),
    ('none', None, 'data.val_labels=.*none cannot be read: No such file'),
    ('map.txt', 'a.jpg\t1\nb.jpg\t2\nc.jpg\t3\nd.jpg\t1\n',
     r'c.jpg has label 3, but there are only 3 classes, 0 to 2 \(labels seem to begin at 1\): complete data.classes'),
    ('map.txt', 'a.jpg\t0\nb.jpg\tcow\n', "map.txt, line 1: class '0' is not one of the 3 classes ant, cat, dog: corr"),
    ('v.csv', 'a.jpg,ant\nb.jpg,cow\n', "v.csv, line 2: class 'cow' is not one of the 3 classes ant, cat, dog: corr"),
    ('truth.txt', '490\n361\n171\n', 'truth.txt has numbers, but no paths, as ILSVRC2012_validation_ground_truth.txt'),
    ('map.txt', 'a.jpg\n', "line 1 is not 'relative path,class'"),
    ('a.lst', '0\t1.0\t2.0\ta.jpg\n', "line 1 is not 'relative path,class'"),
    ('map.txt', 'a.jpg\t0\n', '3 of the 4 images in .*val have no line in .*map.txt, the first is b.jpg')])
def test_bad_validation_tables(animals, tmp_path, name, text, message):
    touch(tmp_path / 'val', 'a.jpg', 'b.jpg', 'c.jpg', 'd.jpg')
    if text is not None and name:
        (tmp_path / name).write_text(text)
    table = str(tmp_path / name) if name else ''
    with pytest.raises(ValueError, match=message):
        open_labelled(DataConfig(path=str(animals), val_path=str(tmp_path / 'val'), val_labels=table), 0)


def test_numeric_classes_are_never_taken_by_position(tmp_path):
    """Folders 1, 2, 3: a 1 in the table is the folder 1, and a 0 an error."""
    touch(tmp_path, 'train/1/a.jpg', 'train/2/b.jpg', 'train/3/c.jpg', 'val/x.jpg', 'val/y.jpg')
    train, val, table = (str(tmp_path / name) for name in ('train', 'val', 'map.txt'))
    data = DataConfig(path=train, val_path=val, val_labels=table)
    (tmp_path / 'map.txt').write_text('x.jpg\t1\ny.jpg\t3\n')
    found = open_labelled(data, 0)
    assert [found.classes[label] for label in found.held_out_labels] == ['1', '3']
    (tmp_path / 'map.txt').write_text('x.jpg\t0\ny.jpg\t2\n')
    with pytest.raises(ValueError, match="map.txt, line 1: class '0' is not one of the 3 classes 1, 2, 3"):
        open_labelled(data, 0)


def test_a_validation_table_of_records(tmp_path):
    """Class numbers of a RecordIO file for training, the same numbers in a table."""
    path = records(tmp_path / 'a.rec', [number % 12 for number in range(24)])
    touch(tmp_path / 'val', 'x.jpg', 'y.jpg')
    (tmp_path / 'map.txt').write_text('x.jpg\t10\ny.jpg\t2\n')
    data = DataConfig(path=path, val_path=str(tmp_path / 'val'), val_labels=str(tmp_path / 'map.txt'))
    assert open_labelled(data, 0).held_out_labels.tolist() == [10, 2]
    with pytest.raises(ValueError, match='data.val_labels=.*map.txt names the classes of files in a folder, but .*a.r'):
        open_labelled(data.model_copy(update={'val_path': path}), 0)
    with pytest.raises(ValueError, match='data.val_labels=x names the classes of the images of data.val_path: set'):
        open_labelled(DataConfig(path=path, val_labels='x'), 0)
