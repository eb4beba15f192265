"""The operators of the models in two forms behind one object, which a network is given when it is built and holds.

`reference` says what an operator computes, with MXNet's own operators, on any device. `native` has the same functions
on a library of ours, which `pip install` compiles: several times faster where MXNet is slow, and able to multiply in
bf16. F is mx.nd or mx.sym, as in hybrid_forward.
"""
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Dict, Optional, Sequence, Tuple

from ..runtime import environment
from . import library, native, reference
from .build import NotBuilt
from .layout import Windows

Pair = Tuple[Any, Any]  # weight and bias
FORMS = {'reference': reference, 'native': native}


@dataclass(frozen=True)
class OpBackend:
    """Compute operators in one form, 'reference' or 'native', with products in 'float32' or 'bf16' (native only).

    Raises:
        NotBuilt: the native form, whose library is not there; building the object loads it.
        ValueError: bf16 where nothing can compute it.
    """
    form: str = 'reference'
    precision: str = 'float32'

    def __post_init__(self) -> None:
        assert self.form in FORMS, self.form
        if self.form == 'native':
            library.admit(self.precision)
        elif self.precision != 'float32':
            raise ValueError(f'operators: the {self.form} form computes in float32, not in {self.precision}')

    @property
    def is_native(self) -> bool:
        """Whether these are the operators of the compiled library, on CPUs."""
        return self.form == 'native'

    def describe(self) -> str:
        """Return form, instructions and precision in words, for the messages of a run."""
        if not self.is_native:
            return f'operators: {self.form}, {self.precision}'
        isa = library.load()
        emulated = self.precision == 'bf16' and isa not in library.BF16
        slow = ' (emulated by this CPU, slower than float32)' if emulated else ''
        return f'operators: native ({isa}), {self.precision}{slow}'

    def layer_norm(self, F: Any, x: Any, weight: Any, bias: Any, eps: float, *, width: int) -> Any:
        """Normalise x (..., C) to zero mean and unit variance over C = `width`, times weight (C,) plus bias (C,)."""
        return FORMS[self.form].layer_norm(F, x, weight, bias, eps, width=width)

    def group_norm(self, F: Any, x: Any, weight: Any, bias: Any, eps: float, *, groups: int, channels: int) -> Any:
        """Normalise x (B, C, H, W) to zero mean and unit variance in each of `groups` groups of an image's channels.

        Then multiply each of the C = `channels` with weight (C,) and add bias (C,) (Wu and He 2018, arXiv:1803.08494).
        """
        return FORMS[self.form].group_norm(F, x, weight, bias, eps, groups=groups, channels=channels)

    def linear(self, F: Any, x: Any, weight: Any, bias: Any = None, gelu: bool = False, *, units: int) -> Any:
        """Multiply x (..., K) with weight (M, K) transposed, add bias (M,): (..., M), M = `units`.

        Then, if asked, apply exact GELU.
        """
        return FORMS[self.form].linear(F, x, weight, bias, gelu, units=units, precision=self.precision)

    def attention(self, F: Any, x: Any, norm: Pair, qkv: Pair, proj: Pair, bias: Any = None, gamma: Any = None,
                  keep: Any = None, mask: Any = None, *, width: int, heads: int, tokens: int, eps: float,
                  windows: Optional[Windows] = None, size: Optional[int] = None, partial: bool = False,
                  recompute: bool = False) -> Any:
        """Compute a transformer's first half block: x + keep * gamma * proj(attention(qkv(norm(x)))), all (B, L, C).

        Each pair is a weight and a bias; qkv's weight is (3HD, C), of H = `heads` heads of D = `size` channels, by
        default C/H, and proj's (C, HD). bias (1, H, N, N), or None, is added to the scores
        between the N tokens of a sequence: all L = `tokens` of an image or, with `windows`, those of one window, then
        N = window^2. Where windows are shifted or padded, mask (windows, 1, N, N) is `shift_mask`. gamma (C,), or None,
        scales channels (Touvron et al. 2021, arXiv:2103.17239); keep (B, 1), or None, scales an image's branch, 0
        dropping it (Huang et al. 2016, arXiv:1603.09382). C = `width`. With `recompute`, native only, nothing between
        is kept for the backward pass.

        As gamma and keep are linear, results of some of the heads each, with their rows of qkv and columns of proj, add
        up to that of all, if all but one are `partial`: these leave out x; proj's bias, too, is given to one alone and
        is None for the others (Shoeybi et al. 2019, arXiv:1909.08053).
        """
        return FORMS[self.form].attention(F, x, norm, qkv, proj, bias, gamma, keep, mask, width=width, heads=heads,
                                          tokens=tokens, eps=eps, windows=windows, size=size,
                                          partial=partial, recompute=recompute, precision=self.precision)

    def cosine_attention(self, F: Any, x: Any, qkv: Pair, proj: Pair, scale: Any, bias: Any, mask: Any = None, *,
                         width: int, heads: int, size: int, windows: Windows) -> Any:
        """Compute proj(attention(qkv(x))) with cosines for products of queries and keys, (B, L, C) to the same.

        Liu et al. 2022 (arXiv:2111.09883). Each head multiplies them with its number in scale (H, 1, 1). Pairs, bias,
        mask and windows as in `attention`. Results of some of the heads each add up to that of all.
        """
        return FORMS[self.form].cosine_attention(F, x, qkv, proj, scale, bias, mask, width=width, heads=heads,
                                                 size=size, windows=windows, precision=self.precision)

    def mlp(self, F: Any, x: Any, norm: Pair, fc1: Pair, fc2: Pair, gamma: Any = None, keep: Any = None,
            rows: Any = None, *, width: int, hidden: int, eps: float, partial: bool = False, recompute: bool = False
            ) -> Any:
        """Compute a transformer's second half block: x + keep * gamma * fc2(gelu(fc1(norm(x)))), (B, L, C) to the same.

        gamma, keep and recompute as in `attention`, and parts, here of the hidden channels, add up as there; `hidden`
        is fc1's width. rows (B, L) is 0 for tokens whose result
        nobody will use, and whose gradient is therefore zero: they may be left as they are.
        """
        return FORMS[self.form].mlp(F, x, norm, fc1, fc2, gamma, keep, rows, width=width, hidden=hidden, eps=eps,
                                    partial=partial, recompute=recompute, precision=self.precision)

    def patchify(self, F: Any, image: Any, size: Tuple[int, int], cell: int, mean: Sequence[float],
                 std: Sequence[float]) -> Any:
        """Cut an image of `size` pixels, height and width, into cells of cell x cell: (B, cells, 3 * cell^2).

        Each cell is ordered (channel, y, x), as in a convolution.

        image is either float32 (B, 3, height, width), normalised already, or uint8 (B, height, width, 3), and then
        becomes (image / 255 - mean) / std. As a symbol, it may be uint8 in the native form only.
        """
        return FORMS[self.form].patchify(F, image, size, cell, mean, std)

    def masked_loss(self, F: Any, tokens: Any, decoder: Pair, target: Any, mask: Any, *, cell: int, patch: int,
                    prefix: int, kind: str) -> Any:
        """Compute SimMIM's loss (1,): the mean over masked pixels of |d| (kind 'l1') or d^2 (kind 'mse').

        d is what the tokens are decoded to, less the target.

        tokens (B, prefix + cells, C), of which the first `prefix` are ignored, are decoded by the pair (3 * cell^2, C)
        and (3 * cell^2,). target (B, cells, 3 * cell^2), of which no gradient exists. mask (B, h, w) is on the grid of
        patches of patch x patch pixels, 1 for masked; a cell holds one patch or several. The sum is divided by the
        number of masked pixels + 1e-5 and by the 3 channels, as the reference does.
        """
        return FORMS[self.form].masked_loss(F, tokens, decoder, target, mask, cell=cell, patch=patch, prefix=prefix,
                                            kind=kind, precision=self.precision)

    def pyramid_pool(self, F: Any, maps: Sequence[Any], boxes: Any, *, strides: Sequence[int], side: int,
                     samples: int = 2) -> Any:
        """Pool boxes from the maps of a feature pyramid: (B, N, C, side, side).

        maps (B, C, H_l, W_l) have a pixel for `strides`[l] of the image's; boxes (B, N, 4) are (x0, y0, x1, y1) in
        pixels of the image, and have no gradient. A box is pooled from one map: one of 224 x 224 pixels from number 2,
        one of twice the side from the next (Lin et al. 2017, arXiv:1612.03144); a box of no area becomes zeros. A bin
        is the mean of samples x samples values, interpolated (RoIAlign, He et al. 2017, arXiv:1703.06870; a pixel's
        value is that in its middle, as detectron2's `aligned`).
        """
        return FORMS[self.form].pyramid_pool(F, maps, boxes, strides=strides, side=side, samples=samples)

    def match_boxes(self, F: Any, boxes: Any, truth: Any, kind: Any) -> Tuple[Any, Any, Any, Any]:
        """Compare boxes (B, N, 4), or (1, N, 4) for all images, with those that are known: truth (B, M, 4).

        kind (B, M) is 1 for an object, 2 for a crowd and 0 for nothing. Returns four arrays (B, N): the largest
        intersection over union with an object; the number of that object, the first of several, 0 for none; whether no
        other box has a larger one with some object than this, 1 or 0; and the largest share of the box's area that a
        crowd covers. They have no gradient.
        """
        return FORMS[self.form].match_boxes(F, boxes, truth, kind)


REFERENCE = OpBackend()


def select_backend(precision: str, contexts: Sequence[Any]) -> OpBackend:
    """Return native operators where all contexts are CPUs and the library is there, else the reference.

    precision is 'float32', 'bf16', or 'auto': bf16 where the CPU multiplies it faster, else float32. Says once, on
    stderr, why operators on a CPU are not native.

    Raises:
        ValueError: bf16 is asked for where nothing can compute it; says why and what to use instead.
    """
    others = [str(context) for context in contexts if context.device_type != 'cpu']
    if others:
        if precision == 'bf16':
            raise ValueError(f"key 'runtime.precision': bf16 is computed on CPUs only, not on {', '.join(others)}: "
                             'write runtime.precision=float32, or devices=[cpu(0)]')
        return REFERENCE
    try:
        isa = library.load()
    except NotBuilt as error:
        if precision == 'bf16':
            raise ValueError(f"key 'runtime.precision': bf16 needs the native operators. {error}; or write "
                             'runtime.precision=float32') from None
        library.tell_once(f'operators: reference, slower than native ones: {error}')
        return REFERENCE
    faster = 'bf16' if isa in library.BF16 else 'float32'
    return OpBackend('native', faster if precision == 'auto' else precision)


def report() -> Dict[str, Any]:
    """Return what `mxsimmim doctor` says of the operators: instructions, names, what `auto` takes; or why none."""
    defaults: Any = SimpleNamespace(threads=0, blas_core='auto')  # RuntimeConfig's, without pydantic
    environment.prepare(defaults)
    try:
        instructions = library.load()
    except NotBuilt as error:
        return {'why': error.why, 'remedy': error.remedy}
    import mxnet
    prefix = library.PREFIX
    return {'instructions': instructions, 'auto': select_backend('auto', [mxnet.cpu()]).precision,
            'names': [name[len(prefix):] for name in dir(mxnet.nd) if name.startswith(prefix)]}
