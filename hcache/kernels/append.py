"""Append one token to every segment of flat key and value buffers, in one launch.

Shapes: S segments (one a sequence and KV head), D head dim; keys and values are flat [slots, D].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hcache.kernels.chain import chained, enter, leave


def append(
    k_SD: Tensor, v_SD: Tensor, keys: Tensor, values: Tensor, first_S: Tensor, lengths_S: Tensor
) -> None:
    """Write one token per segment behind its last one, and lengthen every segment by it.

    No host synchronisation; the caller has made room.

    Args:
        k_SD, v_SD: [S, D]; numbers of a row are adjacent, rows may be strided.
        keys, values: [slots, D] of the same dtype, contiguous; written at slots first + length.
        first_S: [S] int64, first slot of each segment.
        lengths_S: [S] int32, tokens of each segment; one more afterwards.
    """
    segments, dim = k_SD.shape
    assert k_SD.stride(1) == v_SD.stride(1) == 1
    assert all(x.is_contiguous() for x in (keys, values, first_S, lengths_S))
    assert k_SD.dtype == v_SD.dtype == keys.dtype == values.dtype
    if segments:
        _append[(segments,)](
            k_SD, v_SD, keys, values, first_S, lengths_S, k_SD.stride(0), v_SD.stride(0),
            dim, triton.next_power_of_2(dim), num_warps=1, **chained(keys.device),
        )  # fmt: skip


@triton.jit
def _append(  # type: ignore[no-untyped-def]
    k, v, keys, values, first, lengths, k_stride, v_stride,
    dim: tl.constexpr, dim_pad: tl.constexpr, chain: tl.constexpr,
):  # fmt: skip
    """One program a segment, of one warp: all its threads have read the length before one writes it."""
    enter(chain)
    leave(chain)
    s = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, dim_pad)
    inside = d < dim
    length = tl.load(lengths + s)
    place = (tl.load(first + s) + length) * dim + d
    key = tl.load(k + s * k_stride + d, mask=inside)
    value = tl.load(v + s * v_stride + d, mask=inside)
    tl.store(keys + place, key, mask=inside)
    tl.store(values + place, value, mask=inside)
    tl.debug_barrier()
    tl.store(lengths + s, length + 1)
