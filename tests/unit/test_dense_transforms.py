"""Images, label maps, boxes and masks stay together through scale, crop and flip; draws depend on the sample alone."""
import zlib

import numpy as np
import pytest

from mxsimmim.config import AugmentConfig, DataConfig, ModelConfig
from mxsimmim.data.decode import BrokenImage
from mxsimmim.data.dense_transforms import SegmentTransform, SegmentViewsTransform, WholeTransform, largest_share
from mxsimmim.data.geometry import View, padded, random_view, resized, whole_view
from mxsimmim.data.loader import Loader, TooManyBroken, every_image
from mxsimmim.data.object_transforms import MASK_SIDE, ObjectsTransform, ObjectsViewsTransform
from mxsimmim.data.objects import Objects, SceneObjects, WithObjects, box_of
from mxsimmim.data.photometric import distort
from mxsimmim.data.regions import Polygons
from mxsimmim.data.sampling import batch_at, generator
from mxsimmim.data.scenes import DigitScenes
from mxsimmim.data.segmentation import SceneMaps, Segmented

MODEL = ModelConfig(img_size=64, drop_path=0.1)
PLAIN = AugmentConfig(photometric=False)
SCENES = DigitScenes(False, 64, 96)
MAPS, OBJECTS = Segmented(SCENES, SceneMaps(SCENES)), WithObjects(SCENES, SceneObjects(SCENES))
SEED = 5


@pytest.mark.parametrize('size, canvas, scale, covers, whole', [
    ((30, 60), (64, 64), 1, True, (64, 128)), ((30, 60), (64, 64), 1, False, (32, 64)),
    ((30, 60), (64, 64), 0.5, True, (32, 64)), ((30, 60), (32, 128), 2, False, (64, 128)),
    ((1, 1000), (64, 64), 0.1, False, (1, 6)), ((100, 100), (64, 64), 1, True, (64, 64))])
def test_sizes(size, canvas, scale, covers, whole):
    assert resized(size, canvas, scale, covers) == whole


def test_random_views_are_within_their_bounds():
    views = [random_view(generator(SEED, i), (40, 90), (48, 64), (0.5, 2.0), 0.25, covers=True) for i in range(400)]
    scales = np.array([view.whole[0] / 48 for view in views])
    assert 0.5 <= scales.min() < 0.52 and 1.98 < scales.max() <= 2 and abs(scales.mean() - 1.25) < 0.05
    assert abs(np.mean([view.flip for view in views]) - 0.25) < 0.06
    for view in views:
        assert view.shape == (min(48, view.whole[0]), min(64, view.whole[1]))
        assert all(0 <= corner <= whole - shape for corner, whole, shape in zip(view.corner, view.whole, view.shape))
    places = np.array([view.corner[1] / max(1, view.whole[1] - 64) for view in views if view.whole[1] > 80])
    assert places.min() < 0.05 and places.max() > 0.95
    assert whole_view((30, 60), (64, 64)) == View((32, 64), (0, 0), (32, 64))


@pytest.mark.parametrize('number', range(40))
def test_rectangles_stay_where_their_boxes_are(number):
    """Image, label map and mask of a rectangle that is drawn show it where its box says, to half a pixel."""
    rng = np.random.default_rng([SEED, number])
    size = tuple(rng.integers(40, 90, 2))
    x, y = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in size[::-1])
    labels = np.zeros(size, np.uint8)
    labels[y[0]:y[1], x[0]:x[1]] = 1
    view = random_view(generator(number), size, (64, 48), (0.5, 2.0), 0.5, covers=bool(number % 2))
    box = view.boxes(np.array([[x[0], y[0], x[1], y[1]]], np.float32), size)[0]
    shown, pixels = view.nearest(labels), view.pixels(np.repeat(labels[..., None] * 255, 3, 2))
    assert shown.shape == view.shape and pixels.shape == (*view.shape, 3)
    if shown.any():
        assert np.abs(np.array(box_of(shown)) - box).max() <= 0.5 + 1e-3, (size, view)
    else:
        assert (box[2:] - box[:2]).min() < 1
    inside = np.zeros(view.shape, bool)
    left, top, right, bottom = np.ceil(box[:2] - 0.5).astype(int).tolist() + np.ceil(box[2:] - 0.5).astype(int).tolist()
    inside[top:bottom, left:right] = True
    assert (inside == (shown > 0)).all()  # pixels whose centres are in the box, and no others
    scale = max(1.0, *(whole / own for whole, own in zip(view.whole, size)))
    assert np.abs(pixels[..., 0] / 255.0 - shown).sum() <= 2 * scale * (sum(box[2:] - box[:2]) + 4)  # soft edges alone


def test_points_go_there_and_back():
    view, points = View((50, 70), (5, 9), (40, 30), True), np.array([[3.0, 4.0], [20.5, 11.25]])
    assert view.points(np.array([[9 / 70 * 35, 0.0]]), (25, 35)).tolist() == [[30.0, -5.0]]  # left becomes right
    assert np.allclose(view.origin(view.points(points, (25, 35)), (25, 35)), points, atol=1e-12)


def test_padding():
    found = padded(np.ones((2, 3, 3), np.uint8), (4, 5), np.array([7, 8, 9], np.uint8))
    assert found.shape == (4, 5, 3) and (found[:2, :3] == 1).all() and (found[2:] == [7, 8, 9]).all()
    assert (found[:, 3:] == [7, 8, 9]).all()


def test_segments():
    """Bright digits are where the map says, whatever the geometry; padding is ignored; flips can be off."""
    data = DataConfig(scale_jitter=(0.5, 1.0), flip=0)
    transform = SegmentTransform(data, PLAIN, MODEL, MAPS)
    for index in range(12):
        fields = transform(SCENES.read(index), generator(SEED, index), index)
        image, labels = fields['image'], fields['label_map']
        assert image.shape == (64, 64, 3) and labels.shape == (64, 64) and labels.dtype == np.uint8
        assert fields['uniform'].shape == (24,)
        padding = (image == [124, 116, 104]).all(axis=2)
        assert (labels[padding] == 255).mean() > 0.97 and padding[labels == 255].all()
        if (digit := (labels > 0) & (labels < 255)).sum() > 50:
            assert image[digit].mean() > image[labels == 0].mean() + 20
    flipped = SegmentTransform(data.model_copy(update={'flip': 1.0}), PLAIN, MODEL, MAPS)
    one, other = (each(SCENES.read(3), generator(SEED, 3), 3) for each in (transform, flipped))
    valid = int((one['label_map'][0] != 255).sum())
    assert (other['label_map'][:, :valid] == one['label_map'][:, :valid][:, ::-1]).all()
    assert (other['image'][:, :valid] == one['image'][:, :valid][:, ::-1]).all()


def test_crops_of_one_class_are_drawn_again():
    class Halves:
        classes = 'a', 'b'

        def read(self, index):
            return np.repeat(np.arange(2, dtype=np.uint8), 300)[None].repeat(60, 0)

    class Grey:
        notes = ()
        __len__ = lambda self: 1  # noqa: E731
        name = staticmethod(str)

    transform = SegmentTransform(DataConfig(scale_jitter=(1, 1)), PLAIN, MODEL, Segmented(Grey(), Halves()))
    shares = [largest_share(transform(np.zeros((60, 600, 3), np.uint8), generator(SEED, i), 0)['label_map'], 255)
              for i in range(100)]
    assert np.mean(np.array(shares) <= 0.75) > 0.3  # of a single crop 0.06
    assert largest_share(np.full((2, 2), 255), 255) == 1 and largest_share(np.array([[0, 0, 0, 255, 4]]), 255) == 0.75


def test_whole_images_for_evaluation():
    fields = WholeTransform(DataConfig(), MODEL)(SCENES.read(2), generator(0))
    assert fields['extent'].tolist() == [43, 64, 64, 96] and (fields['image'][43:] == [124, 116, 104]).all()


def test_views_for_evaluation():
    """The whole image first, then three parts of twice its size, and each mirrored; what is left is empty."""
    whole = WholeTransform(DataConfig(), MODEL)(SCENES.read(2), generator(0))
    transform = SegmentViewsTransform(DataConfig(), MODEL, MAPS, (1, 2), flip=True)
    assert transform.most == 10
    fields = transform(SCENES.read(2), generator(0), 2)
    views = fields['views'].tolist()
    assert views[:5] == [[43, 64, 0, 0, 43, 64, 0], *([85, 128, top, left, 64, 64, 0] for top in (0, 21)
                                                      for left in (0, 64))]
    assert views[5:] == [[*view[:6], 1] for view in views[:5]]
    assert (fields['image'][0] == whole['image']).all()
    assert (fields['image'][6:] == fields['image'][1:5, :, ::-1]).all()
    assert (fields['image'][1, 21:] == fields['image'][3, :43]).all()  # rows that both show
    assert (fields['truth'] == MAPS.label_map(2)).all()
    small = SegmentViewsTransform(DataConfig(), MODEL, MAPS, (0.5, 2))(SCENES.read(2), generator(0), 2)
    assert small['views'][0].tolist() == [21, 32, 0, 0, 21, 32, 0]


def test_objects():
    """The mask of each object fills its box, and lies over the digit that it is of."""
    data = DataConfig(scale_jitter=(0.5, 2.0))
    transform, brighter = ObjectsTransform(data, MODEL, OBJECTS, masks=True, most=8), []
    for index in range(12):
        fields, known = transform(SCENES.read(index), generator(SEED, index), index), OBJECTS.objects(index)
        count = int((fields['classes'] >= 0).sum())
        assert count <= len(known.boxes) and (fields['classes'][count:] == -1).all() and not fields['crowd'].any()
        assert not fields['boxes'][count:].any() and not fields['masks'][count:].any()
        h, w = fields['extent'][:2]
        for box, mask in zip(fields['boxes'][:count], fields['masks'][:count]):
            assert 0 <= box[0] < box[2] <= w and 0 <= box[1] < box[3] <= h and (box[2:] - box[:2]).min() >= 1
            if 0 < box[0] and box[2] < w and 0 < box[1] and box[3] < h:  # whole: the box is just around the mask
                assert all(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
                x, y = (((np.arange(MASK_SIDE) + 0.5) * (box[2 + i] - box[i]) / MASK_SIDE + box[i]).astype(int)
                        for i in (0, 1))
                part = fields['image'][y[:, None], x].mean(axis=2)
                brighter.append(part[mask > 0].mean() - part[mask == 0].mean())
    assert len(brighter) > 15 and np.mean(np.array(brighter) > 10) > 0.9  # but where others lie around it


class Known:
    """Objects that a test makes."""
    classes, has_masks = ('a', 'b'), True

    def __init__(self, objects):
        self.read = lambda index, masks: objects


def known(boxes, crowd, regions=(), size=None):
    return WithObjects(SCENES, Known(Objects(np.array(boxes, np.float32).reshape(-1, 4), np.zeros(len(boxes), int),
                                             np.array(crowd, bool), regions or (None,) * len(boxes), size)))


STILL = DataConfig(scale_jitter=(1, 1), flip=0)
GREY = np.full((64, 64, 3), 90, np.uint8)


def test_too_many_objects_and_crowds():
    boxes = [[i, i, i + 9, i + 9] for i in range(5)] + [[70, 0, 80, 9], [3, 3, 3.9, 9]]
    transform = ObjectsTransform(STILL, MODEL, known(boxes, [True, False, True, False, False, False, False]), False, 3)
    fields = transform(GREY, generator(SEED), 0)
    assert fields['boxes'].tolist() == [boxes[1], boxes[3], boxes[4]] and not fields['crowd'].any()
    transform = ObjectsTransform(STILL, MODEL, known(boxes[:3], [True, False, True]), False, 3)
    fields = transform(GREY, generator(SEED), 0)
    assert fields['boxes'].tolist() == [boxes[1], boxes[0], boxes[2]] and fields['crowd'].tolist() == [0, 1, 1]
    drawn = {tuple(transform(GREY, generator(SEED, i), 0)['boxes'][:, 0]) for transform in [ObjectsTransform(
        STILL, MODEL, known(boxes[:3], [False] * 3), False, 1)] for i in range(30)}
    assert drawn == {(0,), (1,), (2,)}
    fields = ObjectsTransform(STILL, MODEL, known([], []), True, 3)(GREY, generator(SEED), 0)
    assert (fields['classes'] == -1).all() and fields['masks'].shape == (3, MASK_SIDE, MASK_SIDE)


def test_polygons_and_bitmaps_give_the_same_masks():
    outline = np.array([[8, 8], [40, 8], [40, 24], [24, 40], [8, 40.0]])
    bits = np.zeros((64, 64), bool)
    bits[8:40, 8:40] = np.arange(8, 40)[:, None] + np.arange(8, 40) < 64
    data = STILL.model_copy(update={'scale_jitter': (0.8, 1.7), 'flip': 0.5})
    for i in range(10):
        polygon, bitmap = (ObjectsTransform(data, MODEL, known([[8, 8, 40, 40]], [False], (region,)), True)(
            GREY, generator(SEED, i), 0)['masks'][0] for region in (Polygons((outline,)), bits))
        assert polygon.any() and (polygon != bitmap).mean() < 0.02  # along the slope


@pytest.mark.parametrize('objects, message', [
    (known([[0, 0, 9, 9]], [False], size=(96, 64)), 'digit-scenes#4 has 64 x 64 pixels, but its boxes are of one of 96 '
     'x 64: make them again'),
    (known([[0, 0, 9, 9]], [False]), "digit-scenes#4: object 0 of class 'a' has no mask, which the task needs")])
def test_what_does_not_fit_the_image(objects, message):
    with pytest.raises(BrokenImage, match=message):
        ObjectsTransform(STILL, MODEL, objects, True)(GREY, generator(SEED), 4)
    crowd = ObjectsTransform(STILL, MODEL, known([[0, 0, 9, 9]], [True]), True, 3)(GREY, generator(SEED), 4)
    assert crowd['crowd'].tolist() == [1, 0, 0] and not crowd['masks'].any()


def test_boxes_are_cut_where_their_image_ends():
    """Files of boxes need not tell how large an image is; a box beyond it would have another overlap with any found."""
    outside = known([[-4, 50, 70, 1e9], [64, 0, 80, 9], [1, 2, 3, 4]], [False, True, False])
    truth = ObjectsViewsTransform(STILL, MODEL, outside, False)(GREY, generator(SEED), 4)['truth']
    assert truth.boxes.tolist() == [[0, 50, 64, 64], [1, 2, 3, 4]] and truth.boxes.dtype == np.float32
    assert truth.size == (64, 64) and truth.crowd.tolist() == [False, False] and truth.regions == (None, None)


def test_label_maps_of_other_images():
    with pytest.raises(BrokenImage, match=r'digit-scenes#4 has 96 x 64 pixels, but its label image 64 x 96 \(is it turn'
                       'ed by its EXIF orientation'):
        SegmentTransform(DataConfig(), PLAIN, MODEL, MAPS)(np.zeros((96, 64, 3), np.uint8), generator(SEED), 4)


def test_colours():
    """Half the images change in each way; hue alone keeps the greys grey; the same generator, the same image."""
    grey = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    found = [distort(grey, generator(SEED, i)) for i in range(300)]
    assert all((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all() for image in found)
    unchanged = np.mean([(image == grey).all() for image in found])
    assert 0.17 < unchanged < 0.33  # neither brightness nor contrast: a quarter
    assert {int(image[8, 0, 0]) for image in found} >= {128} and min(int(image[8, 0, 0]) for image in found) < 70
    assert abs(np.mean([image[8, 0, 0] for image in found]) - 128) < 8
    colour = np.array([[[200, 80, 40], [30, 180, 90]]], np.uint8)
    assert np.mean([(distort(colour, generator(SEED, i)) == colour).all() for i in range(300)]) < 0.13
    assert (distort(colour, generator(1)) == distort(colour, generator(1))).all()
    rng, other = generator(3), generator(3)
    distort(colour, rng)
    other.random(9)
    assert rng.random() == other.random()


def fields_of(transform, source, threads, batch, prefetch, steps):
    loader = Loader(source, transform, lambda step: batch_at(step, 24, batch, SEED), SEED, threads, prefetch, 0, print)
    arrays = {}
    for _, filled in loader.iterate(0, steps):
        for position, index in enumerate(filled.index):
            arrays[filled.epoch, int(index)] = {name: zlib.crc32(value[position].tobytes())
                                                for name, value in filled.fields.items()}
    return arrays


@pytest.mark.parametrize('transform, source', [
    (SegmentTransform(DataConfig(), AugmentConfig(), MODEL, MAPS), MAPS),
    (ObjectsTransform(DataConfig(), MODEL, OBJECTS, True, 5), OBJECTS)], ids=['segment', 'detect'])
def test_threads_and_batches_change_no_sample(transform, source):
    source = source.part(np.arange(24))
    one, other = fields_of(transform, source, 1, 4, 1, 6), fields_of(transform, source, 3, 12, 2, 2)
    assert len(one) == 24 and one == other


class Torn(SceneMaps):
    """Of some scenes the label maps cannot be read."""

    def read(self, index):
        if index in (1, 2):
            raise BrokenImage(f'labels/{index}.png: image file is truncated')
        return super().read(index)


def test_label_maps_that_cannot_be_read_are_broken_images():
    source, said = Segmented(SCENES, Torn(SCENES), np.arange(6)), []
    transform = SegmentTransform(DataConfig(), PLAIN, MODEL, source)

    def loaded(most, log):
        loader = Loader(source, transform, lambda step: (0, [0, 1, 3]), SEED, 2, 1, most, log)
        return next(loader.iterate(0, 1))[1].fields, loader

    fields, loader = loaded(2, said.append)
    whole = SegmentTransform(DataConfig(), PLAIN, MODEL, MAPS)
    for position, (asked, shown) in enumerate([(0, 0), (1, 3), (3, 3)]):  # the next image, with the draws of the asked
        expected = whole(SCENES.read(shown), generator(SEED, 0, asked), shown)
        assert all((fields[name][position] == value).all() for name, value in expected.items())
    assert loader.broken == 2
    assert said == [f'broken image {i}, replaced by the next one: labels/{i}.png: image file is truncated'
                    for i in (1, 2)]
    with pytest.raises(TooManyBroken, match='2 images cannot be read, more than data.max_broken=1'):
        loaded(1, said.append)
    with pytest.raises(ValueError, match='every image counts here, so each must be readable: remove or repair labels/'):
        list(every_image(source, SegmentViewsTransform(DataConfig(), MODEL, source), 4, 1))
