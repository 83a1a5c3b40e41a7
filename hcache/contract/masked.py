"""Attention restricted to an index set by a mask, in plain torch: what a method's output must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_to(q_HqD: Tensor, k_HnD: Tensor, v_HnD: Tensor, visible_Hn: Tensor) -> Tensor:
    """One query over the visible tokens of each KV head: [Hq, D]. visible is bool [H, n]."""
    group = q_HqD.shape[0] // k_HnD.shape[0]
    k, v, visible = (x.repeat_interleave(group, dim=0) for x in (k_HnD, v_HnD, visible_Hn))
    logits = (k @ q_HqD.unsqueeze(-1)).squeeze(-1) * q_HqD.shape[-1] ** -0.5
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights.unsqueeze(1) @ v).squeeze(1)


def causal_attention(q_HqnD: Tensor, k_HnD: Tensor) -> Tensor:
    """All attention weights [Hq, n, n] of one sequence; for small n only."""
    group = q_HqnD.shape[0] // k_HnD.shape[0]
    k, n = k_HnD.repeat_interleave(group, dim=0), k_HnD.shape[1]
    logits = q_HqnD @ k.transpose(-1, -2) * q_HqnD.shape[-1] ** -0.5
    return logits.masked_fill(
        torch.ones(n, n, dtype=torch.bool, device=k.device).triu(1), -torch.inf
    ).softmax(-1)
