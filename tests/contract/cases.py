"""The methods that the contract tests hold to account, each with settings that suit a tiny model.

Add a line to `CASES` and a method is held to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hcache import KVCache
from hcache.methods import Method, make
from hcache.models.identity import model_geometry
from hcache.profiling import Graph, HeadProfile


@dataclass(frozen=True)
class Case:
    """One method with settings.

    Args:
        constant: evicts while decoding, so that the size stays.
        hyper: hyper-parameters.
        profiled: needs a head profile.
    """

    method: str
    hyper: dict[str, Any] = field(default_factory=dict)
    constant: bool = False
    profiled: bool = False
    label: str = ""

    def make(self, model: PreTrainedModel) -> Method:
        """The method, for this model."""
        extra = {"profile": profile_of(model)} if self.profiled else {}
        return make(self.method, **self.hyper, **extra)

    def cache(self, model: PreTrainedModel, budget: float | int, **options: Any) -> KVCache:
        """A fresh cache."""
        return KVCache(model, self.make(model), budget, **options)

    def __str__(self) -> str:
        return self.label or self.method


CASES = [
    Case("fullkv"),
    Case("streaming_llm", constant=True),
    Case("snapkv", {"window": 4}),
    Case("heterocache", profiled=True),
    Case("heterocache", {"drift_threshold": 1.0, "steps": 3}, profiled=True, label="heterocache-always"),
]


def profile_of(model: PreTrainedModel) -> HeadProfile:
    """A profile with all four roles where the model has heads enough; half the cache is feasible."""
    geometry = model_geometry(model)
    layers, heads = geometry.layers, geometry.kv_heads
    stability = torch.full((layers, heads), 0.8, dtype=torch.float64)
    stability[-1, 0] = 0.6
    pairs = torch.zeros(layers, heads, heads, dtype=torch.float64)
    if heads > 1:
        pairs[0, 0, 1] = pairs[0, 1, 0] = 0.9  # head 0 watches for head 1, the others stand alone
    if heads > 2:
        stability[0, 2] = 0.2  # volatile
    return HeadProfile(
        layers,
        heads,
        stability,
        dict.fromkeys(Graph, pairs),
        query_heads=geometry.query_heads,
        head_dim=geometry.head_dim,
        fingerprint=geometry.fingerprint,
    )
