"""What every network of a task has."""
from typing import Any, Dict, List, Set, Tuple

import mxnet as mx
from mxnet.gluon import HybridBlock, Parameter

from ..config import ModelConfig
from ..ops import OpBackend
from .pixels import PixelInput
from .shards import Shard


class TaskNetwork(HybridBlock):
    """An encoder and what a task puts on it; computes with `backend` for good."""

    def __init__(self, config: ModelConfig, backend: OpBackend, mean: Tuple[float, ...], std: Tuple[float, ...]):
        super().__init__()
        self.config, self.backend, self.pixels = config, backend, PixelInput(mean, std, backend)
        self.elsewhere: Set[str] = set()  # `Parameter.name` of those that this worker does not hold
        self.shards: Dict[str, List[Tuple[Shard, Parameter]]] = {}  # of parameters that `division.divide` has cut

    def kept(self, image: Any, keep: Any = None) -> List[Any]:
        """Return the factors of stochastic depth (B, 2 * blocks), if its graph takes any: ones where none are given.

        A cached graph always takes the arguments it was built with, in training and out of it.
        """
        if keep is None and self.config.drop_path and isinstance(image, mx.nd.NDArray):
            keep = mx.nd.ones((image.shape[0], 2 * self.config.blocks), ctx=image.context)
        return [] if keep is None else [keep]
