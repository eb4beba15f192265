"""Evaluation: every image once under its own label, the same numbers for any number of workers."""
import json

import numpy as np
import pytest
from PIL import Image
from support.workers import each

from mxsimmim.config import Config, DataConfig, ModelConfig, TrainConfig
from mxsimmim.data.sources import ImageFiles
from mxsimmim.tasks.classify import ClassEvaluator

COLORS = {'red': (250, 0, 0), 'green': (0, 250, 0), 'blue': (0, 0, 250)}
CONFIG = Config(task='classify', model=ModelConfig(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=1),
                data=DataConfig(threads=2), train=TrainConfig(batch_size=8))


class Colors:
    """A placement that knows a class by its color, and is a little unsure."""

    inputs = 'image',

    def __init__(self):
        self.images = 0

    def outputs(self, batch):
        image = batch.fields['image']
        assert image.shape[1:] == (16, 16, 3) and image.dtype == np.uint8
        self.images += len(image)
        return (image[:, 8, 8] / 125).astype('float32')


@pytest.fixture
def images(tmp_path):
    """23 files and their labels: of each color some, the last three red ones labelled blue."""
    paths, labels = [], []
    for number in range(23):
        color = number % 3 if number < 20 else 0
        Image.new('RGB', (20, 16), list(COLORS.values())[color]).save(tmp_path / f'{number:02d}.png')
        paths.append(str(tmp_path / f'{number:02d}.png'))
        labels.append(color if number < 20 else 2)
    return paths, np.array(labels)


def work(images, size, method):
    """`method(evaluation, placement)` in `size` workers at once: what each returned, and the images each was given."""
    placements = [Colors() for _ in range(size)]

    def run(control):
        evaluation = ClassEvaluator(CONFIG, ImageFiles(images[0]), images[1], list(COLORS), control)
        return method(evaluation, placements[control.rank])
    results = each(size, run)
    return results, [placement.images for placement in placements]


@pytest.mark.parametrize('size', [1, 2, 5, 30])
def test_evaluate_is_exact_for_any_number_of_workers(images, size):
    results, counts = work(images, size, ClassEvaluator.evaluate)
    assert sum(counts) == 23 and max(counts) - min(counts) <= 1
    for values in results:
        assert values['val_images_per_second'] > 0
        assert values['val_top1'] == 100 * 20 / 23 and values['val_top5'] == 100
        confidence = np.exp(2) / (np.exp(2) + 2)  # a color is 250 / 125 = 2, the others 0
        assert values['val_loss'] == pytest.approx((20 * -np.log(confidence) + 3 * (2 - np.log(confidence))) / 23,
                                                   rel=1e-6)
        assert values['val_ece'] == pytest.approx(100 * abs(20 / 23 - confidence), rel=1e-6)


@pytest.mark.parametrize('size', [1, 4, 30])
def test_report(images, size, tmp_path):
    folder = tmp_path / 'run'
    results, _ = work(images, size, lambda evaluation, placement: evaluation.report(placement, folder))
    assert results[0].startswith('top-1 86.96 %, top-5 100.00 % of 23 images, loss 0.500')
    assert 'most confused: 3 of blue taken for red' in results[0]
    values = json.loads((folder / 'evaluation.json').read_text())
    assert values['images'] == 23 and values['val_top1'] == 100 * 20 / 23
    table = (folder / 'evaluation.txt').read_text().splitlines()
    assert table[1].split() == ['red', '7', '100.0', '%', '70.0', '%', '82.4', '%']
    assert table[3].split() == ['blue', '9', '66.7', '%', '100.0', '%', '80.0', '%']
    assert Image.open(folder / 'confusion.png').size[0] > 500


def test_an_unreadable_image_is_named(images):
    with open(images[0][7], 'wb') as file:
        file.write(b'\x89PNG broken')
    (error,), _ = work(images, 1, ClassEvaluator.evaluate)
    assert isinstance(error, ValueError) and '07.png' in str(error) and 'max_broken' not in str(error)
    assert '\n' not in str(error) and 'remove or repair' in str(error)


def test_nowhere_to_write(images, tmp_path):
    (tmp_path / 'file').write_text('')
    (error,), _ = work(images, 1, lambda evaluation, placement: evaluation.report(placement, tmp_path / 'file'))
    assert isinstance(error, ValueError) and f'{tmp_path}/file: cannot write the evaluation' in str(error)
