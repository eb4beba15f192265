"""What a forward pass costs, counted from the configuration."""
from ..config import ModelConfig


def multiply_adds(config: ModelConfig, decoder: bool = True) -> int:
    """Multiply-adds of one image's forward pass through encoder and, if asked, decoder: the papers' "FLOPs".

    Matrix products only; normalisation, softmax and activations are a few per cent more.
    """
    width, tokens = config.embed_dim, config.grid ** 2
    total = tokens * 3 * config.patch_size ** 2 * width
    if config.type == 'vit':
        tokens += 1  # cls
        total += config.depth * _block(tokens, width, tokens, config.mlp_ratio)
        tokens -= 1
    else:
        for stage, depth in enumerate(config.depths):
            window = min(config.window_size, config.grid >> stage)
            total += depth * _block(tokens, width, window * window, config.mlp_ratio)
            if stage < config.stages - 1:  # four tokens of this width become one of twice the width
                tokens, width = tokens // 4, 2 * width
                total += tokens * 2 * width * width
    return total + (tokens * width * 3 * config.stride ** 2 if decoder else 0)


def _block(tokens: int, width: int, seen: int, mlp_ratio: float) -> int:
    """One block in which each token attends to `seen` tokens: projections, MLP, attention."""
    return int(tokens * width * width * (4 + 2 * mlp_ratio) + 2 * tokens * seen * width)
