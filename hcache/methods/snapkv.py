"""SnapKV: one-shot prompt compression by what the last `window` queries attend to.

Paper: SnapKV, NeurIPS 2024, arXiv 2404.14469 (section 4; Listing 1). Kept on the device: the window and, for
each KV head, the best-voted earlier tokens. Lost for good: the rest of the prompt. Generated tokens all stay.

Differences from the official code (FasterDecoding/SnapKV e216ddc), both named because they change bytes:
scores are reduced over the GQA group before selecting, so KV is stored once per KV head and not repeated for
every query head; the window counts inside the budget. Scores stay in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.geometry import Geometry
from hcache.methods.base import EvictionMethod
from hcache.methods.registry import register
from hcache.scoring import Group, Pooling, check_kernel, pool, reduce_group, window_attention


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(EvictionMethod):
    """Votes of the observation window, pooled over neighbours.

    Args:
        window: last prompt tokens that vote and always stay.
        kernel: width of the pooling over neighbouring tokens, odd.
        pooling: avg or max.
        group: how the votes of the query heads of one KV head are joined, before pooling.
    """

    window: int = 32
    kernel: int = 5
    pooling: Pooling = Pooling.avg
    group: Group = Group.mean

    def __post_init__(self) -> None:
        check_kernel(self.kernel)
        if self.window < 1:
            raise ValueError(f"method.window={self.window} must be at least 1 token")

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        return self.window + 1

    def shortage(self) -> str:
        return (
            f": method.window={self.window} must be smaller than the budget; lower window or raise the budget"
        )

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        votes = reduce_group(window_attention(q, k, self.window), self.group)
        # The window's own columns are cut off before pooling, so they influence no earlier token.
        prefix = pool(votes[:, : -self.window], self.kernel, self.pooling)
        return torch.cat([prefix, torch.full_like(votes[:, -self.window :], torch.inf)], dim=1)
