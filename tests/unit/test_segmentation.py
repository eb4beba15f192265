"""Label images of every kind, folders of them, and what is said of those that cannot be used."""
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from mxsimmim.config import DataConfig
from mxsimmim.data.decode import BrokenImage
from mxsimmim.data.label_images import read_label_image
from mxsimmim.data.segmentation import open_segmented

NUMBERS = np.arange(12, dtype=np.uint8).reshape(3, 4)
CLASSES = 'road\ncar\nsky\n'


def encoded(image, form='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def of_palette(numbers, bits=8):
    image = Image.fromarray(numbers, 'P')
    image.putpalette([value for number in range(256) for value in (255 - number, number // 2, 7)])
    return encoded(image, bits=bits)


def grey_png(numbers, bits):
    """A grey PNG of 1, 2 or 4 bits a pixel, which Pillow does not write."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
    h, w = numbers.shape
    rows = b''
    for row in numbers:
        word = ''.join(f'{value:0{bits}b}' for value in row)
        word += '0' * (-len(word) % 8)
        rows += b'\0' + int(word, 2).to_bytes(len(word) // 8, 'big')
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, 0, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b''))


@pytest.mark.parametrize('data, numbers', [
    (encoded(Image.fromarray(NUMBERS)), NUMBERS), (of_palette(NUMBERS), NUMBERS), (of_palette(NUMBERS, 4), NUMBERS),
    (grey_png(NUMBERS, 4), NUMBERS), (grey_png(NUMBERS % 4, 2), NUMBERS % 4), (grey_png(NUMBERS % 2, 1), NUMBERS % 2),
    (encoded(Image.fromarray(NUMBERS.astype(np.uint16) * 300)), NUMBERS.astype(int) * 300),
    (encoded(Image.fromarray(NUMBERS.astype(np.uint16) + 5), 'TIFF'), NUMBERS + 5),
    (encoded(Image.fromarray(NUMBERS), 'TIFF'), NUMBERS), (encoded(Image.fromarray(NUMBERS), 'BMP'), NUMBERS),
    (encoded(Image.fromarray(NUMBERS.astype(np.int32) * 5000), 'TIFF'), NUMBERS.astype(int) * 5000)],
    ids=['grey', 'palette', 'palette of 4 bits', '4 bits', '2 bits', '1 bit', '16 bits', '16 bits TIFF', 'TIFF', 'BMP',
         '32 bits'])
def test_numbers_are_read_as_they_were_written(data, numbers):
    found = read_label_image(data, 'x')
    assert found.dtype in (np.uint8, np.uint16) and found.tolist() == numbers.tolist()


RGB = Image.fromarray(np.stack([NUMBERS] * 3, -1))


@pytest.mark.parametrize('data, message', [
    (b'', 'x.png: not an image, or of an unknown format; label images hold a class number a pixel: grey of 8 or 16 bi'),
    (encoded(RGB), r'x.png: has colours \(RGB\), but label images hold a class number .*: write the number of each co'),
    (encoded(RGB.convert('RGBA')), r'x.png: has colours \(RGBA\)'),
    (encoded(Image.fromarray(NUMBERS), 'JPEG'), 'x.png: a JPEG, which blurs class numbers: save label images as PNG'),
    (encoded(Image.fromarray(NUMBERS.astype(np.float32)), 'TIFF'), 'x.png: has pixels of mode F, but label images hol'),
    (encoded(RGB.convert('LA')), 'x.png: has pixels of mode LA, but'),
    (encoded(Image.fromarray(NUMBERS.astype(np.int32) - 3), 'TIFF'), 'x.png: values from -3 to 8; label images hold a'),
    (encoded(Image.fromarray(NUMBERS), 'TIFF', tiffinfo={262: 0}), 'x.png: a TIFF in which white is zero'),
    (encoded(Image.fromarray(np.repeat(NUMBERS, 999, 0)))[:70], 'x.png: .*truncated')],
                         ids=range(9))
def test_what_is_no_label_image(data, message):
    with pytest.raises(BrokenImage, match=message) as error:
        read_label_image(data, 'x.png')
    assert '\n' not in str(error.value)


def write(folder, **files):
    for name, data in files.items():
        path = folder / name.replace('__', '/').replace('_', '.')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else encoded(Image.fromarray(data)))


@pytest.fixture
def streets(tmp_path):
    """Two images in folders parallel to those of their label images, and classes."""
    photo = np.full((3, 4, 3), 90, np.uint8)
    write(tmp_path, images__a_png=photo, images__deep__b_png=photo, labels__a_png=NUMBERS % 3,
          labels__deep__b_png=np.where(NUMBERS < 6, 255, 2).astype(np.uint8))
    (tmp_path / 'classes.txt').write_text(CLASSES)
    return tmp_path


def config(folder, **keys):
    return DataConfig(**{'path': f'{folder}/images', 'labels': f'{folder}/labels', 'classes': f'{folder}/classes.txt',
                         **keys})


def test_parallel_folders(streets):
    train, held_out = open_segmented(config(streets))
    assert held_out is None and train.classes == ('road', 'car', 'sky') and not train.notes
    names = [os.path.relpath(train.name(i), streets) for i in (0, 1)]
    assert names == ['images/a.png', 'images/deep/b.png']
    maps = [train.label_map(i) for i in (0, 1)]
    assert all(found.dtype == np.uint8 for found in maps)
    assert maps[0].tolist() == (NUMBERS % 3).tolist() and maps[1].tolist() == np.where(NUMBERS < 6, 255, 2).tolist()


def test_zero_is_ignored_and_one_is_the_first(streets):
    write(streets, labels__a_png=NUMBERS % 4, labels__deep__b_png=np.where(NUMBERS < 6, 255, 3).astype(np.uint8))
    train, _ = open_segmented(config(streets, reduce_zero_label=True))
    assert train.label_map(0).tolist() == [[255, 0, 1, 2]] * 3
    assert train.label_map(1).tolist() == np.where(NUMBERS < 6, 255, 2).tolist()
    train, _ = open_segmented(config(streets, reduce_zero_label=True, ignore_index=3))
    assert train.label_map(0).tolist() == [[255, 0, 1, 255]] * 3
    with pytest.raises(BrokenImage, match=re.escape(
            'labels/deep/b.png: number 255 in row 0, column 0, but data.classes names 3, numbered 1 to 3: complete '
            'data.classes, or set data.ignore_index=255 if these pixels do not count')):
        train.label_map(1)


def test_many_classes_in_16_bits(streets):
    (streets / 'classes.txt').write_text('\n'.join(f'c{number}' for number in range(300)))
    write(streets, labels__a_png=np.array([[0, 255, 299, 65000]], np.uint16))
    train, _ = open_segmented(config(streets, ignore_index=65000))
    assert train.label_map(0).tolist() == [[0, 255, 299, 65535]] and train.label_map(0).dtype == np.int32


def test_numbers_that_are_no_class(streets):
    write(streets, labels__a_png=NUMBERS % 3 + 1)
    with pytest.raises(BrokenImage, match=re.escape(
            'labels/a.png: number 3 in row 0, column 2, but data.classes names 3, numbered 0 to 2 (numbers seem to '
            'begin at 1: data.reduce_zero_label=true): complete data.classes')):
        open_segmented(config(streets))[0].label_map(0)
    (streets / 'labels/a.png').unlink()
    train, _ = open_segmented(config(streets, path=f'{streets}/images/deep', labels=f'{streets}/labels/deep'))
    (streets / 'labels/deep/b.png').unlink()
    with pytest.raises(BrokenImage, match='labels/deep/b.png: cannot be read: No such file'):
        train.label_map(0)


def test_held_out_folders(streets):
    write(streets, val__a_jpg=encoded(Image.new('RGB', (4, 3)), 'JPEG'), truth__a_png=NUMBERS % 3,
          truth__c_png=NUMBERS % 3)
    paths = {'val_path': f'{streets}/val', 'val_labels': f'{streets}/truth'}
    _, held_out = open_segmented(config(streets, **paths))
    assert len(held_out) == 1 and held_out.label_map(0).tolist() == (NUMBERS % 3).tolist()
    assert held_out.notes == [f'{streets}/truth: 1 label images left out, of which {streets}/val has no image, the '
                              f'first is {streets}/truth/c.png']


def voc(folder):
    for name in ('2007_1', '2007_2'):
        (folder / 'JPEGImages').mkdir(exist_ok=True)
        (folder / 'SegmentationClass').mkdir(exist_ok=True)
        Image.new('RGB', (4, 3)).save(folder / f'JPEGImages/{name}.jpg')
        (folder / f'SegmentationClass/{name}.png').write_bytes(of_palette(NUMBERS % 3))
    (folder / 'ImageSets/Segmentation').mkdir(parents=True)
    (folder / 'ImageSets/Segmentation/train.txt').write_text('2007_2\n\n')
    (folder / 'ImageSets/Segmentation/val.txt').write_text('2007_1\n')


def test_pascal_voc(streets):
    voc(streets)
    lists = f'{streets}/ImageSets/Segmentation'
    for path in (f'{streets}', f'{streets}/JPEGImages'):
        train, held_out = open_segmented(config(streets, path=path, labels=f'{lists}/train.txt', val_path=path,
                                                val_labels=f'{lists}/val.txt'))
        assert [train.name(0), held_out.name(0)] == [f'{streets}/JPEGImages/2007_{i}.jpg' for i in (2, 1)]
        assert len(train) == len(held_out) == 1 and train.label_map(0).tolist() == (NUMBERS % 3).tolist()


@pytest.mark.parametrize('text, message', [
    ('2007_1\n2007_3\n', "train.txt, line 2: .*JPEGImages has no file of the name '2007_3': remove the line, or add"),
    ('2007_1\n\n2007_1\n', 'train.txt, line 3: 2007_1 is already in line 1: remove one'),
    (' \n', 'train.txt names no image')])
def test_lists_that_do_not_fit(streets, text, message):
    voc(streets)
    (streets / 'ImageSets/Segmentation/train.txt').write_text(text)
    with pytest.raises(ValueError, match=message):
        open_segmented(config(streets, path=str(streets), labels=f'{streets}/ImageSets/Segmentation/train.txt'))


@pytest.mark.parametrize('keys, message', [
    ({'labels': ''}, 'data.labels is not set: name the folder of the label images of .*images, or a list in Pascal VO'),
    ({'classes': ''}, 'data.classes= names 0 classes, and two or more are needed: a file of names, one a line'),
    ({'labels': 'nowhere'}, 'nowhere does not exist'),
    ({'path': 'digits'}, 'digits is not a folder of images, of which data.labels=.*labels could have the label images'),
    ({'labels': '{}/classes.txt'}, 'data.labels=.*classes.txt is a file: name the folder of the label images, or a li'),
    ({'val_labels': 'x'}, 'data.val_labels=x has the label images of data.val_path: set that, too'),
    ({'path': 'digit-scenes'}, 'data.labels=.*labels, but digit-scenes has its own label maps and classes: leave it o'),
    ({'val_path': 'digit-scenes'}, 'data.classes=.*classes.txt, but digit-scenes has its own'),
    ({'train_images': 3}, 'data.train_images=3, but there are 2: lower it, or add images'),
    ({'val_fraction': 0.1}, 'data.val_fraction=0.1 of 2 images holds out 0')])
def test_what_does_not_go_together(streets, keys, message):
    with pytest.raises(ValueError, match=message) as error:
        open_segmented(config(streets, **{key: value.format(streets) if isinstance(value, str) else value
                                          for key, value in keys.items()}))
    assert '\n' not in str(error.value)


def test_images_without_label_images(streets):
    write(streets, images__deep__c_png=NUMBERS)
    with pytest.raises(ValueError, match='1 of the 3 images in .*images have no label image in .*labels, the first is '
                       '.*images/deep/c.png: add a deep/c.png, or remove the image'):
        open_segmented(config(streets))
    write(streets, labels__deep__c_png=NUMBERS, labels__deep__c_tif=NUMBERS)
    with pytest.raises(ValueError, match='labels/deep/c.png and .*labels/deep/c.tif are label images of the same imag'):
        open_segmented(config(streets))


def test_checksums(streets):
    first = open_segmented(config(streets))[0].checksum()
    assert first == open_segmented(config(streets))[0].checksum()
    os.rename(streets / 'images/a.png', streets / 'images/z.png')
    os.rename(streets / 'labels/a.png', streets / 'labels/z.png')
    assert first != open_segmented(config(streets))[0].checksum()
