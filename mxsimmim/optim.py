"""AdamW, what it decays, and the learning rate of each step."""
import bisect
import math
from typing import Callable, Dict, Iterable, List, Mapping

import mxnet as mx
import numpy as np
from mxnet.gluon import Parameter

from .config import OptimConfig, TrainConfig

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


def learning_rates(optim: OptimConfig, train: TrainConfig, per_epoch: int, total: int) -> Callable[[int], float]:
    """The learning rate of update k, counted from 0, as a function of k.

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

    def after_warmup(t: float) -> float:
        if optim.schedule == 'multistep':
            return base * optim.gamma ** bisect.bisect_right(milestones, t)
        if optim.schedule == 'cosine' and total > origin:
            turn = min((t - origin) / (total - origin), 1.0)
            return last + (base - last) * (1 + math.cos(math.pi * turn)) / 2
        return base

    def rate(update: int) -> float:
        t = update - 1 / train.accumulate if update else 0
        return first + t * (base - first) / warmup if t < warmup else after_warmup(t)

    return rate


class AdamW:
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), as PyTorch computes it: epsilon outside the corrected root.

    State: two moments a parameter and device, float32, shaped like the parameter. The state of all devices is equal,
    because they see equal gradients.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decays: Mapping[str, float], optim: OptimConfig):
        self._parameters, self._decays = parameters, decays
        self._betas, self._eps = optim.betas, optim.eps
        self.mean: Dict[str, List[mx.nd.NDArray]] = {n: self._zeros(p) for n, p in parameters.items()}
        self.var: Dict[str, List[mx.nd.NDArray]] = {n: self._zeros(p) for n, p in parameters.items()}

    @staticmethod
    def _zeros(parameter: Parameter) -> List[mx.nd.NDArray]:
        return [mx.nd.zeros(parameter.shape, ctx=ctx) for ctx in parameter.list_ctx()]

    def update(self, update: int, lr: float, scales: Iterable[mx.nd.NDArray]) -> None:
        """Update number `update`, counted from 0, on each device with its gradients times its scale (1,).

        A scale of 0 leaves weights and moments alone; MXNet's operator decides that on the device.
        """
        # MXNet's operator has no bias correction: fold it into rate and epsilon. It works with the betas rounded to
        # float32, where 1 - 0.999 is off by 1.3e-5: correct for those. PyTorch rounds after the decay and again after
        # the step; the operator's own decay rounds once, which tells after ten steps.
        beta1, beta2 = (float(np.float32(beta)) for beta in self._betas)
        root = math.sqrt(1 - beta2 ** (update + 1))
        corrected = lr * root / (1 - beta1 ** (update + 1))
        longest = max(int(np.prod(p.shape)) for p in self._parameters.values())
        for device, scale in enumerate(scales):
            decayed = {decay: mx.nd.broadcast_to(1 - lr * decay * (scale != 0), (longest,))
                       for decay in set(self._decays.values()) if decay}
            for name, p in self._parameters.items():
                weight, decay = p.list_data()[device], self._decays[name]
                if decay:
                    flat = weight.reshape((-1,))
                    mx.nd.elemwise_mul(flat, decayed[decay][:flat.size], out=flat)
                mx.nd.contrib.adamw_update(
                    weight, p.list_grad()[device], self.mean[name][device], self.var[name][device], scale, out=weight,
                    lr=corrected, beta1=beta1, beta2=beta2, epsilon=self._eps * root, wd=0, eta=1.0)

    def arrays(self) -> Dict[str, object]:
        """The moments as NumPy arrays, named `mean.NAME` and `var.NAME`."""
        return {f'{kind}.{name}': copies[0].asnumpy() for kind, moment in (('mean', self.mean), ('var', self.var))
                for name, copies in moment.items()}

    def load(self, arrays: Mapping[str, object]) -> None:
        """Sets the moments from what `arrays` returned."""
        for kind, moment in (('mean', self.mean), ('var', self.var)):
            for name, copies in moment.items():
                for copy in copies:
                    copy[:] = arrays[f'{kind}.{name}']
