"""Optimisers, what they decay, and the learning rate of each step."""
import bisect
import math
from typing import Callable, Dict, Iterable, List, Mapping, Optional, Tuple, Type

import mxnet as mx
import numpy as np
from mxnet.gluon import HybridBlock, Parameter

from .config import OptimConfig, TrainConfig
from .models import named_parameters
from .ops import adamw

REFERENCE_BATCH = 512  # the batch the configured rates are for
# Parameters, besides vectors and biases, that a recipe does not decay. The reference decays ViT's mask token and every
# relative position table in pre-training, because its name test misses the `encoder.` prefix.
NO_DECAY = {
    ('reference', 'vit'): ('pos_embed', 'cls_token'),
    ('reference', 'swin'): ('absolute_pos_embed', 'mask_token'),
    ('fixed', 'vit'): ('pos_embed', 'cls_token', 'mask_token', 'relative_position_bias_table'),
    ('fixed', 'swin'): ('absolute_pos_embed', 'mask_token', 'relative_position_bias_table'),
}


def weight_decays(parameters: Mapping[str, Parameter], recipe: str, kind: str, decay: float) -> Dict[str, float]:
    """Weight decay of each parameter by name; `kind` is the model's type."""
    exempt = NO_DECAY[recipe, kind]
    return {name: 0.0 if len(p.shape) == 1 or name.endswith(('.bias',) + exempt) else decay
            for name, p in parameters.items()}


def parameter_groups(net: HybridBlock, layer_decay: float, weight_decay: float,
                     recipe: str = 'reference') -> Dict[str, Tuple[float, float]]:
    """(lr_scale, weight_decay) of each of a classifier's parameters, by official name.

    A block's rate is layer_decay times that of the block after it (Clark et al. 2020, arXiv:2003.10555; Bao et al.
    2022, arXiv:2106.08254): embeddings come first, what follows the last block has the full rate. In fine-tuning the
    reference recognises Swin's position tables and does not decay them; ViT's it still does.
    """
    config = net.config
    last = config.blocks + 1
    fixed = 'fixed' if config.type == 'swin' else recipe
    decays = weight_decays(named_parameters(net), fixed, config.type, weight_decay)
    return {name: (layer_decay ** (last - _layer(name, config.depths, last)), decay) for name, decay in decays.items()}


def _layer(name: str, depths: Tuple[int, ...], last: int) -> int:
    """0 for embeddings, 1 to the number of blocks for these, `last` for the rest."""
    parts = name.split('.')
    if parts[0] in ('cls_token', 'pos_embed', 'absolute_pos_embed', 'patch_embed'):
        return 0
    if parts[0] == 'blocks':
        return 1 + int(parts[1])
    if parts[0] == 'layers':  # merging belongs to the last block of its stage
        before, stage = sum(depths[:int(parts[1])]), depths[int(parts[1])]
        return before + (1 + int(parts[3]) if parts[2] == 'blocks' else stage)
    return last


def learning_rates(optim: OptimConfig, train: TrainConfig, per_epoch: int, total: int) -> Callable[..., float]:
    """The learning rate of update k, counted from 0, as a function of k, and of a scale of the base rate alone.

    Linear warm-up from warmup_lr, then cosine to min_lr (Loshchilov and Hutter 2017, arXiv:1608.03983) or drops at
    milestones. The reference moves its schedule after each update, so updates 0 and 1 both use the warm-up rate and
    update k uses time k-1; it counts accumulated parts, the last one of an update being the one that moves it. Its
    cosine starts at step 0, not where the warm-up ends; the `fixed` recipe starts it there.
    """
    scale = train.batch_size / REFERENCE_BATCH
    base, first, last = optim.base_lr * scale, optim.warmup_lr * scale, optim.min_lr * scale
    warmup = optim.warmup.steps(per_epoch, total)
    milestones = sorted(m.steps(per_epoch, total) for m in optim.milestones)
    origin = warmup if optim.recipe == 'fixed' else 0

    def after_warmup(t: float, top: float) -> float:
        if optim.schedule == 'multistep':
            return top * optim.gamma ** bisect.bisect_right(milestones, t)
        if optim.schedule == 'cosine' and total > origin:
            turn = min((t - origin) / (total - origin), 1.0)
            return last + (top - last) * (1 + math.cos(math.pi * turn)) / 2
        return top

    def rate(update: float, scale: float = 1.0) -> float:
        t = max(update - 1 / train.accumulate, 0)  # a server that counts its own updates asks between two
        top = base * scale
        return first + t * (top - first) / warmup if t < warmup else after_warmup(t, top)

    return rate


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
                 lr_scales: Optional[Mapping[str, float]] = None):
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

    def arrays(self) -> Dict[str, object]:
        """The moments as NumPy arrays, named `mean.NAME` and `var.NAME`."""
        return {name: copies[0].asnumpy() for name, copies in self.moments.items()}

    def load(self, arrays: Mapping[str, object]) -> None:
        """Sets the moments from what `arrays` returned."""
        for name, copies in self.moments.items():
            for copy in copies:
                copy[:] = arrays[name]


class AdamW(Optimizer):
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), as PyTorch computes it: epsilon outside the corrected root."""

    MOMENTS = ('mean', 'var')

    def _apply(self, weights, grads, device, scale, update, rates, factors):
        copies = [[self.moments[f'{moment}.{name}'] for name in self._parameters] for moment in self.MOMENTS]
        means, variances = ([moment[device] for moment in moments] for moments in copies)
        steps = {rate: adamw_arguments(self._optim, update, rate) for rate in set(rates)}
        constants = {key: steps[rates[0]][key] for key in ('beta1', 'beta2', 'epsilon')}
        adamw.update(weights, grads, means, variances,
                     [(steps[rate]['lr'], factor) for rate, factor in zip(rates, factors)],
                     scale, shared=len(copies[0][0]) > 1, **constants)


class SGD(Optimizer):
    """w <- w - lr g, no momentum."""

    def _apply(self, weights, grads, device, scale, update, rates, factors):
        adamw.decay(weights, factors, scale)
        for weight, grad, rate in zip(weights, grads, rates):
            # NaN times 0 is NaN: a skipped step needs a choice, not a product.
            step = mx.nd.broadcast_mul(grad.reshape((-1,)), scale * rate)
            step = mx.nd.where(mx.nd.broadcast_to(scale != 0, step.shape), step, mx.nd.zeros_like(step))
            flat = weight.reshape((-1,))
            mx.nd.elemwise_sub(flat, step, out=flat)


OPTIMIZERS: Dict[str, Type[Optimizer]] = {'adamw': AdamW, 'sgd': SGD}
