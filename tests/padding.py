"""Batches of prompts of different lengths, as states are given them."""

from __future__ import annotations

import torch
from torch import Tensor

Qkv = tuple[Tensor, Tensor, Tensor]
"""q [Hq, n, D], k and v [H, n, D] of one sequence."""


def left_padded(prompts: list[Qkv]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of prompts with pads of NaN on the left, and its mask."""
    longest = max(k.shape[1] for _, k, _ in prompts)
    valid = torch.stack([torch.arange(longest) >= longest - k.shape[1] for _, k, _ in prompts])
    parts = []
    for part in range(3):
        heads, _, dim = prompts[0][part].shape
        batch = torch.full((len(prompts), heads, longest, dim), torch.nan)
        for b, prompt in enumerate(prompts):
            batch[b, :, valid[b]] = prompt[part]
        parts.append(batch)
    return parts[0], parts[1], parts[2], valid
