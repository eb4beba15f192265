"""Pictures: every pixel where it belongs, every curve with the numbers of its run."""
import json
import struct

import numpy as np
import pytest
from PIL import Image

from mxsimmim.tasks import pictures
from mxsimmim.training import plots

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_to_uint8_undoes_the_normalisation():
    original = np.random.RandomState(0).permutation(256 * 3).reshape(1, 16, 16, 3) % 256
    channels_last = (original / 255 - MEAN) / STD
    image = pictures.to_uint8(channels_last.transpose(0, 3, 1, 2).astype('float32'), MEAN, STD)
    assert image.dtype == np.uint8 and image.shape == (1, 16, 16, 3) and np.array_equal(image, original)


def test_to_uint8_clips():
    normalised = np.array([-9, 0, 9, np.nan, np.inf], 'float32').reshape(1, 1, 1, 5).repeat(3, 1)
    image = pictures.to_uint8(normalised, MEAN, STD)
    assert image[0, 0].tolist() == [[0] * 3, [124, 116, 104], [255] * 3, [0] * 3, [255] * 3]


def flat(colors, side):
    """One image a color."""
    return np.array(colors, 'uint8')[:, None, None].repeat(side, 1).repeat(side, 2)


def boxes(canvas, color):
    """(top, left, bottom, right, pixels) of what has this color."""
    rows, columns = np.nonzero((canvas == np.array(color)).all(-1))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1, len(rows)


def test_grid_of_one():
    mask = np.zeros((1, 2, 2), int)
    mask[0, 0, 1] = 1
    canvas = pictures.grid(flat([(200, 10, 10)], 32), mask, flat([(10, 200, 10)], 32))
    assert canvas.dtype == np.uint8 and canvas.shape == (17 + 98, 2 + 3 * 98, 3)  # 32 pixels become 96
    panel, cell = 96 * 96, 48 * 48
    assert boxes(canvas, (200, 10, 10)) == (17, 2, 113, 294, panel + 2 * (panel - cell))
    # The top right cell, of the second panel and of the third.
    assert boxes(canvas[17:], (128, 128, 128)) == (0, 2 + 98 + 48, 48, 2 + 98 + 96, cell)
    assert boxes(canvas, (10, 200, 10)) == (17, 2 + 2 * 98 + 48, 17 + 48, 2 + 2 * 98 + 96, cell)
    assert (canvas[:17] < 100).any() and (canvas[113:] == 255).all()  # titles; paper


@pytest.mark.parametrize('count, side, across, shape', [
    (1, 224, 1, (25 + 228, 4 + 3 * 228)), (2, 96, 1, (17 + 2 * 98, 2 + 3 * 98)),
    (8, 32, 2, (17 + 4 * 98, 2 * 298 - 2)), (7, 32, 2, (17 + 4 * 98, 2 * 298 - 2)),
    (16, 97, 3, (17 + 6 * 99, 3 * 301 - 2))])
def test_grid_order(count, side, across, shape):
    colors = [(10 + index, 0, 200) for index in range(count)]
    image = flat(colors, side)
    canvas = pictures.grid(image, np.zeros((count, 1, 1), 'uint8'), image[::-1])
    assert canvas.shape == shape + (3,)
    shown = max(side, 96)
    corners = [boxes(canvas, color)[:2] for color in colors]
    assert corners == sorted(corners) and len({top for top, _ in corners}) == -(-count // across)
    assert {boxes(canvas, color)[4] for color in colors} == {3 * shown * shown}


def test_small_images_are_enlarged_by_whole_numbers():
    image = np.random.RandomState(0).randint(0, 256, (1, 7, 7, 3)).astype('uint8')
    canvas = pictures.grid(image, np.zeros((1, 7, 7)), image)
    assert canvas.shape == (17 + 100, 2 + 3 * 100, 3)  # 7 x 14 = 98
    assert np.array_equal(canvas[17:115, 2:100][::14, ::14], image[0])


def write_metrics(run, records):
    run.mkdir(exist_ok=True)
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    from matplotlib.figure import Figure
    figures = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)
    monkeypatch.setattr(Figure, 'savefig', keep)
    return figures


def points(line):
    return list(zip(*(np.asarray(values).tolist() for values in line.get_data())))


def test_plot(tmp_path, drawn):
    run = tmp_path / 'vit_base'
    write_metrics(run, [{'step': 0, 'val_loss': 2.0}] + [
        {'step': step, 'loss': 100.0 / step if step != 30 else None, 'lr': step * 1e-6, 'grad_norm': 1 + step / 1000,
         'images_per_second': 300.0, 'skipped': skipped}
        for step, skipped in ((10, 0), (20, 0), (30, 2), (40, 2), (50, 3))] + [{'step': 50, 'val_loss': 0.1}])
    plots.plot(run, tmp_path / 'curves.png')
    png = (tmp_path / 'curves.png').read_bytes()
    assert png[:8] == b'\x89PNG\r\n\x1a\n' and struct.unpack('>II', png[16:24]) == (1320, 880)
    losses, rate, norm, speed = drawn[0].axes
    assert drawn[0].texts[0].get_text() == 'vit_base: 50 steps'
    training, validation = losses.lines[:2]
    assert [point for point in points(training) if point[0] != 30] == [(10, 10.0), (20, 5.0), (40, 2.5), (50, 2.0)]
    assert np.isnan(dict(points(training))[30])
    assert points(validation) == [(0, 2.0), (50, 0.1)]
    assert points(rate.lines[0])[-1] == (50, 50 * 1e-6) and points(norm.lines[0])[0] == (10, 1.01)
    assert points(speed.lines[0]) == [(step, 300.0) for step in (10, 20, 30, 40, 50)]
    assert [line.get_xdata()[0] for line in losses.lines[2:-1]] == [30, 50]
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ['training', 'validation',
                                                                            'updates skipped: 3']
    assert [axes.get_yscale() for axes in drawn[0].axes] == ['log', 'linear', 'linear', 'linear']
    assert [axes.get_ylabel() for axes in drawn[0].axes] == [
        'loss on masked pixels', 'learning rate', 'gradient norm (L2, before clipping)', 'speed (images/s)']
    assert norm.get_xlabel() == speed.get_xlabel() == 'step (updates)'


def test_plot_of_validation_only(tmp_path, drawn):
    write_metrics(tmp_path, [{'step': 0, 'val_loss': 2.0}])
    plots.plot(tmp_path, tmp_path / 'curves.png')
    assert [[text.get_text() for text in axes.texts] for axes in drawn[0].axes] == [[]] + [['not recorded']] * 3


@pytest.mark.parametrize('records', [[], [{'step': 1, 'lr': 0.1}]])
def test_nothing_to_plot(tmp_path, records):
    write_metrics(tmp_path, records)
    with pytest.raises(ValueError, match=f'nothing to plot yet: its metrics.jsonl has {len(records)} records.*wait'):
        plots.plot(tmp_path, tmp_path / 'curves.png')


def test_no_run_and_no_place(tmp_path):
    with pytest.raises(ValueError, match='no such file: give the folder of a run'):
        plots.plot(tmp_path, tmp_path / 'curves.png')
    write_metrics(tmp_path, [{'step': 1, 'loss': 1.0}])
    with pytest.raises(ValueError, match=f'{tmp_path}/no/curves.png: cannot be written: No such file.*another place'):
        plots.plot(tmp_path, tmp_path / 'no' / 'curves.png')


def colors(file):
    """How many pixels have each color, and the size (W, H)."""
    with Image.open(file) as image:
        return {color: count for count, color in image.convert('RGB').getcolors(1 << 24)}, image.size


def test_confusion_is_drawn_in_shares_of_the_true_class(tmp_path):
    """Half of a thousand images or of two: the same blue. What was never taken for another is white."""
    matrix = np.array([[500, 500, 0], [0, 4, 0], [0, 1, 1]])
    pictures.confusion(matrix, ['a$', 'b', 'c' * 40], tmp_path / 'out.png')
    found, size = colors(tmp_path / 'out.png')
    import matplotlib
    blues = [tuple(int(round(255 * part)) for part in matplotlib.colormaps['Blues'](share)[:3])
             for share in (0.0, 0.5, 1.0)]
    cell = {share: sum(count for color, count in found.items() if np.abs(np.subtract(color, blue)).max() <= 2)
            for share, blue in zip((0, 0.5, 1), blues)}
    assert size[0] > 500 and cell[1] > 5000
    assert cell[0] / cell[1] == pytest.approx(4, rel=0.1) and cell[0.5] / cell[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize('classes', [1, 20, 21, 51, 300])
def test_confusion_of_many_classes(classes, tmp_path):
    pictures.confusion(np.eye(classes, dtype=int), [f'class {k}' for k in range(classes)], tmp_path / 'out.png')
    found, size = colors(tmp_path / 'out.png')
    assert 500 < min(size) and max(size) < 2000 and len(found) > 10


def test_confusion_of_more_classes_than_pixels(tmp_path, drawn):
    matrix = np.zeros((3001, 3001), np.int32)
    matrix[np.arange(3001), np.arange(3001)] = 3
    matrix[0, 3000] = 3  # of the nine images in the first field's row
    pictures.confusion(matrix, list(map(str, range(3001))), tmp_path / 'out.png')
    axes = drawn[0].axes[0]
    shares = axes.images[0].get_array()
    assert shares.shape == (1001, 1001) and shares[0, 0] == 0.75 and shares[0, 1000] == 0.25 and shares[1, 1] == 1
    assert axes.images[0].get_extent() == [-0.5, 3000.5, 3000.5, -0.5] and '9,003 of 9,006' in axes.get_title()


@pytest.mark.parametrize('classes', [1, 10, 15, 40])
def test_embedding_has_a_color_a_class(classes, tmp_path, drawn):
    labels = np.random.default_rng(0).permutation(np.arange(classes).repeat(5))
    points = np.random.default_rng(1).standard_normal((len(labels), 2))
    pictures.embedding(points, labels, [f'class {k}' for k in range(classes)], 'title', tmp_path / 'out.png')
    pictures.embedding(points, None, (), 'title', tmp_path / 'plain.png')
    (axes,), (plain,) = drawn[0].axes, drawn[1].axes
    assert [np.array_equal(clouds.get_offsets(), points[labels == k]) for k, clouds in enumerate(axes.collections)] == [
        True] * classes
    assert len({tuple(clouds.get_facecolor()[0]) for clouds in axes.collections}) == classes
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [f'class {k}' for k in range(classes)] if (
        classes <= 20) else legend is None
    assert np.array_equal(plain.collections[0].get_offsets(), points) and plain.get_legend() is None


def test_pictures_that_cannot_be_written(tmp_path):
    for draw in (lambda out: pictures.confusion(np.eye(2, dtype=int), 'ab', out),
                 lambda out: pictures.embedding(np.eye(2), None, (), '', out)):
        with pytest.raises(ValueError, match='none/out.png: cannot be written'):
            draw(tmp_path / 'none' / 'out.png')
