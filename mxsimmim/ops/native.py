"""The native form of the operators: calls what the compiled library registered with MXNet. See `OpBackend`.

MXNet does not tell such an operator whether to replace what a result's buffer holds or to add to it, so it replaces. In
two cases results should be added: to the gradient of a parameter with grad_req='add', which is given as `Added` so that
the operator knows (models/layers.py), and to the gradient of an array that eight operators or more use, such as ViT's
shared bias, which must be given to them in smaller groups (models/vit.py).
"""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import reference
from .boxes import CANONICAL, LEVEL
from .layout import Windows

Pair = Tuple[Any, Any]
KINDS = {'l1': 0, 'mse': 1}


class Added(NamedTuple):
    """An input to whose gradient an operator adds its own."""
    value: Any


def taken(*inputs: Any) -> Tuple[List[Any], Dict[str, int]]:
    """Return the inputs as MXNet takes them, and the attribute that says which are `Added`: bit i for input i."""
    added = sum(1 << number for number, given in enumerate(inputs) if isinstance(given, Added))
    return [given.value if isinstance(given, Added) else given for given in inputs], {'add': added} if added else {}


def optional(**inputs: Any) -> Tuple[list, dict]:
    """The inputs that are there, and an attribute for each that says so."""
    there = {name: value for name, value in inputs.items() if value is not None}
    return list(there.values()), dict.fromkeys(there, 1)


def layer_norm(F: Any, x: Any, weight: Any, bias: Any, eps: float, *, width: int) -> Any:
    """Compute `OpBackend.layer_norm`."""
    inputs, added = taken(x, weight, bias)
    return F.mxsimmim_layer_norm(*inputs, eps=eps, **added)


def group_norm(F: Any, x: Any, weight: Any, bias: Any, eps: float, *, groups: int, channels: int) -> Any:
    """Compute `OpBackend.group_norm`."""
    inputs, added = taken(x, weight, bias)
    return F.mxsimmim_group_norm(*inputs, eps=eps, groups=groups, **added)


def linear(F: Any, x: Any, weight: Any, bias: Any = None, gelu: bool = False, *, units: int,
           precision: str = 'float32') -> Any:
    """Compute `OpBackend.linear`."""
    more, flags = optional(bias=bias)
    inputs, added = taken(x, weight, *more)
    y = F.mxsimmim_linear(*inputs, bf16=precision == 'bf16', gelu=gelu, **flags, **added)
    return y[0] if gelu else y


def attention(F: Any, x: Any, norm: Pair, qkv: Pair, proj: Pair, bias: Any = None, gamma: Any = None, keep: Any = None,
              mask: Any = None, *, width: int, heads: int, tokens: int, eps: float, windows: Optional[Windows] = None,
              size: Optional[int] = None, partial: bool = False, recompute: bool = False, precision: str = 'float32'
              ) -> Any:
    """Compute `OpBackend.attention`."""
    more, flags = optional(proj_bias=proj[1], bias=bias, mask=mask, gamma=gamma, keep=keep)
    if windows:
        flags.update(windows._asdict())
    if size:
        flags['depth'] = size
    inputs, added = taken(x, *norm, *qkv, proj[0], *more)
    y = F.mxsimmim_attention(*inputs, heads=heads, eps=eps, bf16=precision == 'bf16', partial=partial,
                             recompute=recompute, **flags, **added)
    return y if recompute else y[0]


def cosine_attention(F: Any, x: Any, qkv: Pair, proj: Pair, scale: Any, bias: Any, mask: Any = None, *, width: int,
                     heads: int, size: int, windows: Windows, precision: str = 'float32') -> Any:
    """Compute `OpBackend.cosine_attention`: native products, and MXNet's own operators between them."""
    return reference.cosine_attention(F, x, qkv, proj, scale, bias, mask, width=width, heads=heads, size=size,
                                      windows=windows, precision=precision, product=linear)


def mlp(F: Any, x: Any, norm: Pair, fc1: Pair, fc2: Pair, gamma: Any = None, keep: Any = None, rows: Any = None, *,
        width: int, hidden: int, eps: float, partial: bool = False, recompute: bool = False,
        precision: str = 'float32') -> Any:
    """Compute `OpBackend.mlp`."""
    more, flags = optional(fc2_bias=fc2[1], gamma=gamma, keep=keep, rows=rows)
    inputs, added = taken(x, *norm, *fc1, fc2[0], *more)
    y = F.mxsimmim_mlp(*inputs, eps=eps, bf16=precision == 'bf16', partial=partial, recompute=recompute, **flags,
                       **added)
    return y if recompute else y[0]


def patchify(F: Any, image: Any, size: Tuple[int, int], cell: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Compute `OpBackend.patchify`."""
    return F.mxsimmim_patchify(image, cell=cell, **_numbered('mean', mean), **_numbered('std', std))


def masked_loss(F: Any, tokens: Any, decoder: Pair, target: Any, mask: Any, *, cell: int, patch: int, prefix: int,
                kind: str, precision: str = 'float32') -> Any:
    """Compute `OpBackend.masked_loss`; masked cells only are decoded."""
    inputs, added = taken(tokens, *decoder, target, mask)
    loss, _ = F.mxsimmim_masked_loss(*inputs, prefix=prefix, kind=KINDS[kind], bf16=int(precision == 'bf16'), **added)
    return loss


def pyramid_pool(F: Any, maps: Sequence[Any], boxes: Any, *, strides: Sequence[int], side: int, samples: int) -> Any:
    """Compute `OpBackend.pyramid_pool`."""
    return F.mxsimmim_pyramid_pool(*maps, boxes, levels=len(maps), side=side, samples=samples, canonical=CANONICAL,
                                   level=LEVEL, **_numbered('stride', strides))


def match_boxes(F: Any, boxes: Any, truth: Any, kind: Any) -> Tuple[Any, Any, Any, Any]:
    """Compute `OpBackend.match_boxes`."""
    return tuple(F.mxsimmim_match_boxes(boxes, truth, kind))


def _numbered(name: str, values: Sequence[float]) -> Dict[str, float]:
    """Attributes of a native operator are single numbers."""
    return {f'{name}{number}': value for number, value in enumerate(values)}
