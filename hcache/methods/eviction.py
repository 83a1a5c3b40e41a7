"""Methods that evict: tokens are scored, the best of each head stay, the rest is dropped for good.

An eviction method writes `score`; its budget is split by any allocation. One whose size stays constant while
decoding also writes `rate`, which scores the stored tokens at every step. Knows stores and scores; no model.

Shapes: q [Hq, n, D], k and v [H, n, D], scores [H, n] of one sequence; S = B*H segments, G = Hq/H, W places
in text order.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hcache.allocation import Allocation, Division, Uniform, make_allocation
from hcache.budget import Budget
from hcache.cache.state import Bytes, LayerState, StoreLayer, on_host, one_by_one
from hcache.geometry import Geometry
from hcache.methods.base import Method, Usage
from hcache.role_weights import RoleWeights
from hcache.scoring import top_positions


@dataclass(frozen=True)
class EvictionMethod(Method):
    """Keeps the best-scored prompt tokens of each KV head and drops the rest for good.

    A subclass writes `score`.

    Args:
        allocation: how the budget is split over layers and heads: the name of an allocation, a mapping with
            `name` and its settings, or None for the method's own.
    """

    allocation: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        make_allocation(self.split)

    @abstractmethod
    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Importance [H, n] of one sequence's prompt; +inf for what must stay."""

    def score_layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`score` of a certain layer, for methods to which the layer matters."""
        return self.score(q, k, v)

    def protected(self, tokens: int) -> int:
        """Last prompt tokens that stay in every head under a budget of `tokens`."""
        return 0

    def always_kept(self, tokens: int) -> int:
        """Prompt tokens, protected or not, that every head must have room for under such a budget."""
        return self.protected(tokens)

    def own_allocation(self) -> Allocation:
        """The allocation of the method's paper."""
        return Uniform()

    @cached_property
    def split(self) -> Allocation:
        """The allocation in force."""
        return self.own_allocation() if self.allocation is None else make_allocation(self.allocation)

    @property
    def profiled(self) -> Any:
        return self.split if isinstance(self.split, RoleWeights) else None

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        smallest = self.split.minimum_tokens(geometry, prompt_tokens)
        return max(2, smallest, self.protected(smallest) + 1)

    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        tokens = self.require(geometry, budget, prompt_tokens)
        always = self.always_kept(budget.tokens(prompt_tokens))
        kept = self.split.kept_tokens(geometry, tokens, prompt_tokens, always)
        parts: dict[str, int | str] = {"tokens": tokens}
        if kept != tokens * geometry.heads:
            parts["above_budget"] = kept - tokens * geometry.heads
        return Usage(kept * self.slot_bytes(geometry, number_bytes), kept / geometry.heads, parts=parts)

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        if not isinstance(self.split, RoleWeights):
            return []
        return self.split.notes(geometry, budget.tokens(prompt_tokens), prompt_tokens)

    def slot_bytes(self, geometry: Geometry, number_bytes: int) -> int:
        """Bytes of one kept token in one head: key, value and whatever the method notes about it."""
        return 2 * geometry.head_dim * number_bytes

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        plans = [self.plan(geometry, budget, n) for n in prompt_tokens]
        states: list[EvictionLayer] = []
        for layer in range(geometry.layers):
            states.append(self.layer_state(layer, plans, list(states)))
        return [*states]

    def layer_state(self, layer: int, plans: list[Plan], earlier: list[EvictionLayer]) -> EvictionLayer:
        """The state of one layer."""
        return EvictionLayer(self, layer, plans, earlier)

    def plan(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> Plan:
        """The budget of one prompt. Raises InfeasibleBudget."""
        tokens = self.require(geometry, budget, prompt_tokens)
        asked = budget.tokens(prompt_tokens)
        division = self.split.divide(geometry, tokens, prompt_tokens, self.always_kept(asked))
        return Plan(division, self.protected(asked), asked, prompt_tokens, geometry.layers)


@dataclass(frozen=True)
class Plan:
    """One prompt's budget, shared by its layers.

    Args:
        division: over layers and heads.
        protected: last prompt tokens that stay in every head.
        tokens: average per head; may exceed the prompt.
        prompt_tokens: n.
        layers: L.
    """

    division: Division
    protected: int
    tokens: int
    prompt_tokens: int
    layers: int

    @property
    def capacity(self) -> int | None:
        """Tokens that a head of constant size may hold where the whole prompt fits; None where it is cut."""
        return self.tokens if self.tokens >= self.prompt_tokens else None


class EvictionLayer(StoreLayer):
    """Keeps the best of the prompt, head by head, and every later token.

    Args:
        method: scores.
        layer: this layer's index.
        plans: one a sequence, shared with the other layers.
        earlier: the layers before this one, which a cascading division cuts again.
    """

    keeps_scores: bool = False
    """Whether evictions while decoding go by the prompt's scores too."""

    def __init__(
        self, method: EvictionMethod, layer: int, plans: list[Plan], earlier: list[EvictionLayer]
    ) -> None:
        super().__init__()
        self._method, self._layer, self._plans = method, layer, plans
        cascades = any(plan.division.cascades for plan in plans)
        self._earlier = earlier if cascades else []
        self._last = not cascades or layer + 1 == plans[0].layers
        self._scores: list[list[Tensor]] = []

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        super().prefill(q, k, v, valid)
        if self._last:
            for state in (*self._earlier, self):
                state.finish()
            self._earlier = []

    def choose(self, q: Tensor, k: Tensor, v: Tensor, sequence: int) -> list[Tensor]:
        kept = self._best(q, k, v, sequence)
        if sequence + 1 == len(self._plans):
            # Before anything of this layer is stored: at no time is there more than the budget and one layer.
            for state in self._earlier:
                state.cut()
        return kept

    def _best(self, q: Tensor, k: Tensor, v: Tensor, sequence: int) -> list[Tensor]:
        plan, tokens = self._plans[sequence], k.shape[1]
        if plan.capacity is not None and not self.keeps_scores:
            self._scores.append([])
            return super().choose(q, k, v, sequence)
        scores = self._method.score_layer(self._layer, q, k, v).float()
        counts = [tokens] * k.shape[0]
        if plan.capacity is None:
            ranked = _with_protected(scores, plan.protected)
            counts = plan.division.counts(self._layer, ranked, q, k)
        kept = [_best(row, count, plan.protected) for row, count in zip(scores, counts, strict=True)]
        remembered = self.keeps_scores or not self._last
        self._scores.append([row[at] for row, at in zip(scores, kept, strict=True)] if remembered else [])
        return kept

    def cut(self) -> None:
        """Keep only what a later layer's division has left to this one."""
        slots = [index for b in range(len(self._plans)) for index in self._left(b)]
        lengths = [len(index) for kept in self._kept for index in kept]
        if [index.numel() for index in slots] == lengths:
            return
        self.store.keep(slots)
        heads = len(self._kept[0])
        for s, (index, at) in enumerate(zip(slots, on_host(slots), strict=True)):
            b, h = divmod(s, heads)
            self._kept[b][h] = self._kept[b][h][at]
            if self._scores[b]:
                self._scores[b][h] = self._scores[b][h][index]

    def _left(self, b: int) -> list[Tensor]:
        """Slots of one sequence's heads that are still within its budget."""
        plan, device = self._plans[b], self.store.keys.device
        if not plan.division.cascades:
            return [torch.arange(len(index), device=device) for index in self._kept[b]]
        counts = plan.division.revised(self._layer)
        return [_best(row, n, plan.protected) for row, n in zip(self._scores[b], counts, strict=True)]

    def finish(self) -> None:
        """The whole prompt has been divided: nothing of it is cut any more."""
        self._scores = []


class ConstantLayer(EvictionLayer):
    """Evicts one token a step from a full head, so that its size stays.

    A head has one slot more than its capacity. A token that is evicted leaves its slot to the next one; text
    order is kept in a table of slots, so nothing of the keys and values ever moves. All on the device.
    """

    PLACE_BYTES = 4
    """Of a token's entry in the table of slots."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        self._future = self.reserve_tokens
        spare = [1 if p.capacity is None else p.capacity + 1 for p in self._plans]
        self.reserve_tokens = max(self.least_spare, min(self.reserve_tokens, max(spare)))
        super().prefill(q, k, v, valid)

    @property
    def least_spare(self) -> int:
        """Slots behind the prompt that every head has, however few tokens are expected."""
        return 1

    def finish(self) -> None:
        """Make the tables that steps work on, with room for all tokens that are expected."""
        counts = [len(index) for kept in self._kept for index in kept]
        plans = [plan for plan in self._plans for _ in self._kept[0]]
        capacities = [plan.capacity or count for plan, count in zip(plans, counts, strict=True)]
        device = self.store.keys.device
        self._counts, self._capacities, self._fed = counts, capacities, 0
        self._count_S = torch.tensor(counts, device=device)
        self._prompt_S = self._count_S.clone()
        self._capacity_S = torch.tensor(capacities, device=device)
        self._protected_S = torch.tensor([plan.protected for plan in plans], device=device)
        width = max(min(c + 1, n + 1 + self._future) for c, n in zip(capacities, counts, strict=True))
        self._order_SW = torch.arange(width, dtype=torch.int32, device=device).repeat(len(counts), 1)
        super().finish()

    def step(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Append, attend, and evict the worst token of each head that is full. Never synchronises."""
        self._make_room()
        heads = k.shape[1]
        real_S = None if valid is None else valid[:, 0].repeat_interleave(heads)
        slot_S = self._order_SW.gather(1, self._count_S.unsqueeze(1)).squeeze(1).long()
        self.store.put(slot_S, k.flatten(0, 1)[:, 0], v.flatten(0, 1)[:, 0], real_S)
        out, victim_S = self.attend(q)
        self._evict(victim_S, real_S)
        return out

    def attend(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and each head's place in text order [S] that goes if the head is full."""
        limits = self.store.lengths.long().unsqueeze(1)
        out, weights_slotsG = self.backend.decode_weighed(q, self.store.ragged(), limits)
        slot_SW = (self.store.first.unsqueeze(1) + self._order_SW).clamp_max(weights_slotsG.shape[0] - 1)
        alive_SW = self._places() <= self._count_S.unsqueeze(1)
        row_SGW = weights_slotsG[slot_SW].masked_fill_(~alive_SW.unsqueeze(-1), 0.0).transpose(1, 2)
        return out, self._worst(self.rate(row_SGW))

    def rate(self, row_SGW: Tensor) -> Tensor:
        """Scores [S, W] of the stored tokens in text order, from what the newest token attends to.

        The newest token is at place `self._count_S`; places behind it have weight 0.
        """
        raise NotImplementedError

    def _places(self) -> Tensor:
        return torch.arange(self._order_SW.shape[1], device=self._order_SW.device)

    def _worst(self, scores_SW: Tensor) -> Tensor:
        """The place with the lowest score before the protected last ones; the first if all are protected."""
        before_S = (self._count_S + 1 - self._protected_S).clamp_min(1).unsqueeze(1)
        return scores_SW.masked_fill(self._places() >= before_S, torch.inf).argmin(1)

    def _evict(self, victim_S: Tensor, real_S: Tensor | None) -> None:
        """Full heads: the victim's slot goes behind the newest token, where the next one looks for room."""
        full_S = self._count_S >= self._capacity_S
        grown_S = ~full_S
        if real_S is not None:
            full_S, grown_S = full_S & real_S, grown_S & real_S
        freed_S1 = self._order_SW.gather(1, victim_S.unsqueeze(1))
        order_SW = self._without(self._order_SW, victim_S).scatter(1, self._count_S.unsqueeze(1), freed_S1)
        self._order_SW.copy_(torch.where(full_S.unsqueeze(1), order_SW, self._order_SW))
        self.forget(victim_S, full_S, real_S)
        self._prompt_S -= (full_S & (victim_S < self._prompt_S)).long()
        self._count_S += grown_S.long()

    def forget(self, victim_S: Tensor, full_S: Tensor, real_S: Tensor | None) -> None:
        """Let go of what is remembered about the victims of full heads."""

    def _without(self, x_SW: Tensor, victim_S: Tensor) -> Tensor:
        """What is behind the victim moves up by one place."""
        places = self._places()
        source = (places + (places >= victim_S.unsqueeze(1))).clamp_max_(places.numel() - 1)
        return x_SW.gather(1, source)

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token: each evicts before the next one comes, exactly as in decoding."""
        return one_by_one(self, q, k, v, valid)

    def _make_room(self) -> None:
        """Room for one token more, until all heads have their full size; from then on nothing moves."""
        self._fed += 1
        bounds = [min(n + self._fed, c + 1) for n, c in zip(self._counts, self._capacities, strict=True)]
        self.store.grow(bounds)
        width = self._order_SW.shape[1]
        if max(bounds) > width:
            self.widen(max(max(bounds), width + width // 4) - width)

    def widen(self, places: int) -> None:
        """More places in the tables, for heads that are still growing."""
        width = self._order_SW.shape[1]
        fresh = torch.arange(width, width + places, dtype=torch.int32, device=self._order_SW.device)
        self._order_SW = torch.cat([self._order_SW, fresh.repeat(self._order_SW.shape[0], 1)], dim=1)

    def kept(self) -> list[list[Tensor]]:
        heads = len(self._kept[0])
        left, order = self._prompt_S.tolist(), self._order_SW.cpu().long()
        found = []
        for s, count in enumerate(left):
            positions = self._kept[s // heads][s % heads]
            found.append(positions[order[s, :count]])
        return [found[b * heads : (b + 1) * heads] for b in range(len(self._kept))]

    def nbytes(self) -> Bytes:
        """A full head's free slot waits to be overwritten: it is reserve, not payload."""
        total = super().nbytes()
        stale = int((self.store.lengths - self._count_S).sum()) * self.store.token_bytes
        tables = (self._order_SW, self._count_S, self._prompt_S, self._capacity_S, self._protected_S)
        total["device"]["payload"] -= stale
        total["device"]["reserved"] += stale
        total["device"]["metadata"] += sum(table.nbytes for table in tables)
        return total


def _best(scores_n: Tensor, count: int, protected: int) -> Tensor:
    """The `count` places to keep, ascending: the last `protected` of them, then the best before those.

    A head that may keep fewer than are protected keeps the latest.
    """
    places = scores_n.numel()
    sure = min(protected, count, places)
    best = top_positions(scores_n[: max(0, places - protected)], count - sure)
    return torch.cat([best, torch.arange(places - sure, places, device=best.device)])


def _with_protected(scores: Tensor, protected: int) -> Tensor:
    """A copy of scores [..., n] in which the last `protected` tokens can't lose."""
    ranked = scores.clone()
    ranked[..., max(0, scores.shape[-1] - protected) :] = torch.inf
    return ranked
