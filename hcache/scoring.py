"""Importance scores that several methods share: window attention, pooling, reduction over a GQA group.

Everything is float32. Shapes are of one sequence: q [Hq, n, D], k [H, n, D], G = Hq/H, w window rows.
Rules 0.3 to 0.7 of the field's common ground: logits q.k/sqrt(D); softmax over all n columns with the causal
mask in the last w columns; an average pool that divides by the kernel at the edges too.
"""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor


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


def window_attention(q_HqnD: Tensor, k_HnD: Tensor, window: int) -> Tensor:
    """Attention of the last `window` queries, summed over them: [H, G, n] float32.

    One KV head at a time, so that at most [G, w, n] numbers exist at once.
    """
    heads, tokens, dim = k_HnD.shape
    rows_HGwD = q_HqnD[:, -window:].float().unflatten(0, (heads, -1))
    window = rows_HGwD.shape[2]
    future = torch.ones(window, window, dtype=torch.bool, device=k_HnD.device).triu(1)
    votes = []
    for rows, keys in zip(rows_HGwD, k_HnD, strict=True):
        scores_Gwn = rows @ keys.float().T * dim**-0.5
        scores_Gwn[..., tokens - window :].masked_fill_(future, -torch.inf)
        votes.append(scores_Gwn.softmax(-1).sum(1))
    return torch.stack(votes)


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
