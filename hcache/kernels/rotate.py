"""Rotary position embedding of a token's queries and keys, and the norm of heads before it, in one launch.

Shapes: B sequences, Hq and H heads, D head dim; q [B, Hq*D] and k [B, H*D] as projections leave them,
cos and sin [B, D].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave


def rotate(
    q: Tensor,
    k: Tensor,
    cos_BD: Tensor,
    sin_BD: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """q and k, rotated in the halves' convention: x * cos + (-second half, first half) * sin.

    Products and sum are each rounded to the dtype, as by kernels of their own; so is a norm before.

    Args:
        q, k: contiguous, bfloat16 or float16.
        cos_BD, sin_BD: contiguous, same dtype.
        norms, eps: weights [D] of RMSNorms over each head of q and of k.
    """
    batch, dim = cos_BD.shape
    heads, kv_heads = q.shape[1] // dim, k.shape[1] // dim
    assert q.dtype == k.dtype == cos_BD.dtype == sin_BD.dtype
    assert q.shape[0] == k.shape[0] == batch
    assert dim % 2 == 0
    assert all(part.is_contiguous() for part in (q, k, cos_BD, sin_BD))
    assert norms is None or all(weight.is_contiguous() for weight in norms)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    q_norm, k_norm = norms or (cos_BD, cos_BD)
    _rotate[(batch, heads + kv_heads)](
        q, k, q_out, k_out, cos_BD, sin_BD, q_norm, k_norm, eps,
        heads, kv_heads, dim, triton.next_power_of_2(dim // 2), norms is not None,
        num_warps=1, enable_fp_fusion=False, **chained(q.device),  # a fused product would not be rounded
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    q, k, q_out, k_out, cos, sin, q_norm, k_norm, eps, heads, kv_heads,
    dim: tl.constexpr, half_pad: tl.constexpr, has_norm: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """One program a head."""
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    enter(chain)
    leave(chain)
    if h < heads:
        _rotate_head(q, q_out, cos + b * dim, sin + b * dim, q_norm, eps,
                     (b * heads + h) * dim, dim, half_pad, has_norm)  # fmt: skip
    else:
        _rotate_head(k, k_out, cos + b * dim, sin + b * dim, k_norm, eps,
                     (b * kv_heads + h - heads) * dim, dim, half_pad, has_norm)  # fmt: skip


@triton.jit
def _rotate_head(  # type: ignore[no-untyped-def]
    x, out, cos, sin, norm, eps, at, dim: tl.constexpr, half_pad: tl.constexpr, has_norm: tl.constexpr
):
    half: tl.constexpr = dim // 2
    kind = out.dtype.element_ty
    d = tl.arange(0, half_pad)
    inside = d < half
    low = tl.load(x + at + d, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + half + d, mask=inside, other=0.0).to(tl.float32)
    if has_norm:
        scale = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / dim + eps)
        low_weight = tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
        high_weight = tl.load(norm + half + d, mask=inside, other=0.0).to(tl.float32)
        low = ((low * scale).to(kind).to(tl.float32) * low_weight).to(kind).to(tl.float32)
        high = ((high * scale).to(kind).to(tl.float32) * high_weight).to(kind).to(tl.float32)
    low_cos = tl.load(cos + d, mask=inside, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + d, mask=inside, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + half + d, mask=inside, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + half + d, mask=inside, other=0.0).to(tl.float32)
    first = (low * low_cos).to(kind).to(tl.float32) - (high * low_sin).to(kind).to(tl.float32)
    second = (high * high_cos).to(kind).to(tl.float32) + (low * high_sin).to(kind).to(tl.float32)
    tl.store(out + at + d, first.to(kind), mask=inside)
    tl.store(out + at + half + d, second.to(kind), mask=inside)
