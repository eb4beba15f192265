"""COCO's JSON, Pascal VOC's XML and tables of boxes; and what is said of those that cannot be used."""
import json
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mxsimmim.config import DataConfig, ModelConfig
from mxsimmim.data.decode import BrokenImage
from mxsimmim.data.detection import open_objects
from mxsimmim.data.geometry import View
from mxsimmim.data.object_transforms import ObjectsTransform, ObjectsViewsTransform
from mxsimmim.data.regions import Polygons, RunLengths, bitmap, in_box, region_of, unpacked
from mxsimmim.data.sampling import generator
from mxsimmim.data.voc import read_file

# Written by pycocotools 2.0.11 for these bitmaps.
ROWS = '00000000100000000100000010101001010'
KNOWN = [('<', np.zeros((3, 4))), ('5141', np.array(list('000000010101'), int).reshape(3, 4)), ('0<', np.ones((3, 4))),
         ('<23O10O11ON', np.array(list(ROWS), int).reshape(7, 5)), ('XY1', np.zeros((40, 33))),
         ('0XY1', np.ones((40, 33)))]
BLOCKS = 'h>8P100000000000000000080H0000000000000000000'  # 40 x 33, of pycocotools


@pytest.mark.parametrize('text, bits', KNOWN)
def test_packed_run_lengths(text, bits):
    region = region_of({'size': list(bits.shape), 'counts': text}, bits.shape)
    assert (bitmap(region, bits.shape) == bits).all() and bitmap(region, bits.shape).dtype == bool
    plain = region_of({'size': list(bits.shape), 'counts': unpacked(text)}, bits.shape)
    assert isinstance(plain, RunLengths) and (plain.lengths == region.lengths).all()


def test_packed_run_lengths_of_blocks():
    bits = bitmap(region_of({'size': [40, 33], 'counts': BLOCKS}, (40, 33)), (40, 33))
    assert bits.sum() == 176 and (bits == np.kron(bits[::8, ::11], np.ones((8, 11)))).all()


@pytest.mark.parametrize('segmentation, problem', [
    ({'size': [3, 4], 'counts': [5, 6]}, "its 'counts' add up to 11 pixels, and the image has 12"),
    ({'size': [4, 3], 'counts': [12]}, r"its 'size' is \[4, 3\], and the image's \[3, 4\]: height, width"),
    ({'size': [3, 4], 'counts': [-1, 13]}, "'counts' are neither a list of lengths nor a string"),
    ({'size': [3, 4], 'counts': 'é'}, "its 'counts' have the character 'é', which is none of COCO's"),
    ({'size': [3, 4], 'counts': 'o' * 10 ** 6}, "its 'counts' have a number of more than 60 bits"),
    ({'size': [3, 4], 'counts': 'P'}, "its 'counts' end within a number"), ({}, "its 'counts' are neither"),
    ('x', 'neither a list of polygons nor run lengths'), ([[1, 2, 3, 4]], 'an even number of numbers, six or more, but '
     'one is 4 numbers'), ([[1, 2, 3, 4, 5, 'x']], 'something else than numbers'),
    ([[1, 2, 3, 4, 5, None]], 'no pixels'), ([7], 'but one is 7')])
def test_bad_segmentations(segmentation, problem):
    with pytest.raises(ValueError, match=problem):
        region_of(segmentation, (3, 4))


def test_polygons():
    """The pixels whose centres are inside; holes by the even-odd rule; several polygons are one object."""
    square = Polygons((np.array([[1, 1], [4, 1], [4, 3], [1, 3.0]]),))
    expected = np.zeros((5, 6), bool)
    expected[1:3, 1:4] = True
    assert (bitmap(square, (5, 6)) == expected).all()
    backwards = Polygons((square.outlines[0][::-1],))
    assert (bitmap(backwards, (5, 6)) == expected).all()
    shifted = Polygons((square.outlines[0] + 0.49,))
    assert (bitmap(shifted, (5, 6)) == expected).all()
    outside = Polygons((np.array([[-5, -5], [50, -5], [50, 2], [-5, 2.0]]),))
    assert bitmap(outside, (5, 6)).sum() == 12 and bitmap(outside, (5, 6))[:2].all()
    triangle = Polygons((np.array([[0, 0], [200, 0], [0, 200.0]]),))
    assert bitmap(triangle, (200, 200)).sum() == 200 * 199 / 2 + 0  # centres on the slope are outside
    star = Polygons((np.array([[0, 0], [9, 0], [9, 9], [0, 9], [0, 0], [3, 3], [6, 3], [6, 6], [3, 6], [3, 3.0]]),))
    assert bitmap(star, (9, 9)).sum() == 72
    both = Polygons((square.outlines[0], np.array([[3, 2], [6, 2], [6, 5], [3, 5.0]])))
    assert bitmap(both, (5, 6)).sum() == 6 + 9 - 1


@pytest.mark.parametrize('view', [View((50, 60), (0, 0), (50, 60)), View((100, 120), (20, 30), (64, 64)),
                                  View((100, 120), (20, 30), (64, 64), True), View((25, 30), (0, 0), (25, 30), True)])
def test_masks_in_boxes_are_what_the_view_shows(view):
    """Box, mask in the box and the whole mask as the view shows it agree, from polygons and from run lengths."""
    outline = np.array([[20, 12], [41, 15], [44, 40], [23, 33.0]])
    polygon = Polygons((outline,))
    bits = bitmap(polygon, (50, 60))
    lengths = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], bits.T.ravel(), [2]]))))
    runs = RunLengths(lengths if not bits[0, 0] else np.append(0, lengths))
    assert (bitmap(runs, (50, 60)) == bits).all()
    shown = view.nearest(bits)
    box = view.boxes(np.array([[20, 12, 44, 40.0]]), (50, 60))[0]
    part = shown[int(box[1]):int(np.ceil(box[3])), int(box[0]):int(np.ceil(box[2]))]
    for region, tolerance in ((bits, 0.03), (runs, 0.03), (polygon, 0.06)):
        mask = in_box(region, (50, 60), view, box, 56)
        assert abs(mask.mean() - part.mean()) < tolerance, region
    flat = in_box(bits, (50, 60), view, np.array([0, 0, *view.shape[::-1]], float), 8)
    assert flat.shape == (8, 8)


def photos(folder, *names, size=(40, 30)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size).save(folder / name)


@pytest.fixture
def coco(tmp_path):
    """A folder of images, and what a file of instances says of them."""
    photos(tmp_path / 'images', 'a.png', 'b.png', 'deep/ö.png')
    box = [[10, 5, 20, 5, 20, 15, 10, 15]]
    return tmp_path, {
        'info': {'year': 2017}, 'licenses': [{'id': 1}],
        'annotations': [
            {'id': 7, 'image_id': 30, 'category_id': 9, 'bbox': [10, 5, 10, 10], 'iscrowd': 0, 'segmentation': box},
            {'id': 8, 'image_id': 10, 'category_id': 2, 'bbox': [-5, 1.5, 10, 100], 'area': 3},
            {'id': 9, 'image_id': 30, 'category_id': 2, 'bbox': [0, 0, 4, 4], 'iscrowd': 1,
             'segmentation': {'size': [30, 40], 'counts': [0, 4, 1196]}}],
        'images': [{'id': 10, 'file_name': 'a.png', 'height': 30, 'width': 40},
                   {'id': 20, 'file_name': 'b.png', 'height': 30, 'width': 40},
                   {'id': 30, 'file_name': 'deep/ö.png', 'height': 30, 'width': 40}],
        'categories': [{'id': 9, 'name': 'zebra'}, {'id': 2, 'name': 'dög'}]}


def opened(folder, content, **keys):
    file = folder / 'instances.json'
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
    return open_objects(DataConfig(**{'path': f'{folder}/images', 'labels': str(file), **keys}))[0]


@pytest.mark.parametrize('form', [dict(indent=1), dict(ensure_ascii=False), dict(separators=(',', ':'))], ids=str)
def test_coco(coco, form):
    folder, content = coco
    source = opened(folder, b'\xef\xbb\xbf' * ('indent' in form) + json.dumps(content, **form).encode())
    assert source.classes == ('dög', 'zebra') and source.has_masks and len(source) == 3
    assert [source.name(i) for i in range(3)] == [
        f'{folder}/images/{name}' for name in ('a.png', 'b.png', 'deep/ö.png')]
    first, none, last = (source.objects(i) for i in range(3))
    assert first.boxes.tolist() == [[0, 1.5, 5, 30]] and first.classes.tolist() == [0] and first.regions == (None,)
    assert len(none.boxes) == 0 and none.size == (30, 40) and none.boxes.shape == (0, 4)
    assert last.boxes.tolist() == [[10, 5, 20, 15], [0, 0, 4, 4]] and last.classes.tolist() == [1, 0]
    assert last.crowd.tolist() == [False, True] and last.boxes.dtype == np.float32
    masks = [bitmap(region, last.size) for region in last.regions]
    assert masks[0].sum() == 100 and masks[0][5:15, 10:20].all() and masks[1].sum() == 4 and masks[1][:4, 0].all()
    assert source.notes == ['1 boxes cut at the borders of their images']
    assert source.checksum() == opened(folder, None).checksum() != opened(
        folder, {**content, 'annotations': content['annotations'][1:]}).checksum()


def test_classes_in_another_order(coco):
    folder, content = coco
    (folder / 'names.txt').write_text('cat\nzebra\ndög\n', encoding='utf-8')
    source = opened(folder, content, classes=f'{folder}/names.txt')
    assert source.classes == ('cat', 'zebra', 'dög') and source.objects(2).classes.tolist() == [1, 2]
    (folder / 'names.txt').write_text('cat\nzebra\n')
    with pytest.raises(ValueError, match="instances.json, line [0-9]+: class 'dög' is not one of the 2 classes: corre"):
        opened(folder, content, classes=f'{folder}/names.txt')


def changed(section, number, **values):
    """What makes of a file's content one in which an element has other values; None: without it."""
    def change(content):
        element = content[section][number]
        element.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del element[key]
        return json.dumps(content, indent=1)
    return change


@pytest.mark.parametrize('change, message', [
    (lambda _: '', 'line 1, column 1: not JSON: expecting'), (lambda _: '[]', 'line 1, column 1: not JSON: expecting '),
    (lambda content: json.dumps(content, indent=1)[:-40], r'line [0-9]+, column [0-9]+: not JSON'),
    (lambda content: json.dumps(content)[:300], 'line 1, column [0-9]+: not JSON'),
    (lambda content: json.dumps(content).replace('}, {', '} {'), "not JSON: expecting ','"),
    (lambda _: '{"annotations": ' + '[' * 100000, 'not an instances file: nested too deeply'),
    (lambda _: '{"images": [' + '1' * 5000, 'not an instances file: a number is too long'),
    (lambda _: '{"images": []}', "'images' is missing or empty: an instances file has the lists"),
    (lambda content: json.dumps({**content, 'annotations': []}), "'annotations' is missing or empty"),
    (lambda content: json.dumps({**content, 'categories': {}}), "'categories' is missing or empty"),
    (changed('images', 1, file_name=None), "line 78: an image without 'id' or 'file_name'"),
    (changed('images', 1, id=10), 'image 10 is there twice: remove one'),
    (changed('images', 1, height=None), "an image without 'height' and 'width', which its masks need"),
    (changed('categories', 1, name='zebra'), "category 2, 'zebra', is there twice"),
    (changed('categories', 1, id=[2]), "a category without 'id' or 'name'"),
    (changed('images', 1, file_name='c.png'), 'there is no image c.png in .*images, below which paths are, nor 0 oth')])
def test_bad_instances_files(coco, change, message):
    folder, content = coco
    with pytest.raises(ValueError, match=message) as error:
        opened(folder, change(content).encode())
    assert 'instances.json' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('values, message', [
    (dict(bbox=[1, 2, 3]), 'annotation 7 of image 30: its bbox is [1, 2, 3], not [x, y, width, height]'),
    (dict(bbox=None), 'annotation 7 of image 30: its bbox is None, not'),
    (dict(bbox=[1, 2, float('nan'), 4]), 'its bbox is [1, 2, nan, 4], not'),
    (dict(bbox=['1', 2, 3, 4]), "its bbox is ['1', 2, 3, 4], not"), (dict(bbox=[1, 2, 3, 10 ** 400]), 'its bbox'),
    (dict(category_id=5), 'its category_id 5 is in no category of the file'),
    (dict(category_id=[1]), 'its category_id [1] is in no category'), (dict(iscrowd='x'), 'its iscrowd is x, neither'),
    (dict(segmentation=[[1, 2, 3]]), 'line 11: the segmentation of annotation 7 of image 30: a polygon has an even nu'),
    (dict(segmentation={'size': [30, 40], 'counts': [9]}), "its 'counts' add up to 9 pixels, and the image has 1200")])
def test_bad_annotations_break_their_image_alone(coco, values, message):
    folder, content = coco
    source = opened(folder, changed('annotations', 0, **values)(content).encode())
    with pytest.raises(BrokenImage, match=re.escape(message)) as error:
        source.objects(2)
    assert f'{folder}/instances.json, line ' in str(error.value) and '\n' not in str(error.value)
    assert len(source.objects(0).boxes) == 1


def test_masks_that_are_not_asked_for_are_not_read(coco):
    """Other programs write polygons of two points into files of boxes."""
    folder, content = coco
    source = opened(folder, changed('annotations', 0, segmentation=[[1, 2, 3, 4]])(content).encode())
    assert source.objects(2, masks=False).regions == (None, None)
    model = ModelConfig(type='vit', img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=1)
    for transform in (ObjectsTransform, ObjectsViewsTransform):
        transform(DataConfig(), model, source, masks=False)(np.zeros((30, 40, 3), np.uint8), generator(0), 2)
        with pytest.raises(BrokenImage, match='a polygon has an even number of numbers'):
            transform(DataConfig(), model, source, masks=True)(np.zeros((30, 40, 3), np.uint8), generator(0), 2)


def test_boxes_without_area_and_images_that_are_not_listed(coco):
    folder, content = coco
    content['annotations'][0]['bbox'] = [40, 0, 5, 5]
    content['annotations'][1]['bbox'][3] = 0
    content['annotations'].insert(0, {'id': 1, 'image_id': 99, 'category_id': 2, 'bbox': [0, 0, 1, 1]})
    source = opened(folder, content)
    assert [len(source.objects(i).boxes) for i in range(3)] == [0, 0, 1]
    assert bitmap(source.objects(2).regions[0], (30, 40)).sum() == 4  # the mask of the box that is left
    file = f'{folder}/instances.json'
    assert source.notes == [f'2 boxes without an area in the image left out, the first: {file}, line 22: annotation 7',
                            f"{file}: 1 annotations left out, whose images 'images' does not list, the first: {file}, "
                            'line 11: annotation 1']
    for annotation in content['annotations']:
        annotation['bbox'] = 'x'
    with pytest.raises(ValueError, match='annotation 7 of image 30: its bbox is x, .*and no other annotation can be u'):
        opened(folder, content)


def xml(*objects, size=(40, 30)):
    sides = f'<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>' if size else ''
    return f'<annotation>\n<filename>a.jpg</filename>\n{sides}\n' + '\n'.join(objects) + '\n</annotation>'


def boxed(name, *box, more=''):
    corners = ''.join(f'<{key}>{side}</{key}>' for key, side in zip(('xmin', 'ymin', 'xmax', 'ymax'), box))
    return f'<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>'


@pytest.fixture
def voc(tmp_path):
    photos(tmp_path / 'JPEGImages', 'a.jpg', 'b.jpg', 'c.jpg')
    (tmp_path / 'Annotations').mkdir()
    part = '<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>'
    (tmp_path / 'Annotations/a.xml').write_text(xml(boxed('dog', 1, 1, 40, 30, more='<difficult>1</difficult>'),
                                                    boxed('cat', 11, 6, 20.5, 15, more=part)))
    (tmp_path / 'Annotations/b.xml').write_text(xml())
    (tmp_path / 'ImageSets/Main').mkdir(parents=True)
    (tmp_path / 'ImageSets/Main/train.txt').write_text('b\na\n')
    return tmp_path


def test_pascal_voc(voc):
    folders = DataConfig(path=f'{voc}/JPEGImages', labels=f'{voc}/Annotations')
    lists = DataConfig(path=str(voc), labels=f'{voc}/ImageSets/Main/train.txt')
    for data, order in ((folders, (0, 1)), (lists, (1, 0))):
        source, held_out = open_objects(data)
        assert held_out is None and source.classes == ('cat', 'dog') and not source.has_masks
        assert [source.name(order[i]) for i in (0, 1)] == [f'{voc}/JPEGImages/{name}.jpg' for name in 'ab']
        some, none = (source.objects(order[i]) for i in (0, 1))
        assert some.boxes.tolist() == [[0, 0, 40, 30], [10, 5, 20.5, 15]] and some.classes.tolist() == [1, 0]
        assert some.crowd.tolist() == [True, False] and some.size == none.size == (30, 40) and len(none.boxes) == 0
    assert open_objects(folders)[0].notes == [f'{voc}/JPEGImages: 1 images left out that have no .xml file in '
                                              f'{voc}/Annotations']


@pytest.mark.parametrize('text, message', [
    (xml('<object><name>dog</name></object>'), "a.xml, line 4: object 'dog' from line 4 has no bndbox/xmin"),
    (xml(boxed('dog', 1, 2, 3)), "line 4: object 'dog' from line 4 has no bndbox/ymax"),
    (xml(boxed('', 1, 2, 3, 4)), 'line 4: an object from line 4 has no name'),
    (xml(boxed('dog', 1, 2, 3, 'x')), "line 4: object 'dog' from line 4: bndbox: could not convert string to float: '"),
    (xml(boxed('dog', 1, 2, 3, 'inf')), 'bndbox has numbers that are no pixels'),
    (xml(boxed('dog', 1, 2, 3, '1e300')), 'bndbox has numbers that are no pixels'),
    ('<?xml version="1.0" encoding="foo"?>' + xml(), 'a.xml, line 1: unknown encoding: foo: save it as UTF-8'),
    (xml(boxed('dog', 1, 2, 3, 4))[:60], 'a.xml, line [34]: not XML: '), ('', 'a.xml, line 1: not XML: no element fou'),
    ('<html/>', "a.xml, line 1: begins with <html>, and Pascal VOC's files with <annotation>"),
    ('<!DOCTYPE a [<!ENTITY b "c">]>\n' + xml(), 'a.xml, line 1: a document type, which no annotation needs: remove')])
def test_bad_xml_breaks_its_image_alone(voc, text, message):
    (voc / 'Annotations/a.xml').write_text(text)
    (voc / 'Annotations/b.xml').write_text(xml(boxed('dog', 1, 2, 3, 4)))
    source, _ = open_objects(DataConfig(path=f'{voc}/JPEGImages', labels=f'{voc}/Annotations'))
    with pytest.raises(BrokenImage, match=message) as error:
        source.objects(0)
    assert '\n' not in str(error.value) and len(source.objects(1).boxes) == 1
    (voc / 'Annotations/b.xml').unlink()
    with pytest.raises(ValueError, match='and no other file of 1 can be used'):
        open_objects(DataConfig(path=f'{voc}/JPEGImages', labels=f'{voc}/Annotations'))


def test_xml_that_claims_much(voc):
    """A size that no image has is none; what is nested deeply costs no more than its bytes."""
    deep = 60000
    (voc / 'Annotations/a.xml').write_text(xml(boxed('dog', 1, 1, 9, 9, more='<a>' * deep + '</a>' * deep),
                                               size=(10 ** 11, 30)))
    tracemalloc.start()
    size, found = read_file(f'{voc}/Annotations/a.xml')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == (0, 0) and [each.box for each in found] == [(1, 1, 9, 9)] and peak < 20e6


def test_which_image_a_file_is_of(voc):
    photos(voc / 'JPEGImages', 'deep/c.jpg', 'deep/a.png')
    with pytest.raises(ValueError, match=r'deep/a.png and .*JPEGImages/a.jpg: .*/a.xml is of one of them: rename the '
                       'other'):
        open_objects(DataConfig(path=f'{voc}/JPEGImages', labels=f'{voc}/Annotations'))
    (voc / 'JPEGImages/deep/a.png').unlink()
    source, _ = open_objects(DataConfig(path=f'{voc}/JPEGImages', labels=f'{voc}/Annotations'))
    assert len(source) == 2 and '2 images left out that have no .xml file' in source.notes[0]


def test_nothing_to_find(coco, voc):
    (voc / 'Annotations/a.xml').unlink()
    with pytest.raises(ValueError, match='data.labels=.*Annotations has no box that can be used$'):
        open_objects(DataConfig(path=f'{voc}/JPEGImages', labels=f'{voc}/Annotations'))
    folder, content = coco
    for annotation in content['annotations']:
        annotation['image_id'] = str(annotation['image_id'])  # as a converter wrote them
    with pytest.raises(ValueError, match="data.labels=.*has no box that can be used; .*: 3 annotations left out, whose "
                       "images 'images' does not list, the first: .*line 11: annotation 7"):
        opened(folder, content)


def test_boxes_of_no_area_in_xml(voc):
    (voc / 'Annotations/b.xml').write_text(xml(boxed('dog', 5, 5, 4, 9), boxed('dog', 41, 1, 50, 9), size=None))
    source, _ = open_objects(DataConfig(path=f'{voc}/JPEGImages', labels=f'{voc}/Annotations'))
    assert source.objects(1).boxes.tolist() == [[40, 0, 50, 9]] and source.objects(1).size is None  # cut when shown
    assert f'1 boxes without an area in the image left out, the first: {voc}/Annotations/b.xml, line 4' in source.notes


def table(folder, text, **keys):
    photos(folder / 'images', 'a.png', 'deep/b.png', 'c.png')
    (folder / 'boxes.csv').write_text(text)
    return open_objects(DataConfig(**{'path': f'{folder}/images', 'labels': f'{folder}/boxes.csv', **keys}))


@pytest.mark.parametrize('text', [
    'a.png,1,2,3,4.5,dog\ndeep/b.png,,,,,\na.png,0,0,9,9,"cat"\nc.png\n',
    'path,x0,y0,x1,y1,class\na.png, 1,2,3,4.5, dog\n\ndeep\\b.png,,,,,\n./a.png,0,0,9,9,cat\r\nc.png,,,,,\n'])
def test_tables(tmp_path, text):
    source, _ = table(tmp_path, text)
    assert source.classes == ('cat', 'dog') and len(source) == 3 and source.name(1) == f'{tmp_path}/images/deep/b.png'
    assert source.objects(0).boxes.tolist() == [[1, 2, 3, 4.5], [0, 0, 9, 9]]
    assert source.objects(0).classes.tolist() == [1, 0] and source.objects(0).size is None
    assert [len(source.objects(i).boxes) for i in (1, 2)] == [0, 0]


@pytest.mark.parametrize('text, message', [
    ('a.png,1,2,3,4,dog\na.png,40,30,dog,1\n', 'boxes.csv, line 2: 5 fields, not path,x0,y0,x1,y1,class: found a.png'),
    ('filename,width,height,class,xmin,ymin,xmax,ymax\n', 'line 1: 8 fields, not path,x0,y0,x1,y1,class'),
    (',1,2,3,4,dog\n', 'line 1: 6 fields, not path'), ('', 'boxes.csv has no box; write path,x0'),
    ('a.png\nc.png\n', 'boxes.csv has no box'), ('a.png,1,2,3,nan,dog\n', 'line 1: not path,x0,y0,x1,y1,class with nu'),
    ('a.png,1,2,3,1e300,dog\n', 'line 1: not path,x0,y0,x1,y1,class with nu'),
    ('a.png,1,2,3,4,dog\nx.png,1,2,3,4,dog\n', 'boxes.csv, line 2: there is no image x.png in .*images, below which ')])
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        table(tmp_path, text)
    assert '\n' not in str(error.value)


def test_bad_lines_break_their_image_alone(tmp_path):
    source, _ = table(tmp_path, 'a.png,1,2,3,4,dog\nc.png,1,2,3,4,\nc.png,1,2,3,x,dog\na.png,5,5,5,9,dog\n')
    assert source.objects(0).boxes.tolist() == [[1, 2, 3, 4]]
    with pytest.raises(BrokenImage, match='boxes.csv, line 2: not path,x0,y0,x1,y1,class with numbers in pixels: '):
        source.objects(1)
    assert source.notes == [f'1 boxes without an area in the image left out, the first: {tmp_path}/boxes.csv, line 4']


def test_held_out_boxes(tmp_path):
    (tmp_path / 'val.csv').write_text('c.png,1,2,3,4,dog\n')
    val = {'val_path': f'{tmp_path}/images', 'val_labels': f'{tmp_path}/val.csv'}
    train, held_out = table(tmp_path, 'a.png,1,2,3,4,dog\ndeep/b.png,1,2,3,4,cat\n', **val)
    assert held_out.classes == train.classes == ('cat', 'dog') and held_out.objects(0).classes.tolist() == [1]
    (tmp_path / 'val.csv').write_text('c.png,1,2,3,4,cow\n')
    with pytest.raises(ValueError, match="val.csv, line 1: class 'cow' is not one of the 2 classes: correct it, or co"):
        table(tmp_path, 'a.png,1,2,3,4,dog\ndeep/b.png,1,2,3,4,cat\n', **val)
    train, held_out = table(tmp_path, 'a.png,1,2,3,4,dog\ndeep/b.png,1,2,3,4,cat\nc.png\n', val_fraction=0.34,
                            train_images=1)
    assert (len(train), len(held_out)) == (1, 1) and train.name(0) != held_out.name(0)


def test_scenes():
    train, held_out = open_objects(DataConfig(path='digit-scenes', val_path='digit-scenes-val', train_images=50), 3)
    assert (len(train), len(held_out), train.classes) == (50, 500, tuple('0123456789'))
    some = train.objects(5)
    assert some.boxes.shape == (len(some.classes), 4) and some.size == (128, 128) and not some.crowd.any()
    for box, mask in zip(some.boxes.astype(int), some.regions):
        part = mask[box[1]:box[3], box[0]:box[2]]
        assert part.sum() == mask.sum() and all(edge.any() for edge in (part[0], part[-1], part[:, 0], part[:, -1]))


@pytest.mark.parametrize('keys, message', [
    ({'labels': ''}, "data.labels= is not set: name COCO's instances"), ({'labels': '/no/x.json'}, 'does not exist: n'),
    ({'path': 'digits'}, 'digits is not a folder of images, whose boxes data.labels='),
    ({'path': 'digit-scenes'}, 'data.labels=.*, but digit-scenes has its own boxes and classes: leave it out'),
    ({'labels': '{}/images/a.png'}, "a.png is none of COCO's instances .*Annotations is not there"),
    ({'labels': '{}/images'}, "images has no .xml file of Pascal VOC's kind"),
    ({'val_labels': 'x'}, 'data.val_labels=x has the boxes of data.val_path: set that, too')])
def test_what_does_not_go_together(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, 'a.png,1,2,3,4,dog\n', **{key: value.format(tmp_path) for key, value in keys.items()})
