"""Probes: known answers on features made by hand, and the command's table on a run."""
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from support import tiny
from support.runs import stored

from mxsimmim.config import ModelConfig
from mxsimmim.data.labels import Labelled
from mxsimmim.inference import probe
from mxsimmim.models import build_simmim
from mxsimmim.training.run_folder import read_config

VIT = dict(tiny.VIT, depth=3, use_ape=True, use_shared_rpb=False)


def clouds(seed, count, classes=4, width=8, spread=0.3):
    """Features (n, C) around one direction a class, of very different scales a column, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    features = np.eye(classes, width)[labels] + spread * rng.standard_normal((count, width))
    return (features * np.logspace(-2, 2, width)).astype('float32'), labels


def test_linear_finds_what_is_linear_whatever_the_scale():
    (train, labels), (held_out, truth) = clouds(0, 400), clouds(1, 300)
    assert (probe.linear(train, labels, held_out) == truth).mean() > 0.9
    assert np.array_equal(probe.linear(train, labels, held_out), probe.linear(train * 1e3, labels, held_out * 1e3))


@pytest.mark.parametrize('each', [1, 2])
def test_linear_with_hardly_any_labels(each):
    train, labels = np.repeat(np.eye(3, 5, dtype='float32'), each, axis=0), np.repeat(np.arange(3), each)
    assert probe.linear(train, labels, np.eye(3, 5)).tolist() == [0, 1, 2]


@pytest.mark.parametrize('count', [3, 20, 21, 500])
def test_nearest_against_scikit_learn(count, monkeypatch):
    monkeypatch.setattr(probe, 'SIMILARITIES', 700 * count)  # three chunks
    (train, labels), (held_out, _) = clouds(2, count, spread=1), clouds(3, 1500, spread=1)
    reference = KNeighborsClassifier(min(20, count), metric='cosine', algorithm='brute',
                                     weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = reference.fit(train.astype('float64'), labels).predict(held_out.astype('float64'))
    assert (probe.nearest(train, labels, held_out, 4) == expected).mean() > 0.998  # but for float32 near a tie


def test_nearest_in_closed_form():
    """One neighbour at 0 degrees against two at 60: exp(1 / 0.07) against 2 exp(0.5 / 0.07)."""
    train = np.array([[1, 0], [0.5, 3 ** 0.5 / 2], [0.5, -3 ** 0.5 / 2]], 'float32')
    assert probe.nearest(train, np.array([2, 1, 1]), np.array([[5.0, 0]], 'float32'), 3).tolist() == [2]
    many = np.concatenate([train[:1], np.repeat(train[1:2], 19, axis=0) + [[0.4, -0.5]]])  # at 14 degrees
    assert probe.nearest(many, np.array([2] + [1] * 19), np.array([[5.0, 0]]), 3).tolist() == [1]
    assert probe.nearest(train, np.array([2, 1, 0]), np.zeros((1, 2)), 3).tolist() == [0]  # all equal: the lower class


def test_measure_and_table():
    (train, labels), (held_out, truth) = clouds(4, 200, spread=0.01), clouds(5, 60, spread=0.01)
    data = Labelled(train, labels, held_out, truth, tuple('abcd'))
    whole = probe.measure(3, train, held_out, data, [np.arange(200)])
    assert whole.linear.tolist() == [100.0] and whole.block == 3
    drawn = probe.measure(12, train, held_out, data, [np.arange(0, 100), np.arange(100, 200)])
    assert drawn.linear.tolist() == [100.0, 100.0] and len(drawn.neighbours) == 2
    rows = [probe.Row(3, np.array([90.0]), np.array([80.123])),
            probe.Row(12, np.array([50.0, 60.0]), np.array([100.0, 100.0]))]
    assert [line.split() for line in probe.table(rows).splitlines()[1:]] == [
        ['3', '90.00', '%', '80.12', '%'], ['12', '55.00', '±', '7.07', '%', '100.00', '±', '0.00', '%']]
    assert all(len(line) == len(probe.table(rows).splitlines()[0]) for line in probe.table(rows).splitlines()[1:])


@pytest.fixture
def run(tmp_path):
    return stored(tmp_path, build_simmim(ModelConfig(**VIT)))


def on_digits(run, **data):
    config = read_config(run)
    return config.model_copy(update={'data': config.data.model_copy(update={'path': 'digits', 'val_fraction': 0.2,
                                                                            **data})})


@pytest.mark.unmeasured
def test_probe_of_a_run(run):
    few = probe.probe(run, on_digits(run, labels_per_class=4), 'all', 3).splitlines()
    assert few[0] == 'tiny, step 7: 40 training images (4 of each class, 3 draws), 359 held out, 10 classes'
    assert [line.split()[0] for line in few[1:]] == ['block', '1', '2', '3'] and few[2].count('±') == 2
    kept = {file: file.stat().st_mtime_ns for file in (run / 'features').iterdir()}
    assert len(kept) == 6  # three blocks of training and held-out images
    whole = probe.probe(run, on_digits(run), '2', 3).splitlines()
    assert whole[0].startswith('tiny, step 7: 1,438 training images, 359') and len(whole) == 3
    assert '±' not in whole[2] and float(whole[2].split()[1]) > 30  # even random weights beat 10 %
    assert {file: file.stat().st_mtime_ns for file in (run / 'features').iterdir()} == kept


@pytest.mark.parametrize('data, block, draws, complaint', [
    ({}, '9', 5, '--block 9: this vit has blocks 1 to 3'), ({}, '', 0, '--seeds 0: at least one draw'),
    ({'val_fraction': 0}, '', 5, 'no held-out images to measure with: set data.val_path, or data.val_fraction'),
    ({'labels_per_class': 999}, '', 5, "data.labels_per_class=999, but class '0' has 1[0-9]{2} training images"),
    ({'path': ''}, '', 5, 'data.path'), ({'path': 'nowhere'}, '', 5, 'nowhere does not exist')])
def test_bad_requests(run, data, block, draws, complaint):
    with pytest.raises(ValueError, match=complaint):
        probe.probe(run, on_digits(run, **data), block, draws)
    assert not (run / 'features').exists()


def test_images_without_labels(run, tmp_path):
    (tmp_path / 'flat').mkdir()
    (tmp_path / 'flat' / 'a.png').write_bytes(b'')
    with pytest.raises(ValueError, match='in no class folder'):
        probe.probe(run, on_digits(run, path=str(tmp_path / 'flat')), '', 5)
