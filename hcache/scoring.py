"""Importance scores that several methods share: window attention, column sums, pooling, reduction over a
group.

Everything is float32: in half precision long sums stall and most variances are 0. Shapes are of one sequence:
q [Hq, n, D], k [H, n, D], G = Hq/H, w window rows. As in the official codes of SnapKV, PyramidKV and CAKE:
logits q.k/sqrt(D); softmax over all n columns with the causal mask in the last w columns, not renormalised
where these are cut off; an average pool that divides by the kernel at the edges too.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

SCRATCH_NUMBERS = 2**22
"""float32 numbers of a block of attention rows while summing columns, 16 MiB."""


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
    rows_HGwD = q_HqnD[:, -window:].float().unflatten(0, (heads, -1))
    window = rows_HGwD.shape[2]
    future = torch.ones(window, window, dtype=torch.bool, device=k_HnD.device).triu(1)
    for rows, keys in zip(rows_HGwD, k_HnD, strict=True):
        scores_Gwn = rows @ keys.float().T * dim**-0.5
        scores_Gwn[..., tokens - window :].masked_fill_(future, -torch.inf)
        yield scores_Gwn.softmax(-1)


def window_attention(q_HqnD: Tensor, k_HnD: Tensor, window: int) -> Tensor:
    """Attention of the last `window` queries, summed over them: [H, G, n] float32."""
    return torch.stack([rows_Gwn.sum(1) for rows_Gwn in window_rows(q_HqnD, k_HnD, window)])


def column_sums(q_HqnD: Tensor, k_HnD: Tensor) -> Tensor:
    """Attention that each token receives from all queries of the prompt, summed over the group: [H, n]
    float32.

    Block by block of query rows: a block of B rows sees its own columns whole, so n x n is never built.
    """
    heads, tokens, dim = k_HnD.shape
    group = q_HqnD.shape[0] // heads
    block = max(1, SCRATCH_NUMBERS // (group * tokens))
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
