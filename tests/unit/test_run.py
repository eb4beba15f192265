"""What makes two workers, or a checkpoint and a run, the same job."""
import os
import signal
import time
import zlib

import numpy as np
import pytest

from mxsimmim import __version__
from mxsimmim.config import Config, configfile
from mxsimmim.data.labels import Labelled
from mxsimmim.interop import official
from mxsimmim.models import build_simmim
from mxsimmim.tasks import classify, pretrain
from mxsimmim.tasks.classes import check_classes
from mxsimmim.tasks.classify import Classification
from mxsimmim.tasks.pretrain import Pretraining
from mxsimmim.tasks.task import check_same_job
from mxsimmim.training import checkpoint, run_folder
from mxsimmim.training.run_folder import Stop, check_shared, check_written, checkpoint_to_resume, newest_here


class Images:
    """Images by name."""

    def __init__(self, count=3):
        self._count = count

    def __len__(self):
        return self._count

    def name(self, index):
        return f'/disk/{index}.png'


LABELS = np.array([0, 1, 1])


def task(config, monkeypatch, classes, held_out=2, labels=LABELS, held_out_labels=None):
    """Three images and their classes."""
    data = Labelled(Images(), labels, Images(held_out), held_out_labels, classes)
    monkeypatch.setattr(classify, 'open_labelled', lambda *_: data)
    return Classification(config)


def pretraining(config, monkeypatch, images):
    monkeypatch.setattr(pretrain, 'open_source', lambda _: Images(images))
    return Pretraining(config)


class Second:
    """The control plane of a second worker, which hears what the first one said."""
    rank, size = 1, 2

    def __init__(self, classes, **keys):
        self.said = {'config': configfile.to_dict(Config(task='classify', **keys)),
                     'state': {'classes': classes}}

    def broadcast_object(self, _name, make):
        return {**make(), 'held_out': 2, 'annotations': [zlib.crc32(LABELS.tobytes())], **self.said}


@pytest.mark.parametrize('theirs, ours, complaint', [
    (['a', 'b'], ('a', 'c'), "has 2 classes, the data here have 2, and class 1 is 'b' there, 'c' here: mend it"),
    (['a'], ('a', 'c'), "has 1 classes, the data here have 2, and class 1 is missing there, 'c' here"),
    (['b', 'a'], ('a', 'b'), "and class 0 is 'b' there, 'a' here"),
    (['a', 'b'], (), "the data here have 0, and class 0 is 'a' there, missing here"),
])
def test_classes(theirs, ours, complaint):
    with pytest.raises(ValueError) as error:
        check_classes('runs/a', theirs, ours, 'mend it')
    assert str(error.value).startswith('runs/a has ') and complaint in str(error.value)


def test_the_same_classes():
    check_classes('runs/a', ['a', 'b'], ('a', 'b'), '')
    check_classes('runs/a', (), (), '')


def test_workers_need_the_same_classes(monkeypatch):
    """Their tables and lists of names may lie elsewhere, but must say the same."""
    here = Config(task='classify', data={'labels': '/here/labels.csv', 'classes': '/here/names.txt'})
    ours = task(here, monkeypatch, ('cat', 'dog'))
    check_same_job(here, ours, Second(['cat', 'dog'], data={'labels': '/there/labels.csv'}))
    with pytest.raises(ValueError, match="rank 0 has 2 classes, .* class 0 is 'dog' there, 'cat' here: all workers ne"):
        check_same_job(here, ours, Second(['dog', 'cat']))
    with pytest.raises(ValueError, match=r'differently from rank 0: data.labels_per_class \(rank 0 5, here 0\)'):
        check_same_job(here, ours, Second(['cat', 'dog'], data={'labels_per_class': 5}))


def test_workers_need_the_same_held_out_images(monkeypatch):
    here = Config(task='classify', data={'val_path': '/val'})
    with pytest.raises(ValueError, match=r'data.val_path=/val: rank 1 finds 7 images here, rank 0 2: all workers need'):
        check_same_job(here, task(here, monkeypatch, ('a', 'b'), 7), Second(['a', 'b']))


def test_workers_need_the_same_labels(monkeypatch):
    here = Config(task='classify', data={'labels': '/a.csv'})
    with pytest.raises(ValueError, match='data.labels=/a.csv, .*other classes for rank 1 than for rank 0: all'):
        check_same_job(here, task(here, monkeypatch, ('a', 'b'), labels=1 - LABELS), Second(['a', 'b']))
    with pytest.raises(ValueError, match='data.val_labels=/v.csv, data.val_path=/v: some images have other classes'):
        here = Config(task='classify', data={'val_labels': '/v.csv', 'val_path': '/v'})
        there = Second(['a', 'b'])
        there.said['annotations'] = [zlib.crc32(LABELS.tobytes())] * 2
        check_same_job(here, task(here, monkeypatch, ('a', 'b'), held_out_labels=1 - LABELS), there)


def test_a_checkpoint_of_other_images(tmp_path, monkeypatch):
    """As after an update that reads more formats."""
    config = Config(output=str(tmp_path), name='run')
    checkpoint.save(tmp_path / 'run' / 'checkpoints', 7, {}, {'config': configfile.to_dict(config), 'samples': 3}, 1)
    with pytest.raises(ValueError, match=r'the number of training images \(there 3, here 5\) \(files came or went, or '
                       'an earlier version did not read their format: take out what came, put back what went'):
        checkpoint_to_resume(config, pretraining(config, monkeypatch, 5), print)
    assert checkpoint_to_resume(config, pretraining(config, monkeypatch, 3), print).step == 7


def test_a_host_that_does_not_see_what_the_job_has_written(tmp_path):
    """Which another start may: it is no reason to give up."""
    config = Config(output=str(tmp_path), name='run')
    check_written(config, -1)
    checkpoint.save(tmp_path / 'run' / 'checkpoints', 7, {}, {}, 1)
    (tmp_path / 'run' / 'checkpoints' / 'step-00000007' / 'manifest.json').write_text('')  # damaged, but here
    check_written(config, 7)
    with pytest.raises(ValueError, match='has no checkpoint of step 8 here, which this job has written') as caught:
        check_written(config, 8)
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize('by_name', [False, True])
def test_a_checkpoint_of_other_classes(tmp_path, monkeypatch, by_name):
    config = Config(task='classify', output=str(tmp_path), name='run')
    folder = tmp_path / 'run' / 'checkpoints'
    checkpoint.save(folder, 7, {}, {'config': configfile.to_dict(config), 'samples': 3, 'classes': ['cat', 'dog']}, 1)
    if by_name:
        config = config.model_copy(update={'resume': str(folder / 'step-00000007'), 'name': 'other'})
    assert checkpoint_to_resume(config, task(config, monkeypatch, ('cat', 'dog')), pytest.fail).step == 7
    with pytest.raises(ValueError, match="step-00000007 has 2 classes, .* class 1 is 'dog' there, 'hound' here: give"):
        checkpoint_to_resume(config, task(config, monkeypatch, ('cat', 'hound')), pytest.fail)


def test_a_checkpoint_of_before_there_were_classes(tmp_path, monkeypatch):
    config = Config(output=str(tmp_path), name='run')
    checkpoint.save(tmp_path / 'run' / 'checkpoints', 7, {}, {'config': configfile.to_dict(config), 'samples': 3}, 1)
    assert checkpoint_to_resume(config, pretraining(config, monkeypatch, 3), pytest.fail).step == 7


def resumed(config, monkeypatch, **keys):
    config = config.model_copy(update=keys)
    return checkpoint_to_resume(config, pretraining(config, monkeypatch, 3), print)


def test_a_checkpoint_of_another_network(tmp_path, monkeypatch):
    """Named by hand, or found in the folder: keys and shapes that differ are told."""
    model = dict(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    config = Config(output=str(tmp_path), name='run', model=model, mask=dict(patch_size=8))
    weights = official.export_weights(build_simmim(config.model, 0))
    state = {'config': configfile.to_dict(config), 'samples': 3, 'versions': {'mxsimmim': '0.0.7'}}
    path = checkpoint.save(tmp_path / 'run' / 'checkpoints', 7, {'weights': weights}, state, 1)
    assert resumed(config, monkeypatch).step == resumed(config, monkeypatch, name='new', resume=str(path)).step == 7
    wide = Config(output=str(tmp_path), name='new', model={**model, 'embed_dim': 24}, mask=dict(patch_size=8))
    with pytest.raises(ValueError) as error:
        resumed(wide, monkeypatch, resume=str(path))
    assert str(error.value).startswith(
        f'{path}: of another network, by mxsimmim 0.0.7 (this is {__version__}): model.embed_dim was 16 and is 24; '
        'encoder.cls_token has shape (1, 1, 16), the network needs (1, 1, 24); encoder.mask_token has shape '
        '(1, 1, 16), the network needs (1, 1, 24); encoder.patch_embed.proj.weight has shape (16, 3, 4, 4), the '
        'network needs (24, 3, 4, 4); and 19 more: take the model keys of its run')
    deep = Config(output=str(tmp_path), name='new', model={**model, 'depth': 2}, mask=dict(patch_size=8))
    with pytest.raises(ValueError, match='model.depth was 1 and is 2; missing: encoder.blocks.1.gamma_1; missing: enc'):
        resumed(deep, monkeypatch, resume=str(path))
    with pytest.raises(ValueError, match=r'holds a run that differs in model.embed_dim \(there 16, here 24\)'):
        resumed(wide, monkeypatch, name='run')
    # By another version, with the same keys.
    weights['encoder.cls_token'] = weights['encoder.cls_token'][0]
    checkpoint.save(tmp_path / 'run' / 'checkpoints', 7, {'weights': weights}, state, 1)
    with pytest.raises(ValueError, match=r'by mxsimmim 0.0.7 .*: encoder.cls_token has shape \(1, 16\), the network '
                       r'needs \(1, 1, 16\): take'):
        resumed(config, monkeypatch)


def test_a_checkpoint_of_another_version(tmp_path, monkeypatch):
    config = Config(output=str(tmp_path), name='run')
    content = configfile.to_dict(config)
    content['optim']['momentum'] = 0.9
    checkpoint.save(tmp_path / 'run' / 'checkpoints', 7, {}, {'config': content, 'samples': 3,
                                                              'versions': {'mxsimmim': '9.0'}}, 1)
    with pytest.raises(ValueError, match=rf"step-00000007: its configuration is none of this version, {__version__}: "
                       r"mxsimmim 9.0 wrote it: checkpoint: unknown key 'optim.momentum'"):
        resumed(config, monkeypatch)


def test_hosts_that_do_not_share_the_folder(tmp_path):
    """The newest checkpoint is on another host than rank 0 now is."""
    config = Config(output=str(tmp_path / 'local'), name='run', checkpoint={'copy_to': str(tmp_path / 'shared')})
    assert newest_here(config) == -1
    check_shared(config, [-1, -1], ['a', 'b'])
    with pytest.raises(ValueError, match="local/run: rank 1 on b has the checkpoint of step 20 there, and rank 0 on a "
                       'has none: the hosts do not share this folder'):
        check_shared(config, [-1, 20], ['a', 'b'])
    for step in (10, 20):
        checkpoint.save(tmp_path / 'local' / 'run' / 'checkpoints', step, {}, {}, 9)
    assert newest_here(config) == 20
    check_shared(config, [20, 20, -1], ['a', 'b', 'c'])
    with pytest.raises(ValueError, match='rank 2 on c has the checkpoint of step 30 .* rank 0 on a ends at step 20'):
        check_shared(config, [20, -1, 30], ['a', 'b', 'c'])
    checkpoint.save(tmp_path / 'shared' / 'run' / 'checkpoints', 30, {}, {}, 9)  # the copy will do
    check_shared(config, [20, -1, 30], ['a', 'b', 'c'])


def test_signals_that_come_together_are_one(monkeypatch):
    """A scheduler signals each process of a job, and its launcher, which signals them too; later ones act."""
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        monkeypatch.setattr(run_folder, 'TOGETHER', -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
