"""What a forward pass costs, counted from the configuration."""
import math
from typing import List, Tuple

from ..config import ModelConfig


def multiply_adds(config: ModelConfig, decoder: bool = True) -> int:
    """Multiply-adds of one image's forward pass through encoder and, if asked, decoder: the papers' "FLOPs".

    Matrix products only; normalisation, softmax and activations are a few per cent more. So is SwinV2's network of
    positions, which is computed once a batch.
    """
    return sum(segment_costs(config, decoder))


def segment_costs(config: ModelConfig, decoder: bool = True) -> List[int]:
    """Multiply-adds of each of a network's `segments()`: embedding, blocks, head. A classifier's head costs nothing."""
    width, tokens = config.embed_dim, math.prod(config.patches)
    costs = [tokens * 3 * config.patch_size ** 2 * width]
    if config.type == 'vit':  # whose blocks see the cls token, too
        window = min(config.window_size, max(config.patches)) ** 2
        costs += [_block(tokens + 1, width, tokens + 1 if config.sees_all(block) else window, config.mlp_ratio)
                  for block in range(config.depth)]
    else:
        for stage, depth in enumerate(config.depths):
            window = min(config.window_size, max(config.tokens(stage)))
            costs += depth * [_block(tokens, width, window * window, config.mlp_ratio)]
            if stage < config.stages - 1:  # four tokens of this width become one of twice the width
                tokens, width = math.prod(config.tokens(stage + 1)), 2 * width
                costs[-1] += tokens * 2 * width * width
    return [*costs, tokens * width * 3 * config.stride ** 2 if decoder else 0]


def token_shapes(config: ModelConfig) -> List[Tuple[int, int]]:
    """(tokens, width) of an image between the halves of blocks: one of ViT's, one of each of Swin's stages."""
    if config.type == 'vit':
        return [(math.prod(config.patches) + 1, config.embed_dim)]
    return [(math.prod(config.tokens(stage)), config.embed_dim << stage) for stage in range(config.stages)]


def _block(tokens: int, width: int, seen: int, mlp_ratio: float) -> int:
    """One block in which each token attends to `seen` tokens: projections, MLP, attention."""
    return int(tokens * width * width * (4 + 2 * mlp_ratio) + 2 * tokens * seen * width)
