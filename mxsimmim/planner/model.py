"""What a network computes and keeps, counted from its configuration, part by part.

All counts are for one image. Of a tensor group of t devices each has 1/t of the heads and of an MLP's hidden columns
(Shoeybi et al. 2019, arXiv:1909.08053), and what lies between them; the residual stream and what is normalised it has
whole. Operators keep what ops/src says of the native form; for the reference form it is what MXNet's own operators ask
for in their backward passes (compare Korthikanti et al. 2022, arXiv:2205.05198, section 4, in half precision).
"""
import math
from functools import lru_cache
from typing import List, NamedTuple, Sequence, Tuple

from ..config import MaskConfig, ModelConfig

FLOAT = 4  # bytes of float32
# Measured over counted, in processes on CPUs. Products' operands in oneDNN's layouts and MXNet's plan of memory double
# what a native backward pass holds; of the reference form, MXNet's plan adds a half to all that it keeps.
NATIVE_WORK, REFERENCE = 2.0, 1.5
POSITIONS = 512  # hidden units of SwinV2's network of positions


class Form(NamedTuple):
    """How operators are computed: see `OpBackend`."""
    native: bool = True
    bf16: bool = False

    @property
    def bytes(self) -> float:
        """Bytes of a number between two products."""
        return 2.0 if self.bf16 and self.native else FLOAT


class Part(NamedTuple):
    """A part of a network, computed by one operator or a few.

    `shared` numbers are divided among a tensor group, `whole` ones are not.
    """
    kind: str  # embedding, attention, mlp, merging, loss
    width: int  # channels of its tokens
    forward: float  # multiply-adds
    backward: float
    again: float = 0.0  # multiply-adds of the forward pass that recomputing adds to the backward pass
    shared_parameters: int = 0
    whole_parameters: int = 0
    inputs: float = 0.0  # bytes that the backward pass needs of what comes in
    shared_kept: float = 0.0  # bytes that it needs of what is computed inside, unless that is computed again
    whole_kept: float = 0.0
    shared_work: float = 0.0  # bytes that the backward pass holds for itself
    whole_work: float = 0.0
    output: float = 0.0  # numbers of what goes out

    @property
    def is_divided(self) -> bool:
        """Whether a tensor group divides it."""
        return self.kind in ('attention', 'mlp')

    def parameters(self, tensor: int = 1) -> int:
        """Numbers of parameters that each of `tensor` devices has."""
        return self.shared_parameters // tensor + self.whole_parameters

    def kept(self, tensor: int = 1, recompute: bool = False) -> float:
        """Bytes from the forward to the backward pass."""
        inside = 0.0 if recompute and self.is_divided else self.shared_kept / tensor + self.whole_kept
        return self.inputs + inside

    def between(self, tensor: int) -> float:
        """Bytes that each device of a tensor group keeps besides, as there each half block is a graph of its own.

        MXNet's autograd keeps all that goes from one graph to another: a device's term of the sum, and on the device
        that adds up the others' terms.
        """
        if tensor == 1 or not self.is_divided:
            return 0.0
        return FLOAT * self.output * (1 + (tensor - 1) / tensor)

    def work(self, tensor: int = 1) -> float:
        """Bytes that are there only while its backward pass runs."""
        return self.shared_work / tensor + self.whole_work


Segment = Tuple[Part, ...]


@lru_cache(maxsize=64)
def segments(model: ModelConfig, mask: MaskConfig, form: Form) -> List[Segment]:
    """Return the parts of each of a network's segments, as `SimMIM.segments` cuts it: embedding, blocks, head.

    The bias table that all blocks of a ViT share is counted with the embedding, though each stage has it.
    """
    width, tokens, prefix = model.embed_dim, math.prod(model.patches), int(model.type == 'vit')
    found: List[Segment] = [(_embedding(model, tokens, prefix),)]
    # Those of SwinV2 have native products, and MXNet's own operators between them.
    blocks = Form(native=False) if model.type == 'swinv2' else form
    for stage, depth in enumerate((model.depth,) if model.type == 'vit' else model.depths):
        window = min(model.window_size, model.grid >> stage)
        seen = tokens + prefix if model.type == 'vit' else window * window
        for block in range(depth):
            last = stage == model.stages - 1 and block == depth - 1
            rows = tokens * masked_share(model, mask) if last and blocks.native else tokens + prefix
            found.append((_attention(model, blocks, width, tokens + prefix, seen, model.heads[stage]),
                          _mlp(model, blocks, width, tokens + prefix, rows)))
        if stage < model.stages - 1:  # four tokens of this width become one of twice the width
            tokens, width = tokens // 4, 2 * width
            found[-1] += (_merging(model, width, tokens),)
    return [*found, (_loss(model, form, width, tokens, masked_share(model, mask)),)]


def masked_share(model: ModelConfig, mask: MaskConfig) -> float:
    """Share of the final tokens whose cells hold a masked patch, if a cell of the mask is no smaller than theirs."""
    cells = (model.side // mask.patch_size) ** 2
    return math.ceil(mask.ratio * cells) / cells if mask.patch_size >= model.stride else 1.0


def parameters(parts: Sequence[Segment], tensor: int = 1) -> int:
    """Count the parameters of segments that each of `tensor` devices has."""
    return sum(part.parameters(tensor) for segment in parts for part in segment)


def multiply_adds(segment: Segment) -> float:
    """Multiply-adds of a segment's forward pass."""
    return sum(part.forward for part in segment)


def shared_table(model: ModelConfig) -> int:
    """Count the parameters of the bias table that all blocks of a ViT share."""
    return ((2 * model.grid - 1) ** 2 + 3) * model.heads[0] if model.type == 'vit' and model.use_shared_rpb else 0


def _embedding(model: ModelConfig, tokens: int, prefix: int) -> Part:
    """Patches as rows, their product, mask token, position."""
    width, pixels = model.embed_dim, 3 * model.patch_size ** 2
    count = pixels * width + width + width  # the mask token's
    if model.type == 'vit':
        count += width + shared_table(model)
    else:
        count += 2 * width
    if model.use_ape:
        count += (tokens + prefix) * width
    products = tokens * pixels * width
    # Cells; of the mask, two factors and two products of each row.
    return Part('embedding', width, products, products, whole_parameters=count,
                inputs=FLOAT * tokens * pixels, whole_kept=FLOAT * tokens * 4 * width,
                output=(tokens + prefix) * width)


def _attention(model: ModelConfig, form: Form, width: int, tokens: int, seen: int, heads: int) -> Part:
    """A first half block, whose tokens attend to `seen` each.

    Scores are not kept by the native form, whose backward pass multiplies them again.
    """
    products, pairs = tokens * width * width, tokens * seen * width
    vit = model.type == 'vit'
    whole = 2 * width + width + (width if vit and model.init_values is not None else 0)  # norm, proj's bias, gamma
    shared = 4 * width * width + (2 if vit else 3) * width
    if model.type == 'swinv2':  # keys have no bias; the network of positions is computed once a batch
        shared += (1 + POSITIONS) * heads - width
        whole += 3 * POSITIONS
    elif not vit:
        shared += (2 * math.isqrt(seen) - 1) ** 2 * heads
    elif model.use_rpb:
        shared += ((2 * model.grid - 1) ** 2 + 3) * heads
    unit = tokens * width
    if form.native:
        kept = dict(shared_kept=form.bytes * 4 * unit)  # q, k, v; what attention gave
        # Zeros for what nobody sends a gradient of; gradients of queries, keys and values, and of attention.
        work = dict(shared_work=NATIVE_WORK * form.bytes * 9 * unit,
                    whole_work=NATIVE_WORK * (form.bytes * 3 + FLOAT * 3) * unit)
    else:
        bytes_ = REFERENCE * FLOAT
        rows = 8 if model.type == 'swinv2' else 4  # of cosines also squares and lengths of queries and keys
        kept = dict(shared_kept=bytes_ * (rows * unit + tokens * seen * heads),
                    whole_kept=bytes_ * _reference_rows(model) * unit)
        work = dict(shared_work=bytes_ * (4 * unit + 2 * tokens * seen * heads), whole_work=bytes_ * 3 * unit)
    return Part('attention', width, 4 * products + 2 * pairs, 8 * products + (5 if form.native else 4) * pairs,
                3 * products + 2 * pairs, shared, whole, FLOAT * unit, output=unit, **kept, **work)


def _mlp(model: ModelConfig, form: Form, width: int, tokens: int, rows: float) -> Part:
    """A second half block, of which `rows` tokens are computed."""
    hidden = int(width * model.mlp_ratio)
    products = rows * width * hidden
    whole = 2 * width + width + (width if model.type == 'vit' and model.init_values is not None else 0)
    shared = 2 * width * hidden + hidden
    if form.native:
        kept = dict(shared_kept=form.bytes * tokens * hidden)  # what GELU is given
        # Zeros of the same size; the gradient of what GELU is given and what it gave; rows of the width.
        work = dict(shared_work=NATIVE_WORK * form.bytes * (tokens + 2 * rows) * hidden,
                    whole_work=NATIVE_WORK * (form.bytes * 3 * rows + FLOAT * 2 * tokens) * width)
    else:
        bytes_ = REFERENCE * FLOAT
        kept = dict(shared_kept=bytes_ * 2 * tokens * hidden,
                    whole_kept=bytes_ * _reference_rows(model) * tokens * width)
        work = dict(shared_work=bytes_ * 2 * tokens * hidden, whole_work=bytes_ * 2 * tokens * width)
    return Part('mlp', width, 2 * products, 4 * products, products, shared, whole, FLOAT * tokens * width,
                output=tokens * width, **kept, **work)


def _reference_rows(model: ModelConfig) -> int:
    """Arrays (tokens, width) that the reference form's normalisation, scaling and dropping of a half block keep.

    Centred, its square, the outer product of scale and weight, and the result; branch and gamma; the scaled branch.
    """
    return 4 + 2 * (model.type == 'vit' and model.init_values is not None) + bool(model.drop_path)


def _merging(model: ModelConfig, width: int, tokens: int) -> Part:
    """Four neighbours of half this width to one token: normalisation and product, in SwinV2 the other way round."""
    inputs = 2 * width
    norm = 2 * (width if model.type == 'swinv2' else inputs)
    products = tokens * inputs * width
    return Part('merging', width, products, 2 * products, whole_parameters=inputs * width + norm,
                inputs=FLOAT * tokens * inputs, whole_kept=FLOAT * tokens * inputs, output=tokens * width,
                whole_work=FLOAT * 2 * tokens * inputs)


def _loss(model: ModelConfig, form: Form, width: int, tokens: int, share: float) -> Part:
    """Final normalisation, decoder and loss; the native form decodes masked cells only."""
    pixels, prefix = 3 * model.stride ** 2, int(model.type == 'vit')
    norm = 2 * width  # a ViT has it, or a classifier's that pre-training does not use
    products = tokens * (share if form.native else 1) * width * pixels
    return Part('loss', width, products, 2 * products, whole_parameters=width * pixels + pixels + norm,
                inputs=FLOAT * (tokens + prefix) * width,
                whole_kept=FLOAT * ((tokens + prefix) * width + tokens * pixels) + form.bytes * tokens * pixels,
                whole_work=FLOAT * (2 * tokens * width + tokens * pixels))
