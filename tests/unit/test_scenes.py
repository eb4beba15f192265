"""Scenes of digits: the same everywhere, their maps right, held-out ones of other digits."""
import zlib

import numpy as np
import pytest

from mxsimmim.config import DataConfig
from mxsimmim.data import scenes
from mxsimmim.data.labels import open_labelled
from mxsimmim.data.scenes import CLASSES, DigitScenes
from mxsimmim.data.segmentation import open_segmented
from mxsimmim.data.sources import open_source


def checksum(source, indices):
    parts = (part for index in indices for part in (source.read(index), source.scene(index).label_map))
    return zlib.crc32(b''.join(part.tobytes() for part in parts))


@pytest.mark.parametrize('path, name, count, shape, crc', [
    ('digit-scenes', 'digit-scenes#3', 5000, (128, 128, 3), 1396324023),
    ('digit-scenes-val', 'digit-scenes-val#3', 500, (128, 128, 3), 397895496),
    ('digit-scenes-64x96', 'digit-scenes#3', 5000, (64, 96, 3), 1786271016),
    ('digit-scenes-val-200x50', 'digit-scenes-val#3', 500, (200, 50, 3), 3393153990)])
def test_scenes_are_the_same_everywhere_and_in_any_order(path, name, count, shape, crc):
    source = open_source(path)
    assert (source.name(3), len(source), source.read(3).shape, source.read(3).dtype) == (name, count, shape, np.uint8)
    assert checksum(source, range(8)) == crc
    again = open_source(path)
    assert (again.read(7) == source.read(7)).all() and (again.read(2) == source.read(2)).all()


def test_label_maps():
    """Every digit of a scene is in its map, bright on dark, and at least `VISIBLE` of what it was."""
    source, seen = DigitScenes(), np.zeros(11, int)
    for index in range(60):
        image, owner, digits = source.scene(index)
        labels = source.scene(index).label_map
        assert labels.shape == image.shape[:2] and labels.dtype == np.uint8 and 1 <= len(digits) <= scenes.MOST_DIGITS
        assert set(np.unique(owner)) == {-1, *range(len(digits))}  # each can be seen, and so can the background
        assert (labels[owner < 0] == 0).all()
        for number, digit in enumerate(digits):
            assert (labels[owner == number] == digit + 1).all()
        assert image[owner >= 0].mean() > image[owner < 0].mean() + 20
        seen += np.bincount(labels.ravel(), minlength=11) > 0
    assert seen[0] == 60 and seen[1:].min() >= 5  # of each digit some


def test_held_out_scenes_have_digits_of_their_own():
    own, held_out = (set(DigitScenes(held_out)._own.tolist()) for held_out in (False, True))
    assert not own & held_out and len(own | held_out) == 1797 and len(held_out) == 359


@pytest.mark.parametrize('path', ['digit-scenes-40x100', 'digit-scenes-64x4096'])
def test_canvas(path):
    with pytest.raises(ValueError, match=f'{path}: a canvas of [0-9]+ x [0-9]+ pixels: its sides have 48 to 2048'):
        open_source(path)


def test_a_scene_has_no_class():
    with pytest.raises(ValueError, match='digit-scenes has several digits in an image, and so no class: a classifier '):
        open_labelled(DataConfig(path='digit-scenes'), 0)


def test_opened():
    train, held_out = open_segmented(DataConfig(path='digit-scenes', val_path='digit-scenes-val', train_images=50), 3)
    assert (len(train), len(held_out), train.classes) == (50, 500, CLASSES)
    more, none = open_segmented(DataConfig(path='digit-scenes', train_images=500), 3)
    assert none is None and set(train.indices) < set(more.indices) and train.checksum() != more.checksum()
    assert (train.label_map(7) == DigitScenes().scene(int(train.indices[7])).label_map).all()
    train, held_out = open_segmented(DataConfig(path='digit-scenes', val_fraction=0.1))
    assert (len(train), len(held_out)) == (4500, 500) and not set(train.indices) & set(held_out.indices)
