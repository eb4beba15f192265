"""AdamW over all parameters of a device, and sums of squares, in both forms of the operators.

Apart from the other operators, because it imports mxnet.
"""
from typing import Sequence, Tuple

import mxnet as mx
import numpy as np

from ..runtime import mxnet_private
from .backend import OpBackend

Arrays = Sequence[mx.nd.NDArray]
Rates = Sequence[Tuple[float, float]]


def update(weights: Arrays, grads: Arrays, means: Arrays, variances: Arrays, rates: Rates, scale: mx.nd.NDArray, *,
           backend: OpBackend, beta1: float, beta2: float, epsilon: float, copies: Arrays = (),
           shared: bool = False) -> None:
    """One update in place of float32 arrays of any shapes, the same for the four of a parameter, on one device.

    With (lr, factor) of `rates` for each weight: weight *= 1 - factor, then weight -= lr * mean / (sqrt(var) + epsilon)
    with the new moments of grad * scale. scale (1,) is read on the device: 0, and natively also what is not finite,
    leaves everything alone. copies, one a weight, are float16 arrays that receive the new weights' bits in bf16.
    `shared` says that other devices may still read these gradients.

    Raises:
        mxnet.MXNetError: shapes or types contradict each other.
    """
    form = _native_update if backend.is_native else _reference_update
    form(weights, grads, means, variances, rates, scale, copies, shared, beta1=beta1, beta2=beta2, epsilon=epsilon)


def square_sum(arrays: Arrays, backend: OpBackend) -> mx.nd.NDArray:
    """The sum of squares (1,) of all elements of float32 arrays; the native form adds them up in float64."""
    return (_native_square_sum if backend.is_native else _reference_square_sum)(arrays)


def decay(weights: Arrays, factors: Sequence[float], scale: mx.nd.NDArray) -> None:
    """Takes `factor` of each weight away, unless scale (1,) is 0, which is decided on the device."""
    longest = max(weight.size for weight in weights)
    left = {factor: mx.nd.broadcast_to(1 - factor * (scale != 0), (longest,)) for factor in set(factors) if factor}
    for weight, factor in zip(weights, factors):
        if factor:
            flat = weight.reshape((-1,))
            mx.nd.elemwise_mul(flat, left[factor][:flat.size], out=flat)


def _reference_update(weights: Arrays, grads: Arrays, means: Arrays, variances: Arrays, rates: Rates,
                     scale: mx.nd.NDArray, copies: Arrays, shared: bool, **constants: float) -> None:
    # PyTorch rounds after the decay and again after the step; the operator's own decay rounds once, which tells after
    # ten steps.
    decay(weights, [factor for _, factor in rates], scale)
    for weight, grad, mean, var, (lr, _) in zip(weights, grads, means, variances, rates):
        if shared:
            # adamw_update scales its gradient in place but tells the engine that it only reads it, and would overtake
            # copies to other devices that still read it. This write, of nothing new, waits for them.
            start = grad.reshape((-1,))[:1]
            mx.nd.elemwise_mul(start, mx.nd.ones_like(start), out=start)
        mx.nd.contrib.adamw_update(weight, grad, mean, var, scale, out=weight, lr=lr, wd=0, eta=1.0, **constants)
    for weight, copy in zip(weights, copies):
        copy[:] = round_to_bf16(weight.asnumpy()).view('float16')


def _native_update(weights: Arrays, grads: Arrays, means: Arrays, variances: Arrays, rates: Rates,
                  scale: mx.nd.NDArray, copies: Arrays, shared: bool, **constants: float) -> None:
    for weight in weights:
        # Inference may have left it in a layout of oneDNN's own: convolutions do, and an operator of ours would write
        # to a copy. Where MXNet is still about to reorder it, this comes too early and the update is lost: a network
        # with convolutions, of which there is none here, must be waited for between inference and update.
        mxnet_private.data_address(weight)
    mx.nd.mxsimmim_adamw(*weights, *grads, *means, *variances, *copies, mx.nd.array(rates, ctx=scale.context), scale,
                         count=len(weights), copies=int(bool(copies)), **constants)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits, as uint16, of the bf16 numbers nearest to float32 ones, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, 'float32').view('uint32')
    rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype('uint16')


def _reference_square_sum(arrays: Arrays) -> mx.nd.NDArray:
    # BLAS's dot product is five times as fast as MXNet's own norm on a CPU.
    return mx.nd.add_n(*(mx.nd.dot(flat, flat) for flat in (array.reshape((-1,)) for array in arrays)))


def _native_square_sum(arrays: Arrays) -> mx.nd.NDArray:
    return mx.nd.mxsimmim_square_sum(*arrays, count=len(arrays))
