"""RMSNorm over the last dimension, one program a row: one launch for what plain torch does in six.

Shapes: x [R, D], weight [D].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave

WIDEST = 1 << 15
"""Largest D: a program holds its row in registers."""


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * (x * rsqrt(mean(x**2) + eps)) in the dtype of x: the bracket in float32, then rounded to it.

    Args:
        x_RD: contiguous, at least one row.
        weight_D: contiguous, same dtype.
    """
    rows, dim = x_RD.shape
    assert rows >= 1
    assert dim <= WIDEST
    assert weight_D.dtype == x_RD.dtype
    assert x_RD.is_contiguous()
    assert weight_D.is_contiguous()
    out_RD = torch.empty_like(x_RD)
    dim_pad = triton.next_power_of_2(dim)
    warps = min(16, max(1, dim_pad // 512))
    _rms_norm[(rows,)](x_RD, weight_D, out_RD, eps, dim, dim_pad, num_warps=warps, **chained(x_RD.device))
    return out_RD


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x, weight, out, eps, dim: tl.constexpr, dim_pad: tl.constexpr, chain: tl.constexpr
):  # fmt: skip
    enter(chain)
    leave(chain)
    d = tl.arange(0, dim_pad)
    place = tl.program_id(0).to(tl.int64) * dim + d
    x_D = tl.load(x + place, mask=d < dim, other=0.0).to(tl.float32)
    weight_D = tl.load(weight + d, mask=d < dim, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_D * x_D, 0) / dim + eps)
    kind = out.dtype.element_ty
    result_D = weight_D * (x_D * scale).to(kind).to(tl.float32)
    tl.store(out + place, result_D.to(kind), mask=d < dim)
