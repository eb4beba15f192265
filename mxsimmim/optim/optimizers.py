"""Optimisers: how gradients become updates, on each device alike."""
import math
from typing import Dict, Iterable, List, Mapping, Optional, Tuple, Type

import mxnet as mx
import numpy as np
from mxnet.gluon import Parameter

from ..config import OptimConfig
from ..ops import REFERENCE, OpBackend, adamw


def adamw_arguments(optim: OptimConfig, update: int, lr: float) -> Dict[str, float]:
    """What makes MXNet's adamw_update the AdamW of update number `update`, counted from 0; decay is left to the caller.

    The operator has no bias correction: fold it into rate and epsilon. It works with the betas rounded to float32,
    where 1 - 0.999 is off by 1.3e-5: correct for those.
    """
    beta1, beta2 = (float(np.float32(beta)) for beta in optim.betas)
    root = math.sqrt(1 - beta2 ** (update + 1))
    return dict(lr=lr * root / (1 - beta1 ** (update + 1)), beta1=beta1, beta2=beta2, epsilon=optim.eps * root, wd=0,
                eta=1.0)


class Optimizer:
    """Decoupled weight decay, and what the optimisers have in common: their state is some moments a parameter.

    Moments are float32, shaped like their parameter, one copy a device. The state of all devices is equal, because
    they see equal gradients.
    """

    MOMENTS: Tuple[str, ...] = ()

    def __init__(self, parameters: Mapping[str, Parameter], decays: Mapping[str, float], optim: OptimConfig,
                 lr_scales: Optional[Mapping[str, float]] = None, backend: OpBackend = REFERENCE):
        self.backend = backend
        self._parameters, self._decays, self._optim = parameters, decays, optim
        self._scales = lr_scales or dict.fromkeys(parameters, 1.0)
        self.moments: Dict[str, List[mx.nd.NDArray]] = {
            f'{moment}.{name}': [mx.nd.zeros(p.shape, ctx=ctx) for ctx in p.list_ctx()]
            for moment in self.MOMENTS for name, p in parameters.items()}

    def update(self, update: int, lr: float, scales: Iterable[mx.nd.NDArray], floor: float = 0.0) -> None:
        """Update number `update`, counted from 0, on each device with its gradients times its scale (1,).

        A scale of 0 leaves weights and moments alone; that is decided on the device. A parameter's rate lies between
        `floor`, the schedule's rate for a base rate of 0, and `lr`, as its lr_scale says.
        """
        rates = [lr if self._scales[name] == 1 else floor + self._scales[name] * (lr - floor)
                 for name in self._parameters]
        factors = [rate * self._decays[name] for name, rate in zip(self._parameters, rates)]
        for device, scale in enumerate(scales):
            weights = [p.list_data()[device] for p in self._parameters.values()]
            grads = [p.list_grad()[device] for p in self._parameters.values()]
            self._apply(weights, grads, device, scale, update, rates, factors)

    def _apply(self, weights: List[mx.nd.NDArray], grads: List[mx.nd.NDArray], device: int, scale: mx.nd.NDArray,
               update: int, rates: List[float], factors: List[float]) -> None:
        """Decays each weight by its factor, then steps with its rate."""
        raise NotImplementedError

    def arrays(self) -> Dict[str, np.ndarray]:
        """The moments as NumPy arrays, named `mean.NAME` and `var.NAME`."""
        return {name: copies[0].asnumpy() for name, copies in self.moments.items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Sets the moments from what `arrays` returned."""
        for name, copies in self.moments.items():
            for copy in copies:
                copy[:] = arrays[name]


class AdamW(Optimizer):
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), as PyTorch computes it: epsilon outside the corrected root."""

    MOMENTS = ('mean', 'var')

    def _apply(self, weights: List[mx.nd.NDArray], grads: List[mx.nd.NDArray], device: int, scale: mx.nd.NDArray,
               update: int, rates: List[float], factors: List[float]) -> None:
        copies = [[self.moments[f'{moment}.{name}'] for name in self._parameters] for moment in self.MOMENTS]
        means, variances = ([moment[device] for moment in moments] for moments in copies)
        steps = {rate: adamw_arguments(self._optim, update, rate) for rate in set(rates)}
        first = steps[rates[0]]  # of which all but the rate is common to all
        adamw.update(weights, grads, means, variances,
                     [(steps[rate]['lr'], factor) for rate, factor in zip(rates, factors)],
                     scale, backend=self.backend, shared=len(copies[0][0]) > 1, beta1=first['beta1'],
                     beta2=first['beta2'], epsilon=first['epsilon'])


class SGD(Optimizer):
    """w <- w - lr g, no momentum."""

    def _apply(self, weights: List[mx.nd.NDArray], grads: List[mx.nd.NDArray], device: int, scale: mx.nd.NDArray,
               update: int, rates: List[float], factors: List[float]) -> None:
        adamw.decay(weights, factors, scale)
        for weight, grad, rate in zip(weights, grads, rates):
            # NaN times 0 is NaN: a skipped step needs a choice, not a product.
            step = mx.nd.broadcast_mul(grad.reshape((-1,)), scale * rate)
            step = mx.nd.where(mx.nd.broadcast_to(scale != 0, step.shape), step, mx.nd.zeros_like(step))
            flat = weight.reshape((-1,))
            mx.nd.elemwise_sub(flat, step, out=flat)


OPTIMIZERS: Dict[str, Type[Optimizer]] = {'adamw': AdamW, 'sgd': SGD}
