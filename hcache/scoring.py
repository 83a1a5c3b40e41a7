"""Importance scores that several methods share: window attention, column sums, pooling, reduction over a
group.

Everything is float32: in half precision long sums stall and most variances are 0. Shapes are of one sequence:
q [Hq, n, D], k [H, n, D], G = Hq/H, w window rows. As in the official codes of SnapKV, PyramidKV and CAKE:
logits q.k/sqrt(D); softmax over all n columns with the causal mask in the last w columns, not renormalised
where these are cut off; an average pool that divides by the kernel at the edges too.

On CUDA half precision goes to the tensor cores as it is: a product of two such numbers is exact in float32,
in which it is added up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

SCRATCH_NUMBERS = 2**22
"""float32 numbers of a block of attention rows while summing columns, 16 MiB."""

CUDA_SCRATCH_NUMBERS = 2**26
"""The same on CUDA, 256 MiB: a block is several launches, so there the fewer the better."""


class Pooling(Enum):
    """How neighbours share a score."""

    avg = "avg"
    max = "max"


class Group(Enum):
    """How the query heads that share a KV head become one score."""

    mean = "mean"
    max = "max"
    sum = "sum"


def check_kernel(kernel: int) -> None:
    """Raise ValueError unless `kernel` is odd and positive (an even one changes the length)."""
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"method.kernel={kernel} must be an odd number of tokens, at least 1")


def window_rows(q_HqnD: Tensor, k_HnD: Tensor, window: int) -> Iterator[Tensor]:
    """Attention of the last `window` queries, one KV head at a time: [G, w, n] float32."""
    heads, tokens, dim = k_HnD.shape
    rows_HGwD = q_HqnD[:, -window:].unflatten(0, (heads, -1))
    window = rows_HGwD.shape[2]
    future = torch.ones(window, window, dtype=torch.bool, device=k_HnD.device).triu(1)
    for rows, keys in zip(rows_HGwD, k_HnD, strict=True):
        scores_Gwn = _products(rows, keys).mul_(dim**-0.5)
        scores_Gwn[..., tokens - window :].masked_fill_(future, -torch.inf)
        yield scores_Gwn.softmax(-1)


def _half_on_cuda(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _products(rows_GTD: Tensor, keys_nD: Tensor) -> Tensor:
    """rows @ keys.T [G, T, n] in float32."""
    if _half_on_cuda(keys_nD):
        # No float32 copy of the keys is made, nor any of keys that lie between those of other heads.
        flat = torch.mm(rows_GTD.detach().flatten(0, 1), keys_nD.detach().T, out_dtype=torch.float32)
        return flat.unflatten(0, rows_GTD.shape[:2])
    return rows_GTD.float() @ keys_nD.float().T


def window_attention(q_HqnD: Tensor, k_HnD: Tensor, window: int) -> Tensor:
    """Attention of the last `window` queries, summed over them: [H, G, n] float32."""
    return torch.stack([rows_Gwn.sum(1) for rows_Gwn in window_rows(q_HqnD, k_HnD, window)])


def column_sums(q_HqnD: Tensor, k_HnD: Tensor) -> Tensor:
    """Attention that each token receives from all queries of the prompt, summed over the group: [H, n]
    float32. n x n is never built.
    """
    if _half_on_cuda(k_HnD) and _has_triton():
        from hcache.kernels.columns import column_sums as sums_by_triton

        return sums_by_triton(q_HqnD, k_HnD)
    return column_sums_in_blocks(q_HqnD, k_HnD)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    """Whether Triton is there; said once if not."""
    found = find_spec("triton") is not None
    if not found:
        log.warning("no triton: column sums of attention take many passes over memory (pip install triton)")
    return found


def column_sums_in_blocks(q_HqnD: Tensor, k_HnD: Tensor) -> Tensor:
    """`column_sums` in plain torch, block by block of query rows: a block of B rows sees its own columns
    whole.
    """
    heads, tokens, dim = k_HnD.shape
    group = q_HqnD.shape[0] // heads
    numbers = CUDA_SCRATCH_NUMBERS if k_HnD.is_cuda else SCRATCH_NUMBERS
    block = max(1, numbers // (group * tokens))
    sums_Hn = torch.zeros(heads, tokens, device=k_HnD.device)
    for head, rows_GnD in enumerate(q_HqnD.unflatten(0, (heads, group))):
        keys_nD = k_HnD[head].float()
        for start in range(0, tokens, block):
            rows_GBD = rows_GnD[:, start : start + block].float() * dim**-0.5
            sums_Hn[head, : start + rows_GBD.shape[1]] += _received(rows_GBD, keys_nD, start)
    return sums_Hn


def _received(rows_GBD: Tensor, keys_nD: Tensor, start: int) -> Tensor:
    """What the columns up to the last of the rows start..start+B receive from these rows."""
    end = start + rows_GBD.shape[1]
    scores = (rows_GBD.flatten(0, 1) @ keys_nD[:end].T).unflatten(0, rows_GBD.shape[:2])
    future = torch.ones(end - start, end - start, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., start:].masked_fill_(future, -torch.inf)
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    # Normalising the rows and summing them is one product; a second block of scratch is never needed.
    return scores.sum(-1).reciprocal_().flatten() @ scores.flatten(0, 1)


def pool(scores: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """1-D pooling over the last dimension, stride 1, same length."""
    if kernel == 1:
        return scores
    flat = scores.reshape(1, -1, scores.shape[-1])
    function = F.avg_pool1d if pooling is Pooling.avg else F.max_pool1d
    return function(flat, kernel, stride=1, padding=kernel // 2).view_as(scores)


def reduce_group(scores: Tensor, group: Group, dim: int = 1) -> Tensor:
    """Reduce the query heads of a group, by default [H, G, n] -> [H, n]."""
    if group is Group.max:
        return scores.amax(dim)
    return scores.mean(dim) if group is Group.mean else scores.sum(dim)


def top_positions(scores_n: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest scores, ascending; ties go to the earlier position."""
    order = scores_n.sort(descending=True, stable=True).indices[:count]
    return order.sort().values
