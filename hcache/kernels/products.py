"""Our projections, norms and rotation as operators; those of the first two kinds torch.compile can trace.

On CUDA they are the kernels of hcache.kernels.linear, gate, norm and rotate; on a CPU plain torch in the
steps of transformers' own code, of any dtype. Needs no Triton until a kernel runs. For inference: no
gradients.

Shapes: x [..., K], weights [N, K], biases [N]; of a norm x [..., D], weight [D].
"""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional as F

# Operators read annotations: these are types, not strings, whatever the __future__ import does.
Tensors = list[Tensor]
Optional = Tensor | None


@torch.library.custom_op("hcache::linears", mutates_args=(), device_types="cpu")
def linears(x: Tensor, weights: Tensors, biases: Tensors, residual: Optional = None) -> Tensors:
    """x @ weight.T + bias [..., N] for one to three weights, in one launch; no biases at all, or one each.

    Args:
        residual: [..., N], added to the product of a weight that is alone.
    """
    outs = [F.linear(x, weight, bias) for weight, bias in zip_longest(weights, biases)]
    return outs if residual is None else [residual + outs[0]]


@linears.register_kernel("cuda")
def _(x: Tensor, weights: Tensors, biases: Tensors, residual: Optional = None) -> Tensors:
    from hcache.kernels.linear import linears as launch

    outs = launch(_rows(x), weights, biases, None if residual is None else _rows(residual))
    return [out.view(*x.shape[:-1], -1) for out in outs]


@linears.register_fake
def _(x: Tensor, weights: Tensors, biases: Tensors, residual: Optional = None) -> Tensors:
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
    return _normed(x, weight, eps)


@rms_norm.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from hcache.kernels.norm import rms_norm as launch

    return launch(_rows(x), weight, eps).view(x.shape)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    """q [..., Hq*D] and k [..., H*D] with each head rotated, and before that normed where there are norms.

    Args:
        cos, sin: [..., D] of each token, for the halves' convention: x * cos + (-second, first half) * sin.
        norms, eps: weights [D] of RMSNorms over the heads of q and of k.
    """
    if q.is_cuda:
        from hcache.kernels.rotate import rotate as launch

        outs = launch(_rows(q), _rows(k), _rows(cos), _rows(sin), norms, eps)
        return outs[0].view(q.shape), outs[1].view(k.shape)
    q_norm, k_norm = norms or (None, None)
    return _rotated(q, cos, sin, q_norm, eps), _rotated(k, cos, sin, k_norm, eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_float = x.float()
    scaled = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    heads = x.unflatten(-1, (-1, cos.shape[-1]))
    heads = heads if norm is None else _normed(heads, norm, eps)
    low, high = heads.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return (heads * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).flatten(-2)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
