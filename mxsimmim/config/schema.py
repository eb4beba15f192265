"""Typed, frozen configuration: every key, its type, default, meaning and checks.

The field descriptions are the documentation of the keys; `configfile` reads files, and writes conf/base.yaml from
them. Nothing here imports mxnet, so a wrong key is reported in a fraction of a second.
"""
import math
import os
import re
from typing import Tuple, Union

from pydantic import Field, model_validator
from typing_extensions import Literal

from .model import SAMPLED_ANCHORS, ModelConfig
from .sections import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    MaskConfig,
    NotifyConfig,
    OptimConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
)
from .values import GivenPlace, Section, listed, require

SQUARE = 'pretrain', 'classify'  # tasks of square images, whose tokens windows divide without padding
DENSE = 'segment', 'detect'  # tasks that take maps of several resolutions from the encoder


class Config(Section):
    """A whole run, pre-training or fine-tuning."""
    name: str = Field('', description='the run is written to output/name; empty: the name of '
                      'the configuration file')
    output: GivenPlace = Field('runs', description='folder of the runs')
    seed: int = Field(0, ge=0, lt=2 ** 32, description='of weights, order, crops, flips, masks and stochastic depth')
    resume: GivenPlace = Field('auto', description='auto: go on from the newest whole checkpoint; none: start '
                        'anew in an empty folder; or the path of a checkpoint')
    task: Literal['pretrain', 'classify', 'segment', 'detect'] = Field(
        'pretrain', description='pretrain, or what `mxsimmim finetune` trains: classify, segment, detect')
    devices: Union[Literal['auto'], Tuple[str, ...]] = Field(
        'auto', description='auto (every GPU, else cpu(0)), or a list: [gpu(0), gpu(1)]')
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    notify: NotifyConfig = NotifyConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode='after')
    def _check(self) -> 'Config':
        require(re.fullmatch(r'[\w.+-]*', self.name) is not None and self.name not in ('.', '..'),
                 f"name='{self.name}' must consist of letters, digits and . _ + -; output= names the folder above")
        if self.task in SQUARE:
            self._check_square()
        if self.task in DENSE:
            self._check_maps()
        if self.task == 'pretrain':
            self._check_masks()
            self._check_nothing_of_fine_tuning()
        if self.devices != 'auto':
            require(len(self.devices) > 0, 'devices is empty: write devices=auto or devices=[cpu(0)]')
            for device in self.devices:
                require(re.fullmatch(r'(cpu|gpu)\(\d+\)', device) is not None,
                         f"devices: '{device}' is not a device: write cpu(0), gpu(0), gpu(1), …")
            require(len(set(self.devices)) == len(self.devices), f'devices={listed(self.devices)} names one twice')
            require(len({device[:3] for device in self.devices}) == 1,
                     f'devices={listed(self.devices)} mixes CPU and GPU')
            replicas = len(self.devices) // self.parallel.devices
            require(replicas * self.train.accumulate <= self.train.batch_size,
                     f'train.batch_size={self.train.batch_size} is less than {replicas} '
                     f'{"devices" if self.parallel.devices == 1 else "groups of devices"} x '
                     f'train.accumulate={self.train.accumulate}')
        require(self.train.accumulate <= self.train.batch_size,
                 f'train.accumulate={self.train.accumulate} exceeds train.batch_size={self.train.batch_size}')
        if self.parallel.pipeline > 1:
            self._check_pipeline()
        if self.parallel.tensor > 1:
            self._check_tensor()
        # Workers of one device may have a part of the model each, others a stage: the mesh of the job tells.
        if self.devices != 'auto' and len(self.devices) not in (1, self.parallel.tensor):
            self.parallel.check_devices(len(self.devices), f'devices={listed(self.devices)} names {len(self.devices)}')
        require(self.train.length.unit != '%' and self.train.length.value > 0,
                 f'train.length={self.train.length} must be a positive number of steps or epochs')
        for key, period in (('validation.every', self.validation.every), ('checkpoint.every', self.checkpoint.every),
                            ('checkpoint.keep_every', self.checkpoint.keep_every)):
            require(period is None or period.value > 0, f'{key}={period} must be positive')
        second = self.checkpoint.copy_to
        require(not second or os.path.abspath(second) != os.path.abspath(self.output),
                 f'checkpoint.copy_to={second} is where the run itself is written: name a folder of another disk')
        return self

    def _check_square(self) -> None:
        model = self.model
        require(isinstance(model.img_size, int), f'model.img_size={listed(model.img_size)}: {self.task} takes square '
                'images: write one number')
        require(not model.global_blocks, f'model.global_blocks={listed(model.global_blocks)} is for '
                f'segmentation and detection: in {self.task} every block of a ViT sees the whole image')
        require(model.side % model.stride == 0, f'model.img_size={model.side} is not a multiple of {model.stride}, the '
                f'side of one final token (patch_size {model.patch_size} x 2^{model.stages - 1})')
        for stage in range(0 if model.type == 'vit' else model.stages):
            side = model.grid >> stage
            require(side <= model.window_size or side % model.window_size == 0, f'model.window_size='
                    f'{model.window_size} does not divide the {side}x{side} tokens of stage {stage}: change '
                    f'window_size or img_size={model.side}')

    def _check_maps(self) -> None:
        for key in ('pipeline', 'tensor', 'auto'):
            value = getattr(self.parallel, key)
            require(value == ParallelConfig.model_fields[key].default, f'parallel.{key}={str(value).lower()}: '
                    f'{self.task} trains whole models: leave it out')
        require(self.model.type == 'vit' or self.model.stages > 1,
                 f'model.depths={listed(self.model.depths)}: {self.task} needs a Swin of two stages or more')
        require(self.model.type != 'vit' or min(self.model.patches) > 1, f'model.img_size='
                 f'{listed(self.model.img_size)}: {self.task} halves the map of patches, so there must be two a side '
                 'or more')
        anchors = self.model.candidates[0]
        require(self.task != 'detect' or anchors >= SAMPLED_ANCHORS, f'model.img_size={listed(self.model.img_size)} '
                f'has {anchors} anchors, and a detector learns from {SAMPLED_ANCHORS} of an image: raise it')

    def _check_pipeline(self) -> None:
        stages, split, blocks, train = self.parallel.pipeline, self.parallel.split, self.model.blocks, self.train
        parts = self.parallel.micro_batches * train.accumulate
        require(stages <= blocks, f'parallel.pipeline={stages} is more stages than the network has blocks, {blocks}: '
                 'lower it')
        require(not split or sum(split) == blocks, f'parallel.split={listed(split)} divides {sum(split)} blocks, and '
                 f'the network has {blocks}')
        require(parts <= train.batch_size, f'train.batch_size={train.batch_size} is less than parallel.micro_batches='
                 f'{self.parallel.micro_batches} x train.accumulate={train.accumulate}: lower one of these')

    def _check_tensor(self) -> None:
        tensor, most = self.parallel.tensor, self.model.most_parts
        able = ', '.join(str(parts) for parts in range(1, min(most, 64) + 1) if most % parts == 0)
        require(most % tensor == 0, f'parallel.tensor={tensor} does not divide the heads, model.num_heads='
                f'{listed(self.model.num_heads)}, and the MLP of every block: possible are {able}')

    def _check_nothing_of_fine_tuning(self) -> None:
        keys = [('model', 'pretrained'), ('optim', 'layer_decay'), ('data', 'labels'), ('data', 'val_labels'),
                *(('data', key) for key in ('classes', 'labels_per_class', 'train_images', 'ignore_index',
                                            'reduce_zero_label', 'scale_jitter'))]
        keys += [('model', key) for key in ('head_channels', 'auxiliary', 'masks', 'anchor_scale')]
        keys += [('validation', 'flip'), ('validation', 'scales')]
        keys += [('augment', key) for key in AugmentConfig.model_fields]
        for section, key in keys:
            own = getattr(self, section)
            require(getattr(own, key) == type(own).model_fields[key].default,
                     f'{section}.{key} is for fine-tuning: mxsimmim finetune')

    def _check_masks(self) -> None:
        img, cell, patch = self.model.side, self.mask.patch_size, self.model.patch_size
        require(img % cell == 0, f'mask.patch_size={cell} does not divide model.img_size={img}')
        require(cell % patch == 0, f'model.patch_size={patch} does not divide mask.patch_size={cell}')
        cells = (img // cell) ** 2
        require(math.ceil(self.mask.ratio * cells) < cells,
                 f'mask.ratio={self.mask.ratio} hides all {cells} cells: lower it or mask.patch_size={cell}')
