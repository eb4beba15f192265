"""What people of other programs type, and the answer: our key with their value."""
import shlex

import pytest

from mxsimmim import cli, config as cfg
from mxsimmim.config import configfile, foreign_names

KNOWN = configfile.known_keys()
RATE, BATCH = (f' ({note})' for note in (foreign_names.RATE, foreign_names.BATCH))


@pytest.fixture
def empty(tmp_path):
    (tmp_path / 'it.yaml').write_text('')
    return tmp_path / 'it.yaml'


@pytest.mark.parametrize('typed, answer', [
    ('lr=0.1', 'optim.base_lr=0.1' + RATE), ('train.lr=0.1', 'optim.base_lr=0.1' + RATE),
    ('optim.lr=1e-3', 'optim.base_lr=0.001' + RATE), ('optimizer.lr=1', 'optim.base_lr=1' + RATE),
    ('optim_wrapper.optimizer.lr=1', 'optim.base_lr=1' + RATE), ('TRAIN.BASE_LR=1', 'optim.base_lr=1'),
    ('base_lr=1', 'optim.base_lr=1'), ('train.base_lr=1', 'optim.base_lr=1'), ('optim.base-lr=1', 'optim.base_lr=1'),
    ('batch_size=64', 'train.batch_size=64' + BATCH), ('data.batch_size=64', 'train.batch_size=64' + BATCH),
    ('DATA.BATCH_SIZE=64', 'train.batch_size=64' + BATCH), ('train.epochs=100', "train.length='100 epochs'"),
    ('epochs=100', "train.length='100 epochs'"), ('TRAIN.EPOCHS=100', "train.length='100 epochs'"),
    ('train_cfg.max_epochs=100', "train.length='100 epochs'"), ('max_steps=500', 'train.length=500 (in steps)'),
    ('train.warmup_epochs=5', "optim.warmup='5 epochs'"), ('model.drop_path_rate=0.1', 'model.drop_path=0.1'),
    ('depth=6', 'model.depth=6'), ('ratio=0.5', 'mask.ratio=0.5'), ('model.mask_ratio=0.5', 'mask.ratio=0.5'),
    ('patch_size=4', 'model.patch_size=4 or mask.patch_size=4'), ('DATA.MASK_PATCH_SIZE=32', 'mask.patch_size=32'),
    ('MODEL.SIMMIM.NORM_TARGET.ENABLE=True', 'model.norm_targets=true'),
    ('MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE=47', 'model.norm_window=47'), ('MODEL.SWINV2.WINDOW_SIZE=12',
    'model.window_size=12'), ('MODEL.VIT.PATCH_SIZE=8',
    'model.patch_size=8'),
    ('MODEL.SWIN.EMBED_DIM=96', 'model.embed_dim=96'), ('MODEL.TYPE=swin', 'model.type=swin'), ('MODEL.NAME=x',
    'name=x'),
    ('TRAIN.OPTIMIZER.NAME=AdamW', 'optim.type=adamw'), ('TRAIN.LR_SCHEDULER.NAME=cosine', 'optim.schedule=cosine'),
    ('TRAIN.LR_SCHEDULER.MULTISTEPS=[700,]', "optim.milestones='[700 epochs]'"),
    ('SAVE_FREQ=5', "checkpoint.every='5 epochs'"),
    ('data.num_workers=8', 'data.threads=8 (threads that decode, of each process)'), ('train.seed=3', 'seed=3'),
    ('gpus=0,1', "devices='[gpu(0),gpu(1)]'"), ('device=cuda:1', "devices='[gpu(1)]'"), ('AMP_ENABLE=True',
    'runtime.precision=bf16'),
    ('MODEL.MASK_ON=False', 'model.masks=false'), ('SOLVER.IMS_PER_BATCH=16', 'train.batch_size=16' + BATCH),
    ('train_dataloader.dataset.ann_file=a.json', 'data.labels=a.json'), ('ratio_range=(0.1,2.0)',
    "data.scale_jitter='[0.1, 2.0]'"),
    ('AUG.REPROB=0.25', 'augment.erasing=0.25'), ('aug.aa=rand-m9-mstd0.5-inc1', 'augment.rand_magnitude=9')])
def test_keys(typed, answer, empty):
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(empty, [typed])
    assert str(error.value) == f"command line: unknown key '{typed.partition('=')[0]}': write {answer}"


@pytest.mark.parametrize('text, answer', [
    ('lr: 0.1', 'optim: {base_lr: 0.1}' + RATE), ('train: {epochs: 100}', 'train: {length: 100 epochs}'),
    ('optim: {seed: 3}', 'seed: 3'), ('train: {lr_steps: [3, 4]}', 'optim: {milestones: [3 epochs, 4 epochs]}')])
def test_keys_of_files(text, answer, empty):
    empty.write_text(text)
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(empty)
    assert str(error.value).startswith(f'{empty}: unknown key ') and str(error.value).endswith(f': write {answer}')
    empty.write_text(answer.partition(' (')[0])
    configfile.load(empty)


@pytest.mark.parametrize('words, answer', [
    ('optim.base_lr = 2e-4', 'optim.base_lr=2e-4'), ('optim.base_lr= 2e-4', 'optim.base_lr=2e-4'),
    ('optim.base_lr =2e-4', 'optim.base_lr=2e-4'), ('optim.base_lr: 2e-4', 'optim.base_lr=2e-4'),
    ('optim.base_lr:2e-4', 'optim.base_lr=2e-4'), ("'optim.base_lr: 2e-4'", 'optim.base_lr=2e-4'),
    ("'optim.base_lr 2e-4'", 'optim.base_lr=2e-4'), ('optim.base_lr 2e-4', 'optim.base_lr=2e-4'),
    ('seed=1 epochs 100', "train.length='100 epochs'"), ('train.length 3', 'train.length=3')])
def test_pairs(words, answer, empty):
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(empty, shlex.split(words))
    assert str(error.value).endswith(f' is not key=value: write {answer}')


@pytest.mark.parametrize('words, answers', [
    ('--lr 0.1', ['optim.base_lr=0.1' + RATE]), ('--lr=0.1 seed=1', ['optim.base_lr=0.1' + RATE]),
    ('--batch-size 64', ['train.batch_size=64' + BATCH]), ('-b 64', ['train.batch_size=64' + BATCH]),
    ('-b64', ['train.batch_size=64' + BATCH]), ('--epochs 100', ["train.length='100 epochs'"]),
    ('--data-path x', ['data.path=x']), ('--output x', ['output=x']), ('--resume x', ['resume=x']),
    ('--seed 1', ['seed=1']),
    ('--amp', ['runtime.precision=bf16']), ('--gpus 0,1', ["devices='[gpu(0),gpu(1)]'"]),
    ('--pretrained x', ['model.pretrained=x']),
    ('--num-workers 8', ['data.threads=8 (threads that decode, of each process)']),
    ('--img-size 3', ['model.img_size=3']),
    ('--weight-decay .1', ['optim.weight_decay=.1']), ('--mask-ratio .1', ['mask.ratio=.1']),
    ('--optim.base_lr 3', ['optim.base_lr=3']),
    ('--accumulation-steps 2', ['train.accumulate=2']), ('--train.length=3', ['train.length=3']),
    ('--epochs 3 --seed 1', ["train.length='3 epochs'", 'seed=1'])])
def test_options(words, answers, empty, capsys):
    for place in (['pretrain', str(empty)] + shlex.split(words), ['finetune'] + shlex.split(words) + [str(empty)]):
        assert cli.main(place) == 2
        assert [line.partition(': write ')[2] for line in capsys.readouterr().err.splitlines()] == answers


@pytest.mark.parametrize('words, line', [
    ('--cfg x.yaml', "no option '--cfg': the configuration file stands first, as in: mxsimmim pretrain conf/vit_base."
     'yaml'),
    ('--opts TRAIN.EPOCHS 3 DATA.PATH y', "'--opts' is not needed here: write KEY=VALUE, here train.length='3 epochs' "
     'data.path=y'),
    ('--local_rank=0', "no option '--local_rank': several processes are started by tools/launch.py: "
     'tools/launch.py -n 4 -- mxsimmim pretrain …'),
    ('--batchsize 3', "no option '--batchsize': keys are given as "
     "key=value (did you mean 'train.batch_size'?)"),
    ('--foo', "no option '--foo': keys are given as key=value, and `mxsimmim config` lists them")])
def test_other_options(words, line, empty, capsys):
    assert cli.main(['pretrain', str(empty)] + shlex.split(words)) == 2
    assert capsys.readouterr().err == f'mxsimmim: error: {line}\n'


SAMPLES = {str: 'x', int: '2', float: '0.5', bool: 'true'}


def test_every_answer_is_a_key_and_value_that_work(empty):
    values = {'optim.type': 'AdamW', 'optim.schedule': 'Cosine', 'optim.milestones': '3,4', 'optim.betas': '0.9 0.95',
              'data.interpolation': 'bicubic', 'data.scale_jitter': '0.1 2', 'devices': '0,1',
              'runtime.precision': 'True',
              'data.crop_scale': '0.2 1',
              'data.crop_ratio': '(0.75, 1.33)', 'train.store': 'local', 'model.patch_size': '16',
              'model.img_size': '224',
              'mask.patch_size': '32', 'model.embed_dim': '96', 'model.norm_window': '0', 'train.length': '100',
              'optim.warmup': '3'}
    for name, (key, _, _) in foreign_names.FOREIGN.items():
        field = dict(configfile.leaves())[key]
        answer = foreign_names.answer(name, values.get(key, SAMPLES.get(field.annotation, '2')), KNOWN)
        assert answer.startswith(f'write {key}='), (name, answer)
        configfile.load(empty, ['task=classify'] + shlex.split(answer.partition(' (')[0])[1:])


@pytest.mark.parametrize('typed, near', [
    ('vit_base', 'vit_base'), ('conf/vit-base.yaml', 'vit_base'), ('digit.yml', 'digits'),
    ('x/swin_tiny.yaml', 'swin_tiny'), ('finetune_digits', 'finetune_digits')])
def test_a_recipe_by_its_name(typed, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cfg.ConfigError) as error:
        configfile.load(typed)
    assert str(error.value).startswith(f'{typed}: cannot read the configuration: No such file or directory (did you ')
    assert str(error.value).endswith(f'/conf/{near}.yaml?)')
