"""FullKV: no compression. Everything stays on the device and is attended to: what others are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hcache.budget import Budget
from hcache.cache.state import LayerState, StoreLayer
from hcache.geometry import Geometry
from hcache.methods.base import Method, Usage
from hcache.methods.registry import register


@register("fullkv")
@dataclass(frozen=True)
class FullKV(Method):
    """Keeps the whole prompt of every head; ignores the budget and records a fraction of 1."""

    uses_budget: ClassVar[bool] = False

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        return [StoreLayer() for _ in range(geometry.layers)]

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        held = 2 * geometry.heads * geometry.head_dim * prompt_tokens * number_bytes
        return Usage(held, prompt_tokens, parts={"tokens": prompt_tokens})
