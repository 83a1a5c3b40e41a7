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

from dataclasses import dataclass, field
from typing import Any

from hcache.budget import Budget
from hcache.cache.state import LayerState
from hcache.geometry import Geometry
from hcache.methods.base import Method, Usage
from hcache.methods.drift import DriftRule, HeteroLayer, LayerPlan
from hcache.methods.registry import register
from hcache.profiling import HeadProfile, Roles
from hcache.role_weights import (
    RoleSettings,
    compressed_tokens,
    resolve_profile,
    role_counts,
    smallest_tokens,
)
from hcache.scoring import Group, Pooling, check_kernel


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
        visible_after: a refresh decided after token t is seen by token t + visible_after; at most `steps`.
            Above 1 it is fetched beside the steps between, into a staging buffer on the device that is as
            large as what satellites hold, beyond the budget.
        drift_every: for measurements. Pivots drift in every so-many-th window, whatever the overlap: 1 in
            all, 10 in every tenth, 0 in none; None goes by the overlap. All else is done as ever.
        profile: path of a head profile, or a HeadProfile; None finds the one of the model's fingerprint.
        roles: see RoleSettings.
        offload: see OffloadSettings.
    """

    window: int = 1
    kernel: int = 5
    pooling: Pooling = Pooling.avg
    group: Group = Group.max
    steps: int = 5
    drift_threshold: float | None = None
    visible_after: int = 1
    drift_every: int | None = None
    profile: Any = None
    roles: RoleSettings = field(default_factory=RoleSettings)
    offload: OffloadSettings = field(default_factory=OffloadSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.kernel)
        for key in ("window", "steps", "visible_after"):
            if getattr(self, key) < 1:
                raise ValueError(f"method.{key}={getattr(self, key)} must be at least 1 token")
        if self.visible_after > self.steps:
            raise ValueError(
                f"method.visible_after={self.visible_after} must be at most method.steps={self.steps}: the "
                "next decision would overtake the refresh; lower it or raise steps"
            )
        if self.drift_every is not None and self.drift_every < 0:
            raise ValueError(
                f"method.drift_every={self.drift_every} must be 0 (never), a number of windows, or null (by "
                "overlap)"
            )
        if self.drift_threshold is not None and not 0 <= self.drift_threshold <= 1:
            raise ValueError(
                f"method.drift_threshold={self.drift_threshold} must be between 0 and 1 (an overlap)"
            )

    @property
    def profiled(self) -> HeteroCache:
        return self

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        profile = self.head_profile(geometry)
        roles = self.roles.assign(profile)
        plans = [self.plan(geometry, roles, budget, n) for n in prompt_tokens]
        rule = DriftRule(
            self.window,
            self.kernel,
            self.pooling,
            self.group,
            self.steps,
            self.threshold(roles),
            self.visible_after,
            self.drift_every,
        )
        return [
            HeteroLayer([plan[layer] for plan in plans], rule, self.offload.enabled)
            for layer in range(geometry.layers)
        ]

    def head_profile(self, geometry: Geometry) -> HeadProfile:
        """The profile of this model. Raises ValueError for a foreign one, or where there is none."""
        return resolve_profile(self.profile, geometry)

    def threshold(self, roles: Roles) -> float:
        """Overlap below which a pivot has drifted: its own setting, else the threshold of stable heads."""
        return roles.stable_threshold if self.drift_threshold is None else self.drift_threshold

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        roles = self.roles.assign(self.head_profile(geometry))
        plans = self.plan(geometry, roles, budget, prompt_tokens)
        slot = 2 * geometry.head_dim * number_bytes
        kept = sum(sum(plan.counts) for plan in plans)
        partial = [
            plan.counts[head]
            for plan in plans
            for members in plan.watched(prompt_tokens).values()
            for head in members
        ]
        waiting = len(partial) * prompt_tokens * slot
        staged = sum(partial) * slot if self._stages else 0
        tables = sum(self._table_bytes(plan, geometry, prompt_tokens, number_bytes) for plan in plans)
        return Usage(
            device_bytes=kept * slot + staged + tables + (0 if self.offload.enabled else waiting),
            attended_tokens=kept / geometry.heads,
            host_bytes=waiting if self.offload.enabled else 0,
            # Every pivot drifting in every window, spread over the window's steps.
            moved_bytes=sum(partial) * slot // self.steps if self.offload.enabled else 0,
            parts={"full_heads": sum(n >= prompt_tokens for plan in plans for n in plan.counts)},
        )

    @property
    def _stages(self) -> bool:
        """Whether refreshed rows wait on the device before they are seen."""
        return self.visible_after > 1

    def _table_bytes(self, plan: LayerPlan, geometry: Geometry, prompt_tokens: int, number_bytes: int) -> int:
        """A layer's tables: of satellites an int32 a kept token, and another where refreshed rows are staged;
        of pivots a bool a token, and queries of two windows.
        """
        watched = plan.watched(prompt_tokens)
        rows = sum(plan.counts[head] for members in watched.values() for head in members)
        queries = 2 * self.steps * geometry.group * geometry.head_dim * number_bytes
        return (8 if self._stages else 4) * rows + len(watched) * (prompt_tokens + queries)

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        if self.roles.fit_budget:
            return 2
        roles = self.roles.assign(self.head_profile(geometry))
        return max(2, smallest_tokens(roles, geometry, prompt_tokens))

    def shortage(self) -> str:
        return (
            ": its volatile and pivot heads keep the whole prompt; raise the budget, "
            "or set method.roles.fit_budget=true to give some of those roles up"
        )

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        roles = self.roles.assign(self.head_profile(geometry))
        tokens = min(budget.tokens(prompt_tokens), prompt_tokens)
        notes = self.roles.notes(roles, tokens, geometry, prompt_tokens)
        if self._stages:
            notes.append(
                f"visible_after={self.visible_after}: refreshed rows wait in a staging buffer on the device, "
                "as large as what satellites keep, beyond the budget"
            )
        if self.drift_every is not None:
            often = f"in every {self.drift_every}th window" if self.drift_every else "never"
            notes.append(f"drift_every={self.drift_every}: pivots drift {often}, whatever the overlap")
        return notes

    def outline(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> dict[str, Any]:
        """roles: names by layer and head, as fitted to the budget; threshold and steps: of drift."""
        roles = self.roles.assign(self.head_profile(geometry))
        tokens = self.require(geometry, budget, prompt_tokens)
        matrix = self.roles.fitted(roles, tokens, geometry, prompt_tokens).matrix
        names = [[role.name.lower() for role in row] for row in matrix]
        return {"roles": names, "threshold": self.threshold(roles), "steps": self.steps}

    def plan(self, geometry: Geometry, roles: Roles, budget: Budget, prompt_tokens: int) -> list[LayerPlan]:
        """What each layer keeps of one prompt; the sum over heads is the budget exactly."""
        tokens = self.require(geometry, budget, prompt_tokens)
        roles = self.roles.fitted(roles, tokens, geometry, prompt_tokens)
        return role_plans(geometry, roles, tokens, prompt_tokens)


def role_plans(geometry: Geometry, roles: Roles, tokens: int, prompt_tokens: int) -> list[LayerPlan]:
    """What each layer keeps under these roles; a pivot's reference set has a compressed head's average."""
    counts = role_counts(geometry, roles, tokens, prompt_tokens)
    compressed = geometry.heads - roles.full_heads
    left = compressed_tokens(geometry, roles, tokens, prompt_tokens)
    base = min(prompt_tokens, max(1, left // compressed)) if compressed else prompt_tokens
    return [
        LayerPlan(
            counts=row,
            satellites={
                pivot: list(members)
                for pivot in range(geometry.kv_heads)
                if (members := roles.satellites(layer, pivot))
            },
            base=base,
        )
        for layer, row in enumerate(counts)
    ]
