"""The keys of a run's sections: their types, defaults and meanings, and which go together in a section.

Those of the network are in `model`.
"""
from typing import Optional, Tuple, Union

from pydantic import AliasChoices, Field, model_validator
from typing_extensions import Literal

from .values import ClockTime, Duration, Place, Section, Time, listed, require


class MaskConfig(Section):
    """What is hidden from the encoder."""
    patch_size: int = Field(32, gt=0, description='side of a masked cell, pixels')
    ratio: float = Field(0.6, gt=0, lt=1, description='share of the cells that is masked')


class DataConfig(Section):
    """Where the images are and what is done to each."""
    path: Place = Field('', description="a folder of images (class folders or flat), a RecordIO file (.rec), several "
                        "('a.rec;b.rec', or a folder of them), digits, or digit-scenes")
    val_path: Place = Field('', description='held-out images, same kinds; empty: val_fraction of path is held out')
    val_fraction: float = Field(0.0, ge=0, lt=1, description='share of path held out for validation')
    threads: int = Field(0, ge=0, description='loader threads; 0: one a core')
    prefetch: int = Field(3, gt=0, description='batches prepared ahead')
    max_broken: int = Field(100, ge=0, description='unreadable images tolerated before the run ends')
    labels: Place = Field('', description="classify: a file of lines 'relative path,class' (tabs in a .tsv) for the "
                          "images of path, or a list: Swin's train_map.txt, Caffe's, MXNet's .lst; empty: class "
                          "folders, or a RecordIO file's own labels; segment: the folder of the label images, or a "
                          "list of Pascal VOC's ImageSets/Segmentation; detect: COCO's instances (.json), a folder of "
                          "Pascal VOC's .xml files or a list of its ImageSets/Main, or a table of lines "
                          "path,x0,y0,x1,y1,class (.csv)")
    val_labels: Place = Field('', description='the same for the images of val_path; numbers stand for the classes in '
                              'their order')
    classes: Place = Field('', description='a file of class names, one a line, in the order of their numbers; segment '
                           "needs it; empty: the folders' names sorted, or numbers; detect: those of the annotations")
    labels_per_class: int = Field(0, ge=0, description='classify: training images kept of each class, at random; 0: '
                                  'all')
    train_images: int = Field(0, ge=0, description='segment, detect: training images kept, at random; 0: '
                              'all')
    ignore_index: int = Field(255, ge=0, lt=65536, description='segment: the value of pixels in label images that '
                              'count neither in training nor in evaluation')
    reduce_zero_label: bool = Field(False, description='segment: 0 in label images is ignored, too, and class number 0 '
                                    "is written as 1, as in ADE20K's")
    scale_jitter: Tuple[float, float] = Field(
        (0.5, 2.0), description='segment, detect: the range of the random size at which training images are shown; at '
        '1 they just cover the input, or in detect just fit into it')
    crop_scale: Tuple[float, float] = Field((0.67, 1.0), description='share of the image area a random crop keeps')
    crop_ratio: Tuple[float, float] = Field((0.75, 1.3333333333333333), description='width over height of a crop')
    interpolation: Literal['bilinear', 'bicubic'] = Field('bilinear', description='of random crops: bilinear, bicubic')
    flip: float = Field(0.5, ge=0, le=1, description='probability of a horizontal flip')
    eval_crop: float = Field(0.875, gt=0, le=1, description='classify: side of the square cut from the middle for '
                             'evaluation over the short side')
    exif_orientation: Optional[bool] = Field(
        None, description='turn images upright as their EXIF orientation says: true, false, or null: in predict, '
        'serve, reconstruct and features, but not in training and evaluation, as the reference')
    mean: Tuple[float, float, float] = Field((0.485, 0.456, 0.406), description='subtracted, per channel of [0, 1]')
    std: Tuple[float, float, float] = Field((0.229, 0.224, 0.225), description='divided by, per channel of [0, 1]')
    worker_weights: Union[Literal['equal', 'auto'], Tuple[float, ...]] = Field(
        'equal', validation_alias=AliasChoices('worker_weights', 'shares'),
        description="each worker's part of the batch: equal, auto (by measured speed, anew every epoch), or weights "
        'such as [3, 1] (also spelt shares)')

    @model_validator(mode='after')
    def _check(self) -> 'DataConfig':
        for key, (low, high) in (('crop_scale', self.crop_scale), ('crop_ratio', self.crop_ratio),
                                 ('scale_jitter', self.scale_jitter)):
            require(0 < low <= high, f'{key}=[{low}, {high}] must be two positive numbers, the smaller first')
        require(self.crop_scale[1] <= 1, f'crop_scale={listed(self.crop_scale)} asks for more than the image')
        require(min(self.std) > 0, f'std={listed(self.std)} must be positive')
        weights = self.worker_weights
        if not isinstance(weights, str):
            require(len(weights) > 0 and min(weights) > 0, f'worker_weights={listed(weights)} must be positive')
        return self

    def in_use(self) -> 'DataConfig':
        """The same for what users give to a trained network: upright, unless that was ruled out."""
        return self.model_copy(update={'exif_orientation': self.exif_orientation is not False})


class AugmentConfig(Section):
    """What else is done to the images and labels in fine-tuning."""
    rand_ops: int = Field(2, ge=0, description='RandAugment: operations an image; 0: none')
    rand_magnitude: float = Field(9.0, ge=0, le=10, description='RandAugment: mean strength, of 10')
    rand_std: float = Field(0.5, ge=0, description="RandAugment: the strength's standard deviation")
    erasing: float = Field(0.25, ge=0, le=1, description='probability that a rectangle is overwritten with noise')
    mixup: float = Field(0.8, ge=0, description='pairs of images are blended, in shares from Beta(mixup, mixup); 0: '
                         'none')
    cutmix: float = Field(1.0, ge=0, description='a rectangle of each image of a pair goes into the other, of a share '
                          'from Beta(cutmix, cutmix); 0: none')
    mix_switch: float = Field(0.5, ge=0, le=1, description='probability of cutmix, where mixup is on, too')
    mix_prob: float = Field(1.0, ge=0, le=1, description='probability that a pair is mixed')
    smoothing: float = Field(0.1, ge=0, lt=1, description='share of the target spread evenly over all classes')
    photometric: bool = Field(True, description='segment: brightness, contrast, saturation and hue change at random, '
                              'each for half the images')


class OptimConfig(Section):
    """AdamW and its schedule. The three rates are for 512 images a step and scale with train.batch_size."""
    type: Literal['adamw', 'sgd'] = Field('adamw', description='adamw, or sgd without momentum (for comparisons)')
    recipe: Literal['reference', 'fixed'] = Field(
        'reference', description="reference: every quirk of the paper's code; fixed: cosine counted from the end of "
        'the warm-up, no decay on tokens and position tables, accumulated gradients clipped once')
    base_lr: float = Field(1e-4, ge=0, description='learning rate after the warm-up, at batch 512')
    warmup_lr: float = Field(5e-7, ge=0, description='learning rate the warm-up starts from, at batch 512')
    min_lr: float = Field(5e-6, ge=0, description='learning rate the cosine ends at, at batch 512')
    warmup: Time = Field(Duration(10, 'epochs'), description='length of the linear warm-up')
    schedule: Literal['cosine', 'linear', 'multistep', 'constant'] = Field(
        'multistep', description='cosine or linear to min_lr, multistep, constant')
    milestones: Tuple[Time, ...] = Field((Duration(700, 'epochs'),), description='multistep: when the rate drops')
    gamma: float = Field(0.1, gt=0, le=1, description='multistep: factor of a drop')
    weight_decay: float = Field(0.05, ge=0, description='decoupled weight decay')
    layer_decay: float = Field(1.0, gt=0, le=1, description="fine-tuning: a block's learning rate over that of the "
                               'next')
    betas: Tuple[float, float] = Field((0.9, 0.999), description='decay of the two moments')
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment, as in PyTorch's AdamW")
    clip_grad: Optional[float] = Field(5.0, gt=0, description='largest global L2 norm of the gradient; null: no limit')

    @model_validator(mode='after')
    def _check(self) -> 'OptimConfig':
        require(all(0 <= beta < 1 for beta in self.betas), f'betas={listed(self.betas)} must lie in [0, 1)')
        require(max(self.betas) <= 1 - 2 ** -24, f'betas={listed(self.betas)}: in float32, one of them is 1: lower it')
        require(self.schedule != 'multistep' or bool(self.milestones), 'schedule=multistep needs milestones')
        return self


class TrainConfig(Section):
    """The loop."""
    length: Time = Field(Duration(800, 'epochs'), description="length of the run: '800 epochs' or a number of steps")
    batch_size: int = Field(2048, gt=0, description='images an update, over all devices and accumulated parts')
    accumulate: int = Field(1, gt=0, description='parts a batch is computed in, one after another, to save memory')
    store: Literal['auto', 'local', 'device', 'nccl', 'dist_sync', 'dist_device_sync', 'dist_async', 'horovod'] = Field(
        'auto', description='where gradients meet: auto (device, dist_sync or horovod, as the job was launched), '
        'local, device, nccl, dist_sync, dist_device_sync, dist_async, horovod')
    aggregation: Literal['auto', 'sync', 'async', 'local_sgd', 'elastic'] = Field(
        'auto', description='how workers agree: auto (async with dist_async, else sync), sync, async, local_sgd, '
        'elastic')
    local_steps: int = Field(8, gt=0, description='local_sgd, elastic: steps between two meetings')
    average_moments: bool = Field(True, description="local_sgd: average the optimiser's moments, too")
    elastic: float = Field(0.9, gt=0, le=1, description='elastic: how far a meeting closes the gap between the workers '
                           'and their centre')
    compression: Literal['none', 'fp16', '2bit'] = Field(
        'none', description='gradients on the wire: none, fp16 (horovod), 2bit (with error feedback)')
    threshold: float = Field(1e-3, gt=0, description="2bit: the size of what is sent; about the gradient's largest "
                             'elements')
    check_replicas: int = Field(100, ge=0, description="steps between comparisons of all replicas' weights; 0: none")
    ema: float = Field(0.0, ge=0, lt=1, description='decay of an average of the weights, which is then validated and '
                       'used, too; 0: none')
    lr_on_plateau: float = Field(1.0, gt=0, le=1, description='the rate is multiplied by this after train.patience '
                                 'validations without a new best; 1: never')
    patience: int = Field(5, gt=0, description='lr_on_plateau: validations')
    stop_early: int = Field(0, ge=0, description='validations without a new best that end the run; 0: none do')
    max_bad_steps: int = Field(10, gt=0, description='non-finite steps in a row that end the run; each is skipped')
    rollback: bool = Field(False, description='go back to the last checkpoint when the loss spikes, and leave out the '
                           'batches since then')
    spike: float = Field(10.0, gt=0, description='rollback: robust deviations above the median of the last 100 losses '
                         'that are a spike')


class ParallelConfig(Section):
    """How a model is divided over devices. Data parallelism takes what is left of them."""
    auto: bool = Field(False, description='choose pipeline, tensor, micro_batches and shard_optimizer for the '
                       'devices of the job at each start, as `mxsimmim plan` does; also written parallel=auto')
    pipeline: int = Field(1, gt=0, description='stages of a pipeline, each of consecutive blocks: the devices of a '
                          'worker, or workers of one device or of tensor devices')
    split: Tuple[int, ...] = Field((), description='blocks of each stage, e.g. [7, 5]; empty: by what they cost')
    micro_batches: int = Field(8, gt=0, description='pipeline: parts in which a batch passes through the stages')
    schedule: Literal['1f1b', 'gpipe'] = Field('1f1b', description='pipeline: 1f1b, or gpipe, which keeps the '
                                               'activations of all micro-batches; both compute the same')
    tensor: int = Field(1, gt=0, description='devices of a worker, or workers of one device, that compute each block '
                        'together, each some of its attention heads and some of its MLP')
    shard_optimizer: bool = Field(False, description='each worker keeps the optimiser\'s moments of some parameters '
                                  'only (ZeRO stage 1): less memory, more to exchange; same weights; Horovod')

    @property
    def devices(self) -> int:
        """Devices of one replica."""
        return self.pipeline * self.tensor

    @property
    def described(self) -> str:
        """What divides a model, as it is written."""
        return ' x '.join(f'parallel.{key}={value}' for key, value in (('pipeline', self.pipeline),
                                                                       ('tensor', self.tensor)) if value > 1)

    def check_devices(self, count: int, what: str) -> None:
        """See that `count` devices of a worker, described by `what`, are those of one replica or several.

        Raises:
            ValueError: they are not.
        """
        require(count % self.devices == 0, f'{self.described} needs {self.devices} devices a worker, or a multiple, '
                f'and {what}: name more of them with devices=[…], or lower it')

    @model_validator(mode='after')
    def _check(self) -> 'ParallelConfig':
        require(not self.auto or self.devices == 1 and not self.split, 'auto=true chooses what pipeline='
                f'{self.pipeline}, tensor={self.tensor} and split={listed(self.split)} say: leave these out, or set '
                'auto=false')
        require(not self.split or len(self.split) == self.pipeline and min(self.split) > 0,
                 f'split={listed(self.split)} must give each of the {self.pipeline} stages of pipeline={self.pipeline} '
                 'a block or more')
        return self


class ValidationConfig(Section):
    """Measuring on held-out images: in pre-training with masks that never change."""
    every: Time = Field(Duration(1, 'epochs'), description='time between validations; the last step always validates')
    at_start: bool = Field(False, description='also before the first step')
    images: int = Field(1024, gt=0, description='held-out images used at most')
    pictures: int = Field(8, ge=0, description='held-out images that are drawn each time, with their reconstruction, '
                          'map or objects')
    flip: bool = Field(False, description='segment, detect: also look at the mirrored images, and average the '
                       'probabilities, or unite what is found')
    scales: Tuple[float, ...] = Field(
        (1.0,), description='segment, detect: sizes at which each image is looked at, of which the probabilities are '
        'averaged, or what is found is united, e.g. [0.75, 1, 1.25]; at 1 all of it just fits into the input, of a '
        'larger one overlapping parts are shown')

    @model_validator(mode='after')
    def _check(self) -> 'ValidationConfig':
        scales = self.scales
        require(len(scales) > 0 and len(set(scales)) == len(scales) and all(0.1 <= scale <= 4 for scale in scales),
                f'scales={listed(scales)} must be different numbers from 0.1 to 4, such as [0.75, 1, 1.25]')
        return self


class CheckpointConfig(Section):
    """What survives a failing machine. The best checkpoint of fine-tuning so far is kept besides, in RUN/best."""
    every: ClockTime = Field(Duration(1, 'epochs'), description='time between checkpoints, also as 10 minutes; the '
                             'last step always saves')
    keep: int = Field(2, gt=0, description='newest checkpoints kept')
    keep_every: Optional[Time] = Field(None, description='checkpoints at multiples of this stay for ever; null: none')
    copy_to: Place = Field('', description='a second folder of runs, on another disk, to which each checkpoint is '
                           'copied; resume=auto looks there, too; empty: none')

    @model_validator(mode='after')
    def _check(self) -> 'CheckpointConfig':
        require(self.every.unit != 'minutes' or self.keep_every is None, f'keep_every={self.keep_every}: with every='
                f'{self.every} checkpoints come at any step, and hardly one at a multiple: write every in steps or '
                'epochs, or raise keep')
        return self


class LogConfig(Section):
    """What is written down."""
    every: int = Field(10, gt=0, description='steps between two records')
    prometheus_port: int = Field(0, ge=0, lt=65536, description='port at which rank 0 answers Prometheus, which '
                                 'finds it by OUTPUT/NAME.prometheus.json; 0: it does not')
    prometheus_host: str = Field('127.0.0.1', description='prometheus_port: address to listen on; 0.0.0.0: all of the '
                                 'host, without password or encryption')


class NotifyConfig(Section):
    """Who is told of a failure, a restart and the end."""
    command: str = Field('', description='shell command that gets each event as JSON on standard input; in a job it '
                         'runs where the launcher does; empty: none')


class RuntimeConfig(Section):
    """How it is computed. The environment variable of the same effect wins over `auto`."""
    threads: int = Field(0, ge=0, description='threads of one operator (OMP_NUM_THREADS); 0: one a core')
    blas_core: str = Field('auto', description='OPENBLAS_CORETYPE: auto, none, or a name such as HASWELL')
    precision: Literal['float32', 'bf16', 'auto'] = Field(
        'float32', description='of matrix products and the activations between them, on CPUs: float32, bf16, or auto '
        '(bf16 where the CPU multiplies it faster); weights and their updates stay float32')
    deadline: float = Field(0.0, ge=0, description='seconds that a training may wait for one thing (data, a device, '
                            'another worker, a server, a disk) before it ends and says why; ten times as long before '
                            'the first log record; 0: 20 steps, three log records and 300 s at least')
