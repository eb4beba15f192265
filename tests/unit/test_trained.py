"""Runs as they are loaded: those of before there was a protocol of tasks, and by the workers of a job."""
import shutil
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from support.workers import each

from mxsimmim.inference.trained import find_run, load_run, load_run_for
from mxsimmim.models import Classifier, SimMIM, named_parameters
from mxsimmim.ops import REFERENCE
from mxsimmim.tasks.registry import TASKS
from mxsimmim.tasks.task import Metric
from mxsimmim.training.run_folder import checkpoint_to_resume, read_config

RUNS = Path(__file__).parents[1] / 'data' / 'old_runs'  # digits, 30 steps, written before there was a protocol


def inputs():
    rng = np.random.default_rng(5)
    return (mx.nd.array(rng.standard_normal((2, 3, 16, 16)).astype('float32')),
            mx.nd.array(rng.random((2, 4, 4)) < 0.6))


def test_an_old_pretraining_gives_the_numbers_of_its_time():
    trained, (image, mask) = load_run(RUNS / 'pretrain'), inputs()
    assert trained.step == 30 and isinstance(trained.net, SimMIM) and trained.predictor.classes == ()
    assert trained.net(image, mask).asscalar() == pytest.approx(0.8862233, rel=1e-5)
    np.testing.assert_allclose(trained.net.reconstruct(image, mask).asnumpy()[0, 0, 0, :4],
                               [-0.45232946, -0.90041035, -0.1631085, -0.9813486], rtol=1e-5)


@pytest.mark.parametrize('kept, step, logits', [(True, 10, [-0.02154675, -0.0344143, 0.04457119, -0.01268382]),
                                                (False, 30, [-0.09998304, -0.01099432, 0.03304386, -0.07695692])])
def test_an_old_classifier_gives_the_numbers_of_its_time(tmp_path, kept, step, logits):
    """Of its best checkpoint; without one, the average of the newest, not its weights."""
    shutil.copytree(RUNS / 'classify', tmp_path / 'run')
    if not kept:
        shutil.rmtree(tmp_path / 'run' / 'best')
    trained = load_run(tmp_path / 'run')
    assert trained.step == step and isinstance(trained.net, Classifier)
    assert trained.predictor.classes == tuple('0123456789')
    np.testing.assert_allclose(trained.net(inputs()[0]).asnumpy()[0, :4], logits, atol=1e-6)


@pytest.mark.parametrize('kind', ['pretrain', 'classify'])
def test_an_old_run_goes_on(tmp_path, kind):
    config = read_config(RUNS / kind).model_copy(update={'output': str(tmp_path)})
    shutil.copytree(RUNS / kind, tmp_path / config.name)
    saved = checkpoint_to_resume(config, TASKS[kind](config), pytest.fail)
    assert saved.step == 30 and set(saved.arrays) >= {'weights', 'optimizer'}


def test_each_command_names_the_other():
    with pytest.raises(ValueError, match='is a pre-training, which knows no classes: `mxsimmim reconstruct` shows'):
        load_run_for('predict', RUNS / 'pretrain')
    with pytest.raises(ValueError, match='is a classifier, which reconstructs nothing: `mxsimmim predict` shows what'):
        load_run_for('reconstruct', RUNS / 'classify')
    assert load_run_for('predict', RUNS / 'classify').step == 10


def test_in_a_job_rank_0_alone_reads(tmp_path):
    """The others do not have the run."""
    first, *others = each(3, lambda control: find_run(RUNS / 'classify' if control.rank == 0 else tmp_path / 'nothing',
                                                      control))
    assert (first.config.name, first.step, first.state['classes']) == ('ft', 10, list('0123456789'))
    assert 'head.weight' in first.weights
    assert others == [first._replace(weights={})] * 2


@pytest.mark.parametrize('metric, score', [(Metric('val_loss', False), -0.5), (Metric('val_top1', True), 80.0)])
def test_the_higher_score_is_better(metric, score):
    assert metric.score({'val_loss': 0.5, 'val_top1': 80.0}) == score


@pytest.mark.parametrize('kind', ['pretrain', 'classify'])
def test_shapes_are_those_of_the_network(kind):
    task = TASKS[kind](read_config(RUNS / kind))
    net = task.build_network(False, REFERENCE)
    assert task.shapes() == {name: p.shape for name, p in named_parameters(net).items()}
