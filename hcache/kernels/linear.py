"""Products of a few rows with large weight matrices, bound by reading the weights.

Libraries reach three quarters of the memory's bandwidth here: their tiles are made for many rows. Each
program takes a strip of one weight's rows, streams it through a deep pipeline and multiplies on tensor cores.
Weights that share an input share a launch, as a small weight alone can't fill the device.

Shapes: x [M, K] with at most ROWS rows, up to MOST weights [N, K] of their own N each, bias [N].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave

ROWS = 16
"""Most rows of x: one tile of a tensor core."""

MOST = 3
"""Weights of a launch: queries, keys and values."""


class Tuning(NamedTuple):
    """Rows of a weight a program takes, columns a stage loads, warps, depth of the pipeline."""

    strip: int
    block: int
    warps: int
    stages: int


NARROW, LONG, WIDE = Tuning(32, 256, 4, 6), Tuning(32, 512, 4, 4), Tuning(64, 128, 4, 5)
"""For weights of few rows together, so that most SMs have a strip; of these for long rows; for the others.
Measured on an H200 (bf16, M = 1, `python -m runners.kernels --only products`), N x K of 4096 x 4096,
4096 x 14336, 6144 x 4096 and 128256 x 4096: 11.1, 29.8, 16.1 and 236 us; torch: 13.1, 31.9, 28.6 (three
launches) and 247.
"""

NARROW_ROWS, LONG_ROW = 4096, 8192


def tuning_of(outer: int, inner: int) -> Tuning:
    """The tuning for weights with `outer` rows together, of `inner` numbers each."""
    if outer > NARROW_ROWS:
        return WIDE
    return LONG if inner > LONG_ROW else NARROW


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """x @ weight.T + bias [M, N]; see `linears`."""
    return linears(x_MK, [weight_NK], [] if bias_N is None else [bias_N], tuning=tuning)[0]


def linears(
    x_MK: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual_MN: Tensor | None = None,
    tuning: Tuning | None = None,
) -> list[Tensor]:
    """x @ weight.T + bias, + residual, [M, N] for every weight, summed in float32; one launch.

    Product and sum with the residual are each rounded to the dtype of x, as by kernels of their own.

    Args:
        x_MK: contiguous, bfloat16 or float16, M from 1 to ROWS.
        weights: one to MOST [N, K], contiguous, same dtype.
        biases: one [N] a weight, contiguous, or none at all.
        residual_MN: contiguous, for one weight alone.
        tuning: by default one that goes by the rows of all weights together.
    """
    rows, inner = x_MK.shape
    assert 1 <= rows <= ROWS
    assert 1 <= len(weights) <= MOST
    assert len(biases) in (0, len(weights))
    assert all(w.shape[1] == inner and w.dtype == x_MK.dtype for w in weights)
    assert all(part.is_contiguous() for part in (x_MK, *weights, *biases))
    outer = [w.shape[0] for w in weights]
    assert residual_MN is None or (residual_MN.shape == (rows, *outer) and residual_MN.is_contiguous())
    tuning = tuning or tuning_of(sum(outer), inner)
    outs = [torch.empty(rows, n, dtype=x_MK.dtype, device=x_MK.device) for n in outer]
    spare = MOST - len(weights)
    _linears[(sum(triton.cdiv(n, tuning.strip) for n in outer),)](
        x_MK, *_filled(weights, spare), *_filled(biases or outs, spare), *_filled(outs, spare),
        x_MK if residual_MN is None else residual_MN, *outer, *[0] * spare, rows, inner,
        bool(biases), residual_MN is not None, ROWS, tuning.strip, tuning.block,
        num_warps=tuning.warps, num_stages=tuning.stages, **chained(x_MK.device),
    )  # fmt: skip
    return outs


def _filled(parts: Sequence[Tensor], spare: int) -> list[Tensor]:
    """With pointers for weights that aren't there, which nobody follows."""
    return [*parts, *[parts[0]] * spare]


@triton.jit(do_not_specialize=["outer", "second_outer", "third_outer"])
def _linears(  # type: ignore[no-untyped-def]
    x, weight, second, third, bias, second_bias, third_bias, out, second_out, third_out, residual,
    outer, second_outer, third_outer, rows, inner: tl.constexpr,
    has_bias: tl.constexpr, has_residual: tl.constexpr, rows_pad: tl.constexpr,
    strip: tl.constexpr, block: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """Programs of the first weight come first, then those of the second, then those of the third."""
    index = tl.program_id(0)
    strips = tl.cdiv(outer, strip)
    more = tl.cdiv(second_outer, strip)
    if index >= strips + more:
        weight, bias, out, outer = third, third_bias, third_out, third_outer
        index -= strips + more
    elif index >= strips:
        weight, bias, out, outer = second, second_bias, second_out, second_outer
        index -= strips
    enter(chain)
    n = index * strip + tl.arange(0, strip)
    m = tl.arange(0, rows_pad)
    k = tl.arange(0, block)
    weights = weight + n.to(tl.int64)[:, None] * inner + k[None, :]
    sums_NM = tl.zeros([strip, rows_pad], tl.float32)
    for start in range(0, inner, block):
        live = start + k < inner
        w_NK = tl.load(weights + start, mask=(n < outer)[:, None] & live[None, :], other=0.0,
                       eviction_policy="evict_first")  # fmt: skip
        x_KM = tl.load(x + m[None, :] * inner + (start + k)[:, None],
                       mask=(m < rows)[None, :] & live[:, None], other=0.0)  # fmt: skip
        sums_NM = tl.dot(w_NK, x_KM, sums_NM)
    leave(chain)
    if has_bias:
        sums_NM += tl.load(bias + n, mask=n < outer, other=0.0).to(tl.float32)[:, None]
    place = m[None, :].to(tl.int64) * outer + n[:, None]
    mask = (m < rows)[None, :] & (n < outer)[:, None]
    result_NM = sums_NM.to(out.dtype.element_ty)
    if has_residual:
        before_NM = tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        result_NM = (before_NM + result_NM.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + place, result_NM, mask=mask)
