"""Between a batch's images and a network: who normalises them, and with what."""
from dataclasses import dataclass
from typing import Any, Tuple

import mxnet as mx
import numpy as np

from ..config import DataConfig
from ..ops import OpBackend
from ..ops.pixels import normalise

MEAN, STD = DataConfig().mean, DataConfig().std


@dataclass(frozen=True)
class PixelInput:
    """Give uint8 images (B, H, W, 3) zero mean and unit deviation in each channel: (image / 255 - mean) / std.

    Native operators do it where they cut an image into cells, so bytes go into their networks as they are; for the
    reference `prepare` does it before the network. The bits are the same. float32 images (B, 3, H, W) are normalised
    already.
    """
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    backend: OpBackend

    def prepare(self, image: mx.nd.NDArray) -> mx.nd.NDArray:
        """Return the image as the network takes it, on the device where it is."""
        if image.dtype != np.uint8 or self.backend.is_native:
            return image
        return normalise(mx.nd, image, self.mean, self.std)

    def cells(self, F: Any, image: Any, size: Tuple[int, int], cell: int) -> Any:
        """Cut a prepared image of `size` pixels, height and width, into cells, inside the network.

        See `OpBackend.patchify`.
        """
        return self.backend.patchify(F, image, size, cell, self.mean, self.std)
