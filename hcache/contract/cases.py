"""The methods that the contract tests hold to account, each with settings that suit a tiny model.

Add a line to `CASES` and a method is held to all of them; `python -m hcache.check_method` puts a user's own
there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hcache import KVCache
from hcache.contract.tiny_models import tiny_model
from hcache.methods import Method, make
from hcache.methods.streaming_llm import Positions, Prefill
from hcache.models.identity import model_geometry
from hcache.profiling import Graph, HeadProfile


@dataclass(frozen=True)
class Case:
    """One method with settings.

    Args:
        method: registered name.
        hyper: hyper-parameters.
        profiled: needs a head profile.
        unmasked: why no mask over the prompt gives the same output; empty where one does.
        dense_follow_ups: several tokens at once attend to everything.
        layers: of the tiny models; more where that is what makes the tests' budgets feasible.
        grain: tokens on average that a budget may leave unspent: one where it is tokens, a chunk or page
            where those are what is kept.
        divided_by_scores: how much a layer or head keeps goes by the prompt's own scores.
        label: names the case where one method has several.
    """

    method: str
    hyper: dict[str, Any] = field(default_factory=dict)
    profiled: bool = False
    unmasked: str = ""
    dense_follow_ups: bool = False
    layers: int = 2
    grain: int = 1
    divided_by_scores: bool = False
    label: str = ""

    def model(self, family: str = "llama", kv_heads: int = 4) -> PreTrainedModel:
        """A tiny random decoder of a family in `tiny_models.FAMILIES`."""
        return tiny_model(family, kv_heads, self.layers)

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
    Case("streaming_llm"),
    Case(
        "streaming_llm",
        {"positions": Positions.rolling},
        unmasked="sinks move along with the window",
        label="streaming-rolling",
    ),
    Case("streaming_llm", {"prefill": Prefill.streaming}, label="streaming-stream"),
    Case("h2o"),
    Case("snapkv", {"window": 4}),
    Case("snapkv", {"window": 4, "allocation": "adaptive"}, divided_by_scores=True, label="snapkv-adaptive"),
    Case("pyramidkv", {"window": 4}),
    Case("cake", {"window": 4}, divided_by_scores=True),
    Case("random", {"recent": 4}),
    Case(
        "quest",
        {"page_size": 4},
        unmasked="pages of generated tokens are left out too",
        dense_follow_ups=True,
        grain=4,
    ),
    Case(
        "shadowkv",
        {"chunk": 4, "rank": 8, "local_chunks": 1},
        unmasked="keys are rebuilt from factors of a low rank",
        grain=8,
    ),
    Case("omnikv", {"wait_layers": 0}, layers=4),
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
