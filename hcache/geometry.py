"""The numbers of a decoder's attention that a compression method needs to know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's KV cache.

    Args:
        layers: decoder layers, L.
        query_heads: query heads a layer, Hq.
        kv_heads: KV heads a layer, H; H divides Hq.
        head_dim: numbers in one key or value, D.
        fingerprint: identity of the weights (hcache.models.fingerprint), None where unknown.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if min(self.layers, self.query_heads, self.kv_heads, self.head_dim) < 1:
            raise ValueError(f"every number of a geometry must be positive, got {self}")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide query_heads={self.query_heads}")

    @property
    def group(self) -> int:
        """Query heads that share one KV head, G."""
        return self.query_heads // self.kv_heads

    @property
    def heads(self) -> int:
        """KV heads of the whole model, L * H."""
        return self.layers * self.kv_heads
