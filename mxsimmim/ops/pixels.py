"""The reference form of the operators on pixels: images to cells, and SimMIM's loss on cells. `reference` offers them.

A cell is a square of pixels, a row of 3 * cell^2 values ordered (channel, y, x). F is mx.nd or mx.sym.
"""
from typing import Any, Sequence, Tuple

AUTO = -1  # in MXNet's reshape: infer this size


def swap(F: Any, x: Any, *shape: int) -> Any:
    """Views x as the 4-D `shape` and swaps its middle axes, the one transpose MXNet does at memory speed on a CPU."""
    return F.transpose(F.reshape(x, shape=shape), axes=(0, 2, 1, 3))


def to_cells(F: Any, image: Any, size: Tuple[int, int], cell: int) -> Any:
    """(B, 3, height, width) to (B, cells, 3*cell*cell): a row a cell, ordered (channel, y, x) as in a convolution."""
    down, across = size[0] // cell, size[1] // cell
    rows = swap(F, image, AUTO, 3, down, cell * size[1])      # (B, down, 3, cell*width)
    cells = swap(F, rows, AUTO, 3 * cell, across, cell)       # (B*down, across, 3*cell, cell)
    return F.reshape(cells, shape=(AUTO, down * across, 3 * cell * cell))


def from_cells(F: Any, cells: Any, side: int, cell: int) -> Any:
    """The inverse of `to_cells` for squares; the order is that of PyTorch's pixel shuffle."""
    n = side // cell
    rows = swap(F, cells, AUTO, n, 3 * cell, cell)            # (B*n, 3*cell, n, cell)
    image = swap(F, rows, AUTO, n, 3, cell * side)            # (B, 3, n, cell*side)
    return F.reshape(image, shape=(AUTO, 3, side, side))


def normalise(F: Any, image: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Turn bytes (B, S, S, 3) into (image / 255 - mean) / std of each channel, float32 (B, 3, S, S)."""
    return F.image.normalize(F.image.to_tensor(image), mean=tuple(mean), std=tuple(std))


def patchify(F: Any, image: Any, size: Tuple[int, int], cell: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """See `OpBackend.patchify`. A graph does not know the type of its inputs: here a symbol is a float32 image."""
    if 'uint8' in str(getattr(image, 'dtype', '')):
        image = normalise(F, image, mean, std)
    return to_cells(F, image, size, cell)


def masked_loss(F: Any, tokens: Any, decoder: Tuple[Any, Any], target: Any, mask: Any, *, cell: int, patch: int,
                prefix: int, kind: str, precision: str = 'float32') -> Any:
    """See `OpBackend.masked_loss`; all cells are decoded, and weighted with the mask."""
    tokens = F.slice_axis(tokens, axis=1, begin=prefix, end=None)
    predicted = F.FullyConnected(tokens, *decoder, num_hidden=3 * cell ** 2, flatten=False)
    hidden = _masked_pixels(F, mask, cell // patch, patch)                          # (B, cells, 1, cell^2)
    error = F.reshape(predicted - F.BlockGrad(target), shape=(0, 0, 3, AUTO))       # (B, cells, 3, cell^2)
    error = F.abs(error) if kind == 'l1' else F.square(error)
    weights = F.concat(hidden, hidden, hidden, dim=2)
    return F.sum(error * weights) / (F.sum(hidden) + 1e-5) / 3


def _masked_pixels(F: Any, mask: Any, patches: int, size: int) -> Any:
    """The mask (B, h, w) as one of pixels, a row a cell: (B, cells, 1, cell^2).

    A patch has size x size pixels, a cell patches x patches patches.
    """
    mask = F.reshape(F.cast(mask, dtype='float32'), shape=(0, -4, AUTO, patches, -4, AUTO, patches))
    mask = F.reshape(F.transpose(mask, axes=(0, 1, 3, 2, 4)), shape=(0, -3, 0, 0))  # (B, cells, y, x)
    mask = F.reshape(mask, shape=(0, 0, patches, 1, patches, 1))
    mask = F.broadcast_axis(mask, axis=(3, 5), size=(size, size))                   # (B, cells, y, size, x, size)
    return F.reshape(mask, shape=(0, 0, 1, AUTO))

