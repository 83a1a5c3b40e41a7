"""The gated half of an MLP for a few rows: silu(x @ gate.T) * (x @ up.T), without the products in between.

Each program streams the same strip of both weights. Bound by reading them, as in hcache.kernels.linear.

Shapes: x [M, K] with at most ROWS rows, gate and up [N, K].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave
from hcache.kernels.linear import ROWS, Tuning

TUNING = Tuning(64, 128, 4, 4)
"""`strip` counts rows of each weight. Measured on an H200 for 2 x 14336 x 4096 (bf16, M = 1,
`python -m runners.kernels --only products`): 57.1 us, torch 66.4.
"""


def swiglu(x_MK: Tensor, gate_NK: Tensor, up_NK: Tensor, tuning: Tuning = TUNING) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) [M, N] in the dtype of x.

    Sums and silu in float32; products, silu and result are each rounded to the dtype, as by kernels of
    their own.

    Args:
        x_MK: contiguous, bfloat16 or float16, M from 1 to ROWS.
        gate_NK, up_NK: contiguous, same dtype.
    """
    rows, inner = x_MK.shape
    outer = gate_NK.shape[0]
    assert 1 <= rows <= ROWS
    assert gate_NK.shape == up_NK.shape == (outer, inner)
    assert x_MK.dtype == gate_NK.dtype == up_NK.dtype
    assert all(part.is_contiguous() for part in (x_MK, gate_NK, up_NK))
    out_MN = torch.empty(rows, outer, dtype=x_MK.dtype, device=x_MK.device)
    _swiglu[(triton.cdiv(outer, tuning.strip),)](
        x_MK, gate_NK, up_NK, out_MN, rows, outer, inner, ROWS, tuning.strip, tuning.block,
        num_warps=tuning.warps, num_stages=tuning.stages, **chained(x_MK.device),
    )  # fmt: skip
    return out_MN


@triton.jit
def _swiglu(  # type: ignore[no-untyped-def]
    x, gate, up, out, rows, outer, inner: tl.constexpr,
    rows_pad: tl.constexpr, strip: tl.constexpr, block: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    enter(chain)
    n = tl.program_id(0) * strip + tl.arange(0, strip)
    m = tl.arange(0, rows_pad)
    k = tl.arange(0, block)
    offsets = n.to(tl.int64)[:, None] * inner + k[None, :]
    gate_NM = tl.zeros([strip, rows_pad], tl.float32)
    up_NM = tl.zeros([strip, rows_pad], tl.float32)
    for start in range(0, inner, block):
        live = start + k < inner
        mask = (n < outer)[:, None] & live[None, :]
        g_NK = tl.load(gate + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first")
        u_NK = tl.load(up + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first")
        x_KM = tl.load(x + m[None, :] * inner + (start + k)[:, None],
                       mask=(m < rows)[None, :] & live[:, None], other=0.0)  # fmt: skip
        gate_NM = tl.dot(g_NK, x_KM, gate_NM)
        up_NM = tl.dot(u_NK, x_KM, up_NM)
    leave(chain)
    kind = out.dtype.element_ty
    g_NM = gate_NM.to(kind).to(tl.float32)
    silu_NM = (g_NM / (1.0 + tl.exp(-g_NM))).to(kind).to(tl.float32)
    result_NM = (silu_NM * up_NM.to(kind).to(tl.float32)).to(kind)
    place = out + m[None, :].to(tl.int64) * outer + n[:, None]
    tl.store(place, result_NM, mask=(m < rows)[None, :] & (n < outer)[:, None])
