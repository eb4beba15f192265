"""Files of annotations with bytes or values that are anything: they are read, or refused in one line."""
import io
import json
import random

import numpy as np
import pytest
from PIL import Image

from mxsimmim.data.box_table import read_table
from mxsimmim.data.coco import read_coco
from mxsimmim.data.label_images import read_label_image
from mxsimmim.data.regions import bitmap
from mxsimmim.data.voc import read_voc

SEED, ROUNDS = 3, 150
COCO = {
    'annotations': [
        {'id': 7, 'image_id': 3, 'category_id': 9, 'bbox': [10, 5, 10, 10], 'segmentation': [[10, 5, 20, 5, 20, 15.5]]},
        {'id': 8, 'image_id': 1, 'category_id': 2, 'bbox': [-5, 1.5, 10, 100], 'segmentation': {
            'size': [30, 40], 'counts': 'XY1'}},
        {'id': 9, 'image_id': 3, 'category_id': 2, 'bbox': [0, 0, 4, 4], 'iscrowd': 1, 'segmentation': {
            'size': [30, 40], 'counts': [0, 4, 1196]}}],
    'images': [{'id': number, 'file_name': f'{number}.png', 'height': 30, 'width': 40} for number in (1, 2, 3)],
    'categories': [{'id': 9, 'name': 'zebra'}, {'id': 2, 'name': 'dög'}]}
VOC = (b'<annotation>\n<size><width>40</width><height>30</height></size><object><name>dog</name>'
       b'<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>')
TABLE = b'path,x0,y0,x1,y1,class\na.png,1,2,3,4.5,dog\nb.png,,,,,\na.png,0,0,9,9,"cat"\nc.png\n'
ANYTHING = (None, True, -1, 0, 1e308, float('nan'), 10 ** 400, '', 'x', '\ud800', [], {}, [[]], [1], {'a': 1},
            [None] * 4)


def label_image():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(buffer, 'PNG')
    return buffer.getvalue()


def damaged(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        place, how = rng.randrange(len(data)), rng.random()
        data[place:place + (how > 0.3) + (how > 0.8) * 20] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
    return bytes(data)


def changed(rng, value):
    if rng.random() < 0.06:
        return rng.choice(ANYTHING)
    if isinstance(value, dict):
        return {key: changed(rng, item) for key, item in value.items() if rng.random() > 0.02}
    if isinstance(value, list):
        return [changed(rng, item) for item in value if rng.random() > 0.03]
    return value


CASES = {
    'values of JSON': (lambda rng: json.dumps(changed(rng, COCO)).encode(), lambda file: read_coco(file, ())[1]),
    'JSON': (lambda rng: damaged(rng, json.dumps(COCO).encode()), lambda file: read_coco(file, ())[1]),
    'XML': (lambda rng: damaged(rng, VOC), lambda file: read_voc([file], (), 'data.classes')),
    'table': (lambda rng: damaged(rng, TABLE), lambda file: read_table(file, (), 'data.labels')[2]),
    'label image': (lambda rng: damaged(rng, label_image()), None)}


@pytest.mark.parametrize('name', CASES)
def test_any_file_is_read_or_refused_in_one_line(name, tmp_path):
    make, read = CASES[name]
    print('seed', SEED)
    rng, file, refused = random.Random(f'{SEED} {name}'), tmp_path / 'file.csv', 0

    def attempt(what, *given):
        try:
            return what(*given)
        except ValueError as error:
            assert type(error).__name__ in ('ValueError', 'BrokenImage') and '\n' not in str(error), repr(error)
            return None

    for _ in range(ROUNDS):
        file.write_bytes(make(rng))
        found = attempt(read, str(file)) if read else attempt(read_label_image, file.read_bytes(), str(file))
        refused += found is None
        for index in range(len(found._sizes) if found is not None and read else 0):
            objects = attempt(found.read, index, True)
            if objects is not None:
                assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
                assert len(objects.boxes) == len(objects.classes) == len(objects.crowd)
                masks = [bitmap(region, objects.size) for region in objects.regions if region is not None]
                assert all(mask.shape == objects.size for mask in masks)
    assert ROUNDS / 4 < refused < ROUNDS
