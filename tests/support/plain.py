"""Blocks of transformers in NumPy: which tokens see each other is written down, without padding, windows or masks."""
import math

import numpy as np

ERF = np.vectorize(math.erf)


def together(windows):
    """(L, L): whether two tokens are in one window after the shift, and were neighbours before it."""
    places = []
    for side in (windows.height, windows.width):
        count = -(-side // windows.window)
        shift = windows.shift if count > 1 else 0
        place = np.arange(side)
        moved = (place - shift) % (count * windows.window)
        places.append((moved // windows.window) * 2 + (place < shift))  # what is before the shift comes out at the end
    key = (places[0][:, None] * 1000 + places[1]).reshape(-1)
    return key[:, None] == key


def offset_bias(table, height, width, reach):
    """The bias (H, L, L) that a table (rows, H) of a map, or window, of `reach` tokens down and across has for offsets.

    0 for those that it has not.
    """
    y, x = np.divmod(np.arange(height * width), width)
    dy, dx = y[:, None] - y, x[:, None] - x
    down, across = reach
    there = (abs(dy) < down) & (abs(dx) < across)
    rows = np.where(there, (dy + down - 1) * (2 * across - 1) + dx + across - 1, 0)
    return np.where(there, table[rows].transpose(2, 0, 1), 0)


def normed(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + eps) * weight + bias


def attention(x, norm, qkv, proj, bias, seen, heads, eps, gamma=1.0):
    """x (B, L, C) + gamma * attention of norm(x), each token attending to those that `seen` (L, L) says."""
    images, tokens, width = x.shape
    parts = (normed(x, *norm, eps) @ qkv[0].T + qkv[1]).reshape(images, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = parts[0] @ parts[1].swapaxes(-1, -2) / np.sqrt(width // heads)
    scores = np.where(seen, scores + bias, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ parts[2]
    return x + gamma * (mixed.transpose(0, 2, 1, 3).reshape(x.shape) @ proj[0].T + proj[1])


def mlp(x, norm, fc1, fc2, eps, gamma=1.0):
    hidden = normed(x, *norm, eps) @ fc1[0].T + fc1[1]
    hidden = hidden * (1 + ERF(hidden / math.sqrt(2))) / 2
    return x + gamma * (hidden @ fc2[0].T + fc2[1])


def cells(image, cell):
    """(B, 3, H, W) to (B, cells, 3 * cell^2)."""
    images, _, height, width = image.shape
    parts = image.reshape(images, 3, height // cell, cell, width // cell, cell).transpose(0, 2, 4, 1, 3, 5)
    return parts.reshape(images, -1, 3 * cell * cell)
