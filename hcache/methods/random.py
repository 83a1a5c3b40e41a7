"""Random: the baseline that any score must beat, of no paper.

Kept on the device: the first and last tokens of the prompt and, for each KV head, a random choice of the
others. Lost for good: the rest of the prompt. Generated tokens all stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hcache.geometry import Geometry
from hcache.methods.eviction import EvictionMethod
from hcache.methods.registry import register


@register("random")
@dataclass(frozen=True)
class Random(EvictionMethod):
    """Scores drawn anew for each layer and head, the same for every sequence of one length.

    Args:
        sinks: first prompt tokens that always stay: without them most models break down.
        recent: last prompt tokens that always stay.
        seed: of the draw.
    """

    sinks: int = 4
    recent: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("sinks", "recent"):
            if getattr(self, key) < 0:
                raise ValueError(f"method.{key}={getattr(self, key)} must be 0 or more tokens")

    def protected(self, tokens: int) -> int:
        return self.recent

    def always_kept(self, tokens: int) -> int:
        return self.sinks + self.recent

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        return max(self.sinks + self.recent + 1, super().minimum_tokens(geometry, prompt_tokens))

    def shortage(self) -> str:
        return f": method.sinks={self.sinks} and method.recent={self.recent} must be smaller than the budget"

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.score_layer(0, q, k, v)

    def score_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Drawn on the CPU, so that every device keeps the same tokens.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
        scores = torch.rand(k.shape[:2], generator=generator).to(k.device)
        scores[:, : self.sinks] = torch.inf
        return scores
