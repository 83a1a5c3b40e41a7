"""Our projections and norms as operators of torch, which torch.compile traces without looking inside.

On CUDA they are the kernels of hcache.kernels.linear, gate and norm; on a CPU plain torch in the steps of
transformers' own code, of any dtype. Needs no Triton until a kernel runs. For inference: no gradients.

Shapes: x [..., K], weights [N, K], biases [N]; of a norm x [..., D], weight [D].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Operators read annotations: these are types, not strings, whatever the __future__ import does.
Tensors = list[Tensor]


@torch.library.custom_op("hcache::linears", mutates_args=(), device_types="cpu")
def linears(x: Tensor, weights: Tensors, biases: Tensors) -> Tensors:
    """x @ weight.T + bias [..., N] for one to three weights, in one launch; no biases at all, or one each."""
    if not biases:
        return [F.linear(x, weight) for weight in weights]
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@linears.register_kernel("cuda")
def _(x: Tensor, weights: Tensors, biases: Tensors) -> Tensors:
    from hcache.kernels.linear import linears as launch

    return [out.view(*x.shape[:-1], -1) for out in launch(_rows(x), weights, biases)]


@linears.register_fake
def _(x: Tensor, weights: Tensors, biases: Tensors) -> Tensors:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@torch.library.custom_op("hcache::swiglu", mutates_args=(), device_types="cpu")
def swiglu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) [..., N]."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


@swiglu.register_kernel("cuda")
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    from hcache.kernels.gate import swiglu as launch

    return launch(_rows(x), gate, up).view(*x.shape[:-1], -1)


@swiglu.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate.shape[0])


@torch.library.custom_op("hcache::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * (x * rsqrt(mean(x**2) + eps)), the bracket in float32 and then rounded to the dtype of x."""
    x_float = x.float()
    scaled = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


@rms_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from hcache.kernels.norm import rms_norm as launch

    return launch(_rows(x), weight, eps).view(x.shape)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
