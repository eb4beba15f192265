"""Metrics: the numbers of scikit-learn and of closed forms, however the images are split."""
import numpy as np
import pytest
from sklearn import metrics as reference

from mxsimmim.tasks.class_table import LONGEST
from mxsimmim.tasks.metrics import (
    NONE,
    Tally,
    class_scores,
    class_table,
    confusion_matrix,
    log_softmax,
    worst_confusions,
)


def draw(seed, count, classes, scale=2.0):
    """Logits float32 (n, K) that favour the label somewhat, and labels of which every class has one."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    logits = scale * rng.standard_normal((count, classes))
    logits[np.arange(count), labels] += scale
    return logits.astype('float32'), labels


def tally(logits, labels):
    result = Tally()
    return result, result.add(logits, labels)


@pytest.mark.parametrize('classes', [2, 3, 5, 6, 10, 100])
def test_against_scikit_learn(classes):
    logits, labels = draw(classes, 700, classes)
    result, predicted = tally(logits, labels)
    values, known = result.values(), range(classes)
    probabilities = np.exp(log_softmax(logits))
    assert np.array_equal(predicted, logits.argmax(1))
    assert values['val_top1'] == 100 * reference.accuracy_score(labels, predicted)
    score = probabilities[:, 1] if classes == 2 else logits
    top5 = 1 if classes <= 5 else reference.top_k_accuracy_score(labels, score, k=5, labels=known)
    assert values['val_top5'] == pytest.approx(100 * top5, rel=1e-14)
    assert values['val_loss'] == pytest.approx(reference.log_loss(labels, probabilities, labels=known), rel=1e-12)

    matrix = confusion_matrix(labels, predicted, classes)
    assert np.array_equal(matrix, reference.confusion_matrix(labels, predicted, labels=known))
    scores = class_scores(labels, predicted, classes)
    precision, recall, f1, images = reference.precision_recall_fscore_support(labels, predicted, labels=known,
                                                                              zero_division=np.nan)
    assert np.array_equal(scores[:, 0], images)
    for column, expected in ((1, recall), (2, precision), (3, np.nan_to_num(f1))):  # 0, as newer versions say, too
        assert scores[:, column] == pytest.approx(100 * expected, rel=1e-12, nan_ok=True)


def test_any_split_adds_up_to_the_same():
    logits, labels = draw(1, 1000, 7)
    whole, _ = tally(logits, labels)
    for seed in range(5):
        print('seed', seed)
        cuts = np.sort(np.random.default_rng(seed).choice(1001, 12))  # uneven, some empty
        parts = [tally(*part)[0].state() for part in zip(np.split(logits, cuts), np.split(labels, cuts))]
        assert len(parts) == 13 and [part[0] for part in parts] != [parts[0][0]] * 13
        together = Tally(np.sum(parts, axis=0)).values()
        assert together['val_top1'] == whole.values()['val_top1'] and together['val_top5'] == whole.values()['val_top5']
        assert together == pytest.approx(whole.values(), rel=1e-13)


def calibrated(confidence, hits, count):
    """`count` images of two classes predicted as class 0 with this confidence, of which `hits` are class 0."""
    logits = np.tile([np.log(confidence / (1 - confidence)), 0], (count, 1))
    return logits, (np.arange(count) >= hits).astype(int)


@pytest.mark.parametrize('groups, error', [
    ([(0.9, 90, 100)], 0), ([(0.9, 60, 100)], 30), ([(0.75, 100, 100)], 25), ([(0.9, 0, 100)], 90),
    ([(0.9, 60, 100), (0.7, 240, 300)], 100 * 0.25 * 0.3 + 100 * 0.75 * 0.1),
    # Two confidences of one bin, (9/15, 10/15]: their mean is what counts.
    ([(0.61, 61 - 20, 100), (0.65, 65 + 20, 100)], 0)])
def test_calibration_error_in_closed_form(groups, error):
    parts = [calibrated(*group) for group in groups]
    result, _ = tally(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    assert result.values()['val_ece'] == pytest.approx(error, abs=1e-10)


def test_bins_are_closed_above():
    """Confidences 1/15 + k/15: just below, at and above the border between two bins."""
    for confidence, bin in ((0.6 - 1e-9, 8), (0.6 + 1e-9, 9), (1.0, 14)):
        logits = np.log(np.array([[confidence, 1 - confidence + 1e-300]]))
        assert tally(logits, np.array([0]))[0].state()[4 + bin] == 1


def test_of_equal_logits_the_lower_class_counts_as_larger():
    logits = np.zeros((8, 8))
    result, predicted = tally(logits, np.arange(8))
    assert predicted.tolist() == [0] * 8
    assert result.values()['val_top1'] == 100 / 8 and result.values()['val_top5'] == 500 / 8
    assert result.values()['val_loss'] == pytest.approx(np.log(8))


def test_what_is_no_number_is_no_hit():
    logits, labels = draw(3, 20, 10)
    logits[np.arange(20), labels] += 20
    assert tally(logits, labels)[0].values()['val_top5'] == 100
    for number, value in enumerate((np.nan, np.inf)):
        logits[number, labels[number]] = value
    logits[2] = -np.inf
    result, predicted = tally(logits, labels)
    assert predicted[:3].tolist() == [NONE] * 3
    values = result.values()
    assert values['val_top5'] == 100 * 17 / 20 and np.isnan(values['val_loss']) and np.isfinite(values['val_ece'])
    assert confusion_matrix(labels, predicted, 10).sum() == 17
    assert class_scores(labels, predicted, 10)[:, 0].sum() == 20
    logits[0, 1:] = -np.inf  # classes ruled out are numbers enough
    logits[0, 0] = 1
    assert tally(logits[:1], np.array([0]))[0].values() == {'val_top1': 100, 'val_top5': 100, 'val_loss': 0,
                                                            'val_ece': 0}


def test_table_is_aligned():
    labels, predicted = np.array([0, 0, 0, 2]), np.array([0, 0, 1, NONE])
    names = ['ox', 'a' * 50, 'donkey', 'unseen']
    lines = class_table(class_scores(labels, predicted, 4), names).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    assert lines[0].split() == ['class', 'images', 'recall', 'precision', 'F1']
    assert lines[1].split() == ['ox', '3', '66.7', '%', '100.0', '%', '80.0', '%']
    assert lines[2].split() == ['a' * (LONGEST - 1) + '…', '0', '-', '0.0', '%', '0.0', '%']
    assert lines[3].split() == ['donkey', '1', '0.0', '%', '-', '0.0', '%']
    assert lines[4].split() == ['unseen', '0', '-', '-', '-']
    worst = class_table(class_scores(labels, predicted, 4), names, limit=3).splitlines()
    assert [line.split()[0] for line in worst[1:]] == ['a' * (LONGEST - 1) + '…', 'donkey', 'ox']


def test_worst_confusions():
    matrix = np.array([[9, 2, 0], [5, 1, 2], [0, 0, 3]])
    assert worst_confusions(matrix, 'abc', 9) == ['5 of b taken for a', '2 of a taken for b', '2 of b taken for c']
    assert worst_confusions(matrix, 'abc', 1) == ['5 of b taken for a'] and worst_confusions(np.eye(3), 'abc', 5) == []
