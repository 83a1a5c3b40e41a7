"""Methods that evict: tokens are scored, the best of each head stay, the rest is dropped for good.

An eviction method writes `score`; its budget is split by any allocation. One whose size stays constant while
decoding also says how the stored tokens are scored at every step. Knows stores and scores; no model.

Shapes: q [Hq, n, D], k and v [H, n, D], scores [H, n] of one sequence; S = B*H segments, G = Hq/H, W places
in text order.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hcache.allocation import Allocation, Division, Uniform, make_allocation
from hcache.budget import Budget
from hcache.cache.room import Room
from hcache.cache.state import Bytes, LayerState, StoreLayer, Turn, on_host, one_by_one, storage_bytes
from hcache.cache.store import RaggedStore
from hcache.geometry import Geometry
from hcache.kernels.fused import fused
from hcache.methods.base import Method, Usage
from hcache.role_weights import RoleWeights
from hcache.scoring import top_positions

if TYPE_CHECKING:
    from hcache.kernels.evict import Judging


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

    off_step = (*StoreLayer.off_step, "_scores", "_earlier")

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
        self.pending = not self._last
        self._scores: list[list[Tensor]] = []

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        super().prefill(q, k, v, valid)
        if self._last:
            for state in (*self._earlier, self):
                state.finish()
            self._earlier = []

    def new_store(self, lengths: list[int], like: Tensor) -> RaggedStore:
        if not self.pending:
            return super().new_store(lengths, like)
        # A room would remember sizes from before the cuts.
        return RaggedStore(lengths, like, self.reserve_tokens, Room(), self.backend.granule)

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
        if self.pending:
            self.store.settle(self.room)
            self.pending = False


class ConstantLayer(EvictionLayer):
    """Evicts one token a step from a full head, so that its size stays.

    A head has one slot more than its capacity, and a token that is evicted leaves its slot to the next one:
    nothing of the keys and values ever moves. All on the device.
    """

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
        """Make the tables that steps work on."""
        super().finish()
        self._counts = [len(index) for kept in self._kept for index in kept]
        plans = [plan for plan in self._plans for _ in self._kept[0]]
        self._capacities = [plan.capacity or n for plan, n in zip(plans, self._counts, strict=True)]
        self._fed = 0
        self._capacity_S = self._numbers(self._capacities)

    def _numbers(self, numbers: list[int]) -> Tensor:
        """One number a head, as steps read it."""
        return torch.tensor(numbers, dtype=torch.int32, device=self.store.keys.device)

    @property
    def count_S(self) -> Tensor:
        """Tokens of each head between two steps, int32."""
        return torch.minimum(self.store.lengths, self._capacity_S)

    def ready(self, even: bool) -> Turn:
        """Room for one token more, until all heads have their full size; from then on nothing moves."""
        self._fed += 1
        bounds = [min(n + self._fed, c + 1) for n, c in zip(self._counts, self._capacities, strict=True)]
        self.store.grow(bounds)
        return Turn((self.store.moves, self.tables_for(max(bounds))))

    def tables_for(self, tokens: int) -> int:
        """Make room for so many tokens of a head in tables, if there are any; returns their width."""
        return 0

    def extend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Token by token: each evicts before the next one comes, exactly as in decoding."""
        return one_by_one(self, q, k, v, valid)

    def nbytes(self) -> Bytes:
        """A full head's free slot waits to be overwritten: it is reserve, not payload."""
        total = super().nbytes()
        stale = int((self.store.lengths - self.count_S).sum()) * self.store.token_bytes
        total["device"]["payload"] -= stale
        total["device"]["reserved"] += stale
        total["device"]["metadata"] += storage_bytes(self._capacity_S)
        return total


class RankedLayer(ConstantLayer):
    """Evicts the worst token of a full head by scores that every step brings.

    Text order is kept in a table of slots. A subclass writes `rate`, and as `judging` the same for the
    kernels that do a step's work on a GPU.
    """

    PLACE_BYTES = 4
    """Of a token's entry in the table of slots."""

    def finish(self) -> None:
        super().finish()
        self._prompt_S = self._numbers(self._counts)
        self._protected_S = self._numbers([plan.protected for plan in self._plans for _ in self._kept[0]])
        sizes = zip(self._capacities, self._counts, strict=True)
        width = self.room.size("places", max(min(c + 1, n + 1 + self._future) for c, n in sizes))
        places = torch.arange(width, dtype=torch.int32, device=self._prompt_S.device)
        self._order_SW = places.repeat(len(self._counts), 1)

    def advance(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Append, attend, and evict the worst token of each head that is full. Never synchronises."""
        k_SD, v_SD = k.flatten(0, 1)[:, 0], v.flatten(0, 1)[:, 0]
        real_S = None if valid is None else valid[:, 0].repeat_interleave(k.shape[1])
        if fused(q):
            return self._advance_by_kernels(q, k_SD, v_SD, real_S)
        # The newest token's place; of heads without one, the free slot's.
        newest_S = self.count_S.long()
        slot_S = self._order_SW.gather(1, newest_S.unsqueeze(1)).squeeze(1).long()
        self.store.put(slot_S, k_SD, v_SD, real_S)
        out, row_SGW = self._attend(q, newest_S)
        scores_SW = self.rate(row_SGW, newest_S)
        self._evict(scores_SW, newest_S, real_S)
        return out

    def _advance_by_kernels(self, q: Tensor, k_SD: Tensor, v_SD: Tensor, real_S: Tensor | None) -> Tensor:
        """The same in three kernels beside those that attend."""
        from hcache.kernels.evict import evict, put

        store = self.store
        into = (store.keys, store.values, store.first, store.lengths, self._order_SW, self._capacity_S)
        put(k_SD, v_SD, *into, real_S)
        out, logits, totals_SG = self.backend.decode_scored(q, store.ragged(), store.lengths.unsqueeze(1))
        evict(
            logits, totals_SG, store.first, store.lengths, self._order_SW, self._capacity_S,
            self._protected_S, self._prompt_S, self.judging(totals_SG.shape[1]), self.received(), real_S,
        )  # fmt: skip
        return out

    def rate(self, row_SGW: Tensor, newest_S: Tensor) -> Tensor:
        """Scores [S, W] of the stored tokens in text order, from what the newest token attends to.

        Args:
            row_SGW: weights; 0 at places behind the newest token.
            newest_S: its place.
        """
        raise NotImplementedError

    def judging(self, group: int) -> Judging:
        """`rate` of heads that are shared by `group` query heads, as kernels know it."""
        raise NotImplementedError

    def received(self) -> Tensor | None:
        """Sums [S, W] over the steps so far, where scores are such sums."""
        return None

    def _attend(self, q: Tensor, newest_S: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the weights [S, G, W] in text order."""
        limits_S1 = self.store.lengths.unsqueeze(1)
        out, logits, totals_SG = self.backend.decode_scored(q, self.store.ragged(), limits_S1)
        # Heads that are still growing have more places than slots.
        slot_SW = (self.store.first.unsqueeze(1) + self._order_SW).clamp_max_(logits.shape[0] - 1)
        row_SWG = (logits[slot_SW] - totals_SG.unsqueeze(1)).exp_()
        behind_SW = self._places() > newest_S.unsqueeze(1)
        return out, row_SWG.masked_fill_(behind_SW.unsqueeze(-1), 0.0).transpose(1, 2)

    def _places(self) -> Tensor:
        return torch.arange(self._order_SW.shape[1], device=self._order_SW.device)

    def _evict(self, scores_SW: Tensor, newest_S: Tensor, real_S: Tensor | None) -> None:
        """Full heads: the victim's slot goes behind the newest token, where the next one looks for room.

        The victim has the lowest score before the protected last ones; it is the first if all are protected.
        """
        before_S1 = (newest_S + 1 - self._protected_S).clamp_min(1).unsqueeze(1)
        victim_S = scores_SW.masked_fill(self._places() >= before_S1, torch.inf).argmin(1)
        full_S = newest_S >= self._capacity_S
        full_S = full_S if real_S is None else full_S & real_S
        freed_S1 = self._order_SW.gather(1, victim_S.unsqueeze(1))
        order_SW = self.without(self._order_SW, victim_S).scatter(1, newest_S.unsqueeze(1), freed_S1)
        self._order_SW.copy_(torch.where(full_S.unsqueeze(1), order_SW, self._order_SW))
        self._prompt_S -= (full_S & (victim_S < self._prompt_S)).int()
        self.forget(scores_SW, victim_S, newest_S, full_S, real_S)

    def forget(
        self, scores_SW: Tensor, victim_S: Tensor, newest_S: Tensor, full_S: Tensor, real_S: Tensor | None
    ) -> None:
        """Let go of what is remembered about the victims of full heads."""

    def without(self, x_SW: Tensor, victim_S: Tensor) -> Tensor:
        """What is behind the victim moves up by one place."""
        places = self._places()
        source = (places + (places >= victim_S.unsqueeze(1))).clamp_max_(places.numel() - 1)
        return x_SW.gather(1, source)

    def tables_for(self, tokens: int) -> int:
        """Wider tables for heads that are still growing."""
        width = self._order_SW.shape[1]
        if tokens > width:
            self.widen(self.room.size("places", max(tokens, width + width // 4)) - width)
        return self._order_SW.shape[1]

    def widen(self, places: int) -> None:
        """More places in the tables."""
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
        """Places of stored tokens are metadata, those of others reserve."""
        total = super().nbytes()
        device, tokens = total["device"], int(self.count_S.sum())
        device["metadata"] += storage_bytes(self._prompt_S, self._protected_S)
        sums_SW = self.received()
        for table in (self._order_SW,) if sums_SW is None else (self._order_SW, sums_SW):
            used = tokens * table.element_size()
            device["metadata"] += used
            device["reserved"] += storage_bytes(table) - used
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
