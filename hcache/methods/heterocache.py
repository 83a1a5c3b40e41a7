"""HeteroCache: heads have roles, budgets follow stability, pivots watch for drift and satellites are
refreshed.

Paper: HeteroCache, ACL 2026, arXiv 2601.13684; official repository ponytaill/HeteroCache 01dc7fe. This file
is the
policy: which head keeps how much. `hcache.methods.drift` is what happens during decoding.

| role | device | host | decoding |
|---|---|---|---|
| anchor | compressed | - | static |
| volatile | full | - | static |
| pivot | full | - | watches for drift on behalf of its satellites |
| satellite | compressed | full | refreshed when its pivot drifts |

Differences from the official code, which loses tokens or is wrong there: what clipping at the prompt cuts off
is given to other heads and the sum is exact; each satellite gets its own top positions; decisions are made
for each sequence; only satellites wait in host memory; roles come from a profile tied to the model's weights;
an infeasible budget is an error that names the smallest feasible one.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from hcache.allocation import water_fill
from hcache.budget import Budget
from hcache.cache.offload import OffloadManager
from hcache.cache.state import LayerState
from hcache.geometry import Geometry
from hcache.methods.base import Method
from hcache.methods.drift import DriftRule, HeteroLayer, LayerPlan
from hcache.methods.registry import register
from hcache.profiling import Graph, HeadProfile, Role, Roles, find_profile, load_profile
from hcache.scoring import Group, Pooling, check_kernel

log = logging.getLogger(__name__)

Head = tuple[int, int]
"""(layer, KV head)."""


@dataclass(frozen=True)
class RoleSettings:
    """How a profile's scores become roles.

    Args:
        fit_budget: below the smallest feasible budget, demote the most stable volatile heads and then the
            pivots with the fewest satellites, instead of refusing.
        stable_threshold: an unclustered head at least this stable is an anchor; None takes the profile's own.
        similarity_threshold: heads at least this similar are clustered; None takes the profile's own.
        graph: which similarity is clustered.
    """

    fit_budget: bool = False
    stable_threshold: float | None = None
    similarity_threshold: float | None = None
    graph: Graph = Graph.median


@dataclass(frozen=True)
class OffloadSettings:
    """Where the full KV of satellites waits.

    Args:
        enabled: in host memory; False keeps it on the device, with the same tokens.
    """

    enabled: bool = True


@register("heterocache")
@dataclass(frozen=True)
class HeteroCache(Method):
    """Role budgets with drift-triggered retrieval.

    Args:
        window: last prompt queries whose attention selects what is kept.
        kernel: width of the pooling over neighbouring tokens, odd.
        pooling: avg or max.
        group: how query heads of one KV head are joined, after pooling.
        steps: decode steps between two looks at the pivots, W.
        drift_threshold: a pivot has drifted when its median overlap falls below; None takes the stable
            threshold.
        visible_after: a refresh decided after token t is seen by token t + visible_after.
        profile: path of a head profile, or a HeadProfile; None finds the one of the model's fingerprint.
        roles: see RoleSettings.
        offload: see OffloadSettings.
    """

    needs_fingerprint: ClassVar[bool] = True

    window: int = 1
    kernel: int = 5
    pooling: Pooling = Pooling.avg
    group: Group = Group.max
    steps: int = 5
    drift_threshold: float | None = None
    visible_after: int = 1
    profile: Any = None
    roles: RoleSettings = field(default_factory=RoleSettings)
    offload: OffloadSettings = field(default_factory=OffloadSettings)

    def __post_init__(self) -> None:
        check_kernel(self.kernel)
        for key in ("window", "steps", "visible_after"):
            if getattr(self, key) < 1:
                raise ValueError(f"method.{key}={getattr(self, key)} must be at least 1 token")
        if self.drift_threshold is not None and not 0 <= self.drift_threshold <= 1:
            raise ValueError(
                f"method.drift_threshold={self.drift_threshold} must be between 0 and 1 (an overlap)"
            )

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        profile = self.head_profile(geometry)
        roles = self.assign(profile)
        plans = [self.plan(geometry, roles, budget, n) for n in prompt_tokens]
        rule = DriftRule(
            self.window,
            self.kernel,
            self.pooling,
            self.group,
            self.steps,
            self.threshold(roles),
            self.visible_after,
        )
        return [
            HeteroLayer([plan[layer] for plan in plans], rule, OffloadManager(self.offload.enabled))
            for layer in range(geometry.layers)
        ]

    def head_profile(self, geometry: Geometry) -> HeadProfile:
        """The profile of this model. Raises ValueError for a foreign one, or where there is none."""
        return _resolve(self.profile, geometry)

    def assign(self, profile: HeadProfile) -> Roles:
        """Roles under the thresholds that were set, else under the profile's own."""
        settings = self.roles
        return profile.roles(settings.stable_threshold, settings.similarity_threshold, settings.graph)

    def threshold(self, roles: Roles) -> float:
        """Overlap below which a pivot has drifted: its own setting, else the threshold of stable heads."""
        return roles.stable_threshold if self.drift_threshold is None else self.drift_threshold

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        if self.roles.fit_budget:
            return 2
        roles = self.assign(self.head_profile(geometry))
        return max(2, smallest_tokens(roles, geometry, prompt_tokens))

    def shortage(self) -> str:
        return (
            ": its volatile and pivot heads keep the whole prompt; raise the budget, "
            "or set method.roles.fit_budget=true to give some of those roles up"
        )

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        roles = self.assign(self.head_profile(geometry))
        tokens = min(budget.tokens(prompt_tokens), prompt_tokens)
        fitted, demoted = fit_roles(roles, tokens, geometry, prompt_tokens)
        if not demoted:
            return []
        names = ", ".join(f"L{layer}H{head}" for layer, head in demoted)
        kept = f"{fitted.full_heads} of {roles.full_heads} full heads stay full"
        return [f"roles.fit_budget: {kept}; demoted to compressed: {names}"]

    def plan(self, geometry: Geometry, roles: Roles, budget: Budget, prompt_tokens: int) -> list[LayerPlan]:
        """What each layer keeps of one prompt; the sum over heads is the budget exactly."""
        tokens = self.require(geometry, budget, prompt_tokens)
        if tokens < prompt_tokens and self.roles.fit_budget:
            roles, demoted = fit_roles(roles, tokens, geometry, prompt_tokens)
            if demoted:
                log.info("roles.fit_budget: %d full heads demoted for %d tokens", len(demoted), tokens)
        return role_plans(geometry, roles, tokens, prompt_tokens)


@lru_cache(maxsize=16)
def _resolve(profile: HeadProfile | str | None, geometry: Geometry) -> HeadProfile:
    """Found, read and checked once for all prompts of a run."""
    if profile is None:
        return find_profile(geometry)
    given = profile if isinstance(profile, HeadProfile) else load_profile(profile)
    given.check(geometry)
    return given


def smallest_tokens(roles: Roles, geometry: Geometry, prompt_tokens: int) -> int:
    """Average tokens per head from which the budget exceeds what the full heads keep by one head's prompt.

    With F full heads that is (F + 1) / (L * H) of the prompt, the official rule int(rho * L * H) > F.
    """
    return min(prompt_tokens, math.ceil((roles.full_heads + 1) * prompt_tokens / geometry.heads))


def fit_roles(roles: Roles, tokens: int, geometry: Geometry, prompt_tokens: int) -> tuple[Roles, list[Head]]:
    """Demote full heads until `tokens` on average are feasible.

    The most stable volatile heads go first, then the pivots with the fewest satellites.

    Returns:
        the roles that remain and the demoted heads, in order.
    """
    demoted: list[Head] = []
    for head in _demotion_order(roles):
        if tokens >= smallest_tokens(roles, geometry, prompt_tokens):
            break
        roles = roles.demote(*head)
        demoted.append(head)
    return roles, demoted


def _demotion_order(roles: Roles) -> list[Head]:
    """Full heads in the order in which they are given up; without scores, volatile heads go by position."""
    heads = [(layer, head) for layer in range(roles.layers) for head in range(roles.kv_heads)]
    volatile = [at for at in heads if roles.matrix[at[0]][at[1]] is Role.VOLATILE]
    pivots = [at for at in heads if roles.matrix[at[0]][at[1]] is Role.PIVOT]
    volatile.sort(key=lambda at: -roles.stability_of(*at))
    return volatile + sorted(pivots, key=lambda at: len(roles.satellites(*at)))


def role_plans(geometry: Geometry, roles: Roles, tokens: int, prompt_tokens: int) -> list[LayerPlan]:
    """Split `tokens` on average over all heads: full heads keep all, the others by weight, none above n."""
    heads = [(layer, head) for layer in range(geometry.layers) for head in range(geometry.kv_heads)]
    weights = {at: weight for at in heads if (weight := roles.weights[at[0]][at[1]]) is not None}
    left = tokens * geometry.heads - (len(heads) - len(weights)) * prompt_tokens
    shares = water_fill(list(weights.values()), max(left, 0), prompt_tokens)
    counts = dict.fromkeys(heads, prompt_tokens) | dict(zip(weights, shares, strict=True))
    base = min(prompt_tokens, max(1, left // len(weights))) if weights else prompt_tokens
    return [
        LayerPlan(
            counts=[counts[layer, head] for head in range(geometry.kv_heads)],
            satellites={
                pivot: list(members)
                for pivot in range(geometry.kv_heads)
                if (members := roles.satellites(layer, pivot))
            },
            base=base,
        )
        for layer in range(geometry.layers)
    ]
