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


NARROW, WIDE = Tuning(32, 256, 4, 4), Tuning(64, 128, 4, 5)
"""For weights of few rows together, so that most SMs have a strip, and for the others. Measured on an H200
(bf16, M = 1, K = 4096) for N = 4096, 6144 and 28672: 11.6, 14.7 and 56.5 us; cuBLAS: 12.9, 15.6 and 57.3.
"""

NARROW_ROWS = 4096


def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, tuning: Tuning | None = None) -> Tensor:
    """x @ weight.T + bias [M, N]; see `linears`."""
    return linears(x_MK, [weight_NK], [] if bias_N is None else [bias_N], tuning)[0]


def linears(
    x_MK: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], tuning: Tuning | None = None
) -> list[Tensor]:
    """x @ weight.T + bias [M, N] for every weight, in the dtype of x and summed in float32; one launch.

    Args:
        x_MK: contiguous, bfloat16 or float16, M from 1 to ROWS.
        weights: one to MOST [N, K], contiguous, same dtype.
        biases: one [N] a weight, contiguous, or none at all.
        tuning: by default one that goes by the rows of all weights together.
    """
    rows, inner = x_MK.shape
    assert 1 <= rows <= ROWS
    assert 1 <= len(weights) <= MOST
    assert len(biases) in (0, len(weights))
    assert all(w.shape[1] == inner and w.dtype == x_MK.dtype for w in weights)
    assert all(part.is_contiguous() for part in (x_MK, *weights, *biases))
    outer = [w.shape[0] for w in weights]
    tuning = tuning or (NARROW if sum(outer) <= NARROW_ROWS else WIDE)
    outs = [torch.empty(rows, n, dtype=x_MK.dtype, device=x_MK.device) for n in outer]
    spare = MOST - len(weights)
    _linears[(sum(triton.cdiv(n, tuning.strip) for n in outer),)](
        x_MK, *_filled(weights, spare), *_filled(biases or outs, spare), *_filled(outs, spare),
        *outer, *[0] * spare, rows, inner, bool(biases), ROWS, tuning.strip, tuning.block,
        num_warps=tuning.warps, num_stages=tuning.stages,
    )  # fmt: skip
    return outs


def _filled(parts: Sequence[Tensor], spare: int) -> list[Tensor]:
    """With pointers for weights that aren't there, which nobody follows."""
    return [*parts, *[parts[0]] * spare]


@triton.jit(do_not_specialize=["outer", "second_outer", "third_outer"])
def _linears(  # type: ignore[no-untyped-def]
    x, weight, second, third, bias, second_bias, third_bias, out, second_out, third_out,
    outer, second_outer, third_outer, rows, inner: tl.constexpr, has_bias: tl.constexpr,
    rows_pad: tl.constexpr, strip: tl.constexpr, block: tl.constexpr,
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
    if has_bias:
        sums_NM += tl.load(bias + n, mask=n < outer, other=0.0).to(tl.float32)[:, None]
    place = out + m[None, :].to(tl.int64) * outer + n[:, None]
    tl.store(place, sums_NM.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < outer)[:, None])
