"""Optimisers: how gradients become updates, on each device alike."""
import math
from typing import Dict, Iterable, List, Mapping, Sequence, Tuple, Type

import mxnet as mx
import numpy as np

from ..config import OptimConfig
from ..models import ParameterSpec, joined
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
    """Decoupled weight decay, and what the optimisers have in common: their state is some moments a weight.

    Moments are float32, shaped like their weight, one copy on each of its contexts. The state of all replicas is equal,
    because they see equal gradients.
    """

    MOMENTS: Tuple[str, ...] = ()

    def __init__(self, specs: Iterable[ParameterSpec], optim: OptimConfig, backend: OpBackend = REFERENCE):
        """Prepare to update the trainable ones of `specs`; their contexts are those of this moment."""
        self.backend, self._optim = backend, optim
        self._specs = [spec for spec in specs if spec.trainable]
        self.moments: Dict[str, List[mx.nd.NDArray]] = {
            f'{moment}.{spec.key}': [mx.nd.zeros(spec.parameter.shape, ctx=ctx) for ctx in spec.parameter.list_ctx()]
            for moment in self.MOMENTS for spec in self._specs}
        self._places: Dict[mx.Context, List[Tuple[int, int]]] = {}  # of each context: (weight, its copy there)
        for number, spec in enumerate(self._specs):
            for copy, ctx in enumerate(spec.parameter.list_ctx()):
                self._places.setdefault(ctx, []).append((number, copy))

    def update(self, update: int, lr: float, scale: mx.nd.NDArray, floor: float = 0.0) -> None:
        """Makes update number `update`, counted from 0, on each context with its gradients times scale (1,).

        A scale of 0 leaves weights and moments alone; that is decided on the device. A weight's rate lies between
        `floor`, the schedule's rate for a base rate of 0, and `lr`, as its lr_scale says.
        """
        rates = [lr if spec.lr_scale == 1 else floor + spec.lr_scale * (lr - floor) for spec in self._specs]
        for ctx, places in self._places.items():
            self._apply(places, scale.as_in_context(ctx), update, [rates[number] for number, _ in places],
                        [rates[number] * self._specs[number].decay for number, _ in places])

    def _apply(self, places: Sequence[Tuple[int, int]], scale: mx.nd.NDArray, update: int, rates: List[float],
               factors: List[float]) -> None:
        """Decays each weight by its factor, then steps with its rate."""
        raise NotImplementedError

    def _arrays(self, places: Sequence[Tuple[int, int]]) -> Tuple[List[mx.nd.NDArray], List[mx.nd.NDArray]]:
        """Weights and gradients on one context."""
        parameters = [(self._specs[number].parameter, copy) for number, copy in places]
        return [p.list_data()[copy] for p, copy in parameters], [p.list_grad()[copy] for p, copy in parameters]

    def arrays(self) -> Dict[str, np.ndarray]:
        """Return the moments of whole parameters, named `mean.NAME` and `var.NAME`."""
        return self.whole([copies[0].asnumpy() for copies in self.moments.values()])

    def whole(self, values: Sequence[np.ndarray]) -> Dict[str, np.ndarray]:
        """Return what takes the place of each of the moments, in their order, as `arrays` returns these."""
        count = len(self._specs)
        return {f'{moment}.{name}': value for number, moment in enumerate(self.MOMENTS)
                for name, value in joined(self._specs, values[number * count:(number + 1) * count]).items()}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Sets the moments from what `arrays` returned."""
        for name in self.names():
            self.set(name, arrays[name])

    def names(self) -> List[str]:
        """Return the names of the whole parameters' moments, as `arrays` has them."""
        return list(dict.fromkeys(f'{moment}.{spec.name}' for moment in self.MOMENTS for spec in self._specs))

    def set(self, name: str, whole: np.ndarray) -> None:
        """Set one of `names`."""
        moment, _, parameter = name.partition('.')
        for spec in self._specs:
            if spec.name == parameter:
                for copy in self.moments[f'{moment}.{spec.key}']:
                    copy[:] = spec.part_of(whole)


class AdamW(Optimizer):
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), as PyTorch computes it: epsilon outside the corrected root."""

    MOMENTS = ('mean', 'var')

    def _apply(self, places: Sequence[Tuple[int, int]], scale: mx.nd.NDArray, update: int, rates: List[float],
               factors: List[float]) -> None:
        weights, grads = self._arrays(places)
        means, variances = ([self.moments[f'{moment}.{self._specs[number].key}'][copy] for number, copy in places]
                            for moment in self.MOMENTS)
        steps = {rate: adamw_arguments(self._optim, update, rate) for rate in set(rates)}
        first = steps[rates[0]]  # of which all but the rate is common to all
        adamw.update(weights, grads, means, variances,
                     [(steps[rate]['lr'], factor) for rate, factor in zip(rates, factors)], scale,
                     backend=self.backend, shared=any(len(self._specs[n].parameter.list_ctx()) > 1 for n, _ in places),
                     beta1=first['beta1'], beta2=first['beta2'], epsilon=first['epsilon'])


class SGD(Optimizer):
    """w <- w - lr g, no momentum."""

    def _apply(self, places: Sequence[Tuple[int, int]], scale: mx.nd.NDArray, update: int, rates: List[float],
               factors: List[float]) -> None:
        weights, grads = self._arrays(places)
        adamw.decay(weights, factors, scale)
        for weight, grad, rate in zip(weights, grads, rates):
            # NaN times 0 is NaN: a skipped step needs a choice, not a product.
            step = mx.nd.broadcast_mul(grad.reshape((-1,)), scale * rate)
            step = mx.nd.where(mx.nd.broadcast_to(scale != 0, step.shape), step, mx.nd.zeros_like(step))
            flat = weight.reshape((-1,))
            mx.nd.elemwise_sub(flat, step, out=flat)


OPTIMIZERS: Dict[str, Type[Optimizer]] = {'adamw': AdamW, 'sgd': SGD}
