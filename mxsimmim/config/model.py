"""The keys of the network, what follows from them, and which go together."""
import math
from functools import reduce
from typing import Any, Callable, List, Optional, Tuple, Union

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from typing_extensions import Literal

from .values import Place, Section, listed, require

ANCHORS = 3  # of a detector at each place of a map: twice as wide as high, square, twice as high as wide
OBJECTS = 100  # of an image that a detector is told in training, and that it finds, at most
MASK_SIDE = 56
"""Cells a side of an object's mask, in its box. A region of interest that shares half of its area with the box (IoU of
0.5) has at least half its side, so that of its 28 x 28 cells each is as large as one of these or larger; the bitmaps of
100 objects at 1024 x 1024 would be 100 MB an image, these are 0.3 MB."""
PROPOSALS = 1000  # boxes of a map, and of an image, that are kept
SAMPLED_ANCHORS = 256  # of an image, that a detector learns from


class ModelConfig(Section):
    """The network. Its keys carry the reference implementation's names."""
    type: Literal['vit', 'swin', 'swinv2'] = Field('vit', description='vit, swin or swinv2')
    img_size: Union[int, Tuple[int, int]] = Field(224, description='height and width of the input, pixels; '
                                                  'segment and detect also take [height, width]')
    patch_size: int = Field(16, gt=0, description='side of a patch, pixels; Swin uses 4')
    embed_dim: int = Field(768, gt=0, description='width of the tokens; of the first stage in Swin')
    depth: int = Field(12, gt=0, description='ViT: number of blocks')
    depths: Tuple[int, ...] = Field((), description='Swin: blocks of each stage, e.g. [2, 2, 18, 2]')
    num_heads: Union[int, Tuple[int, ...]] = Field(12, description='attention heads; a list, one a stage, in Swin')
    window_size: int = Field(7, gt=0, description='side of an attention window, tokens: Swin, and ViT with '
                             'global_blocks')
    global_blocks: Tuple[int, ...] = Field((), description='ViT, segment and detect: the blocks, from 0, '
                                           'that see the whole image, e.g. [2, 5, 8, 11]; the others see windows; '
                                           'empty: all see it')
    pretrained_window_sizes: Tuple[int, ...] = Field((), description='SwinV2: side of the windows of each stage in '
                                                     'pre-training, which its positions are relative to, e.g. '
                                                     '[12, 12, 12, 6]; empty or 0: those of this network')
    mlp_ratio: float = Field(4.0, gt=0, description='hidden width of the MLP over embed_dim')
    init_values: Optional[float] = Field(0.1, description='ViT: initial layer scale; null for none')
    init_std: float = Field(0.02, gt=0, description='deviation of the initial linear maps, tokens and positions; 0.02 '
                            "is for the papers' widths: narrow networks learn far sooner with about 1/sqrt(embed_dim)")
    use_ape: bool = Field(False, validation_alias=AliasChoices('use_ape', 'ape'),
                          description='learned absolute positions (also spelt ape)')
    use_rpb: bool = Field(False, description='ViT: a relative position table in each block')
    use_shared_rpb: bool = Field(True, description='ViT: one relative position table shared by all blocks')
    use_mean_pooling: bool = Field(False, description='ViT: no final norm (fine-tuning normalises the mean token)')
    drop_path: float = Field(0.0, ge=0, lt=1, description='stochastic depth of the last block; grows linearly from 0')
    head_channels: int = Field(512, gt=1, description="segment: channels of UperNet; its auxiliary head has half; "
                               "detect: channels of the feature pyramid and its heads; boxes' hidden layers have 4 "
                               "times as many; the papers' networks have 256")
    auxiliary: float = Field(0.4, ge=0, description="segment: weight of the auxiliary head's loss")
    masks: bool = Field(True, description='detect: also tell which pixels are an object (Mask R-CNN); false: boxes '
                        'alone (Faster R-CNN)')
    anchor_scale: float = Field(8.0, gt=0, description='detect: side of the square anchor, in places of its map: at 8, '
                                '32 pixels on a map that has a place for 4 pixels a side')
    sampled_boxes: int = Field(512, gt=3, description='detect: boxes of an image that the heads learn from, a quarter '
                               'of them objects at most; fewer take less time, and do for images of few objects')
    loss: Literal['l1', 'mse'] = Field('l1', description='on masked pixels: l1 (the paper) or mse')
    norm_targets: bool = Field(False, description='predict each decoder cell normalised by its own mean and deviation')
    norm_window: int = Field(0, ge=0, description='norm_targets: normalise each pixel by the square of this odd side '
                             'around it instead, pixels (SwinV2: 47); 0: by its cell')
    recompute: bool = Field(False, description='keep half of a block\'s input only and compute the rest again in the '
                            'backward pass: less memory, a third more time; CPUs with native operators only')
    pretrained: Place = Field('', description='fine-tuning: where the encoder comes from: the folder of a run, a '
                              '.pth or .safetensors file, or FILE:KEY (such as a.pth:teacher) for one of several '
                              'networks in it; empty: random weights')

    @property
    def stages(self) -> int:
        """Number of resolutions the encoder passes through; 1 for ViT."""
        return 1 if self.type == 'vit' else len(self.depths)

    @property
    def heads(self) -> Tuple[int, ...]:
        """Attention heads of each stage; of a ViT, of all blocks."""
        return self.num_heads if isinstance(self.num_heads, tuple) else (self.num_heads,)

    @property
    def stride(self) -> int:
        """Pixels a side that one final token stands for: the decoder's cell."""
        return self.patch_size * 2 ** (self.stages - 1)

    @property
    def size(self) -> Tuple[int, int]:
        """Height and width of the input, pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def side(self) -> int:
        """Height and width of a square input, pixels."""
        assert isinstance(self.img_size, int), 'not square'
        return self.img_size

    @property
    def patches(self) -> Tuple[int, int]:
        """Patches down and across at the input."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size

    def tokens(self, stage: int) -> Tuple[int, int]:
        """Tokens down and across in a stage: merging takes two to one, and rounds up."""
        down, across = self.patches
        return -(-down >> stage), -(-across >> stage)

    @property
    def pyramid(self) -> List[Tuple[int, int]]:
        """Height and width of a detector's maps, the finest first: four of a ViT or one a stage, and one coarser."""
        height, width = self.patches
        maps = ([(4 * height, 4 * width), (2 * height, 2 * width), (height, width), (height // 2, width // 2)]
                if self.type == 'vit' else [self.tokens(stage) for stage in range(self.stages)])
        return [*maps, (-(-maps[-1][0] // 2), -(-maps[-1][1] // 2))]

    @property
    def candidates(self) -> Tuple[int, int]:
        """How many anchors a detector has, and how many boxes at most it proposes in an image."""
        anchors = [ANCHORS * height * width for height, width in self.pyramid]
        return sum(anchors), min(PROPOSALS, sum(min(PROPOSALS, number) for number in anchors))

    @property
    def samples(self) -> Tuple[int, int]:
        """How many boxes of an image a detector's heads learn from, and how many of them at most are objects."""
        boxes = min(self.sampled_boxes, self.candidates[1] + OBJECTS)
        return boxes, min(self.sampled_boxes // 4, boxes)

    @property
    def grid(self) -> int:
        """Patches a side of a square input."""
        return self.side // self.patch_size

    def sees_all(self, block: int) -> bool:
        """Tell whether the tokens of this block of a ViT attend to the whole image."""
        return not self.global_blocks or block in self.global_blocks

    @property
    def blocks(self) -> int:
        """Transformer blocks in all."""
        return self.depth if self.type == 'vit' else sum(self.depths)

    @property
    def position_windows(self) -> Tuple[int, ...]:
        """SwinV2: the side of the windows, in each stage, that its positions are relative to."""
        own = [min(self.window_size, max(self.tokens(stage))) for stage in range(self.stages)]
        return tuple(given or side for given, side in zip(self.pretrained_window_sizes or own, own))

    @property
    def most_parts(self) -> int:
        """Most equal parts that the heads and the MLP's hidden channels of every block can be cut into."""
        hidden = [int(self.embed_dim * 2 ** stage * self.mlp_ratio) for stage in range(self.stages)]
        return reduce(math.gcd, (*self.heads, *hidden))

    @field_validator('img_size', mode='wrap')
    @classmethod
    def _one_number_for_squares(cls, value: Any, parse: Callable[[Any], Union[int, Tuple[int, int]]]
                                ) -> Union[int, Tuple[int, int]]:
        try:
            parsed = parse(value)
        except ValidationError:
            raise ValueError(f'{value!r} is neither a number of pixels nor [height, width]') from None
        height, width = (parsed, parsed) if isinstance(parsed, int) else parsed
        require(min(height, width) > 0, 'input should be greater than 0')
        return height if height == width else parsed

    @model_validator(mode='after')
    def _check(self) -> 'ModelConfig':
        require(self.norm_window == 0 or self.norm_targets, f'norm_window={self.norm_window} is for norm_targets=true')
        require(self.norm_window == 0 or self.norm_window % 2 == 1 and self.norm_window > 1,
                f'norm_window={self.norm_window} must be odd, as its square has a pixel in the middle: 3, 5, … or 0')
        if self.type == 'vit':
            require(isinstance(self.num_heads, int),
                     f'num_heads={listed(self.num_heads)} is a list; a ViT has one number of heads')
            require(self.heads[0] > 0 and self.embed_dim % self.heads[0] == 0,
                     f'embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}')
        else:
            self._check_swin()
        require(all(side % self.patch_size == 0 for side in self.size), f'img_size={listed(self.img_size)} is not a '
                f'multiple of {self.patch_size}, the side of one patch (patch_size)')
        last = self.depth - 1 if self.type == 'vit' else -1
        require(all(0 <= block <= last for block in self.global_blocks), f'global_blocks={listed(self.global_blocks)}: '
                + (f'the blocks of this ViT are 0 to {last}' if self.type == 'vit' else 'a Swin has none'))
        require(not self.global_blocks or not self.use_shared_rpb, 'global_blocks: windows cannot share the position '
                'table of the whole image: set use_shared_rpb=false, and use_rpb=true for a table in each block')
        self._check_swin_v2()
        return self

    def _check_swin(self) -> None:
        depths = self.depths
        require(len(depths) > 0, 'depths is empty: a Swin needs its blocks a stage, e.g. depths=[2,2,18,2]')
        require(len(depths) <= 32, f'depths lists {len(depths)} stages; each halves the image, so 32 are too many')
        require(all(d > 0 for d in depths), f'depths={listed(depths)} has a stage without blocks')
        require(isinstance(self.num_heads, tuple) and len(self.num_heads) == len(depths),
                 f'num_heads={listed(self.num_heads)} must list one number for each of the {len(depths)} stages of '
                 f'depths={listed(depths)}')
        for stage, h in enumerate(self.heads):
            width = self.embed_dim * 2 ** stage
            require(h > 0 and width % h == 0, f'the width {width} of stage {stage} (embed_dim {self.embed_dim} x '
                     f'2^{stage}) is not a multiple of its num_heads={h}')

    def _check_swin_v2(self) -> None:
        given = self.pretrained_window_sizes
        if self.type != 'swinv2':
            require(not given, f'pretrained_window_sizes={listed(given)} is for type=swinv2, not {self.type}')
            return
        require(not self.recompute, 'recompute=true: the half blocks of type=swinv2 cannot be computed again: write '
                'recompute=false; train.accumulate and parallel.pipeline save memory, too')
        require(len(given) in (0, self.stages), f'pretrained_window_sizes={listed(given)} must list one number for '
                f'each of the {self.stages} stages of depths={listed(self.depths)}')
        for stage, window in enumerate(self.position_windows):
            require(window > 1, f'stage {stage} has windows of {window} token a side, and so no relative positions: '
                    f'raise img_size={self.img_size}, or give its window in pre-training with pretrained_window_sizes')
