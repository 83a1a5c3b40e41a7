"""What the roles of heads entitle them to: full heads keep the whole prompt, the others share by weight.

Source: HeteroCache, arXiv 2601.13684 (budgets follow stability). Used by HeteroCache itself, and by any
method that scores tokens as `allocation: roles`. Knows profiles and budgets; nothing of methods.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

from hcache.allocation import ALLOCATIONS, Allocation, Fixed, water_fill
from hcache.geometry import Geometry
from hcache.profiling import Graph, HeadProfile, Role, Roles, find_profile, load_profile
from hcache.registry import choice, unknown_name

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", choice(Graph, "roles.graph", self.graph))

    def assign(self, profile: HeadProfile) -> Roles:
        """Roles under the thresholds that were set, else under the profile's own."""
        return profile.roles(self.stable_threshold, self.similarity_threshold, self.graph)

    def fitted(self, roles: Roles, tokens: int, geometry: Geometry, prompt_tokens: int) -> Roles:
        """The roles, with full heads demoted if need be and if that is allowed."""
        if tokens >= prompt_tokens or not self.fit_budget:
            return roles
        fitted, demoted = fit_roles(roles, tokens, geometry, prompt_tokens)
        if demoted:
            log.info("roles.fit_budget: %d full heads demoted for %d tokens", len(demoted), tokens)
        return fitted

    def notes(self, roles: Roles, tokens: int, geometry: Geometry, prompt_tokens: int) -> list[str]:
        """Which full heads this budget has cost, for the record; none where the roles fit."""
        if not self.fit_budget:
            return []
        fitted, demoted = fit_roles(roles, tokens, geometry, prompt_tokens)
        if not demoted:
            return []
        names = ", ".join(f"L{layer}H{head}" for layer, head in demoted)
        kept = f"{fitted.full_heads} of {roles.full_heads} full heads stay full"
        return [f"roles.fit_budget: {kept}; demoted to compressed: {names}"]


@lru_cache(maxsize=16)
def resolve_profile(profile: HeadProfile | str | None, geometry: Geometry) -> HeadProfile:
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


def role_counts(
    geometry: Geometry, roles: Roles, tokens: int, prompt_tokens: int, protected: int = 0
) -> list[list[int]]:
    """[L][H]: `tokens` on average; full heads keep all, the others share by weight, none above the prompt.

    Each head has room for its `protected` tokens first, as far as the budget goes; weights divide the rest.
    """
    heads = [(layer, head) for layer in range(geometry.layers) for head in range(geometry.kv_heads)]
    weights = {at: weight for at in heads if (weight := roles.weights[at[0]][at[1]]) is not None}
    left = compressed_tokens(geometry, roles, tokens, prompt_tokens)
    sure = min(protected, left // max(1, len(weights)))
    shares = water_fill(list(weights.values()), left - sure * len(weights), prompt_tokens - sure)
    shared = {at: sure + share for at, share in zip(weights, shares, strict=True)}
    counts = dict.fromkeys(heads, prompt_tokens) | shared
    return [[counts[layer, head] for head in range(geometry.kv_heads)] for layer in range(geometry.layers)]


def compressed_tokens(geometry: Geometry, roles: Roles, tokens: int, prompt_tokens: int) -> int:
    """Tokens that are left for all compressed heads together."""
    return max(0, tokens * geometry.heads - roles.full_heads * prompt_tokens)


@ALLOCATIONS.register("roles")
@dataclass(frozen=True)
class RoleWeights(Allocation):
    """By the roles of a head profile, as HeteroCache does, for any scorer; nothing is retrieved later.

    Args:
        profile: path of a head profile, or a HeadProfile; None finds the one of the model's fingerprint.
        roles: see RoleSettings; a mapping of its fields will do.
    """

    profile: Any = None
    roles: Any = field(default_factory=RoleSettings)

    def __post_init__(self) -> None:
        if isinstance(self.roles, Mapping):
            given = {str(key): value for key, value in self.roles.items()}
            options = {option.name for option in fields(RoleSettings)}
            for key in given.keys() - options:
                raise ValueError(unknown_name("setting of roles", key, options))
            object.__setattr__(self, "roles", RoleSettings(**given))

    def head_profile(self, geometry: Geometry) -> HeadProfile:
        """The profile of this model. Raises ValueError for a foreign one, or where there is none."""
        return resolve_profile(self.profile, geometry)

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        if self.roles.fit_budget:
            return 1
        return smallest_tokens(self.roles.assign(self.head_profile(geometry)), geometry, prompt_tokens)

    def notes(self, geometry: Geometry, tokens: int, prompt_tokens: int) -> list[str]:
        """As RoleSettings.notes."""
        roles = self.roles.assign(self.head_profile(geometry))
        return self.roles.notes(roles, min(tokens, prompt_tokens), geometry, prompt_tokens)

    def divide(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> Fixed:
        roles = self.roles.assign(self.head_profile(geometry))
        roles = self.roles.fitted(roles, tokens, geometry, prompt_tokens)
        return Fixed(role_counts(geometry, roles, tokens, prompt_tokens, protected))
