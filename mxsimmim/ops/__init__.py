"""Operators of the models, each in two forms under one name: plain MXNet, and native code for CPUs.

`reference` says what an operator computes, with MXNet's own operators, on any device. `native` has the same functions
on a library of ours, which `pip install` compiles: several times faster where MXNet is slow, and able to multiply in
bf16. `choose` decides once, at the start; a hybridized network keeps what it was traced with. F is mx.nd or mx.sym, as
in hybrid_forward.
"""
import contextlib
from typing import Any, Iterator, NamedTuple, Optional, Sequence, Tuple

from . import native, reference
from .layout import Windows, shift_mask

__all__ = ['Choice', 'Windows', 'attention', 'choose', 'chosen', 'layer_norm', 'linear', 'masked_loss', 'mlp',
           'patchify', 'shift_mask', 'using']

Pair = Tuple[Any, Any]  # weight and bias
FORMS = {'reference': reference, 'native': native}


class Choice(NamedTuple):
    """Which form runs, and in which precision it multiplies: 'float32' or 'bf16' (native only)."""
    form: str = 'reference'
    precision: str = 'float32'


_chosen = Choice()


def chosen() -> Choice:
    """The choice in force."""
    return _chosen


def choose(precision: str, contexts: Sequence[Any]) -> Choice:
    """Native operators where all contexts are CPUs and the library is there, else the reference; makes that the choice.

    precision is 'float32', 'bf16', or 'auto': bf16 where the CPU multiplies it faster, else float32.

    Raises:
        ValueError: bf16 is asked for where nothing can compute it; says why and what to use instead.
    """
    global _chosen
    _chosen = Choice(*native.decide(precision, contexts))
    return _chosen


@contextlib.contextmanager
def using(form: str, precision: str = 'float32') -> Iterator[None]:
    """While entered, `form` runs in `precision`: what is exported, for example, must not need our library.

    Raises:
        NotBuilt: the native form, which is not there.
        ValueError: bf16 where nothing can compute it.
    """
    global _chosen
    if form == 'native':
        native.admit(precision)
    elif precision != 'float32':
        raise ValueError(f"operators: the {form} form computes in float32, not in {precision}")
    before, _chosen = _chosen, Choice(form, precision)
    try:
        yield
    finally:
        _chosen = before


def _form() -> Any:
    return FORMS[_chosen.form]


def layer_norm(F: Any, x: Any, weight: Any, bias: Any, eps: float, *, width: int) -> Any:
    """x (..., C) with zero mean and unit variance over C = `width`, times weight (C,) plus bias (C,)."""
    return _form().layer_norm(F, x, weight, bias, eps, width=width)


def linear(F: Any, x: Any, weight: Any, bias: Any = None, gelu: bool = False, *, units: int) -> Any:
    """x (..., K) times weight (M, K) transposed, plus bias (M,): (..., M), M = `units`; then, if asked, exact GELU."""
    return _form().linear(F, x, weight, bias, gelu, units=units)


def attention(F: Any, x: Any, norm: Pair, qkv: Pair, proj: Pair, bias: Any = None, gamma: Any = None, keep: Any = None,
              mask: Any = None, *, width: int, heads: int, tokens: int, eps: float, windows: Optional[Windows] = None,
              recompute: bool = False) -> Any:
    """A transformer's first half block: x + keep * gamma * proj(attention(qkv(norm(x)))), (B, L, C) to the same.

    Each pair is a weight and a bias; qkv's weight is (3C, C). bias (1, H, N, N), or None, is added to the scores
    between the N tokens of a sequence: all L = `tokens` of an image or, with `windows`, those of one window, then N =
    window^2. Where windows are shifted, mask (windows, 1, N, N) is `shift_mask`. gamma (C,), or None, scales channels
    (Touvron et al. 2021, arXiv:2103.17239); keep (B, 1), or None, scales an image's branch, 0 dropping it (Huang et al.
    2016, arXiv:1603.09382). C = `width`. With `recompute`, native only, nothing between is kept for the backward pass.
    """
    return _form().attention(F, x, norm, qkv, proj, bias, gamma, keep, mask, width=width, heads=heads, tokens=tokens,
                             eps=eps, windows=windows, recompute=recompute)


def mlp(F: Any, x: Any, norm: Pair, fc1: Pair, fc2: Pair, gamma: Any = None, keep: Any = None, rows: Any = None, *,
        width: int, hidden: int, eps: float, recompute: bool = False) -> Any:
    """A transformer's second half block: x + keep * gamma * fc2(gelu(fc1(norm(x)))), (B, L, C) to the same.

    gamma, keep and recompute as in `attention`; `hidden` is fc1's width. rows (B, L) is 0 for tokens whose result
    nobody will use, and whose gradient is therefore zero: they may be left as they are.
    """
    return _form().mlp(F, x, norm, fc1, fc2, gamma, keep, rows, width=width, hidden=hidden, eps=eps,
                       recompute=recompute)


def patchify(F: Any, image: Any, side: int, cell: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """An image of side x side pixels to its cells of cell x cell: (B, cells, 3 * cell^2), each ordered (channel, y, x),
    as in a convolution.

    image is either float32 (B, 3, side, side), normalised already, or uint8 (B, side, side, 3), and then becomes
    (image / 255 - mean) / std. As a symbol, it may be uint8 in the native form only.
    """
    return _form().patchify(F, image, side, cell, mean, std)


def masked_loss(F: Any, tokens: Any, decoder: Pair, target: Any, mask: Any, *, cell: int, patch: int, prefix: int,
                kind: str) -> Any:
    """SimMIM's loss (1,): the mean over masked pixels of |d| (kind 'l1') or d^2 ('mse'), d = decoded - target.

    tokens (B, prefix + cells, C), of which the first `prefix` are ignored, are decoded by the pair (3 * cell^2, C) and
    (3 * cell^2,). target (B, cells, 3 * cell^2), of which no gradient exists. mask (B, h, w) is on the grid of patches
    of patch x patch pixels, 1 for masked; a cell holds one patch or several. The sum is divided by the number of masked
    pixels + 1e-5 and by the 3 channels, as the reference does.
    """
    return _form().masked_loss(F, tokens, decoder, target, mask, cell=cell, patch=patch, prefix=prefix, kind=kind)
