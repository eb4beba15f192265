"""Configuration: inheritance, overrides, and the text of every complaint."""
from pathlib import Path

import pytest

from mxsimmim import config as cfg
from mxsimmim.config import configfile

CONF = Path(__file__).parents[2] / 'conf'
SWIN = ['model.type=swin', 'model.img_size=192', 'model.patch_size=4', 'model.embed_dim=128', 'model.window_size=6']


def test_base_yaml_is_the_defaults_with_every_key_commented():
    text = (CONF / 'base.yaml').read_text()
    assert text == configfile.reference_yaml(), 'run `mxsimmim config > conf/base.yaml`'
    assert configfile.load(CONF / 'base.yaml').model_copy(update={'name': ''}) == cfg.Config()
    for line in text.splitlines():
        assert not line or '#' in line


@pytest.mark.parametrize('path', sorted(CONF.glob('*.yaml')), ids=lambda p: p.name)
def test_recipes_load_and_go_round(path, tmp_path):
    config = configfile.load(path)
    assert config.name == path.stem
    (tmp_path / 'again.yaml').write_text(configfile.to_yaml(config))
    assert configfile.load(tmp_path / 'again.yaml') == config
    assert configfile.from_dict(configfile.to_dict(config), 'a checkpoint') == config


@pytest.mark.parametrize('path', [p for p in sorted(CONF.glob('*.yaml')) if p.name != 'base.yaml'],
                         ids=lambda p: p.name)
def test_recipes_open_with_command_time_and_result(path):
    text = path.read_text()
    command = 'pretrain' if configfile.load(path).task == 'pretrain' else 'finetune'
    assert f'mxsimmim {command} conf/{path.name}' in text
    assert '# Time: ' in text and '# Expected: ' in text


def test_inheritance_and_overrides(tmp_path):
    (tmp_path / 'a.yaml').write_text('optim: {base_lr: 1.0, gamma: 0.5}\ntrain: {batch_size: 8}\n')
    (tmp_path / 'b.yaml').write_text('base: a.yaml\noptim: {base_lr: 2}\nname: other\n')
    config = configfile.load(tmp_path / 'b.yaml', ['train.batch_size=16', 'optim={eps: 1e-6}', 'model.ape=true'])
    assert (config.optim.base_lr, config.optim.gamma, config.optim.eps) == (2.0, 0.5, 1e-6)
    assert (config.train.batch_size, config.name, config.model.use_ape) == (16, 'other', True)
    assert configfile.load(tmp_path / 'b.yaml', ['optim.base_lr=2e-4']).optim.base_lr == 2e-4  # a string to YAML


def test_worker_weights_were_called_shares(tmp_path):
    """In files, words, and what runs and checkpoints have recorded; the later one of both names holds."""
    (tmp_path / 'old.yaml').write_text('data: {shares: [3, 1]}\n')
    recorded = configfile.to_yaml(cfg.Config()).replace('worker_weights: equal', 'shares: auto')
    (tmp_path / 'run.yaml').write_text(recorded)
    assert configfile.load(tmp_path / 'old.yaml').data.worker_weights == (3, 1)
    assert configfile.load(tmp_path / 'old.yaml', ['data.worker_weights=auto']).data.worker_weights == 'auto'
    assert configfile.load(tmp_path / 'old.yaml', ['data={shares: [2, 5]}']).data.worker_weights == (2, 5)
    assert configfile.recorded(tmp_path / 'run.yaml').data.worker_weights == 'auto'
    assert configfile.from_dict({'data': {'shares': [1, 2]}}, 'checkpoint').data.worker_weights == (1, 2)
    with pytest.raises(cfg.ConfigError, match=r'data.*worker_weights=\[0.0\] must be positive'):
        configfile.load(tmp_path / 'old.yaml', ['data.shares=[0]'])


def test_strings_are_taken_as_typed():
    config = configfile.load(CONF / 'base.yaml', ['name=0123', 'data.path=', 'output=1e3'])
    assert (config.name, config.data.path, config.output) == ('0123', '', '1e3')


@pytest.mark.parametrize('text, steps', [('500', 500), (500, 500), ('3 epochs', 30), ('1 epoch', 10), ('0.5 epochs', 5),
                                         ('5%', 20), ('7steps', 7)])
def test_durations(text, steps):
    length = cfg.CheckpointConfig(every=text).every
    assert length.steps(per_epoch=10, total=400) == steps
    assert cfg.CheckpointConfig(every=str(length)).every == length


@pytest.mark.parametrize('text, minutes', [
    ('10 minutes', 10), ('1 minute', 1), ('2.5min', 2.5), ('90 mins', 90), ('2 hours', 120), ('1 hour', 60),
    ('.5h', 30)])
def test_time_by_the_clock(text, minutes):
    every = cfg.CheckpointConfig(every=text).every
    assert every == (minutes, 'minutes') and cfg.CheckpointConfig(every=str(every)).every == every
    assert configfile.load(CONF / 'base.yaml', [f'checkpoint.every={text}']).checkpoint.every == every


@pytest.mark.parametrize('overrides, complaint', [
    (['optim.base_lrr=1'], "command line: unknown key 'optim.base_lrr' (did you mean 'optim.base_lr'?)"),
    (['base_lr=1'], "command line: unknown key 'base_lr': write optim.base_lr=1"),
    (['model.qqqq=1'], "command line: unknown key 'model.qqqq'; `mxsimmim config` lists the known ones"),
    (['optim.base_lr=fast'], "command line: key 'optim.base_lr': input should be a valid number, unable to parse "
                             "string as a number, found 'fast'"),
    (['train.batch_size=8.5'], "key 'train.batch_size': input should be a valid integer"),
    (['train.batch_size=0'], "key 'train.batch_size': input should be greater than 0, found 0"),
    (['model.loss=l2'], "command line: key 'model.loss': input should be 'l1' or 'mse', found 'l2'"),
    (['optim'], "'optim' is not key=value: write for instance optim.base_lr=2e-4"),
    (['model.depth=['], "command line: the value of 'model.depth' is not YAML"),
    (['train.length=10 parsecs'], "'10 parsecs' is not a length of time: write steps as 500, or '10 epochs'"),
    (['train.length=10 minutes'], "'10 minutes' is a time by the clock, which checkpoint.every takes and nothing else"),
    (['optim.milestones=[1 h]'], "'1 h' is a time by the clock"),
    (['checkpoint.keep_every=5 min'], "'5 min' is a time by the clock"),
    (['checkpoint.every=0 min'], 'checkpoint.every=0 minutes must be positive'),
    (['checkpoint.every=10 min', 'checkpoint.keep_every=5'], 'keep_every=5 steps: with every=10 minutes checkpoints'),
    (['checkpoint.copy_to=./runs/'], 'copy_to=./runs/ is where the run itself is written: name a folder of another'),
    (['train.length=5%'], 'train.length=5% must be a positive number of steps or epochs'),
    (['model.img_size=225'], 'img_size=225 is not a multiple of 16'),
    (['model.img_size=[64, 128]'], 'model.img_size=[64, 128]: pretrain takes square images: write one number'),
    (['model.img_size=[64, 100]'], 'img_size=[64, 100] is not a multiple of 16'),
    (['model.img_size=[64, 64, 64]'], "key 'model.img_size': [64, 64, 64] is neither a number of pixels nor [height, "),
    (['model.img_size=large'], "key 'model.img_size': 'large' is neither a number of pixels nor [height, width]"),
    (['model.img_size=0'], "key 'model.img_size': input should be greater than 0"),
    (['model.global_blocks=[2]'], 'global_blocks: windows cannot share the position table of the whole image'),
    (['model.global_blocks=[12]', 'model.use_shared_rpb=false'], 'global_blocks=[12]: the blocks of this ViT are 0 to'),
    (['model.global_blocks=[2]', 'model.use_shared_rpb=false'], 'model.global_blocks=[2] is for segmentation and '),
    (SWIN + ['model.depths=[2]', 'model.num_heads=[4]', 'model.global_blocks=[0]'], 'global_blocks=[0]: a Swin has'),
    (['mask.patch_size=50'], 'mask.patch_size=50 does not divide model.img_size=224'),
    (['mask.patch_size=8'], 'model.patch_size=16 does not divide mask.patch_size=8'),
    (['mask.ratio=0.99'], 'mask.ratio=0.99 hides all 49 cells'),
    (['model.num_heads=5'], 'embed_dim=768 is not a multiple of num_heads=5'),
    (['model.num_heads=[3,6]'], 'num_heads=[3, 6] is a list; a ViT has one number of heads'),
    (['model.type=swin'], 'depths is empty: a Swin needs its blocks a stage'),
    (SWIN + ['model.depths=[2,2]', 'model.num_heads=4'], 'num_heads=4 must list one number for each of the 2 stages'),
    (SWIN + ['model.depths=[2,2]', 'model.num_heads=[4,7]'], 'the width 256 of stage 1 (embed_dim 128 x 2^1) is not'),
    (SWIN + ['model.depths=[2,2]', 'model.num_heads=[4,8]', 'model.window_size=7'],
     'window_size=7 does not divide the 48x48 tokens of stage 0'),
    (['devices=[gpu(0),gpu(0)]'], 'devices=[gpu(0), gpu(0)] names one twice'),
    (['devices=[gpu(0),cpu(0)]'], 'devices=[gpu(0), cpu(0)] mixes CPU and GPU'),
    (['devices=[tpu(0)]'], "'tpu(0)' is not a device: write cpu(0)"),
    (['devices=[cpu(0),cpu(1)]', 'train.batch_size=1'], 'train.batch_size=1 is less than 2 devices'),
    (['train.accumulate=4', 'train.batch_size=2'], 'train.accumulate=4 exceeds train.batch_size=2'),
    (['data.crop_scale=[1.0, 0.5]'], 'crop_scale=[1.0, 0.5] must be two positive numbers, the smaller first'),
    (['optim.betas=[0.9, 2]'], 'betas=[0.9, 2.0] must lie in [0, 1)'),
    (['optim.milestones=[]'], 'schedule=multistep needs milestones'),
    (['data.std=[0,1,1]'], 'std=[0.0, 1.0, 1.0] must be positive'),
    (['validation.every=0'], 'validation.every=0 steps must be positive'),
    (['optim.base_lr=.inf'], "key 'optim.base_lr': input should be a finite number"),
    (['name=a/b'], "name='a/b' must consist of letters, digits and . _ + -"),
])
def test_complaints(overrides, complaint):
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(CONF / 'base.yaml', overrides)
    assert complaint in str(error.value)


@pytest.mark.parametrize('override', [
    'model.pretrained=runs/other', 'optim.layer_decay=0.75', 'data.labels=labels.csv', 'data.val_labels=val_map.txt',
    'data.classes=names.txt', 'data.labels_per_class=10', 'augment.rand_ops=0', 'augment.rand_magnitude=5',
    'augment.rand_std=0', 'augment.erasing=0', 'augment.mixup=0', 'augment.cutmix=0', 'augment.mix_switch=1',
    'augment.mix_prob=0.5', 'augment.smoothing=0', 'model.masks=false', 'model.anchor_scale=4'])
def test_what_pre_training_has_no_use_for(override):
    key = override.partition('=')[0]
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(CONF / 'base.yaml', [override])
    assert str(error.value) == f'command line: {key} is for fine-tuning: mxsimmim finetune'
    assert configfile.load(CONF / 'base.yaml', [override, 'task=classify']).task == 'classify'
    section, name = key.split('.')
    default = getattr(getattr(cfg.Config(), section), name)
    assert configfile.load(CONF / 'base.yaml', [f'{key}={default}']).task == 'pretrain'


@pytest.mark.parametrize('content, complaint', [
    ('optim:\n  base_lr: 1\n  bas_lr: 2\n', "bad.yaml: unknown key 'optim.bas_lr' (did you mean 'optim.base_lr'?)"),
    ('optim:\n  base_lr: 1\n  base_lr: 2\n', "bad.yaml: not YAML: key 'base_lr' is given twice (line 3, column 3)"),
    ('optim: [', 'bad.yaml: not YAML'),
    ('- a\n', "bad.yaml: expected 'key: value' lines, found list"),
    ('base: bad.yaml\n', 'bad.yaml: base: goes round in a circle'),
    ('base: none.yaml\n', 'cannot read the configuration: No such file or directory'),
    ('base: [a, b]\n', "key 'base': expected the name of one file"),
    ('optim: 3\n', "bad.yaml: key 'optim': input should be a valid dictionary"),
])
def test_bad_files(content, complaint, tmp_path):
    (tmp_path / 'bad.yaml').write_text(content)
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(tmp_path / 'bad.yaml')
    assert complaint in str(error.value)


def test_every_problem_is_reported_at_once():
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(CONF / 'base.yaml', ['optim.base_lr=x', 'train.batch_size=y'])
    assert len(str(error.value).splitlines()) == 2


def test_frozen():
    with pytest.raises(Exception, match='frozen'):
        cfg.Config().train.batch_size = 3


def test_what_may_change_in_a_resumed_run():
    old = cfg.Config()
    new = configfile.load(CONF / 'base.yaml', ['log.every=3', 'devices=[cpu(0),cpu(1)]', 'data.threads=7'])
    assert configfile.differences(old, new) == []
    new = configfile.load(CONF / 'base.yaml', ['optim.base_lr=1', 'mask.ratio=0.5'])
    assert configfile.differences(old, new) == [('mask.ratio', 0.6, 0.5), ('optim.base_lr', 0.0001, 1.0)]


def test_labels_may_have_moved_but_not_become_fewer():
    old = configfile.load(CONF / 'base.yaml', ['task=classify'])
    moved = ['data.labels=a.csv', 'data.val_path=e', 'data.val_labels=f', 'data.classes=b.txt', 'data.path=c',
             'model.pretrained=d']
    new = configfile.load(CONF / 'base.yaml', ['task=classify', 'data.labels_per_class=10', *moved])
    for free in (configfile.FREE_ON_RESUME, configfile.FREE_BETWEEN_WORKERS):
        assert configfile.differences(old, new, free) == [('data.labels_per_class', 0, 10)]


def test_sizes_of_the_input():
    """A square is one number, however it is written; sides that merging does not divide are rounded up."""
    square = cfg.ModelConfig(img_size=[64, 64])
    assert square == cfg.ModelConfig(img_size=64) and configfile.to_dict(square)['img_size'] == 64
    assert (square.size, square.side, square.patches, square.grid) == ((64, 64), 64, (4, 4), 4)
    long = cfg.ModelConfig(type='swin', img_size=[40, 72], patch_size=4, embed_dim=8, depths=[1, 1, 1],
                           num_heads=[1, 1, 1])
    assert configfile.to_dict(long)['img_size'] == [40, 72] and long.size == (40, 72)
    assert [long.tokens(stage) for stage in range(3)] == [(10, 18), (5, 9), (3, 5)]


def test_blocks_that_see_all():
    some = cfg.ModelConfig(depth=4, use_shared_rpb=False, global_blocks=[1, 3])
    assert [some.sees_all(block) for block in range(4)] == [False, True, False, True]
    assert all(cfg.ModelConfig(depth=4).sees_all(block) for block in range(4))
