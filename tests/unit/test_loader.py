"""The same batches whatever the number of threads, the start or the broken images; and threads that end."""
import io
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mxsimmim.config import AugmentConfig, DataConfig, MaskConfig, ModelConfig
from mxsimmim.data import decode as decoding
from mxsimmim.data.augment import mix_pair
from mxsimmim.data.loader import Loader, TooManyBroken, fixed_batches
from mxsimmim.data.sampling import batch_at, generator
from mxsimmim.data.sources import Digits, Subset
from mxsimmim.data.transforms import DRAWN, ClassifyEvalTransform, ClassifyTransform, EvalTransform, PretrainTransform

MODEL, MASK = ModelConfig(img_size=32, patch_size=4, depth=3, drop_path=0.1), MaskConfig(patch_size=8)
PRETRAIN, EVAL = (kind(DataConfig(), MASK, MODEL) for kind in (PretrainTransform, EvalTransform))
SEED = 21


class Pictures:
    """Small PNGs of different sizes, some of them broken; counts how often each is read."""

    def __init__(self, count, broken=(), missing=()):
        self.count, self.broken, self.missing, self.reads = count, broken, missing, Counter()

    def __len__(self):
        return self.count

    def name(self, index):
        return f'picture-{index}.png'

    def read(self, index):
        self.reads[index] += 1
        if index in self.missing:
            raise FileNotFoundError(2, 'No such file or directory', self.name(index))
        if index in self.broken:
            return b'no image'
        rng, buffer = np.random.default_rng(index), io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20 + index, 40 - index % 9, 3), dtype=np.uint8)).save(buffer, 'PNG')
        return buffer.getvalue()


def loader(source, threads=2, batch=4, max_broken=0, prefetch=2, log=None, transform=PRETRAIN, seed=SEED):
    return Loader(source, transform, lambda step: batch_at(step, len(source), batch, seed), seed, threads, prefetch,
                  max_broken, log or (lambda text: pytest.fail(text)))


def assert_equal(one, other):
    assert [step for step, _ in one] == [step for step, _ in other]
    for (_, a), (_, b) in zip(one, other):
        assert a.epoch == b.epoch and (a.index == b.index).all() and a.fields.keys() == b.fields.keys()
        for field, array in a.fields.items():
            assert (array == b.fields[field]).all()


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith('loader-')]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert loader_threads() == []


@pytest.mark.parametrize('threads, prefetch', [(1, 1), (2, 3), (3, 1), (8, 5), (0, 2)])
def test_batches_do_not_depend_on_threads(threads, prefetch):
    source = Pictures(19)
    assert_equal(list(loader(source, threads, prefetch=prefetch).iterate(0, 13)),
                 list(loader(source, threads=1, prefetch=1).iterate(0, 13)))


@pytest.mark.parametrize('start', [1, 4, 5, 11, 12, 13])
def test_batches_do_not_depend_on_the_start(start):
    source = Pictures(19)
    whole = list(loader(source).iterate(0, 13))  # 4 steps an epoch
    assert_equal(list(loader(source).iterate(start, 13)), whole[start:])


def test_a_sample_is_a_function_of_seed_epoch_and_sample():
    source = Pictures(9)
    batches = [batch for _, batch in loader(source, batch=3).iterate(0, 6)]
    for batch in batches:
        for position, index in enumerate(batch.index):
            pixels = np.asarray(Image.open(io.BytesIO(source.read(int(index)))))
            want = PRETRAIN(pixels, generator(SEED, batch.epoch, int(index)))
            for field in ('image', 'mask', 'uniform'):
                assert (batch.fields[field][position] == want[field]).all()
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1, 1, 1]
    assert batches[0].fields['uniform'].shape == (3, 6) and batches[0].fields['image'].shape == (3, 32, 32, 3)
    masks = {index: [b.fields['mask'][b.index == index][0] for b in batches if index in b.index] for index in range(9)}
    assert any((first != second).any() for first, second in masks.values())  # another mask in the next epoch


def test_at_most_prefetch_batches_are_prepared_ahead():
    source = Pictures(40)
    batches = loader(source, batch=4, prefetch=2).iterate(0, 10)
    for step in range(3):
        next(batches)
        deadline = time.monotonic() + 5
        while sum(source.reads.values()) < 4 * (step + 3) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sum(source.reads.values()) == 4 * (step + 3)
    batches.close()


def test_broken_images_are_named_counted_and_replaced():
    source, said = Pictures(12, broken=(3, 4), missing=(11,)), []
    load = loader(source, batch=12, max_broken=3, log=said.append)
    batches = list(load.iterate(0, 3))
    assert load.broken == 3 and len(said) == 3
    for name, reason in (('picture-3.png', 'not an image'), ('picture-4.png', 'not an image'),
                         ('picture-11.png', 'No such file')):
        assert len([text for text in said if name in text and reason in text]) == 1
    assert all(source.reads[index] <= 2 for index in (3, 4, 11))  # once a thread at most, never again
    for _, batch in batches:
        for broken, replacement in ((3, 5), (4, 5), (11, 0)):
            position = list(batch.index).index(broken)
            pixels = np.asarray(Image.open(io.BytesIO(source.read(replacement))))
            want = PRETRAIN(pixels, generator(SEED, batch.epoch, broken))
            for field in ('image', 'mask'):
                assert (batch.fields[field][position] == want[field]).all()


@pytest.mark.parametrize('threads', [1, 4])
def test_too_many_broken(threads):
    said = []
    load = loader(Pictures(20, broken=(2, 5, 9)), threads, batch=20, max_broken=2, log=said.append)
    with pytest.raises(TooManyBroken, match=r'3 images cannot be read, more than data.max_broken=2: remove or repair '
                                            r'them, or raise data.max_broken; the last: .*picture-\d.png: not an') as e:
        list(load.iterate(0, 1))
    assert isinstance(e.value, ValueError) and len(said) == 3


def test_nothing_but_broken_images():
    with pytest.raises(TooManyBroken, match='none of the 5 images can be read; the last: picture-'):
        list(loader(Pictures(5, broken=range(5)), batch=2, max_broken=5, log=lambda text: None).iterate(0, 2))


def test_an_exception_in_a_thread_reaches_the_consumer():
    class Faulty(Pictures):
        def read(self, index):
            raise ZeroDivisionError('from a thread')
    with pytest.raises(ZeroDivisionError, match='from a thread'):
        list(loader(Faulty(8)).iterate(0, 2))


@pytest.mark.alone
@pytest.mark.parametrize('exception', [None, KeyboardInterrupt, RuntimeError])
def test_leaving_early_ends_the_threads(exception):
    source = Pictures(1000)
    batches = loader(source, threads=4, batch=250, prefetch=3).iterate(0, 4)
    next(batches)
    assert len(loader_threads()) == 4
    began = time.monotonic()
    if exception is None:
        batches.close()
    else:
        with pytest.raises(exception):
            batches.throw(exception)
    assert time.monotonic() - began < 1 and loader_threads() == []
    assert sum(source.reads.values()) < 1000


def test_an_abandoned_loop_ends_the_threads():
    for _ in loader(Pictures(100), batch=10).iterate(0, 10):
        break
    assert loader_threads() == []


LABELS = np.arange(19) % 5
CLASSIFY = ClassifyTransform(DataConfig(), AugmentConfig(), MODEL, LABELS, 5)


def decoded(source, index):
    return np.asarray(Image.open(io.BytesIO(source.read(index))))


@pytest.mark.parametrize('batch', [6, 7])
def test_partners_are_mixed(batch):
    """Positions 0 and 1, 2 and 3, …; the last of an odd number stays as it is."""
    source, mixed = Pictures(19), 0
    for _, found in loader(source, batch=batch, transform=CLASSIFY).iterate(0, 4):
        samples = [CLASSIFY(decoded(source, i), generator(SEED, found.epoch, i), i) for i in map(int, found.index)]
        images, labels = (np.stack([sample[field] for sample in samples]) for field in ('image', 'label'))
        alone = labels.copy()
        for first in range(0, batch - 1, 2):
            pair, indices = slice(first, first + 2), map(int, found.index[first:first + 2])
            mix_pair(images[pair], labels[pair], generator(SEED, found.epoch, *indices), AugmentConfig())
        assert (found.fields['image'] == images).all() and (found.fields['label'] == labels).all()
        mixed += (labels != alone).any(1).sum()
        assert batch == 6 or (found.fields['label'][-1] == alone[-1]).all()
        np.testing.assert_allclose(found.fields['label'].sum(1), 1, atol=1e-6)
    assert mixed > 10


def test_mixed_batches_do_not_depend_on_threads_start_or_workers():
    source = Pictures(19)
    whole = list(loader(source, batch=6, transform=CLASSIFY).iterate(0, 9))
    assert_equal(list(loader(source, threads=1, batch=6, transform=CLASSIFY, prefetch=1).iterate(0, 9)), whole)
    assert_equal(list(loader(source, threads=5, batch=6, transform=CLASSIFY).iterate(4, 9)), whole[4:])
    for part in (slice(0, 4), slice(4, 6)):  # what two workers would get
        def own(step, part=part):
            epoch, index = batch_at(step, 19, 6, SEED)
            return epoch, index[part]
        load = Loader(source, CLASSIFY, own, SEED, 2, 2, 0, pytest.fail)
        for (_, mine), (_, all_of_it) in zip(load.iterate(0, 9), whole):
            for field in ('image', 'label'):
                assert (mine.fields[field] == all_of_it.fields[field][part]).all()


def test_a_replaced_image_keeps_its_own_label():
    source = Pictures(19, broken=(3, 4))
    plain = ClassifyTransform(DataConfig(), AugmentConfig(mixup=0, cutmix=0, smoothing=0), MODEL, LABELS, 5)
    evaluation = ClassifyEvalTransform(DataConfig(), MODEL, LABELS, 5)
    for transform in (plain, evaluation):
        load = loader(source, batch=19, max_broken=2, log=lambda text: None, transform=transform)
        (_, batch), = load.iterate(0, 1)
        shown = np.where(np.isin(batch.index, (3, 4)), 5, batch.index)
        assert (batch.fields['label'].argmax(1) == LABELS[shown]).all() and (batch.fields['label'].max(1) == 1).all()
        assert 'mask' not in batch.fields


@pytest.mark.parametrize('transform, needed, reads', [
    (PRETRAIN, ['keep'], False), (PRETRAIN, ['mask', 'uniform'], False), (PRETRAIN, ['image', 'mask'], True),
    (CLASSIFY, ['keep'], False), (CLASSIFY, ['keep', 'label'], True),
    (ClassifyEvalTransform(DataConfig(), MODEL), ['label'], False)])
def test_where_no_image_is_needed_none_is_read(transform, needed, reads):
    """The draws are those of who reads them, also of images that are broken, and twelve are not too many."""
    def batches(step):
        return batch_at(step, 12, 4, SEED)
    whole = list(Loader(Pictures(12, broken=(3, 4)), transform, batches, SEED, 2, 2, 2, print).iterate(0, 6))
    source = Pictures(12, broken=(3, 4) if reads else range(12))
    load = Loader(source, transform, batches, SEED, 2, 2, 2 * reads, print, needed)
    ours = list(load.iterate(0, 6))
    assert bool(sum(source.reads.values())) == reads and load.broken == 2 * reads
    if not reads:
        assert all(set(batch.fields) <= set(DRAWN) for _, batch in ours)
        whole = [(step, batch._replace(fields={name: batch.fields[name] for name in DRAWN if name in batch.fields}))
                 for step, batch in whole]
    assert_equal(ours, whole)


@pytest.mark.parametrize('threads', [1, 3])
def test_fixed_batches(threads):
    digits = Digits()
    first, second = (list(fixed_batches(digits, EVAL, 16, 50, SEED, count)) for count in (threads, 2))
    assert [len(batch.index) for batch in first] == [16, 16, 16, 2]
    assert_equal(list(enumerate(first)), list(enumerate(second)))
    indices = np.concatenate([batch.index for batch in first])
    assert (np.diff(indices) > 0).all() and indices.max() > 1000  # from everywhere, in order
    other = list(fixed_batches(digits, EVAL, 16, 50, SEED + 1, threads))
    assert any((a.fields['mask'] != b.fields['mask']).any() for a, b in zip(first, other))


def test_fixed_batches_of_a_small_source_takes_it_whole():
    batches = list(fixed_batches(Subset(Digits(), np.arange(5)), EVAL, 8, 100, SEED, 2))
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2, 3, 4]]


def test_fixed_batches_replace_broken_images_too(caplog):
    batches = list(fixed_batches(Pictures(4, broken=(1,)), EVAL, 4, 4, SEED, 1))
    assert (batches[0].fields['image'][1] == batches[0].fields['image'][2]).all() and 'picture-1.png' in caplog.text
    with pytest.raises(TooManyBroken, match='data.max_broken=0'):
        list(fixed_batches(Pictures(4, broken=(1,)), EVAL, 4, 4, SEED, 1, max_broken=0))


@pytest.mark.parametrize('key, upright', [(None, False), (False, False), (True, True)])
def test_exif_orientation_as_the_configuration_says(key, upright):
    pixels = np.random.default_rng(SEED).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif, buffer, data = Image.Exif(), io.BytesIO(), DataConfig(exif_orientation=key)
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(buffer, 'PNG', exif=exif)
    source = Pictures(1)
    source.read = lambda _: buffer.getvalue()
    batch, = fixed_batches(source, EvalTransform(data, MASK, MODEL), 1, 1, SEED, 1)
    assert (batch.fields['image'][0] == (pixels if upright else np.rot90(pixels))).all()
    for use, want in ((data, upright), (data.in_use(), key is not False)):
        made = [PretrainTransform(use, MASK, MODEL), EvalTransform(use, MASK, MODEL),
                ClassifyEvalTransform(use, MODEL), ClassifyTransform(use, AugmentConfig(), MODEL, np.zeros(1, int), 2)]
        assert [transform.upright for transform in made] == [want] * 4


def test_what_is_guessed_about_values_is_logged_once():
    decoding._said.clear()
    values, buffer, said = np.arange(4096, dtype=np.uint16).reshape(64, 64), io.BytesIO(), []
    Image.fromarray(values).save(buffer, 'PNG')
    source = Pictures(5)
    source.read = lambda _: buffer.getvalue()
    for _ in range(2):
        list(fixed_batches(source, EVAL, 2, 5, SEED, 2, log=said.append))
    assert len(said) == 1 and 'integer values up to 4095, taken as 12 bits' in said[0]
