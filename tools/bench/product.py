#!/usr/bin/env python
"""How fast this machine multiplies the matrices of a training step, and the floor that this sets for the step.

Every product that a step of SimMIM cannot do without, forward and backward, is timed alone: by oneDNN, on all threads,
its operands where they are best for it. The sum is the least that a step can take with these products. It counts the
decoder, and the MLP of the last block, on masked tokens only: of the others nobody uses the result.

    python tools/bench/product.py --model vit_base --batch 8

Prints tables for docs/benchmarks.md. Needs the native operators. Takes about a minute.
"""
import argparse
import ctypes
import math
import sys
from typing import TYPE_CHECKING, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from common import CELL, RATIO, Case, add_case_options, cases, describe, model_config

if TYPE_CHECKING:
    from mxsimmim.config import ModelConfig

FORWARD, INPUT, WEIGHT = 'forward', 'input gradient', 'weight gradient'
REPEATS = 9
Shape = Tuple[int, int, int]  # (m, k) times (k, n)
Rates = Dict[str, Dict[Shape, float]]  # precision -> shape -> GFLOP/s


class Product(NamedTuple):
    """`count` products (m, k) times (k, n) of a step: of which part of the model, and in which pass."""
    part: str
    phase: str
    shape: Shape
    count: int  # type: ignore[assignment]  # tuple has a method of this name

    @property
    def flops(self) -> float:
        """Of all of them; a multiply-add is two."""
        return 2.0 * math.prod(self.shape) * self.count


def products(config: 'ModelConfig', images: int, masked: int) -> List[Product]:
    """The products of a step over so many images, `masked` of the final tokens of each being masked.

    Those of attention are many small ones: one with all heads of an image in its rows stands for them.
    """
    width, tokens, prefix = config.embed_dim, config.grid ** 2, int(config.type == 'vit')
    found = [*_linear('linear', images * tokens, 3 * config.patch_size ** 2, width, first=True)]
    for stage, (depth, heads) in enumerate(_stages(config)):
        window = min(config.window_size, config.grid >> stage) ** 2 if config.type == 'swin' else tokens + prefix
        rows = images * (tokens + prefix)
        for block in range(depth):
            final = stage == config.stages - 1 and block == depth - 1
            found += _attention(images, tokens + prefix, window, width, heads)
            seen, hidden = images * masked if final else rows, int(width * config.mlp_ratio)
            found += [*_linear('mlp', seen, width, hidden), *_linear('mlp', seen, hidden, width)]
        if stage < config.stages - 1:  # four tokens of this width become one of twice the width
            tokens, width = tokens // 4, 2 * width
            found += _linear('linear', images * tokens, 2 * width, width)
    found += _linear('loss', images * masked, width, 3 * config.stride ** 2)
    total: Dict[Tuple[str, str, Shape], int] = {}
    for part, phase, shape, count in found:
        total[part, phase, shape] = total.get((part, phase, shape), 0) + count
    return [Product(*key, count) for key, count in total.items()]


def _stages(config: 'ModelConfig') -> List[Tuple[int, int]]:
    """(blocks, heads) of each stage."""
    return list(zip(config.depths if config.type == 'swin' else (config.depth,), config.heads))


def _linear(part: str, rows: int, inputs: int, outputs: int, first: bool = False) -> Iterator[Product]:
    """A linear map of `rows` tokens; the `first` of a network needs no gradient of what it is given."""
    yield Product(part, FORWARD, (rows, inputs, outputs), 1)
    if not first:
        yield Product(part, INPUT, (rows, outputs, inputs), 1)
    yield Product(part, WEIGHT, (outputs, rows, inputs), 1)


def _attention(images: int, tokens: int, seen: int, width: int, heads: int) -> Iterator[Product]:
    """Attention of each image's tokens to `seen` of them: scores and mixture, and the gradients of their factors."""
    yield from _linear('attention', images * tokens, width, 3 * width)
    yield from _linear('attention', images * tokens, width, width)
    scores, mixture = (tokens * heads, width // heads, seen), (tokens * heads, seen, width // heads)
    yield Product('attention', FORWARD, scores, images)
    yield Product('attention', FORWARD, mixture, images)
    yield Product('attention', INPUT, scores, images)       # of the probabilities
    yield Product('attention', INPUT, mixture, 3 * images)  # of queries, keys and values


def masked_tokens(config: 'ModelConfig') -> int:
    """Final tokens of an image that are masked, a cell of the mask holding one or several."""
    return math.ceil(RATIO * (config.side // CELL) ** 2) * (CELL // config.stride) ** 2


def step_products(case: Case) -> List[Product]:
    config = model_config(case.model)
    return products(config, case.batch, masked_tokens(config))


class Multiplier:
    """The native library's own measurement of a product."""

    def __init__(self, threads: int):
        """Raises mxsimmim's NotBuilt where there is no library."""
        from mxsimmim import config as cfg
        from mxsimmim.runtime import environment
        environment.prepare(cfg.RuntimeConfig(threads=threads))
        from mxsimmim.ops import library
        opened = library.open_library()
        self.isa = opened.isa
        self._rate = ctypes.CDLL(str(opened.path)).mxsimmim_product_rate
        self._rate.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] * 2
        self._rate.restype = ctypes.c_double

    def can(self, precision: str) -> bool:
        from mxsimmim.ops.library import BF16, EMULATED
        return precision != 'bf16' or self.isa in BF16 + EMULATED

    def rates(self, of: Iterable[Case]) -> Rates:
        """GFLOP/s of each product of these cases, medians."""
        found: Rates = {}
        for case in of:
            known = found.setdefault(case.arithmetic, {})
            for product in step_products(case):
                if product.shape not in known:
                    rate = self._rate(*product.shape, int(case.arithmetic == 'bf16'), REPEATS)
                    assert rate > 0, f'oneDNN cannot multiply {product.shape} in {case.arithmetic}'
                    known[product.shape] = rate
        return found


def measured_rates(args: argparse.Namespace, threads: int) -> Optional[Rates]:
    """As `Multiplier.rates`, of the cases that the options ask for; None where there is no library.

    Takes a precision that this machine cannot compute out of `args`, with a word on stderr.
    """
    from mxsimmim.ops.build import NotBuilt
    try:
        multiplier = Multiplier(threads)
    except NotBuilt as error:
        args.precision = [precision for precision in args.precision if precision != 'bf16']
        print(f'no bf16, no rates of products, no floors: {error}', file=sys.stderr)
        return None
    for precision in [precision for precision in args.precision if not multiplier.can(precision)]:
        args.precision.remove(precision)
        print(f'no {precision}: this CPU has {multiplier.isa}', file=sys.stderr)
    return multiplier.rates(cases(args))


def seconds(product: Product, rates: Dict[Shape, float]) -> float:
    return product.flops / rates[product.shape] / 1e9


def floor(of: Iterable[Product], rates: Dict[Shape, float]) -> float:
    """Seconds that these products take."""
    return sum(seconds(product, rates) for product in of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser)
    args = parser.parse_args()
    from mxsimmim.runtime import facts
    machine = facts.collect()
    threads = args.threads or machine.cores
    rates = measured_rates(args, threads)
    if rates is None:
        sys.exit(1)
    print(f'{describe(machine, threads)}; medians of {REPEATS}')
    for case in cases(args):
        print('\n'.join(table(case, rates[case.precision])), flush=True)


def table(case: Case, rates: Dict[Shape, float]) -> List[str]:
    """A table of the products of a step, the slowest first, and the floor."""
    of = sorted(step_products(case), key=lambda product: -seconds(product, rates))
    least, best = floor(of, rates), max(rates.values())
    flops = sum(product.flops for product in of)
    lines = ['', f'{case.title}: {flops / 1e9:.0f} GFLOP in {least:.2f} s, {flops / least / 1e9:.0f} GFLOP/s, '
             f'{case.batch / least:.1f} images/s; best rate {best:.0f} GFLOP/s', '',
             '| part | pass | product | times | GFLOP/s | ms |', '|---|---|---|--:|--:|--:|']
    for p in of:
        lines.append(f"| {p.part} | {p.phase} | {' x '.join(map(str, p.shape))} | {p.count} | {rates[p.shape]:.0f} "
                     f'| {1e3 * seconds(p, rates):.1f} |')
    return lines


if __name__ == '__main__':
    main()
