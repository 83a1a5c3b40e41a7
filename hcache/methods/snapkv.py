"""SnapKV: one-shot prompt compression by what the last `window` queries attend to.

Paper: SnapKV, NeurIPS 2024, arXiv 2404.14469 (section 4; Listing 1). Kept on the device: the window and, for
each KV head, the best-voted earlier tokens. Lost for good: the rest of the prompt. Generated tokens all stay.

Differences from the official code (FasterDecoding/SnapKV e216ddc): votes are reduced over the GQA group
before selecting, so KV is stored once per KV head and not repeated for every query head, which changes bytes;
votes stay in float32, theirs are rounded to the model's dtype; kept tokens stay in text order. As theirs, the
budget includes the window. The defaults are those that its models start with (the class alone has window 64,
the LongBench runs have kernel 7 and max pooling).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.methods.eviction import EvictionMethod
from hcache.methods.registry import register
from hcache.scoring import Group, Pooling, check_kernel, pool, reduce_group, window_attention


@dataclass(frozen=True)
class WindowMethod(EvictionMethod):
    """Eviction methods in which an observation window at the prompt's end votes on what is before it.

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
        super().__post_init__()
        check_kernel(self.kernel)
        if self.window < 1:
            raise ValueError(f"method.window={self.window} must be at least 1 token")

    def protected(self, tokens: int) -> int:
        return self.window

    def shortage(self) -> str:
        if self.profiled is not None:
            return (
                ": the full heads of method.allocation keep the whole prompt; raise the budget, or set "
                "roles.fit_budget=true among its settings"
            )
        return (
            f": method.window={self.window} must be smaller than the budget; lower window or raise the budget"
        )

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.smooth(reduce_group(window_attention(q, k, self.window), self.group))

    def smooth(self, votes_Hn: Tensor) -> Tensor:
        """Votes [H, n], pooled over neighbours; the window's own are cut off first and influence none."""
        prefix = pool(votes_Hn[:, : -self.window], self.kernel, self.pooling)
        return torch.cat([prefix, votes_Hn[:, -self.window :]], dim=1)


@register("snapkv")
@dataclass(frozen=True)
class SnapKV(WindowMethod):
    """Votes of the observation window, pooled over neighbours; fields as in WindowMethod."""
